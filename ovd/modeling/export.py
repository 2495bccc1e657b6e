# SPDX-License-Identifier: Apache-2.0
"""Exported detectors of any kind: a folder with a card (``model.json``) and weights (``model.safetensors``).

The card is read without torch; only what touches tensors imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ovd.inference.scoring import Calibration
from ovd.vocabulary import TEMPLATE_SETS
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json, write_atomically
from pretrain.engine.stored import require_types, stored_section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ovd.config import ModelConfig
    from ovd.config_detr import DetrConfig
    from ovd.config_fvlm import FvlmConfig

FORMAT = 1
"""Version of ``model.json``."""


@dataclass(frozen=True, kw_only=True)
class FinetunedCard:
    """A branch of fine-tuned classes beside a detector of photographs (`ovd.modeling.fvlm.finetuned`).

    Attributes:
        names: of the classes, in the order of the branch's scores.
        file: of its tensors, below the detector's folder.
        sha256: of that file: cached results of other branches are not taken for this one's.
        side: longest side of a picture in the branch, pixels.
        nms: IoU above which the lesser of two boxes of a class goes.
        top: boxes of a picture.
        slope, offset: of the scores' sigmoid, see `ovd.inference.calibration.fit_platt`.
        config_hash: of the training configuration.
        metrics: what was measured on the photos that were held out of its training.
    """

    names: tuple[str, ...]
    file: str
    sha256: str
    side: int
    nms: float
    top: int
    slope: float = 1.0
    offset: float = 0.0
    config_hash: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


class HeadRecord(TypedDict, total=False):
    """Keys of ``model.head`` that are read without building the model; others are those of the architecture.

    Attributes:
        scale: inverse temperature.
        patches, patch_size: of UP-DETR's pretext, count and side in pixels.
    """

    scale: float
    patches: int
    patch_size: int


class ArchitectureRecord(TypedDict, total=False):
    """An architecture's configuration as plain values, with the keys that are read without building the model."""

    arch: str
    variant: str
    head: HeadRecord


def architecture_record(values: Mapping[str, object]) -> ArchitectureRecord:
    """The plain values of a validated configuration, as `DetectorCard.model`."""
    return cast(ArchitectureRecord, dict(values))


@dataclass(frozen=True, kw_only=True)
class DetectorCard:
    """Content of ``model.json``, beside the weights.

    Attributes:
        model: the architecture as plain values; `architecture` reads them.
        embed_dim: D.
        pixel_mean, pixel_std: RGB, 0…255.
        encoder: name or path of the encoder.
        encoder_fingerprint: its sha256; another encoder's texts would mean nothing here.
        short_side, long_side: input size the model was trained at, pixels.
        classes: training vocabulary, in the order of the classifier's rows.
        novel: indices of the classes that no label of training named.
        background_words: fixed competitors of every class; ``bank`` in the file.
        calibration: fields of :class:`Calibration`.
        config_hash: of the training configuration.
        templates: name of the prompts that the classes were embedded with.
        crop_refinement: regions of a picture that the image encoder embeds too, as the calibration was fitted
            (`ovd.inference.crop_refinement`); ``second_look`` in older files.
        finetuned: branches of classes that were added by fine-tuning, oldest first; ``own`` in the file.
    """

    model: ArchitectureRecord
    embed_dim: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    encoder: str
    encoder_fingerprint: str
    short_side: int
    long_side: int
    classes: tuple[str, ...]
    novel: tuple[int, ...]
    background_words: tuple[str, ...]
    calibration: dict[str, float]
    config_hash: str
    format: int = FORMAT
    templates: str = "sticker"  # cards that do not say are older than the choice
    crop_refinement: int = 0
    finetuned: tuple[FinetunedCard, ...] = ()

    @property
    def is_transformer(self) -> bool:
        """Whether `model` describes a detection transformer."""
        return self.arch in ("conditional", "detr")

    @property
    def arch(self) -> str:
        """``model.arch`` of the training configuration."""
        return str(self.model.get("arch", "mask_rcnn"))

    @property
    def architecture(self) -> ModelConfig | DetrConfig | FvlmConfig:
        """The configuration that the model was built from.

        Raises:
            UserError: the file has none that this version can read.
        """
        where = "model.json: model"
        from ovd.config import ModelConfig
        from ovd.config_detr import DetrConfig
        from ovd.config_fvlm import FvlmConfig

        if self.arch == "mask_rcnn":
            return stored_section(ModelConfig, self.model, where=where)
        if self.arch == "fvlm":
            return stored_section(FvlmConfig, self.model, where=where)
        without_head = {key: value for key, value in self.model.items() if key != "head"}
        return stored_section(DetrConfig, without_head, where=where)

    @property
    def trainable(self) -> Tensor:
        """(C,) bool: False for the classes that no label of training named."""
        import torch

        trainable = torch.ones(len(self.classes), dtype=torch.bool)
        trainable[list(self.novel)] = False
        return trainable


