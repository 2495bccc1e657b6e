# SPDX-License-Identifier: Apache-2.0
"""The folder that `wordbox export --format onnx` writes: ``runtime.json`` beside the graphs.

    runtime.json            `RuntimeCard`
    model.json, card.*      as in the folder that was exported
    proposals.onnx          pixels (1, 3, H, W) -> words (1, A, K), sides (1, A, 4, bins)
    tower.onnx              pixels (N, 3, H, W) -> fine, coarse, last: maps; row (N, D): the picture's embedding
    regions.onnx            the three maps, boxes and around (R, 4), known (R, K) -> embedding, bias, image; where the
                            detector has it, also the picture's size (2,) -> quality
    conse.onnx              pixels (1, 3, H, W), boxes (R, 4) -> row (R, D); where the detector has it
    text.onnx               tokens (N, T) -> row (N, D)
    classes-NN.onnx         for each branch of fine-tuned classes: pixels -> words (1, A, classes), sides
    background_words.npy    (B, D) float16
    merges.txt              of the tokenizer, best first

H and W are multiples of 32, A cells, K words of the proposal network, D joint embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json, sha256_of, write_atomically
from pretrain.engine.stored import require_types

if TYPE_CHECKING:
    from ovd.modeling.export import FinetunedCard

FORMAT = "wordbox-onnx/1"
CARD = "runtime.json"
EXPORT_FOLDER, INT8_FOLDER = "onnx", "onnx-int8"
"""Folders of exports in the folder of the weights that they were made of, in single precision and in 8 bits.

In an installed wheel the weights' folder is an export itself, and the second holds only the files that differ.
"""
PROPOSALS, TOWER, REGIONS, TEXT = "proposals.onnx", "tower.onnx", "regions.onnx", "text.onnx"
CONSE = "conse.onnx"
REGION_OUTPUTS, QUALITY = ("embedding", "bias", "image"), "quality"
BACKGROUND, MERGES = "background_words.npy", "merges.txt"
COPIED = ("model.json", "card.json", "card.md")
"""Files that an export has from the folder of its weights."""
SOURCES = (
    "model.safetensors",
    "proposals/model.safetensors",
    "proposals/model.json",
    "conse.safetensors",
    "quality.safetensors",
)
"""Files of a detector of photographs that its export is made of, beside its encoder and branches."""


@dataclass(frozen=True, kw_only=True)
class RuntimeCard:
    """Content of ``runtime.json``.

    Attributes:
        sources: sha256 of each file of `sources_of`.
        encoder_fingerprint: of the encoder.
        embed_dim: D.
        image_size: side of the crops that the encoder embeds; 0: it knows texts only.
        image_mean, image_std: of the encoder's and the tower's pixels, RGB, 0…1.
        context_length: T.
        side: longest side of a picture in the tower, pixels.
        context: factor on the box in which the last map is pooled once more.
        scale: inverse temperature of the region head.
        words: of the proposal network; empty where the head does not read its scores.
        proposal_sides: longest sides of a picture in the proposal network, pixels.
        proposal_mean, proposal_std: of its pixels, RGB, 0…255.
        strides: of its levels, pixels.
        conse_side: longest side of a picture in ConSE's network, pixels; 0: there is none.
        conse_mean, conse_std: of its pixels, RGB, 0…1.
        quality: whether the detector has localisation quality.
        nms, pre_nms, post_nms: see `ovd.modeling.proposals.network.DenseProposals`.
        precision: of the convolutions: "float32", or "int8" (`ovd.runtime.quantise`).
        ranges: where precision is int8, a description of the photos that the ranges were measured on.
    """

    sources: dict[str, str]
    encoder_fingerprint: str
    embed_dim: int
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    context_length: int
    side: int
    context: float
    scale: float
    words: tuple[str, ...]
    proposal_sides: tuple[int, ...]
    proposal_mean: tuple[float, float, float]
    proposal_std: tuple[float, float, float]
    strides: tuple[int, ...]
    nms: float
    pre_nms: int
    post_nms: int
    conse_side: int = 0
    conse_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    conse_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    quality: bool = False
    precision: str = "float32"
    ranges: str = ""
    format: str = FORMAT


def write_runtime_card(folder: Path, card: RuntimeCard) -> None:
    """Write ``runtime.json``."""
    write_atomically(folder / CARD, (json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n").encode())


def read_runtime_card(folder: Path) -> RuntimeCard:
    """The card of an export.

    Raises:
        UserError: none there, or one that this version cannot read.
    """
    path = folder / CARD
    raw = read_json(path, hint="`wordbox export --format onnx` writes it")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path}: not of format {FORMAT}; export the weights again with this version")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    try:
        require_types(RuntimeCard, values)
        return RuntimeCard(**values)
    except TypeError as error:
        raise UserError(f"{path}: {error}; export the weights again with this version") from error


def branch_graph(card: FinetunedCard) -> str:
    """Name of the graph of a branch of fine-tuned classes."""
    return f"classes-{Path(card.file).stem}.onnx"


def sources_of(folder: Path, finetuned: Sequence[FinetunedCard]) -> dict[str, str]:
    """sha256 of the files that an export is made of; ``finetuned``: the branches on the detector's card."""
    names = (*SOURCES, *(card.file for card in finetuned))
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}


def graphs_of(folder: Path) -> Path:
    """The archive of graphs without weights beside a detector's folder, there or not (`ovd.runtime.assemble`)."""
    return folder.with_name(f"{folder.name}-graphs.zip")


def find_export(folder: Path) -> Path | None:
    """The export of a detector's folder: the folder itself, or the one that it holds; None: there is none."""
    return next((candidate for candidate in (folder, folder / EXPORT_FOLDER) if (candidate / CARD).is_file()), None)


def find_int8_export(folder: Path) -> Path | None:
    """The same in 8 bits."""
    if (folder / CARD).is_file() and read_runtime_card(folder).precision == "int8":
        return folder
    inner = folder / INT8_FOLDER
    return inner if (inner / CARD).is_file() else None


def export_file(export: Path, name: str) -> Path:
    """A file of an export; see `INT8_FOLDER`."""
    outer = export.parent / name
    return outer if export.name == INT8_FOLDER and not (export / name).exists() and outer.is_file() else export / name


def stale(folder: Path, export: Path, finetuned: Sequence[FinetunedCard]) -> bool:
    """Whether an export was made of other weights, or other branches, than those beside it."""
    if export == folder:
        return False
    is_wheel = (folder / CARD).is_file()  # of a wheel
    sources = read_runtime_card(folder).sources if is_wheel else sources_of(folder, finetuned)
    return read_runtime_card(export).sources != sources
