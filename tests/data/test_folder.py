# SPDX-License-Identifier: Apache-2.0
"""Reading pictures that people bring: every kind, every orientation, and what must be refused."""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ovd.pictures import resized, to_rgb, upright_size
from pretrain.data.folder import (
    FORMATS,
    HAS_HEIF,
    MAX_PIXELS,
    find_images,
    list_images,
    pixel_limit,
    read_image,
    require_files,
)  # fmt: skip
from pretrain.engine.errors import BadImageError, UserError

# A picture whose four quarters differ, so that any wrong turn shows.
UPRIGHT = np.kron(
    np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[250, 250, 0], [0, 250, 250], [250, 0, 250]]], np.uint8),
    np.ones((8, 8, 1), np.uint8),
)
# What a camera stores for each EXIF orientation (TIFF 6.0 / EXIF 2.3, tag 274), given the upright picture.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", sorted(STORED))
@pytest.mark.parametrize("kind", sorted({"JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"} & {"MPO", *FORMATS}))
def test_read_image__exif_orientation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    full = {"quality": 100, "subsampling": "4:4:4"}
    options = {"JPEG": full, "MPO": full, "AVIF": full, "WEBP": {"lossless": True}}.get(kind, {})
    stored, close = Image.fromarray(np.ascontiguousarray(STORED[orientation])), 6 if options == full else 0
    path = tmp_path / "picture"
    for mode in ("RGB", *(("L", "RGBA") if kind in ("PNG", "TIFF") else ())):  # Pillow maps the plainest TIFF files
        path.write_bytes(encode(stored.convert(mode), kind, exif=exif.tobytes(), **options))
        expected = np.asarray(Image.fromarray(UPRIGHT).convert(mode).convert("RGB")).astype(int)
        assert upright_size(path) == UPRIGHT.shape[:2]
        with Image.open(io.BytesIO(path.read_bytes())) as opened:
            for image in (read_image(path), read_image(path.read_bytes()), to_rgb(opened)):
                assert image.shape == UPRIGHT.shape
                assert np.abs(image - expected).max() <= close


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_read_image__lossless_formats_are_exact(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(read_image(encode(Image.fromarray(UPRIGHT), kind, **options)), UPRIGHT)


def test_read_image__transparent_pixels_are_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 10, 10, 255)
    image = read_image(encode(Image.fromarray(rgba), "PNG"))
    assert (image[:2] == (200, 10, 10)).all() and (image[2:] == 255).all()
    assert np.array_equal(read_image(encode(Image.fromarray(rgba), "PNG"), alpha=True), rgba)


def test_read_image__alpha_is_blended_with_white() -> None:
    rgba = np.full((2, 2, 4), (0, 0, 0, 128), np.uint8)
    assert np.abs(read_image(encode(Image.fromarray(rgba), "PNG")).astype(int) - 127).max() <= 1


def test_read_image__palettes_with_and_without_transparency() -> None:
    palette = Image.fromarray(UPRIGHT).quantize(8)
    assert np.abs(read_image(encode(palette, "PNG")).astype(int) - UPRIGHT).max() <= 6
    index = palette.getpixel((0, 0))
    image = read_image(encode(palette, "PNG", transparency=index))
    assert (image[:8, :8] == 255).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_read_image__grey_gets_three_channels(mode: str) -> None:
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert(mode)
    assert read_image(encode(grey, "PNG")).tolist() == [[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]]


def test_read_image__16_bit_greys_are_scaled() -> None:
    grey = np.array([[0, 65535], [32768, 257]], np.uint16)
    image = read_image(encode(Image.fromarray(grey), "PNG"))
    assert image[..., 0].tolist() == [[0, 255], [128, 1]]


def test_transparency__a_grey_png_in_16_bits_is_laid_on_white() -> None:
    grey = Image.fromarray(np.array([[20_000, 20_001], [20_000, 65_535]], np.uint16))
    image = read_image(encode(grey, "PNG", transparency=20_000))
    assert image[..., 0].tolist() == [[255, 78], [255, 255]]


@pytest.mark.parametrize(("white", "grey"), [(1.0, 0.5), (255.0, 128.0), (65535.0, 32896.0)])
def test_read_image__float_greys_are_scaled_from_0_to_1(white: float, grey: float) -> None:
    image = read_image(encode(Image.fromarray(np.array([[0, grey], [white, float("nan")]], np.float32)), "TIFF"))
    assert image[..., 0].tolist() == [[0, 128], [255, 0]]


