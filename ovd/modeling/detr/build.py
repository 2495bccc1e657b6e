# SPDX-License-Identifier: Apache-2.0
"""Assembling, starting, saving and loading detection transformers, and the region model that page and commands use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from ovd.config_detr import DetrConfig
from ovd.inference.scoring import Calibration, RegionSet
from ovd.modeling.backbone import build_bottom_up, to_detectron2
from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.detr.matcher import groups_of, to_corners
from ovd.modeling.detr.network import Detr, Memory
from ovd.modeling.export import DetectorCard, exported_tensors, load_exported, read_card
from ovd.modeling.region_head import last_stage_head
from ovd.modeling.vild.build import RegionModel
from ovd.regions.crops import crop_regions
from pretrain.engine.errors import UserError
from pretrain.engine.files import EXPORTED
from pretrain.engine.state import LoadReport, load_tensors
from pretrain.nets.checkpoints import read_tensors

if TYPE_CHECKING:
    from ovd.regions.crops import RegionEncoder

OFFICIAL_BACKBONE = "backbone.0.body."  # of released DETR and UP-DETR checkpoints
DROPPED = ("class_embed.", "classifier.")  # what fine-tuning starts anew, as UP-DETR's paper does
REGION_RESOLUTION = 4  # side of the map a region tower reads: the encoder's own res4 at 64 pixels
OBJECTNESS = 0.5  # exponents of word and objectness in a score: their geometric mean
PASSES = 8  # sets of words that go through the decoder at once
TOLD_OVERLAP = 0.7  # IoU above which the boxes of two told words are one region


def build_detr(
    config: DetrConfig,
    *,
    embed_dim: int,
    rows: Tensor | None,
    trainable: Tensor | None,
    classes: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> Detr:
    """A transformer with random weights.

    Args:
        config: architecture.
        embed_dim: D of the encoder; used with ``embed_space: clip``, else D is the backbone's own.
        rows: (C, D) text embeddings for variant ``text``.
        trainable: (C,) bool, False for novel classes.
        classes: C for variant ``closed``.
        pixel_mean, pixel_std: RGB in 0…255.
    """
    bb = config.backbone
    if config.variant == "text" and rows is None:
        raise ValueError("variant 'text' needs the text embeddings of its vocabulary")
    backbone = build_bottom_up(bb, out_features=bb.features)
    maps = backbone.output_shape()
    return Detr(
        arch=config.arch,
        backbone=backbone,
        features=[(name, maps[name].channels, maps[name].stride) for name in bb.features],
        frozen=bb.frozen,
        width=config.width,
        heads=config.heads,
        ffn=config.ffn,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        queries=config.queries,
        dropout=config.dropout,
        pre_norm=config.pre_norm,
        embed_dim=embed_dim if config.embed_space == "clip" else sum(maps[name].channels for name in bb.features),
        classifier=EmbeddingClassifier(rows=rows, trainable=trainable, scale=config.scale)
        if config.variant == "text" and rows is not None
        else None,
        closed_classes=classes if config.variant == "closed" else None,
        unit_conditions=config.embed_space == "clip",
        denoising=config.denoising,
        box_noise=config.box_noise,
        label_noise=config.label_noise,
        conditioned=config.conditioned,
        region_tower=last_stage_head(bb, resolution=REGION_RESOLUTION, norm=bb.norm, embed_dim=embed_dim)
        if config.region_tower
        else None,
        scale=config.scale,
        loss=config.loss,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


@torch.no_grad()
def start_projections(
    model: Detr, *, tokens_SC: Tensor, embeddings_PD: Tensor | None = None, projection_DC: Tensor | None = None
) -> str:
    """Start ``input_proj`` and ``patch2query`` so that a patch's query already points at look-alike tokens.

    Features of a trained network share a large part that says nothing; what tells one place from another is the rest,
    and pooled patches have another shared part than tokens have. So both projections begin as the same matrix, and
    their biases take off the mean of what they are fed. (On Sticker Scenes the most similar token lies within the patch
    for 41 % of the patches by the raw features, for 52 % by centred ones; in the joint space 13 and 41 %; a patch
    covers 14 % of its picture: benchmarks/patch_start.py.)

    Args:
        model: with random weights.
        tokens_SC: joined features of some places of some pictures.
        embeddings_PD: of some patches; None: only ``input_proj`` is started.
        projection_DC: the linear map from the pooled last feature map to the joint space, where embeddings lie there.

    Returns:
        What was done, for the log.
    """
    weight = model.input_proj.weight[:, :, 0, 0]
    assert model.input_proj.bias is not None
    if len(tokens_SC) < 2 or (embeddings_PD is not None and len(embeddings_PD) < 2):
        return "input_proj starts at random: a single place tells no deviation"
    weight.div_((tokens_SC @ weight.T).std(0).mean().clamp(min=1e-6))
    model.input_proj.bias.copy_(-weight @ tokens_SC.mean(0))
    said = "input_proj starts centred on the tokens"
    if embeddings_PD is None:
        return said
    own = not model.patch2query.unit and model.patch2query.in_features == model.input_proj.in_channels
    if own:
        model.patch2query.weight.copy_(weight)
    elif projection_DC is not None:
        # Back from the joint space to the channels it was projected from, as far as that goes, then as the tokens.
        back = torch.linalg.pinv(projection_DC.double()).to(weight)
        model.patch2query.weight.copy_(weight[:, -len(back) :] @ back)
    else:
        return said + "; patch2query at random: its space is not the tokens'"
    model.patch2query.bias.zero_()
    found, wanted = model.patch2query(embeddings_PD), tokens_SC @ weight.T
    model.patch2query.weight.mul_(wanted.std(0).norm() / found.std(0).norm().clamp(min=1e-6))
    model.patch2query.bias.copy_(-model.patch2query(embeddings_PD).mean(0))
    return said + ", patch2query as the same map, centred on the patches"


# --- starting from other weights


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a released DETR or UP-DETR checkpoint → ours: only the backbone's differ."""
    body = {k.removeprefix(OFFICIAL_BACKBONE): v for k, v in state.items() if k.startswith(OFFICIAL_BACKBONE)}
    out = {k.removeprefix("module."): v for k, v in state.items() if not k.startswith(OFFICIAL_BACKBONE)}
    out.update({f"backbone.{k}": v for k, v in to_detectron2(body).items()})
    return out


