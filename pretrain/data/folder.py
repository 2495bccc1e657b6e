# SPDX-License-Identifier: Apache-2.0
"""Safe reading of pictures, and the pictures of a folder."""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features

from pretrain.data.damage import require_sound_png, require_whole_jpeg, require_whole_webp
from pretrain.engine.errors import BadImageError, UserError, absent, warn

HAS_AVIF = bool(features.check("avif"))  # Pillow's own packages have it from 11.3 on
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
HEIF = (".heic", ".heif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", *(("AVIF",) if HAS_AVIF else ()))
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff",
    *((".avif",) if HAS_AVIF else ()), *(HEIF if HAS_HEIF else ()),
)  # fmt: skip
OTHER_EXTENSIONS = tuple(  # pictures too, in formats that are not read here
    extension
    for extension in (".avif", ".cr2", ".dng", ".gif", *HEIF, ".jp2", ".jxl", ".nef", ".svg")
    if extension not in EXTENSIONS
)
HEIF_NEEDED = "HEIC needs the package pillow-heif: pip install pillow-heif"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12
MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded
PILLOWS_LIMIT = 178_956_970  # twice Image.MAX_IMAGE_PIXELS: there Pillow refuses, whatever is wanted here
PAGE_PIXELS = 25_000_000  # of the page, where strangers send pictures and several are read at once
LIMIT = "WORDBOX_MAX_PIXELS"
"""Environment variable that takes the place of `MAX_PIXELS`; a number, so that workers of a loader have it too."""
RESULTS = (("job.json", "parts"), ("label.json", "predictions"))
"""What `ovd.predict` and `ovd.label` have in their output folders."""
U8 = NDArray[np.uint8]
TURNS = {  # EXIF orientation -> how a picture is stood upright (Exif 2.3, tag 274)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    source: str | Path | bytes | BinaryIO,
    *,
    max_pixels: int | None = None,
    max_side: int | None = None,
    alpha: bool = False,
) -> U8:
    """Decode one picture.

    Args:
        source: path, the bytes of a file, or an open binary file.
        max_pixels: larger pictures are refused before they are decoded; None: `pixel_limit`.
        max_side: shrink (area average) so that no side is longer.
        alpha: return RGBA instead of RGB. Without it transparent pixels are laid on white.

    Returns:
        uint8 (H, W, 3) RGB, or (H, W, 4); turned upright as its EXIF orientation says.

    Raises:
        BadImageError: not of `FORMATS` (or HEIC, with its package), damaged, or too large; `.path` names the file.
    """
    remedy = f"shrink it, or set {LIMIT}" if max_pixels is None else "shrink it first"
    max_pixels = pixel_limit() if max_pixels is None else max_pixels
    with open_image(source, max_pixels=max_pixels) as (image, file):
        width, height = image.size
        if width * height > max_pixels:
            raise BadImageError(
                _name_of(source), f"has {width}x{height} pixels, more than the limit of {max_pixels:,}; {remedy}."
            )
        if max_side is not None and image.format == "JPEG":
            image.draft("RGB", (max_side, max_side))
        if image.format == "PNG":
            require_sound_png(file)
        if image.format == "WEBP":
            require_whole_webp(file)
        converted = _convert(upright(image), alpha)
        if image.format in ("JPEG", "MPO"):
            require_whole_jpeg(file, image)
    if max_side is not None and max(converted.size) > max_side:
        factor = max_side / max(converted.size)
        side = (max(1, round(converted.width * factor)), max(1, round(converted.height * factor)))
        converted = converted.resize(side, Image.Resampling.BOX)
    return np.array(converted)