LARGEST_INPUT = 16_384
"""Pixels of a side to which a network's pictures are resized; more fills the memory of any machine."""
SHARES = ("threshold", "example_threshold", "text_weight", "head_weight", "open_conse", "open_fallback")
"""Values of the calibration that lie between 0 and 1."""
FILE_KEYS = {"background_words": "bank", "finetuned": "own"}
"""Fields of `DetectorCard` → their keys in ``model.json``, where these differ."""


def save_detector(
    folder: Path, model: nn.Module, card: DetectorCard, *, background_words: Tensor, half: bool = True
) -> None:
    """Write ``model.safetensors`` and ``model.json``; floats as fp16 when ``half``."""
    from pretrain.engine.checkpoint import save_weights

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v.detach().cpu() for k, v in model.state_dict().items()}
    tensors["bank"] = background_words.cpu()
    if half:
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_weights(folder / "model.safetensors", {k: v.contiguous() for k, v in tensors.items()}, {"format": str(FORMAT)})
    write_card(folder, card)


def write_card(folder: Path, card: DetectorCard) -> None:
    """Write ``model.json``; what a card has nothing of is left out."""
    content = {FILE_KEYS.get(key, key): value for key, value in asdict(card).items()}
    if not card.finetuned:
        del content["own"]
    write_atomically(folder / "model.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_card(folder: Path) -> DetectorCard:
    """The card of an exported detector.

    Raises:
        UserError: no detector there, or a card this version cannot read.
    """
    path = folder / "model.json"
    hint = "a detector is a folder with model.json and model.safetensors, as ovd.train exports it"
    raw = read_json(path, hint=hint)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path}: not a detector card of format {FORMAT}; export the model again with this version")
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        if "second_look" in values:  # the field's former name
            values.setdefault("crop_refinement", values.pop("second_look"))
        for name, key in FILE_KEYS.items():
            if key in values:
                values[name] = values.pop(key)
        branches = values.get("finetuned", ())
        values["finetuned"] = tuple(_branch(branch) for branch in branches)
        require_types(DetectorCard, values)
        card = DetectorCard(**values)
        _require_sense(card)
        return card
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing; export the model again with this version") from error
    except TypeError as error:
        raise UserError(f"{path}: {error}; export the model again with this version") from error


def _branch(record: dict[str, Any]) -> FinetunedCard:
    values = {**record, "names": tuple(record["names"])}
    require_types(FinetunedCard, values)
    return FinetunedCard(**values)


def _require_sense(card: DetectorCard) -> None:
    """Refuse values that have the right type and no meaning.

    Raises:
        TypeError: the first of them.
    """
    unknown = set(card.calibration) - {field.name for field in fields(Calibration)}
    shares = {key: card.calibration[key] for key in SHARES if key in card.calibration}
    wrong = {
        "embed_dim": card.embed_dim < 1,
        "short_side": not 0 < card.short_side <= card.long_side <= LARGEST_INPUT,
        "pixel_mean": len(card.pixel_mean) != 3,
        "pixel_std": len(card.pixel_std) != 3 or min(card.pixel_std) <= 0,
        "novel": not all(0 <= index < len(card.classes) for index in card.novel),
        "templates": card.templates not in TEMPLATE_SETS,
        "crop_refinement": card.crop_refinement < 0,
        f"calibration.{min(unknown, default='')}": bool(unknown),
        **{f"calibration.{key}": not 0 <= value <= 1 for key, value in shares.items()},
        "own": any(
            not 1 <= branch.side <= LARGEST_INPUT or branch.top < 1 or not 0 <= branch.nms <= 1
            for branch in card.finetuned
        ),
    }
    if found := next((key for key, is_wrong in wrong.items() if is_wrong), None):
        raise TypeError(f"{found} has no meaning here")


def exported_tensors(folder: Path, card: DetectorCard) -> tuple[dict[str, Tensor], Tensor]:
    """(state dict, (B, D) embeddings of the background words) of an exported detector, in full precision.

    Raises:
        UserError: there are other background words than on the card: each would compete under another's name.
    """
    from pretrain.engine.checkpoint import load_weights

    tensors, _ = load_weights(folder / "model.safetensors")
    bank, expected = tensors.get("bank"), (len(card.background_words), card.embed_dim)
    if bank is None or tuple(bank.shape) != expected or not bank.is_floating_point():
        found = "none" if bank is None else f"{list(bank.shape)} of {bank.dtype}"
        raise UserError(
            f"{folder / 'model.safetensors'}: bank must hold the embeddings of model.json's background words, "
            f"{list(expected)} numbers; holds {found}. Export it again"
        )
    state = {
        k.removeprefix("model."): v.float() if v.is_floating_point() else v
        for k, v in tensors.items()
        if k.startswith("model.")
    }
    return state, tensors["bank"].float()


def load_exported(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Load an exported state dict whole.

    Raises:
        UserError: it does not fit the card that the model was built from.
    """
    from pretrain.engine.state import load_tensors

    hint = "Its model.json describes another model; export it again"
    load_tensors(model, state, source=folder / "model.safetensors", hint=hint)