def read_official(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.pth`` file under our names; nothing in it is executed.

    Raises:
        UserError: no such file, or one that holds anything but tensors and plain values.
    """
    return official_names(read_tensors(path))


def read_start(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Tensors of an exported folder, or of a released ``.pth`` file, and whether they bring a backbone of their own.

    A frozen backbone is the one the configuration names, in full precision; one that was trained belongs to its
    transformer.

    Raises:
        UserError: neither.
    """
    if path.suffix in (".pth", ".pt"):
        return read_official(path), True
    folder = _exported_of(path)
    card = read_card(folder)
    if not card.is_transformer:
        raise UserError(f"weights={path}: is no detection transformer; give exported/ of a DETR or UP-DETR run")
    return exported_tensors(folder)[0], not card.model["backbone"]["frozen"]


def _exported_of(path: Path) -> Path:
    """The exported folder of a run, or the folder itself."""
    return path / EXPORTED if (path / EXPORTED / "model.json").is_file() else path


def refuse_other_attention(path: Path, state: Mapping[str, Tensor], config: DetrConfig) -> None:
    """Refuse weights whose shapes fit but which compute something else here.

    Args:
        path: of `read_start`.
        state: what it read.
        config: of the model that is to start from them.

    Raises:
        UserError: another number of heads, or norms in another place.
    """
    pre_norm = "transformer.encoder.norm.weight" in state  # only where norms come first is there one at the end
    if pre_norm != config.pre_norm:
        raise UserError(f"weights={path}: trained with model.pre_norm={str(pre_norm).lower()}; set it so here")
    if path.suffix in (".pth", ".pt"):
        return  # a released file does not say how many heads it has: the papers' 8
    heads = int(read_card(_exported_of(path)).model["heads"])
    if heads != config.heads:
        raise UserError(f"weights={path}: trained with model.heads={heads}, not {config.heads}; set it so here")


def start_detr(model: Detr, state: Mapping[str, Tensor], *, source: str, backbone: bool = True) -> LoadReport:
    """Copy what fits; classification layers start anew, query embeddings are kept and cut to the number of queries.

    Args:
        model: to be started.
        state: under our names.
        source: for messages.
        backbone: take the backbone too.

    Raises:
        UserError: less than half of the transformer fits, so this is another architecture.
    """
    own = model.state_dict()
    transformer = [k for k in own if k.startswith("transformer.")]
    fitting = sum(k in state and state[k].shape == own[k].shape for k in transformer)
    if 2 * fitting < len(transformer):  # a bias or two always fit
        raise UserError(
            f"weights={source}: {fitting} of {len(transformer)} transformer tensors fit; "
            "model.arch, width and ffn must be those it was trained with"
        )
    queries: dict[str, Tensor] = {}
    notes = ""
    for key in ("query_embed.weight", "query_anchor"):
        if key in own and key in state and own[key].shape != state[key].shape:
            given, fresh = state[key], own[key]
            if given.shape[1:] == fresh.shape[1:]:
                kept = min(len(given), len(fresh))
                queries[key] = torch.cat([given[:kept].to(fresh), fresh[kept:]])
                notes = f"query embeddings: the first {kept} of {len(given)} are kept"
                if len(fresh) > kept:
                    notes += f", the other {len(fresh) - kept} start anew"
    skip = DROPPED if backbone else (*DROPPED, "backbone.")
    report = load_tensors(model, {**state, **queries}, source=source, strict="no", skip=skip)
    return replace(report, notes=notes)


# --- inference


class PatchEncoder:
    """The transformer's own image space as the encoder of a person's crops (`ovd.regions.crops.RegionEncoder`).

    Args:
        model: its backbone embeds.
        side: pixels.
    """

    def __init__(self, *, model: Detr, side: int) -> None:
        self.model, self.image_size, self.embed_dim = model, side, model.embed_dim
        mean = model.pixel_mean.flatten() / 255
        self.image_mean = (float(mean[0]), float(mean[1]), float(mean[2]))

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, h, w) → float (N, 3, S, S), still in 0…255: the model normalises."""
        pixels = images.to(self.model.device).float()
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True).clamp(0, 255)
        return pixels

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, D)."""
        return self.model.pooled(pixels)


