# SPDX-License-Identifier: Apache-2.0
"""The part of ``wordbox predict`` that takes videos, cameras and streams. Imports nothing slow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovd.query_flags import check_words, load_query
from pretrain.engine.errors import UserError, absent, warn

EXTENSIONS = (
    ".3gp", ".avi", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm",
    ".wmv",
)  # fmt: skip

MOST_FRAMES = 0.9
"""Share of the frames that a file says it has, which some only estimate: fewer, and its end is missing."""


def is_video(text: str) -> bool:
    """Whether an argument names a video file, a stream, or a camera by its number."""
    if text.lower().endswith(EXTENSIONS):
        return not Path(text).is_dir()
    if "://" in text:
        from pretrain.data.folder import EXTENSIONS as PICTURES

        return not text.partition("?")[0].lower().endswith(PICTURES)
    return text.isdecimal() and not Path(text).exists()


def videos_in(folder: Path) -> list[Path]:
    """Video files directly in a folder."""
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(EXTENSIONS) and path.is_file())


def predict_videos(options: argparse.Namespace, sources: Sequence[str]) -> int:
    """Run the command on videos; returns the exit status.

    Raises:
        UserError: flags that are for pictures, sources that cannot be opened, or results that are there already.
    """
    if options.format is not None:
        raise UserError("--format is for pictures; of a video NAME.jsonl has every box of every frame")
    examples = check_words(options)
    for text in sources:
        if "://" not in text and not text.isdecimal() and not Path(text).is_file():
            raise UserError(f"{text}: {absent(text, 'no such file')}")
    from ovd.tiles import TiledDetector
    from ovd.video import VideoSource, predict_video, progress, written_files

    opened: list[VideoSource] = []
    try:
        for text in sources:
            opened.append(VideoSource.open(text))
        names = [source.name for source in opened]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two videos would be called {twice!r}; run them separately")
        written = [file for name in names for file in written_files(options.out, name)]
        _require_room(written, [Path(text) for text in sources], overwrite=options.overwrite)
        detector, query = load_query(options, examples, masks=options.masks and options.draw)
        for notice in query.notices:
            warn(notice)
        if options.tiles:
            detector = TiledDetector(detector, side=options.tile_side)
        for source in opened:
            if source.live:
                print(f"{source.name}: Ctrl-C stops it", flush=True)
            done = predict_video(
                detector=detector, query=query, source=source, out=options.out, threshold=options.threshold,
                every=options.every, track=options.track, draw=options.draw, masks=options.masks, on_frame=progress,
            )  # fmt: skip
            if done < MOST_FRAMES * (source.frames or 0):
                warn(
                    f"{source.name}: ends after {done} of the {source.frames} frames that it should "
                    "have: it is truncated or damaged"
                )
            print(f"{source.name}: {done} frames, see {options.out / source.name}.jsonl", flush=True)
    finally:
        for source in opened:
            source.close()
    return 0


def _require_room(written: Sequence[Path], sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse to overwrite existing files, and in any case the videos themselves."""
    for file in filter(Path.exists, written):
        if any(source.is_file() and file.samefile(source) for source in sources):
            raise UserError(f"{file}: is an input video and would be overwritten. Give another --out")
        if not overwrite:
            raise UserError(f"{file}: already exists. Give another --out, or --overwrite to replace it")