def test_read_image__dark_16_bit_greys_are_scaled() -> None:
    grey = np.full((2, 2), 255, np.uint16)  # 0.4 % of white
    assert read_image(encode(Image.fromarray(grey), "PNG")).max() == 1


def test_read_image__cmyk_is_converted() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red = read_image(data)[8, 8].astype(int)
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


def test_read_image__path_bytes_and_file_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(UPRIGHT), "PNG"))
    with path.open("rb") as handle:
        pictures = [read_image(path), read_image(str(path)), read_image(path.read_bytes()), read_image(handle)]
    assert all(np.array_equal(picture, UPRIGHT) for picture in pictures)


def test_read_image__format_follows_content_not_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(Image.fromarray(UPRIGHT), "PNG"))
    assert np.array_equal(read_image(path), UPRIGHT)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims width x height pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [11_000, 20_000, 2**31 - 1])
def test_read_image__decompression_bomb_is_refused_by_header(side: int) -> None:
    with pytest.raises(BadImageError, match="pixels"):
        read_image(bomb(side, side))


def test_read_image__pixel_limit_is_an_argument() -> None:
    data = encode(Image.fromarray(UPRIGHT), "PNG")
    assert read_image(data, max_pixels=UPRIGHT.shape[0] * UPRIGHT.shape[1]).shape == UPRIGHT.shape
    with pytest.raises(BadImageError, match="16|24"):
        read_image(data, max_pixels=UPRIGHT.shape[0] * UPRIGHT.shape[1] - 1)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.png", b""),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("text.jpg", b"hello"),
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("anim.png", encode(Image.new("RGB", (8, 8)), "GIF")),
        ("torn.tif", encode(Image.fromarray(UPRIGHT), "TIFF")[:100]),
        ("torn.jpg", encode(Image.fromarray(UPRIGHT), "JPEG")[:200]),
        ("torn.png", encode(Image.fromarray(UPRIGHT), "PNG")[:60]),
        ("torn.webp", encode(Image.fromarray(UPRIGHT), "WEBP")[:40]),
        ("torn.bmp", encode(Image.fromarray(UPRIGHT), "BMP")[:100]),
    ],
)
def test_read_image__unreadable_file_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BadImageError) as caught:
        read_image(path)
    assert caught.value.path == path and name in str(caught.value)
    said = {"empty.png": r"is empty \(0 bytes\)", "pointer.jpg": "a pointer of Git LFS"}
    assert re.search(said.get(name, "cannot be read as JPEG"), str(caught.value))


@pytest.mark.parametrize("level", [0, 6])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_read_image__a_png_cut_short_is_refused(share: float, level: int) -> None:
    waves = 99 + 99 * np.sin(np.arange(120 * 160 * 3).reshape(120, 160, 3) / 97)
    photo = (waves + np.random.default_rng(0).integers(0, 40, waves.shape)).astype(np.uint8)
    data = encode(Image.fromarray(photo), "PNG", compress_level=level)
    kept = int(share * len(data))
    for end in (b"", bytes(len(data) - kept), bytes(len(data) - kept - 12) + data[-12:]):  # cut, or room that was made
        with pytest.raises(BadImageError, match="damaged|truncated|broken"):
            read_image(data[:kept] + end)


def photo(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (130, 250, 3), dtype=np.uint8)).convert(mode)


JPEG_KINDS: list[dict[str, object]] = [
    {}, {"optimize": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}, {"quality": 100}, {"progressive": True},
]  # fmt: skip


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg__truncated_and_closed_is_refused(mode: str, options: dict[str, object]) -> None:
    """libjpeg fills what is missing with grey, and Pillow drops its warning."""
    data = encode(photo(mode), "JPEG", **options)
    for share in (0.4, 0.6) if "progressive" in options else (0.4, 0.7, 0.95):
        cut = data[: int(share * len(data))].rstrip(b"\xff")
        for end in (b"\xff\xd9", bytes(300) + b"\xff\xd9", b"\xff\xd9" + data):
            with pytest.raises(BadImageError, match="its end is missing"):
                read_image(cut + end)
        with pytest.raises(BadImageError, match="its end is missing"):
            read_image(cut + b"\xff\xd9", max_side=32)


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg__a_whole_one_that_ends_in_grey_is_read(mode: str, options: dict[str, object]) -> None:
    """The grey of missing pixels is a colour like others, and bytes behind the end belong to nobody."""
    for size, grey_from in (((1, 1), 0), ((7, 9), 0), ((100, 64), 32), ((250, 131), 0)):
        picture = photo().resize(size)
        picture.paste((128, 128, 128), (0, grey_from, *size))
        data = encode(picture.convert(mode), "JPEG", **options)
        for end in (b"", bytes(100), b"\xff\xd9" + data[:500]):
            assert read_image(data + end).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("lossless", [False, True])
