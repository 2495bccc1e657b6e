# SPDX-License-Identifier: Apache-2.0
"""Writing a detector of photographs as ONNX files (needs torch and the package onnx).

Weights are stored in half precision where nothing is lost by it (the shipped ones are), and widened when a graph is
loaded. Words stay free: scoring is a matrix product outside of the graphs.
"""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ovd.modeling.export import DetectorCard, FinetunedCard, read_card
from ovd.modeling.fvlm.finetuned import load_finetuned
from ovd.modeling.fvlm.head import WORD_EPS
from ovd.modeling.fvlm.network import PROPOSALS as PROPOSALS_FOLDER
from ovd.modeling.fvlm.network import load_fvlm
from ovd.modeling.fvlm.quality import geometry
from ovd.modeling.fvlm.tower import COARSE, FINE
from ovd.modeling.proposals.architecture import PIXEL_MEAN, PIXEL_STD
from ovd.modeling.proposals.build import PROPOSAL_WORDS
from ovd.modeling.proposals.build import read_card as read_proposal_card
from ovd.modeling.proposals.cells import gather
from ovd.runtime.files import (
    BACKGROUND,
    CONSE,
    COPIED,
    MERGES,
    PROPOSALS,
    QUALITY,
    REGION_OUTPUTS,
    REGIONS,
    TEXT,
    TOWER,
    RuntimeCard,
    branch_graph,
    sources_of,
    write_runtime_card,
)
from ovd.runtime.halve import halve
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError
from pretrain.engine.files import whole_folder
from pretrain.nets.imagenet import PIXEL_MEAN as CONSE_MEAN
from pretrain.nets.imagenet import PIXEL_STD as CONSE_STD
from pretrain.nets.timm_tower import TimmImage
from pretrain.nets.towers import CbowText, JointEncoder

if TYPE_CHECKING:
    from ovd.modeling.fvlm.network import FvlmDetector

OPSET = 17


class _Cells(nn.Module):
    """(1, 3, H, W) to the logits of words and sides, by the parts of a dense detector."""

    def __init__(self, trunk: nn.Module, heads: nn.ModuleList) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        cells = gather(self.heads, self.trunk(pixels))
        return cells.words, cells.sides


class _Tower(nn.Module):
    """(N, 3, H, W) to three maps and the encoder's embedding of the whole picture."""

    def __init__(self, detector: FvlmDetector) -> None:
        super().__init__()
        tower = detector.tower
        self.stem, self.stages, self.top, self.proj = tower.stem, tower.stages, tower.top, tower.proj
        self.fine_stage = tower.fine_stage

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = fine = self.stem(pixels)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            fine = x if number == self.fine_stage else fine
        last = self.top(x)
        return fine, x, last, self.proj(last.mean((2, 3)))


class _Regions(nn.Module):
    """Maps, boxes and scores of the proposal network's words to the outputs of the heads."""

    def __init__(self, detector: FvlmDetector) -> None:
        super().__init__()
        self.head, self.proj, self.pool = detector.head, detector.tower.proj, detector.tower.pool
        self.width = detector.tower.width
        self.image_head, self.quality = detector.image_head, detector.quality

    def forward(
        self, fine: Tensor, coarse: Tensor, last: Tensor, boxes: Tensor, around: Tensor, words: Tensor, size: Tensor
    ) -> tuple[Tensor, ...]:
        width = self.width
        read = [(fine, boxes, self.pool, FINE, 2), (coarse, boxes, self.pool, COARSE, 2),
                (last, boxes, 1, COARSE, 0), (last, around, 1, COARSE, 0)]  # fmt: skip
        features = torch.cat(
            [
                roi_align(values, [where], side, 1 / stride, sampling_ratio=samples, aligned=True).flatten(1)
                for values, where, side, stride, samples in read
            ],
            dim=1,
        )
        inputs = [features]
        if self.head.words:
            probability = words.clamp(WORD_EPS, 1 - WORD_EPS)
            inputs.append(torch.log(probability / (1 - probability)))
        hidden = self.head.layers(self.head.norm(torch.cat(inputs, dim=1)))
        image = F.normalize(self.proj(features[:, -2 * width : -width]), dim=1)
        if self.image_head is not None:
            image = self.image_head(features, image)
        outputs = F.normalize(self.head.projection(hidden), dim=1), self.head.bias(hidden)[:, 0], image
        if self.quality is None:
            return outputs
        return *outputs, self.quality(features, geometry(boxes, size)).sigmoid()


