# SPDX-License-Identifier: Apache-2.0
"""Chooses the runtime of a detector and loads it.

"auto" is ONNX Runtime for a folder that is only an export (`ovd.runtime.files`), for weights with an export beside them
where that is faster (a CPU without bfloat16 arithmetic, no GPU requested or found; docs/reports/runtime.md), and where
torch is not installed. Otherwise it is torch. It is never the export in 8 bits, "onnx-int8".

Exports of the shipped default are written on demand, without torch or photos (`ovd.runtime.assemble`).
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from ovd.runtime.cpu import computes_bfloat16, computes_int8
from ovd.runtime.files import find_export, find_int8_export, graphs_of, stale
from ovd.vocabulary import TEMPLATE_SETS
from ovd.weights import ModelCard, read_model_card
from pretrain.engine.errors import NEEDS_TORCH, UserError, ignore_old_torch_calls
from pretrain.engine.loading import fast_loading

if TYPE_CHECKING:
    from ovd.inference.region_model import RegionModel
    from ovd.modeling.export import DetectorCard
    from ovd.text import TextEncoder

log = logging.getLogger(__name__)

Runtime = Literal["auto", "onnx", "onnx-int8", "torch"]


class DetectorParts(NamedTuple):
    """What a `Detector` is made of.

    Attributes:
        model: finds regions.
        encoder: of words and crops.
        templates: prompts of the words.
        card: what is known of the weights.
        crop_refinement: as many regions as the scores were calibrated for.
    """

    model: RegionModel
    encoder: TextEncoder
    templates: tuple[str, ...]
    card: ModelCard
    crop_refinement: int = 0


class Networks(NamedTuple):
    """A detector's regions, and the encoder that they were trained against."""

    model: RegionModel
    encoder: TextEncoder


def load_trained(
    folder: Path, runtime: Runtime, *, device: str, threads: int | None, masks: bool, regions: int
) -> DetectorParts:
    """The parts of a detector as it was trained; see `load_networks`."""
    from ovd.modeling.export import read_card

    card = read_card(folder)
    with warnings.catch_warnings():
        ignore_old_torch_calls()
        networks = load_networks(
            folder, card, runtime=runtime, device=device, threads=threads, masks=masks, regions=regions
        )
    return DetectorParts(*networks, TEMPLATE_SETS[card.templates], read_model_card(folder), card.crop_refinement)


def load_networks(
    folder: Path,
    card: DetectorCard,
    *,
    runtime: Runtime = "auto",
    device: str = "auto",
    threads: int | None = None,
    masks: bool = True,
    regions: int = 150,
) -> Networks:
    """Load a detector's networks.

    Args:
        folder: exported detector, by ``ovd.train`` or `wordbox export`.
        card: its card.
        runtime: see the module.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: of a CPU; None: as many as the runtime takes by itself.
        masks: False finds boxes only.
        regions: kept per picture.

    Raises:
        UserError: the runtime cannot run these weights, with what to do.
    """
    if runtime not in get_args(Runtime):
        raise UserError(f"runtime {runtime!r} is unknown: auto, onnx, onnx-int8 or torch")
    export = export_for(folder, card, runtime=runtime, device=device)
    if export is not None:
        from ovd.runtime.regions import load_onnx

        return Networks(*load_onnx(export, card, threads=threads, top=regions))
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder}: holds an export for ONNX Runtime only; load it with runtime onnx on a CPU")
    if importlib.util.find_spec("torch") is None:
        if runtime == "torch" or device not in ("auto", "cpu"):
            option = "runtime torch" if runtime == "torch" else f"device {device}"
            raise UserError(f"{option} needs torch, which is not installed: {NEEDS_TORCH}")
        if card.arch == "fvlm":
            raise UserError(
                f"{folder}: torch is not installed, and no export for ONNX Runtime there; write one where torch is "
                f"({_export_command(folder)}), or install it: {NEEDS_TORCH}"
            )
        raise UserError(f"{folder} has no export for ONNX Runtime and needs torch: {NEEDS_TORCH}")
    return _load_torch(folder, card, device=device, threads=threads, masks=masks, regions=regions)


def export_for(folder: Path, card: DetectorCard, *, runtime: Runtime, device: str) -> Path | None:
    """The export to be run; None: torch runs the weights."""
    if runtime == "torch":
        return None
    export = find_export(folder)
    if runtime in ("onnx", "onnx-int8"):
        if card.arch != "fvlm":
            raise UserError(
                f"{folder.name} (model.arch {card.arch}) cannot be exported to ONNX, only detectors of photographs "
                f"(fvlm) can; use runtime torch, which needs: {NEEDS_TORCH}"
            )
        if device not in ("auto", "cpu"):
            raise UserError(f"runtime {runtime} runs on a CPU, not on {device}; use runtime torch")
        int8 = runtime == "onnx-int8"
        export = _export_of(folder, card, int8=int8)
        if export is None:
            raise UserError(
                f"{folder}: no export for ONNX Runtime{' in 8 bits' if int8 else ''}; write one: "
                f"{_export_command(folder, int8=int8)}{'' if graphs_of(folder).is_file() else ' (this needs torch)'}"
            )
        _require_fresh(folder, export, card)
        if int8 and computes_int8() is False:
            log.warning("this CPU has no instructions for products of 8 bits (VNNI): runtime onnx may be faster here")
        return export
    if device not in ("auto", "cpu") or card.arch != "fvlm":
        return None
    if export == folder:
        return export
    if importlib.util.find_spec("torch") is None:
        export = _export_of(folder, card, int8=False)
        if export is not None:
            _require_fresh(folder, export, card)
        return export
    if export is None:
        return None
    slower = computes_bfloat16() or (device == "auto" and shutil.which("nvidia-smi") is not None)
    return None if slower or stale(folder, export, card.finetuned) else export


def _require_fresh(folder: Path, export: Path, card: DetectorCard) -> None:
    """Refuse an export of other weights.

    Raises:
        UserError: they are not those beside it.
    """
    if stale(folder, export, card.finetuned):
        raise UserError(f"{export}: was exported from other weights than those beside it; export them again")


def _export_of(folder: Path, card: DetectorCard, *, int8: bool) -> Path | None:
    """The export in a detector's folder, else that of the archive beside it."""
    export = find_int8_export(folder) if int8 else find_export(folder)
    if export == folder or card.finetuned:
        return export
    from ovd.runtime.assemble import bundled_export

    return bundled_export(folder, int8=int8) or export


def _export_command(folder: Path, *, int8: bool = False) -> str:
    """The command that writes an export beside the weights."""
    return f"wordbox export --format onnx{' --int8' if int8 else ''} --weights {folder}"


def _load_torch(
    folder: Path, card: DetectorCard, *, device: str, threads: int | None, masks: bool, regions: int
) -> Networks:
    from ovd.inference.encoder import load_encoder_of
    from ovd.modeling.load import load_detector_model
    from pretrain.engine.distributed import pick_device

    with fast_loading():
        target = pick_device(device, threads=threads)
        encoder = load_encoder_of(folder, card).to(target)
        model = load_detector_model(folder, device=str(target), masks=masks, top=regions, encoder=encoder)
    return Networks(model, encoder)