def test_webp__a_truncated_one_is_refused(lossless: bool) -> None:
    data = encode(photo(), "WEBP", lossless=lossless)
    kept = len(data) // 2
    with pytest.raises(BadImageError, match="its end is missing"):
        read_image(data[:kept] + bytes(len(data) - kept))
    assert read_image(data + bytes(100)).shape == (130, 250, 3)


def test_read_image__folder_or_missing_file_is_a_bad_image(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(BadImageError, match=path.name):
            read_image(path)


def test_bad_image_error__can_be_pickled(tmp_path: Path) -> None:
    with pytest.raises(BadImageError) as caught:
        read_image(tmp_path / "missing.png")
    assert str(ForkingPickler.loads(ForkingPickler.dumps(caught.value))) == str(caught.value)


def test_read_image__large_picture_can_be_read_small() -> None:
    big = np.kron(UPRIGHT, np.ones((20, 20, 1), np.uint8))
    for kind in ("PNG", "JPEG"):
        image = read_image(encode(Image.fromarray(big), kind), max_side=48)
        assert image.shape == (32, 48, 3) and np.abs(image[4, 4].astype(int) - UPRIGHT[2, 2]).max() < 12


def test_folder__order_is_fixed_and_recursive(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.jpg", "a/b/c.webp", "d.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(UPRIGHT).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == [
        "a/b/c.webp",
        "a/z.jpg",
        "b.PNG",
        "d.bmp",
    ]


def test_folder__hidden_files_are_skipped(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", ".hidden.png", ".ipynb_checkpoints/a-checkpoint.jpg", "b/.trash/c.jpg", "b/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(UPRIGHT).save(tmp_path / name)
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == ["a.jpg", "b/d.jpg"]
    hidden_root = tmp_path / ".ipynb_checkpoints"
    assert len(list_images(hidden_root)) == 1, "a folder that is named is searched"


def test_folder__links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "photos/inner").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("photos/a.jpg", "elsewhere/b.jpg", "photos/inner/c.jpg"):
        Image.fromarray(UPRIGHT).save(tmp_path / name)
    (tmp_path / "photos/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/inner/up").symlink_to(tmp_path / "photos")
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path / "photos")]
    assert names == ["photos/a.jpg", "photos/inner/c.jpg", "photos/link/b.jpg"]


def test_folder__other_formats_are_counted_and_outputs_skipped(tmp_path: Path) -> None:
    (tmp_path / "results/drawn").mkdir(parents=True)
    for name in ("a.jpg", "results/drawn/a.jpg"):
        Image.fromarray(UPRIGHT).save(tmp_path / name)
    for name in ("b.gif", "c.GIF", "d.jxl", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    listing = find_images(tmp_path, without=tmp_path / "results")
    assert [path.name for path in listing.paths] == ["a.jpg"]
    assert str(listing).startswith("skipped: 2 .gif, 1 .jxl (read are .jpg")
    assert not str(find_images(tmp_path / "results"))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"contains no picture .* skipped: 2 \.gif, 1 \.jxl"):
        find_images(tmp_path, without=tmp_path / "results")


def test_folder__skipped_files_are_reported_by_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert len(list_images(tmp_path)) == 1 and capsys.readouterr().err == ""
    (tmp_path / "b.gif").write_bytes(b"")
    assert len(list_images(tmp_path)) == 1 and "skipped: 1 .gif (read are" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert len(list_images(tmp_path)) == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize(("stamp", "beside"), [("job.json", "parts"), ("label.json", "predictions")])
