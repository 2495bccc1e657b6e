# SPDX-License-Identifier: Apache-2.0
"""Geometry, antialiasing and border handling of crops, and how crops become embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ovd.regions.crops import CPU_CROPS, crop_regions, embed_crops, embed_regions
from ovd.regions.cutting import expand_boxes
from ovd.regions.proposals import resize_boxes
from pretrain.engine.errors import UserError
from tests.regions.fakes import TinyEncoder

MEAN = (0.48, 0.46, 0.41)


def photo(height: int = 120, width: int = 160, seed: int = 0) -> np.ndarray:
    """Structure at every scale, down to single pixels."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for side in (1, 4, 16, 40):
        coarse = rng.uniform(0, 255, (-(-height // side), -(-width // side), 3))
        total += np.kron(coarse, np.ones((side, side, 1)))[:height, :width]
    return (total / 4).astype(np.uint8)


def position_picture(height: int, width: int) -> np.ndarray:
    """Red tells x, green tells y, in steps of 1 per pixel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)


def triangle_weights(low: float, high: float, size: int, extent: int) -> np.ndarray:
    """Antialiased bilinear weights ``(size, extent)``, written down from the definition of the filter."""
    scale = (high - low) / size
    width = max(scale, 1.0)
    centre = low + (np.arange(size)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(np.arange(extent)[None] + 0.5 - centre) / width, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 20, 30, 60), (5, 10, 35, 70)),
        ((0, 0, 10, 10), (-2.5, -2.5, 12.5, 12.5)),
        ((150, 110, 160, 120), (147.5, 107.5, 162.5, 122.5)),
        ((1.5, 2.25, 3.5, 6.25), (1, 1.25, 4, 7.25)),
    ],
)
def test_enlarged_box__keeps_its_centre(box: tuple[float, ...], expected: tuple[float, ...]) -> None:
    x1, y1, x2, y2 = box
    grown = expand_boxes(np.array([box], dtype=np.float64), 1.5)[0]
    assert grown.tolist() == pytest.approx(expected)
    assert grown.tolist() == pytest.approx(
        (1.25 * x1 - 0.25 * x2, 1.25 * y1 - 0.25 * y2, 1.25 * x2 - 0.25 * x1, 1.25 * y2 - 0.25 * y1)
    )


@pytest.mark.parametrize("box", [(8, 4, 72, 68), (0, 0, 160, 120), (20, 30, 36, 118), (100, 50, 131, 60), (3, 3, 8, 9)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_crop__whole_pixel_boxes_equal_pil_crop_and_resize(box: tuple[int, int, int, int], resample: str) -> None:
    image = photo()
    ours = crop_regions(image, np.array([box]), size=32, scales=(1.0,), resample=resample)[0, 0]  # type: ignore[arg-type]
    filter_ = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resample]
    reference = np.asarray(Image.fromarray(image).crop(box).resize((32, 32), filter_)).transpose(2, 0, 1)
    difference = np.abs(ours.numpy().astype(int) - reference)
    # The two differ only where a filter tap reaches over the edge of the box: PIL's crop has no pixels there.
    shrink = max(1, -(-max(box[2] - box[0], box[3] - box[1]) // 32))
    edge = 2 if resample == "bicubic" or shrink > 1 else 1
    reach = -(-edge * 32 // min(box[2] - box[0], box[3] - box[1], 32))
    inside = difference[:, reach:-reach, reach:-reach]
    assert inside.size and inside.max() <= 1
    assert difference.mean() < 6


@pytest.mark.parametrize(
    "box", [(10.3, 20.7, 90.2, 77.9), (0.0, 0.0, 160.0, 120.0), (33.4, 5.5, 45.1, 118.0), (155.2, 113.3, 160.0, 120.0)]
)
def test_crop__sub_pixel_boxes_equal_an_independent_triangle_filter(box: tuple[float, float, float, float]) -> None:
    image = photo(seed=3)
    ours = crop_regions(image, np.array([box]), size=24, scales=(1.0,))[0, 0].numpy().astype(float)
    wx = triangle_weights(box[0], box[2], 24, 160)
    wy = triangle_weights(box[1], box[3], 24, 120)
    reference = np.einsum("yh,hwc,xw->cyx", wy, image.astype(float), wx)
    assert np.abs(ours - reference).max() <= 1.5  # PIL rounds to bytes twice


def test_crop__shrinking_does_not_alias() -> None:
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    crop = crop_regions(stripes, np.array([[0, 0, 128, 128]]), size=16, scales=(1.0,))
    assert (crop.float() - 127.5).abs().max() < 6  # a filter without antialiasing would return black or white


def test_crop__pixel_positions_are_exact() -> None:
    image = position_picture(100, 200)
    crop = crop_regions(image, np.array([[40.0, 20.0, 72.0, 52.0]]), size=32, scales=(1.0,))[0, 0]
    assert crop[0, 5].tolist() == list(range(40, 72))
    assert crop[1, :, 9].tolist() == list(range(20, 52))


def test_crop__scales_come_in_order() -> None:
    image = position_picture(100, 200)
    one, larger = crop_regions(image, np.array([[80.0, 40.0, 112.0, 56.0]]), size=16, scales=(1.0, 1.5))[0]
    assert one[0, 8, 0] == pytest.approx(80.5, abs=1) and one[0, 8, -1] == pytest.approx(110.5, abs=1)
    assert larger[0, 8, 0] == pytest.approx(73, abs=1) and larger[0, 8, -1] == pytest.approx(118, abs=1)


def test_border_clamp__cuts_a_border_box_at_the_border() -> None:
    image = photo()
    box = np.array([[140.0, 100.0, 160.0, 120.0]])
    clamped = crop_regions(image, box, size=16, scales=(1.5,), border="clamp")
    by_hand = crop_regions(image, np.array([[135.0, 95.0, 160.0, 120.0]]), size=16, scales=(1.0,))
    assert torch.equal(clamped, by_hand)


def test_border_fill__shows_the_mean_colour_beyond_the_border() -> None:
    white = np.full((120, 160, 3), 255, dtype=np.uint8)
    box = np.array([[140.0, 100.0, 160.0, 120.0]])  # 1.5x hangs out by 5 of 30 pixels: the last sixth
    filled = crop_regions(white, box, size=24, scales=(1.5,), border="fill", fill=MEAN)[0, 0]
    colour = torch.tensor([round(255 * c) for c in MEAN], dtype=torch.uint8)
    assert torch.equal(filled[:, 22, 22], colour) and torch.equal(filled[:, 21, 3], colour)
    assert (filled[:, :18, :18] == 255).all()
    clamped = crop_regions(white, box, size=24, scales=(1.5,), border="clamp", fill=MEAN)
    assert (clamped == 255).all()


@pytest.mark.parametrize("border", ["clamp", "fill"])
def test_border__boxes_inside_do_not_depend_on_it(border: str) -> None:
    image = photo()
    inside = np.array([[40.0, 40.0, 80.0, 80.0]])
    outside = np.array([[0.0, 0.0, 30.0, 30.0]])
    alone = crop_regions(image, inside, size=16)
    together = crop_regions(image, np.concatenate([inside, outside]), size=16, border=border)  # type: ignore[arg-type]
    assert torch.equal(alone[0], together[0])  # the margin made for one box does not shift another


def test_shape_center__keeps_the_middle_square_of_a_long_box() -> None:
    image = position_picture(100, 200)
    crop = crop_regions(image, np.array([[40.0, 20.0, 140.0, 52.0]]), size=32, scales=(1.0,), mode="center")[0, 0]
    assert crop[0, 0].tolist() == list(range(74, 106))
    assert crop[1, :, 0].tolist() == list(range(20, 52))


def test_shape_pad__keeps_proportions_and_fills_the_bars() -> None:
    white = np.full((100, 200, 3), 255, dtype=np.uint8)
    crop = crop_regions(white, np.array([[20.0, 20.0, 84.0, 52.0]]), size=32, scales=(1.0,), mode="pad", fill=(0, 0, 0))
    rows = (crop[0, 0, 0] == 255).all(dim=1)
    assert rows.tolist() == [False] * 8 + [True] * 16 + [False] * 8


def test_crop__no_boxes_give_no_crops() -> None:
    crops = crop_regions(photo(), np.zeros((0, 4)), size=8)
    assert crops.shape == (0, 2, 3, 8, 8)
    assert embed_crops(TinyEncoder(), crops).shape == (0, 16)


@pytest.mark.parametrize(
    "box",
    [
        (10, 10, 10, 20),
        (10, 10, 5, 20),
        (np.nan, 0, 5, 5),
        (0, 0, np.inf, 5),
        (170, 0, 180, 10),
        (-9, -9, 0, 5),
        (0, 0, 9e3, 9),
    ],
)
def test_crop__boxes_of_no_area_are_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="box"):
        crop_regions(photo(), np.array([[1, 1, 5, 5], box]), size=8)


@pytest.mark.parametrize("option", [{"mode": "stretch"}, {"border": "reflect"}, {"resample": "nearest"}])
def test_crop__unknown_options_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="unknown crop option"):
        crop_regions(photo(), np.array([[1, 1, 5, 5]]), size=8, **option)  # type: ignore[arg-type]


def test_crop__float_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        crop_regions(photo().astype(np.float32), np.array([[1, 1, 5, 5]]), size=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalise_each", [False, True])
def test_crop_embedding__is_the_sum_over_scales_normalised_once(normalise_each: bool) -> None:
    encoder, image = TinyEncoder(), photo()
    boxes = np.array([[10.0, 10.0, 50.0, 40.0], [100.0, 60.0, 160.0, 120.0]])
    got = embed_regions(encoder, image, boxes, normalise_each=normalise_each)
    for p in range(2):
        parts = []
        for scale in (1.0, 1.5):
            x1, y1, x2, y2 = expand_boxes(boxes[p : p + 1], scale)[0]
            window = (max(x1, 0), max(y1, 0), min(x2, 160), min(y2, 120))
            crop = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR, box=window)
            with torch.no_grad():
                pixels = encoder.prepare(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None])
                parts.append(encoder.encode_image(pixels)[0])
        parts = [F.normalize(part, dim=0) for part in parts] if normalise_each else parts
        assert torch.allclose(got[p], F.normalize(parts[0] + parts[1], dim=0), atol=1e-6)
    assert torch.allclose(got.norm(dim=1), torch.ones(2))


def test_crop_embedding__the_two_crops_of_a_box_differ() -> None:
    one = embed_regions(TinyEncoder(), photo(), np.array([[40.0, 40.0, 90.0, 80.0]]), scales=(1.0,))
    both = embed_regions(TinyEncoder(), photo(), np.array([[40.0, 40.0, 90.0, 80.0]]), scales=(1.0, 1.5))
    assert (one - both).abs().max() > 1e-3


def test_crop_embedding__does_not_depend_on_the_batch() -> None:
    boxes = np.array([[5.0 * i, 3.0 * i, 5.0 * i + 40, 3.0 * i + 30] for i in range(20)])
    whole = embed_regions(TinyEncoder(), photo(), boxes, batch_size=1000)
    pieces = embed_regions(TinyEncoder(), photo(), boxes, batch_size=7)
    assert torch.allclose(whole, pieces, atol=1e-6)


def test_crop_embedding__takes_few_crops_at_once_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, forwards = TinyEncoder(), []
    encode = encoder.encode_image
    monkeypatch.setattr(encoder, "encode_image", lambda pixels: forwards.append(len(pixels)) or encode(pixels))
    boxes = np.array([[2.0 * i, 1.0 * i, 2.0 * i + 40, 1.0 * i + 30] for i in range(50)])
    embed_regions(encoder, photo(), boxes, scales=(1.0,))
    assert sum(forwards) == 50 and max(forwards) == CPU_CROPS


def test_crop_embedding__can_be_trained_against() -> None:
    target = embed_regions(TinyEncoder(), photo(), np.array([[10.0, 10.0, 50.0, 40.0]]))
    student = torch.nn.Parameter(torch.zeros_like(target))
    (student - target).abs().sum().backward()  # inference tensors would refuse here
    assert student.grad is not None


def test_crop_embedding__an_encoder_that_returns_nan_is_refused() -> None:
    encoder = TinyEncoder()
    with torch.no_grad():
        encoder.project.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="check its weights"):
        embed_regions(encoder, photo(), np.array([[10.0, 10.0, 50.0, 40.0]]))


def test_boxes__resize_with_the_picture() -> None:
    image = position_picture(100, 200)
    doubled = np.kron(image, np.ones((2, 2, 1), dtype=np.uint8))
    boxes = torch.tensor([[40.0, 20.0, 72.0, 52.0], [90.0, 10.0, 130.0, 70.0], [0.0, 0.0, 20.0, 20.0]])
    resized = resize_boxes(boxes, (100, 200), (200, 400))
    one, two = (crop_regions(i, b, size=8, scales=(1.0,)).int() for i, b in ((image, boxes), (doubled, resized)))
    assert (one - two).abs().max() <= 1