@contextmanager
def open_image(
    source: str | Path | bytes | BinaryIO, *, max_pixels: int = PILLOWS_LIMIT
) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """A picture of which the header is read, and its file, while the block lasts.

    Args:
        source: as for `read_image`.
        max_pixels: the limit that a message names; it is for the block to look for.

    Raises:
        BadImageError: what is wrong with the file, here or in the block.
    """
    name = _name_of(source)
    try:
        with warnings.catch_warnings(), ExitStack() as closing:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            # Never Pillow a path: it maps such a file, and in a TIFF that lies on its side takes rows for columns.
            file: BinaryIO
            if isinstance(source, bytes):
                file = io.BytesIO(source)
            else:
                file = closing.enter_context(open(source, "rb")) if isinstance(source, (str, Path)) else source
            yield closing.enter_context(Image.open(file, formats=formats_of(file, name))), file
    except BadImageError:
        raise
    except FileNotFoundError as error:
        raise BadImageError(name, absent(name, "does not exist")) from error
    except IsADirectoryError as error:
        raise BadImageError(name, "is a folder, not a picture") from error
    except UnidentifiedImageError as error:  # whose own text shows the address of a buffer
        raise BadImageError(name, f"cannot be read as {', '.join(FORMATS)}: it is none of them") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise BadImageError(name, f"has more pixels than the limit of {max_pixels:,}; shrink it first.") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadImageError(name, f"cannot be read as {', '.join(FORMATS)}: {error}") from error


def _name_of(source: str | Path | bytes | BinaryIO) -> str:
    return str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "<bytes>"))


def pixel_limit() -> int:
    """How many pixels a picture may have: `MAX_PIXELS`, or what the environment says.

    Raises:
        UserError: the variable is no number.
    """
    text = os.environ.get(LIMIT, "").replace("_", "")
    if not text:
        return MAX_PIXELS
    if not text.isdecimal() or not 0 < int(text) <= PILLOWS_LIMIT:
        raise UserError(f"{LIMIT}={text}: expected a number of pixels, at most {PILLOWS_LIMIT} (Pillow's own limit)")
    return int(text)