class _BagOfWords(nn.Module):
    """`CbowText` without the shortcut that depends on the longest text of a batch."""

    def __init__(self, text: CbowText) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor) -> Tensor:
        from pretrain.nets.towers import START

        counted = ((tokens != 0) & (tokens < START)).unsqueeze(-1).float()
        total = (self.text.token_embedding(tokens) * counted).sum(1)
        bag = self.text.norm(total / counted.sum(1).clamp(min=1))
        return self.text.proj(F.gelu(self.text.hidden(bag))) + self.text.skip(bag)


def export_onnx(
    source: Path,
    encoder: JointEncoder,
    target: Path,
    *,
    photos: Sequence[NDArray[np.uint8]] = (),
    photos_are: str = "",
) -> None:
    """Write the export of a detector's folder; `ovd.runtime.files` says what is in it.

    Args:
        source: exported detector with ``model.arch: fvlm``.
        encoder: its encoder.
        target: is made, and replaced where it is an export.
        photos: (H, W, 3) RGB; where there are any, convolutions are quantised for them (`ovd.runtime.quantise`).
        photos_are: what they are, for the card.

    Raises:
        UserError: networks of which this knows no export.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as problem:
        raise UserError("export --format onnx needs the package onnx: pip install onnx") from problem
    card = read_card(source)
    detector, background = load_fvlm(source, card, encoder, precision=torch.float32)
    if detector.proposer.model.proposal_generator.ranking != "words":
        raise UserError(f"{source}: only proposals that are ranked by words can be exported to ONNX")
    if not isinstance(encoder.visual, TimmImage):
        raise UserError(f"{source}: only encoders with an image tower of timm can be exported to ONNX")
    with whole_folder(target) as folder:
        _write_graphs(detector, encoder, folder)
        _write_branches(source, card.finetuned, folder)
        np.save(folder / BACKGROUND, background.numpy().astype(np.float16))
        (folder / MERGES).write_text("\n".join(_merges()) + "\n", encoding="utf-8")
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        runtime = _runtime_card(source, card, detector, encoder)
        if photos:
            from ovd.runtime.quantise import quantise

            runtime = replace(runtime, precision="int8", ranges=photos_are)
            quantise(folder, runtime, card.finetuned, photos)
        write_runtime_card(folder, runtime)


def _runtime_card(source: Path, card: DetectorCard, detector: FvlmDetector, encoder: JointEncoder) -> RuntimeCard:
    """The card of an export in single precision."""
    proposals, generator = read_proposal_card(source / PROPOSALS_FOLDER), detector.proposer.model.proposal_generator
    return RuntimeCard(
        sources=sources_of(source, card.finetuned),
        encoder_fingerprint=encoder.fingerprint(),
        embed_dim=encoder.embed_dim,
        image_size=encoder.image_size,
        image_mean=encoder.image_mean,
        image_std=encoder.image_std,
        context_length=encoder.token_ids([""]).shape[1],
        side=detector.tower.side,
        context=detector.tower.context,
        scale=float(detector.head.scale.detach()),
        words=PROPOSAL_WORDS if detector.reads_words else (),
        proposal_sides=proposals.sides,
        proposal_mean=PIXEL_MEAN,
        proposal_std=PIXEL_STD,
        strides=generator.architecture.strides,
        nms=generator.nms,
        pre_nms=generator.pre_nms,
        post_nms=generator.post_nms,
        conse_side=0 if detector.conse is None else detector.conse.side,
        conse_mean=(CONSE_MEAN,) * 3,
        conse_std=(CONSE_STD,) * 3,
        quality=detector.quality is not None,
    )


def _write_graphs(detector: FvlmDetector, encoder: JointEncoder, folder: Path) -> None:
    if isinstance(encoder.text, CbowText):
        text: nn.Module = _BagOfWords(encoder.text)
    elif encoder.text is not None:
        text = encoder.text
    else:
        raise UserError("this encoder has no text tower")
    tower = _Tower(detector).eval()
    pixels = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        fine, coarse, last, _ = tower(pixels)
    boxes = torch.tensor([[8.0, 8.0, 60.0, 70.0], [30.0, 20.0, 120.0, 90.0]])
    words = torch.rand(2, len(PROPOSAL_WORDS) if detector.reads_words else 0)
    height_width = {2: "h", 3: "w"}
    proposals = detector.proposer.model
    cells = _Cells(proposals.backbone.trunk, proposals.proposal_generator.heads)
    _write_cells(folder / PROPOSALS, cells)
    _write(folder / TOWER, tower, {"pixels": pixels}, ["fine", "coarse", "last", "row"], {
        "pixels": {0: "n", **height_width}, "fine": {0: "n", 2: "fh", 3: "fw"}, "coarse": {0: "n", 2: "ch", 3: "cw"},
        "last": {0: "n", 2: "ch", 3: "cw"}, "row": {0: "n"},
    })  # fmt: skip
    size = torch.tensor([96.0, 128.0])
    read = {"fine": fine, "coarse": coarse, "last": last, "boxes": boxes, "around": boxes, "known": words, "size": size}
    outputs = [*REGION_OUTPUTS, *([QUALITY] if detector.quality is not None else [])]
    _write(folder / REGIONS, _Regions(detector), read, outputs, {
        "fine": {2: "fh", 3: "fw"}, "coarse": {2: "ch", 3: "cw"}, "last": {2: "ch", 3: "cw"}, "boxes": {0: "r"},
        "around": {0: "r"}, "known": {0: "r"}, **{name: {0: "r"} for name in outputs},
    })  # fmt: skip
    if detector.conse is not None:
        _write(folder / CONSE, detector.conse, {"pixels": pixels, "boxes": boxes}, ["row"], {
            "pixels": {2: "h", 3: "w"}, "boxes": {0: "r"}, "row": {0: "r"},
        })  # fmt: skip
    tokens = torch.from_numpy(encoder.token_ids(["a photo of a dog", "cat"]))
    _write(folder / TEXT, text, {"tokens": tokens}, ["row"], {"tokens": {0: "n"}, "row": {0: "n"}})


def _write_branches(source: Path, cards: Sequence[FinetunedCard], folder: Path) -> None:
    finetuned = load_finetuned(source, cards, lexicon=read_lexicon(), precision=torch.float32)
    for branch in () if finetuned is None else finetuned.branches:
        network = branch.network
        _write_cells(folder / branch_graph(branch.card), _Cells(network.trunk, network.heads))


def _write_cells(file: Path, cells: nn.Module) -> None:
    free = {"pixels": {2: "h", 3: "w"}, "words": {1: "cells"}, "sides": {1: "cells"}}
    _write(file, cells, {"pixels": torch.rand(1, 3, 96, 128)}, ["words", "sides"], free)


def _write(
    file: Path,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: list[str],
    free: Mapping[str, Mapping[int, str]],
) -> None:
    """Trace a module and write its graph; ``free`` names the sizes that may change."""
    import onnx

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tracing exporter's age, and sizes that the trace holds fixed
        torch.onnx.export(
            module.eval().to(memory_format=torch.contiguous_format),
            tuple(inputs.values()),
            buffer,  # type: ignore[arg-type]
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes={name: dict(axes) for name, axes in free.items()},
            opset_version=OPSET,
            # Batch norms stay as they are, so that their convolutions keep the stored weights; the runtime folds them.
            training=torch.onnx.TrainingMode.PRESERVE,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    halve(model.graph)
    onnx.checker.check_model(model, full_check=True)
    file.write_bytes(model.SerializeToString())


def _merges() -> list[str]:
    """CLIP's merges, best first, as open_clip ships them."""
    import gzip
    from importlib import resources

    from pretrain.nets.towers import VOCABULARY

    packed = (resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    return lines[1 : VOCABULARY - 512 - 2 + 1]  # after the heading; 256 bytes and the same at a word's end, two marks
