# SPDX-License-Identifier: Apache-2.0
"""The pictures on a command line: files and folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.engine.errors import UserError, absent, warn

if TYPE_CHECKING:
    from pretrain.data.folder import U8

PACKAGED_PHOTOS = Path(__file__).parent / "demo/examples/photos"
"""Photos of the page's examples: dogs, horses, chickens, cars, a living room, instruments, coffee, wine."""


class PictureFiles:
    """Picture files whose ids are their names, a `pretrain.data.images.IdentifiedPictures`.

    Args:
        paths: name → file, in order.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = paths
        self.ids: Sequence[str] = list(paths)

    @classmethod
    def collect(cls, paths: Sequence[Path], *, without: Path | None = None) -> PictureFiles:
        """The pictures of files and folders; a name is the path inside its folder, and unique.

        Args:
            paths: pictures and folders.
            without: a folder that is not searched: that of the results.

        Raises:
            UserError: a path does not exist, or a folder holds no picture.
        """
        from pretrain.data.folder import find_images

        pictures: dict[str, Path] = {}
        for argument in paths:
            if without is not None and argument.is_dir() and without.resolve() == argument.resolve():
                raise UserError(
                    f"--out {without}: is the folder of the pictures; give another, such as {argument / 'found'}"
                )
            if argument.is_dir():
                listing = find_images(argument, without=without)
                if str(listing):
                    warn(f"{argument}: {listing}")
                inside = [(path.relative_to(argument).as_posix(), path) for path in listing.paths]
            elif argument.is_file():
                inside = [(argument.name, argument)]
            else:
                raise UserError(f"{argument}: {absent(argument)}")
            for name, path in inside:
                first = pictures.setdefault(name, path)
                if os.path.realpath(first) != os.path.realpath(path):  # links may go in circles
                    raise UserError(f"two pictures would be called {name!r}: {first} and {path}; run them separately")
        return cls(pictures)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """File of picture ``index``."""
        return self.paths[self.ids[index]]

    def image(self, index: int) -> U8:
        """uint8 (H, W, 3) RGB, upright. ``BadImageError`` if it cannot be read."""
        from pretrain.data.folder import read_image

        return read_image(self.path(index))