def formats_of(file: BinaryIO, name: str) -> tuple[str, ...]:
    """The Pillow formats that a file may be read as; a HEIC file without its package is an error.

    Raises:
        BadImageError: it is HEIC, and the package is not installed; or nothing is in the file, or what Git LFS leaves.
    """
    head = file.read(12)
    file.seek(0)
    if not head:
        raise BadImageError(name, "is empty (0 bytes)")
    if head == b"version http":
        raise BadImageError(name, "is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    if head[4:8] != b"ftyp" or head[8:12] not in HEIF_BRANDS:
        return FORMATS
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise BadImageError(name, HEIF_NEEDED) from error
    register_heif_opener()
    return (*FORMATS, "HEIF")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser raises many kinds for a damaged block; the picture itself is fine
        return 1
    return value if isinstance(value, int) else 1


def upright(image: Image.Image) -> Image.Image:
    """The picture rotated by its EXIF orientation, decoded.

    Pillow's own `exif_transpose` also writes the EXIF block anew, and fails when any other tag in it is odd.
    """
    image.load()  # first: this turns a TIFF, and takes its orientation away
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _convert(image: Image.Image, alpha: bool) -> Image.Image:
    """RGB or RGBA of any mode; 16-bit greys are scaled, not clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image).astype(np.float64))
        deep = image.mode.startswith("I;16") or grey.max(initial=0.0) > 255
        scale = 255.0 / 65535.0 if deep else 1.0
        if image.mode == "F" and grey.max(initial=0.0) <= 1:  # as scientific programs write greys
            scale = 255.0
        clear = image.info.get("transparency")  # the grey that is none, before it is scaled
        image = Image.fromarray(np.clip(np.floor(grey * scale + 0.5), 0, 255).astype(np.uint8))
        if isinstance(clear, int):
            image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if alpha:
        return image.convert("RGBA")
    if transparent:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageListing:
    """Pictures of a folder.

    Attributes:
        paths: sorted by their path below the folder.
        skipped: extension -> number of pictures in formats that are not read.
        results: folders with drawn or copied pictures, written by earlier commands.
        lost: links to pictures that are gone.
    """

    paths: list[Path]
    skipped: Mapping[str, int]
    results: tuple[Path, ...] = ()
    lost: int = 0

    def __str__(self) -> str:
        """What was skipped, or nothing."""
        parts = []
        if self.skipped:
            formats = ", ".join(f"{count} {extension}" for extension, count in sorted(self.skipped.items()))
            heif = f", and {HEIF_NEEDED}" if set(HEIF) & set(self.skipped) else ""
            parts.append(f"{formats} (read are {', '.join(EXTENSIONS)}; convert the others first{heif})")
        if self.lost:
            parts.append(f"{self.lost} links to pictures that are not there")
        if self.results:
            parts.append(f"results of earlier commands, in {', '.join(map(str, self.results))}")
        return f"skipped: {'; '.join(parts)}" if parts else ""


def find_images(folder: str | Path, *, without: Path | None = None) -> ImageListing:
    """Every picture below `folder`, by file extension.

    Hidden files and folders (``.ipynb_checkpoints``, macOS's ``._a.jpg``) are no pictures of a person's, nor is what
    ``wordbox predict`` and ``wordbox label`` wrote into a folder below. Links to folders are followed, each folder
    once.

    Args:
        folder: searched with its sub folders.
        without: a folder that is left out: a command's own output.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give a folder of {', '.join(EXTENSIONS)} files.")
    output = without.resolve() if without is not None else None
    visited: set[Path] = set()
    paths: list[Path] = []
    skipped: Counter[str] = Counter()
    results: list[Path] = []
    lost = 0
    for where, folders, names in os.walk(root, followlinks=True):
        real = Path(where).resolve()
        if real in visited or real == output:
            folders.clear()
            continue
        visited.add(real)
        if Path(where) != root and any({stamp, beside} <= {*names, *folders} for stamp, beside in RESULTS):
            results.append(Path(where))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            path = Path(where, name)
            if name.startswith(".") or not path.is_file():
                lost += not name.startswith(".") and extension in EXTENSIONS and path.is_symlink() and not path.exists()
                continue
            if extension in EXTENSIONS:
                paths.append(path)
            elif extension in OTHER_EXTENSIONS:
                skipped[extension] += 1
    listing = ImageListing(
        sorted(paths, key=lambda path: path.relative_to(root).as_posix()), skipped, tuple(results), lost
    )
    if not paths:
        raise UserError(f"{root} contains no picture ({', '.join(EXTENSIONS)}). {listing}".rstrip())
    return listing


def require_files(names: Iterable[str | Path], folder: Path, *, where: str | Path, allowed: float = 0.0) -> str | None:
    """Check that the pictures of a list exist before work on them begins.

    Args:
        names: relative to ``folder``.
        folder: of the pictures.
        where: the list, for messages.
        allowed: share that may be missing.

    Returns:
        what to warn of when some are missing.

    Raises:
        UserError: more are missing, or all.
    """
    present = [(name, os.path.isfile(folder / name)) for name in names]
    missing = [name for name, exists in present if not exists]
    if not missing:
        return None
    text = f"{where}: {len(missing)} of its {len(present)} pictures are not there, such as {folder / missing[0]}"
    if len(missing) > allowed * len(present) or len(missing) == len(present):
        raise UserError(f"{text}; is {folder} the folder that their names are relative to?{backslash_hint(missing[0])}")
    return text


def backslash_hint(name: str | Path) -> str:
    """A hint to append to the name of a missing picture if it was written on Windows; else nothing."""
    return r" Names with \ come from Windows: write them with /." if "\\" in str(name) else ""


def list_images(folder: str | Path) -> list[Path]:
    """The paths of `find_images`; skipped files are reported on standard error, by one process of a run."""
    listing = find_images(folder)
    if str(listing) and os.environ.get("RANK", "0") == "0":
        warn(f"{folder}: {listing}")
    return listing.paths