class DetrRegions(RegionModel):
    """A loaded transformer behind the interface of `ovd.detector.RegionFinder`.

    Objectness and word are told apart by the model, so scores are their geometric mean.

    Args:
        model: in eval mode.
        card: its card.
        bank: (B, D) unit embeddings of the bank words.
        top: regions kept per picture.
    """

    objectness_weight = OBJECTNESS

    def __init__(self, *, model: Detr, card: DetectorCard, bank: Tensor, top: int = 150) -> None:
        self.detr, self.card, self.top = model, card, top
        self.bank = F.normalize(bank, dim=1) if len(bank) else bank
        self.calibration = Calibration(**card.calibration)
        self.background: Tensor | None = None
        head = card.model.get("head", {})
        self.patches, self.patch_size = int(head.get("patches", 1)), int(head.get("patch_size", 64))
        self.example_encoder: RegionEncoder | None = None
        if not model.patch2query.unit:
            self.example_encoder = PatchEncoder(model=model, side=self.patch_size)

    @property
    def locates(self) -> bool:
        """A pretext's transformer: it knows no words, and finds what crops show by being told them."""
        return self.detr.classifier is None and self.detr.class_embed is None

    @torch.no_grad()
    def _memory(self, image: np.ndarray) -> Memory:
        inputs, _, _ = self._input(image)
        return self.detr.memory([inputs])

    def _in_pixels(self, boxes: Tensor, image: np.ndarray) -> Tensor:
        """Centre boxes (K, 4) in [0, 1] → corners in pixels of the picture."""
        height, width = image.shape[:2]
        return to_corners(boxes).clamp(0, 1) * boxes.new_tensor([width, height, width, height])

    @torch.no_grad()
    def _found(self, image: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Corner boxes in pixels of the picture, objectness and embeddings of all free queries, in their order."""
        found = self.detr.answer(self._memory(image))
        return self._in_pixels(found.boxes[0], image), found.logits[0].sigmoid(), found.embeddings[0]

    def regions(self, image: np.ndarray) -> RegionSet:
        """Regions of one RGB picture (H, W, 3) uint8, best objectness first."""
        if self.detr.classifier is None:
            raise UserError(
                "this transformer knows no words (it was pretrained on patches, or on a closed list of classes); "
                "train it with model.variant=text"
            )
        boxes, objectness, z = self._found(image)
        order = objectness.argsort(descending=True)[: self.top]
        return RegionSet(
            boxes=boxes[order].cpu(),
            objectness=objectness[order].cpu(),
            text=z[order].cpu(),
            image=None,
            masks=None,
            size=(image.shape[0], image.shape[1]),
        )

    @torch.no_grad()
    def labels(self, image: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (Q, 4) in pixels, scores (Q,) and best classes (Q,) of a model of a closed list of classes.

        Raises:
            UserError: this model is none.
        """
        found = self.detr.answer(self._memory(image))
        if found.classes is None:
            raise UserError("this transformer has no closed list of classes; ask it with words")
        score, label = found.classes[0].softmax(-1)[:, :-1].max(-1)
        return self._in_pixels(found.boxes[0], image).cpu(), score.cpu(), label.cpu()

    def propose(self, image: np.ndarray, *, top: int) -> tuple[np.ndarray, np.ndarray]:
        """((P, 4) float32 boxes in original pixels, (P,) objectness): class-agnostic proposals, best first."""
        boxes, objectness, _ = self._found(image)
        order = objectness.argsort(descending=True)[:top]
        return boxes[order].cpu().numpy(), objectness[order].cpu().numpy()

    def ask(self, image: np.ndarray, rows_CD: Tensor, *, at_once: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ask with words, crops or means of both: queries that were told what to look for.

        Args:
            image: (H, W, 3) uint8 RGB.
            rows_CD: embeddings in the model's space.
            at_once: classes that share the queries; at most as many as queries. Training used ``model.conditioned``.

        Returns:
            Boxes (K, 4) in pixels, scores (K,) and class numbers (K,), in no order.
        """
        shares, score, owner = self._asked(self._memory(image), rows_CD, at_once=at_once)
        return self._in_pixels(shares, image).cpu(), score.cpu(), owner.cpu()

    def told_regions(self, image: np.ndarray, rows_CD: Tensor, *, at_once: int) -> RegionSet:
        """Regions that are found by queries which were told what to look for, best certainty first.

        Certainties of different words say little beside each other, so words only help to *find*: what a region is, is
        read inside its box, as for free queries. Without a region tower a region is what its query was told.

        Args:
            image, rows_CD, at_once: as `ask`.

        Returns:
            At most as many regions as there are queries (and as ``top``), no two of which overlap by `TOLD_OVERLAP`.
        """
        memory = self._memory(image)
        shares, score, owner = self._asked(memory, rows_CD, at_once=at_once)
        boxes = self._in_pixels(shares, image)
        kept = nms(boxes.float(), score, TOLD_OVERLAP)[: min(self.top, self.detr.queries)]
        if self.detr.region_tower is None:
            z = rows_CD.to(boxes)[owner[kept]]
        else:
            with torch.no_grad():
                z = self.detr.region_embeddings(memory, torch.zeros_like(kept), shares[kept])
        return RegionSet(
            boxes=boxes[kept].cpu(),
            objectness=score[kept].cpu(),
            text=F.normalize(z.float(), dim=1).cpu(),
            image=None,
            masks=None,
            size=(image.shape[0], image.shape[1]),
        )

    @torch.no_grad()
    def _asked(self, memory: Memory, rows_CD: Tensor, *, at_once: int) -> tuple[Tensor, Tensor, Tensor]:
        """Centre boxes (K, 4) in [0, 1], scores (K,) and class numbers (K,) of told queries."""
        count = min(at_once, self.detr.queries)
        passes = -(-len(rows_CD) // count)
        # The last pass asks its first words twice rather than giving each more queries than in training.
        asked, last = torch.arange(passes * count), (passes - 1) * count
        asked[last:] = last + torch.arange(count) % (len(rows_CD) - last)
        group = groups_of(self.detr.queries, count)
        boxes, scores = [], []
        for conditions in rows_CD[asked].to(self.detr.device).unflatten(0, (passes, count)).split(PASSES):
            found = self.detr.answer(memory.repeated(len(conditions)), conditions_NMD=conditions)
            boxes.append(found.boxes)
            scores.append(found.logits.sigmoid())
        owner = (torch.arange(passes)[:, None] * count + group).flatten().to(self.detr.device)
        real = owner < len(rows_CD)
        return torch.cat(boxes).flatten(0, 1)[real], torch.cat(scores).flatten()[real], owner[real]

    @torch.no_grad()
    def locate(self, image: np.ndarray, crops: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Find what crops show, by the pretext alone: each crop is a query patch.

        Args:
            image: (H, W, 3) uint8 RGB.
            crops: likewise, one per thing; from this picture or another.

        Returns:
            As `ask`: boxes in pixels, scores and the number of each one's crop.

        Raises:
            UserError: a model whose patches were embedded by the image-text encoder; `ask` takes those embeddings.
        """
        if self.detr.patch2query.unit:
            raise UserError("this transformer's patches live in the image-text encoder's space: embed crops with it")
        whole = [(crop, (0.0, 0.0, crop.shape[1], crop.shape[0])) for crop in crops]
        return self.ask(image, self.patch_rows(whole), at_once=self.patches)

    @torch.no_grad()
    def patch_rows(self, shown: Sequence[tuple[np.ndarray, Sequence[float]]]) -> Tensor:
        """(K, D) embeddings of boxes (x1, y1, x2, y2) of pictures as the pretext's patches are embedded: not unit rows.

        Only for a model whose patches live in its backbone's own space.
        """
        patches = [
            crop_regions(picture, np.array([box]), size=self.patch_size, scales=(1.0,))[0] for picture, box in shown
        ]
        return self.detr.pooled(torch.cat(patches).to(self.detr.device))


# --- loading


def load_detr(folder: Path) -> tuple[Detr, DetectorCard, Tensor]:
    """(model in eval mode, card, (B, D) bank) of an exported transformer.

    Raises:
        UserError: missing file or tensors that do not fit the card.
    """
    card = read_card(folder)
    state, bank = exported_tensors(folder)
    config = card.architecture
    assert isinstance(config, DetrConfig)
    model = build_detr(
        config,
        embed_dim=card.embed_dim,
        rows=torch.ones(len(card.classes), card.embed_dim) if config.variant == "text" else None,
        trainable=card.trainable,
        classes=len(card.classes),
        pixel_mean=card.pixel_mean,
        pixel_std=card.pixel_std,
    )
    load_exported(model, state, folder)
    return model.eval(), card, bank


def load_detr_regions(folder: Path, *, top: int, device: str) -> DetrRegions:
    """Load an exported transformer for inference.

    Raises:
        UserError: see `load_detr`.
    """
    model, card, bank = load_detr(folder)
    return DetrRegions(model=model.to(device), card=card, bank=bank, top=top)
