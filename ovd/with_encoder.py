# SPDX-License-Identifier: Apache-2.0
"""``Detector.load(weights, encoder=…)``: the boxes of trained weights, named by another image-text encoder.

    detector = Detector.load("default", encoder="open_clip:ViT-B-32:laion2b_s34b_b79k")

What is kept for the user (embeddings of the background words, fitted calibrations) is in `ovd.user_files`.
``python -m ovd.with_encoder SPEC`` fetches an encoder and loads nothing.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.data.splits import COCO_NAMES
from ovd.inference.arrays import Floats
from ovd.inference.crop_classifier import (
    CROPS,
    CropClassifier,
    DetectorBoxes,
    PhotoBoxes,
    ProposedBoxes,
    RegionSource,
    uncalibrated_notice,
)
from ovd.inference.known_words import WordList
from ovd.inference.scoring import Calibration
from ovd.runtime.choice import DetectorParts, Runtime
from ovd.text import embed_vocabulary
from ovd.user_files import StoredCalibration, read_calibration, text_cache
from ovd.vocabulary import TEMPLATE_SETS, Vocabulary
from ovd.weights import ModelCard, read_model_card
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.distributed import pick_device
from pretrain.engine.errors import UserError, run_cli, warn
from pretrain.engine.loading import fast_loading

if TYPE_CHECKING:
    from ovd.modeling.export import DetectorCard
    from pretrain.nets.towers import JointEncoder

SHIPPED_TEMPLATES = {"clip-photo": "photo", "clip-sticker": "sticker"}
"""Prompts that the shipped encoders were trained with; any other encoder gets CLIP's (`TEMPLATE_SETS["clip"]`)."""

UNFITTED = Calibration(head_weight=0.2, open_objectness=0.5, open_area=0.0, threshold=0.25)
"""Before anything is fitted; the inverse temperature is the encoder's own."""


def refuse_options(runtime: Runtime, crop_refinement: int | None) -> None:
    """Refuse options that do not work with another encoder.

    Raises:
        UserError: naming the option.
    """
    if crop_refinement:
        raise UserError("with an encoder of your own all regions are cropped: leave crop_refinement out")
    if runtime in ("onnx", "onnx-int8"):
        raise UserError(f"an encoder of your own runs with torch: leave runtime {runtime} out")


def load_with_encoder(
    folder: Path,
    spec: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    masks: bool = True,
    regions: int | None = None,
) -> DetectorParts:
    """The boxes of an exported detector, named by an encoder.

    Args:
        folder: of the detector, or of a proposal network.
        spec: ``open_clip:MODEL:WEIGHTS`` or whatever `ovd.training.inputs.resolve_encoder` takes.
        device: "auto", "cpu", "cuda" or "cuda:N", where both run.
        threads: of a CPU; None: as many as torch takes by itself.
        masks: False leaves a mask head out.
        regions: cropped and embedded per picture, best objectness first; None: `CROPS`.

    Raises:
        UserError: no such detector or encoder, or an encoder without an image or a text tower.
    """
    from ovd.modeling.proposals.build import PROPOSAL_WORDS
    from ovd.training.inputs import resolve_encoder

    where = pick_device(device, threads=threads)
    top = CROPS if regions is None else regions
    with fast_loading():
        source, card = region_source(folder, device=str(where), masks=masks, top=top)
        encoder = resolve_encoder(spec).to(where)
    if encoder.visual is None or encoder.text is None:
        raise UserError(f"--encoder {spec}: names need both an image and a text tower")
    templates = TEMPLATE_SETS[SHIPPED_TEMPLATES.get(Path(spec).name, "clip")]
    lexicon = read_lexicon()
    words = tuple(COCO_NAMES.values()) if card is None or not card.background_words else card.background_words
    stored, scale = read_calibration(folder, encoder), math.exp(float(encoder.logit_scale.detach()))
    scores_words = isinstance(source, PhotoBoxes) and source.word_scores
    model = CropClassifier(
        source=source,
        encoder=encoder,
        name=spec,
        background_words=_embed_words(words, templates, encoder, spec),
        words=WordList(words=words, lexicon=lexicon),
        proposal_words=WordList(words=PROPOSAL_WORDS if scores_words else (), lexicon=lexicon),
        calibration=Calibration(**stored.calibration) if stored else replace(UNFITTED, open_scale=scale),
        calibrated=stored is not None,
        card=card,
    )
    return DetectorParts(model, encoder, templates, _card(folder, spec, encoder.fingerprint(), stored))