def test_folder__earlier_results_and_dead_links_are_skipped(stamp: str, beside: str, tmp_path: Path) -> None:
    for folder in ("found/drawn", f"found/{beside}", "own/parts"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a.jpg", "found/drawn/a.jpg", "own/b.jpg"):
        Image.fromarray(UPRIGHT).save(tmp_path / name)
    (tmp_path / "found" / stamp).write_text("{}")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    listing = find_images(tmp_path)
    assert [path.name for path in listing.paths] == ["a.jpg", "b.jpg"]
    assert "2 links to pictures that are not there; results of earlier commands" in str(listing)
    assert len(find_images(tmp_path / "found").paths) == 1  # asked for by name


def test_folder__without_pictures_is_refused(tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "contains no picture"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(UserError, match=message):
            list_images(folder)


def test_read_image__odd_exif_tag_is_ignored() -> None:
    width_as_text = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc")  # Pillow reads such a block and cannot write it again
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + width_as_text + turned + struct.pack("<I", 0)
    data = encode(Image.fromarray(np.ascontiguousarray(STORED[6])), "JPEG", quality=100, exif=exif)
    assert read_image(data).shape == UPRIGHT.shape


# --- more formats, and the limit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TIFF", "AVIF"])
def test_read_image__tiff_and_avif(kind: str, tmp_path: Path) -> None:
    if kind not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"a.{kind.lower()}"
    Image.fromarray(UPRIGHT).save(path)
    assert np.abs(read_image(path).astype(int) - UPRIGHT).mean() < (1 if kind == "TIFF" else 12)
    assert [p.name for p in find_images(tmp_path).paths] == [path.name]


def test_read_image__tiff_of_16_bits_and_several_pages(tmp_path: Path) -> None:
    grey = np.array([[0, 65535], [32768, 257]], np.uint16)
    assert read_image(encode(Image.fromarray(grey), "TIFF"))[..., 0].tolist() == [[0, 255], [128, 1]]
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert (read_image(tmp_path / "pages.tif") == (255, 0, 0)).all()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


def test_read_image__heic_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(HEIC)
    for source in (tmp_path / "a.heic", HEIC):
        with pytest.raises(BadImageError, match="HEIC needs the package pillow-heif: pip install pillow-heif"):
            read_image(source)
    if not HAS_HEIF:
        with pytest.raises(UserError, match=r"skipped: 1 \.heic .* pip install pillow-heif"):
            find_images(tmp_path)


def test_read_image__heic_with_its_package(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.fromarray(UPRIGHT).save(tmp_path / "a.heic")
    assert np.abs(read_image(tmp_path / "a.heic").astype(int) - UPRIGHT).mean() < 20


def test_read_image__pixel_limit_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("L", (300, 200)), "PNG")
    assert pixel_limit() == MAX_PIXELS == 100_000_000
    monkeypatch.setenv("WORDBOX_MAX_PIXELS", "59_999")
    with pytest.raises(
        BadImageError, match=r"300x200 pixels, more than the limit of 59,999; shrink it, or set WORDBOX"
    ):
        read_image(data)
    assert read_image(data, max_pixels=60_000).shape == (200, 300, 3)
    monkeypatch.setenv("WORDBOX_MAX_PIXELS", "100 MP")
    with pytest.raises(UserError, match="WORDBOX_MAX_PIXELS=100 MP: expected a number of pixels"):
        read_image(data)


@pytest.mark.parametrize(
    ("there", "allowed", "said"), [(100, 0.0, None), (99, 0.01, "1 of its 100"), (100, 0.01, None)]
)
def test_folder__listed_pictures_are_checked_first(
    tmp_path: Path, there: int, allowed: float, said: str | None
) -> None:
    names = [f"{number}.png" for number in range(100)]
    for name in names[:there]:
        (tmp_path / name).touch()
    answer = require_files(names, tmp_path, where="list.json", allowed=allowed)
    assert (answer is None) == (said is None) and (said or "") in (answer or "")


@pytest.mark.parametrize(("there", "allowed"), [(99, 0.0), (98, 0.01), (0, 1.0)])
def test_folder__too_many_missing_pictures_name_the_first(tmp_path: Path, there: int, allowed: float) -> None:
    names = [f"{number}.png" for number in range(100)]
    for name in names[:there]:
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=rf"list\.json: {100 - there} of its 100 pictures .* such as .*/{there}\.png; is"
    ):
        require_files(names, tmp_path, where="list.json", allowed=allowed)


def test_read_image__folder_is_named_as_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="is a folder, not a picture$"):
        read_image(tmp_path)


@pytest.mark.parametrize("size", [(600, 800), (601, 799), (1203, 401)])
def test_resized__halving_first_gives_the_mean_of_the_same_pixels(size: tuple[int, int]) -> None:
    height, width = size
    y, x = np.mgrid[:height, :width]
    picture = np.stack([127 + 120 * np.sin(x / 40), 127 + 120 * np.cos(y / 60), 255 * x / width], axis=2)
    for factor in (1 / 2, 1 / 5, 1 / 9):
        small = resized(picture.astype(np.uint8), factor)
        assert small.shape == (max(1, round(height * factor)), max(1, round(width * factor)), 3)
        at_once = cv2.resize(picture.astype(np.float32), small.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(small - at_once).max() < 3, factor
    assert resized(np.zeros((1, 4000, 3), np.uint8), 1 / 100).shape == (1, 40, 3)
