# SPDX-License-Identifier: Apache-2.0
"""Damage that Pillow decodes without a word: parts of a picture that were never copied come out as grey or noise."""

from __future__ import annotations

import io
import os
import re
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image

_FILLED = 128  # libjpeg's value of what is missing, in every channel
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # ends the coded pixels of a scan: no stuffed byte, no restart
_CODED = bytes((i * 89 + 31) % 251 for i in range(1000))  # coded pixels of some kind, without markers
_MORE = _CODED + b"".join(bytes((0xFF, 0xD0 + i % 8)) + _CODED for i in range(16))  # after any restart
_ZEROS = 64  # bytes: entropy coding leaves no such run at the end of a picture


def require_sound_png(file: BinaryIO) -> None:
    """Compare the pixels' checksums, which Pillow does not: half a copied file would give noise instead of an error.

    Raises:
        SyntaxError: they are damaged; Pillow's own error for the other chunks.
    """
    place = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        left, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind != b"IDAT":
            file.seek(left + 4, os.SEEK_CUR)
            continue
        checksum = zlib.crc32(kind)
        while left and (block := file.read(min(left, 1 << 20))):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
        stated = file.read(4)
        if left == 0 and len(stated) == 4 and checksum != int.from_bytes(stated, "big"):
            raise SyntaxError("its pixels are damaged (their checksum is wrong)")
    file.seek(place)


def require_whole_webp(file: BinaryIO) -> None:
    """Look for zeros where the coded pixels should end, as programs leave them that set a file's size in advance.

    Raises:
        SyntaxError: the picture ends in zeros.
    """
    place = file.tell()
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[4:], "little")
        if head[:4] in (b"VP8 ", b"VP8L") and size > _ZEROS:
            file.seek(size - _ZEROS, os.SEEK_CUR)
            if not any(file.read(_ZEROS)):
                raise SyntaxError("its end is missing (zeros are in its place)")
            break
        file.seek(size + size % 2, os.SEEK_CUR)
    file.seek(place)


def require_whole_jpeg(file: BinaryIO, image: Image.Image) -> None:
    """Look whether all of a JPEG was coded: it may have been cut and closed with an end marker.

    Where the last pixel of a sequential picture is the grey that stands for missing ones, it is decoded once more,
    small, with further bytes before its end: only if something was missing do they change it. A progressive one has
    to hold every bit of every coefficient; a cut in the last of them, which hardly shows, is not noticed.

    Args:
        file: the picture's.
        image: decoded, as stored (not turned upright).

    Raises:
        SyntaxError: its end is missing.
    """
    corner = image.getpixel((image.width - 1, image.height - 1))
    filled = all(abs(value - _FILLED) <= 1 for value in (corner if isinstance(corner, tuple) else (corner or 0,)))
    progressive = "progressive" in image.info
    if not filled and not progressive:
        return
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    end, complete = _scans(data)
    if (progressive and not complete) or (filled and _small(data) != _small(data[:end] + _MORE + data[end:])):
        raise SyntaxError("its end is missing (it was cut, and closed with an end marker)")


def _small(data: bytes) -> bytes | None:
    """The pixels at an eighth of the size; None where they cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.draft("RGB", (1, 1))
            return np.asarray(image).tobytes()
    except (OSError, SyntaxError, ValueError):
        return None


def _scans(data: bytes) -> tuple[int, bool]:
    """Where the coded pixels of the last scan end, and whether the scans hold every bit of every coefficient."""
    missing: dict[int, set[int]] = {}  # component -> coefficients whose last bit is yet to come
    at, end = 2, len(data)
    while (marker := _MARKER.search(data, at)) is not None and data[marker.end() - 1] != 0xD9:
        kind, at = data[marker.end() - 1], marker.end()
        if kind in (0x01, 0xD8):  # without content
            continue
        content = data[at + 2 : at + int.from_bytes(data[at : at + 2], "big")]
        at += 2 + len(content)
        if kind in (0xC0, 0xC1, 0xC2) and len(content) > 5:
            missing = {component: set(range(64)) for component in content[6::3]}
        if kind == 0xDA and len(content) >= 4:
            first, last, bits = content[-3:]
            if bits & 0x0F == 0:
                for component in content[1:-3:2]:
                    missing.get(component, set()).difference_update(range(first, last + 1))
            following = _MARKER.search(data, at)
            end = at = following.start() if following is not None else len(data)
    return end, not any(missing.values())