def fetch(spec: str) -> None:
    """Download an encoder unless it is cached or a local file or folder.

    Raises:
        UserError: no such model, or it cannot be fetched.
    """
    if spec.startswith("open_clip:"):
        from pretrain.nets.clip_files import find_open_clip, tokenizer_of

        settings, path = find_open_clip(spec.removeprefix("open_clip:"))
        tokenizer_of(settings["model"].get("text_cfg", {}), name=settings["name"], folder=path.parent)


def fetch_elsewhere(spec: str) -> int:
    """`fetch` in a process of its own, so that this one can stay without a network; returns its exit status."""
    return subprocess.run([sys.executable, "-m", "ovd.with_encoder", spec], check=False).returncode


def main(argv: list[str]) -> int:
    """Fetch the encoder that is named; returns the exit status."""
    if len(argv) != 1:
        raise UserError("usage: python -m ovd.with_encoder open_clip:MODEL:TAG")
    fetch(argv[0])
    return 0


def region_source(folder: Path, *, device: str, masks: bool, top: int) -> tuple[RegionSource, DetectorCard | None]:
    """The source of boxes in an exported folder, and its card where it is a detector's.

    Raises:
        UserError: nothing there that boxes pictures.
    """
    from ovd.config_fvlm import FvlmConfig
    from ovd.modeling.export import read_card
    from ovd.modeling.fvlm.network import PROPOSALS, proposal_words
    from ovd.modeling.load import load_detector_model, load_proposer
    from ovd.modeling.proposals.build import has_proposals, load_proposals

    if has_proposals(folder):
        return PhotoBoxes(proposer=load_proposals(folder, device=device), top=top), None
    card = read_card(folder)
    if isinstance(config := card.architecture, FvlmConfig):
        scores_words = bool(proposal_words(config))
        if card.finetuned:
            names = ", ".join(name for branch in card.finetuned for name in branch.names)
            warn(f"what {folder} learned of {names} is not used: the encoder names them")
        return PhotoBoxes(
            proposer=load_proposals(folder / PROPOSALS, device=device), top=top, word_scores=scores_words
        ), card
    if card.model.get("variant") in ("agnostic", "closed"):
        return ProposedBoxes(proposer=load_proposer(folder, device=device), top=top), card
    return DetectorBoxes(model=load_detector_model(folder, device=device, masks=masks, top=top)), card


def _embed_words(words: Sequence[str], templates: Sequence[str], encoder: JointEncoder, spec: str) -> Floats:
    """(B, D) unit rows of the background words, kept for the next time where the user's cache can be written."""
    vocabulary = Vocabulary.of(words, templates=templates)
    cache = text_cache()
    cached = cache is not None and (cache / f"{vocabulary.hash}-{encoder.fingerprint()[:16]}.safetensors").is_file()
    if not cached:
        print(f"{spec}: embedding {len(words):,} background words, once ({cache or 'not kept'})", file=sys.stderr)
    return embed_vocabulary(vocabulary, encoder, cache_dir=cache)


def _card(folder: Path, spec: str, fingerprint: str, stored: StoredCalibration | None) -> ModelCard:
    """The weights' card, without figures that were measured with their own encoder."""
    card = read_model_card(folder)
    card.pop("metrics", None)
    scores = (
        uncalibrated_notice(spec) if stored is None else f"scores fitted on {stored.data}, {stored.scenes} pictures"
    )
    name = card.get("name", folder.name)
    card["purpose"] = f"Boxes of {name}, named by {spec}: {scores}."
    card["text"] = "\n\n".join(
        [f"**{card['purpose']}** What follows is about {name} as it is shipped.", str(card.get("text", ""))]
    )
    fitted = "uncalibrated" if stored is None else sorted(stored.calibration.items())
    card["settings"] = f"{card.get('settings', '')} {spec} {fingerprint[:16]} {fitted}"
    return {**card, "name": f"{name} + {spec}", "encoder": spec, "calibrated": stored is not None}


if __name__ == "__main__":
    run_cli(main)
