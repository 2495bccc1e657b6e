# SPDX-License-Identifier: Apache-2.0
"""Videos, webcams and streams: an annotated video, and its tracks as JSON lines.

OpenCV decodes (it knows cameras, streams and turned videos), PyAV encodes H.264, which plays everywhere. The file is
written in fragments: whatever ends the command, what was written plays.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import cv2
import numpy as np
from numpy.typing import NDArray

from ovd.detector import Detector
from ovd.drawing import draw_detections
from ovd.query import Query
from ovd.tracking import WEAK, Tracked, Tracker, untracked
from pretrain.engine.errors import UserError, absent
from pretrain.engine.files import write_atomically

TICKS = 90_000  # per second, MPEG's clock
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
USUAL_RATE = 30.0  # frames per second of a source that does not say


def written_files(out: Path, name: str) -> list[Path]:
    """What `predict_video` writes of a source of this name."""
    return [out / f"{name}{ending}" for ending in (".jsonl", ".json", ".mp4")]


@dataclass(kw_only=True)
class VideoSource:
    """A video that is read frame by frame.

    Attributes:
        name: for file names.
        live: a camera or a stream: it ends when the person ends it.
        frames: how many there are; None where that is not known.
        rate: frames per second.
        capture: OpenCV's.
    """

    name: str
    live: bool
    frames: int | None
    rate: float
    capture: Any

    @classmethod
    def open(cls, text: str) -> VideoSource:
        """Open a file, a camera (``0``) or a stream (``rtsp://…``).

        Raises:
            UserError: it cannot be opened.
        """
        camera = text.isdecimal() and not Path(text).exists()
        if not camera and "://" not in text and not Path(text).is_file():
            raise UserError(f"{text}: {absent(text, 'no such file')}")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: the error below is one line
        log = cv2.utils.logging
        level = log.setLogLevel(log.LOG_LEVEL_SILENT)  # likewise: a missing camera is two lines of warnings
        with _utf_8_name(text) as name_in_utf_8:
            capture = cv2.VideoCapture(int(text)) if camera else cv2.VideoCapture(name_in_utf_8)
        log.setLogLevel(level)
        if not capture.isOpened():
            kind = f"camera {text}" if camera else text
            raise UserError(f"{kind}: cannot be opened as a video" + ("; is it connected, and free?" if camera else ""))
        live = camera or "://" in text
        frames, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), float(capture.get(cv2.CAP_PROP_FPS))
        named = text.partition("?")[0] if "://" in text else text
        name = f"camera{text}" if camera else os.fsencode(Path(named).stem).decode(errors="replace") or "stream"
        return cls(
            name=name,
            live=live,
            frames=frames if frames > 0 and not live else None,
            rate=rate if 0 < rate <= 1000 else USUAL_RATE,
            capture=capture,
        )

    def __iter__(self) -> Iterator[tuple[float, NDArray[np.uint8]]]:
        """(seconds from the start, (H, W, 3) uint8 RGB) of each frame, later and later."""
        begun, last, number = time.monotonic(), -1.0, 0
        while True:
            read, frame = self.capture.read()
            if not read:
                return
            stamp = self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            seconds = time.monotonic() - begun if self.live else stamp if number and stamp > 0 else number / self.rate
            last = max(seconds, last + 1 / TICKS)
            number += 1
            yield last, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def close(self) -> None:
        """Give the camera or file back."""
        self.capture.release()


@contextmanager
def _utf_8_name(text: str) -> Iterator[str]:
    """The same file under a name that OpenCV can take: one whose bytes are no UTF-8 crashes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / f"video{os.fsencode(Path(text).suffix).decode(errors='replace')}"
            link.symlink_to(os.path.abspath(text))
            yield str(link)
        return
    yield text


class VideoWriter:
    """An MP4 file in fragments, H.264; a context manager. The first frame decides the size.

    Args:
        path: of the file.
        rate: frames per second, for the encoder.

    Raises:
        UserError: PyAV is not installed, or the file cannot be written.
    """

    def __init__(self, path: Path, *, rate: float) -> None:
        try:
            import av
        except ImportError as problem:
            raise UserError("an annotated video needs the package av: pip install av. Or give --no-draw") from problem
        self.rate = rate
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: Any = av.open(str(path), "w", options=FRAGMENTS)
        except (OSError, ValueError) as problem:
            raise UserError(f"{path}: cannot be written: {problem}") from problem
        self._av: Any = av
        self._stream: Any = None

    def write(self, pixels: NDArray[np.uint8], seconds: float) -> None:
        """Add a frame that is shown from this time on."""
        from fractions import Fraction

        height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2  # H.264 wants even sides
        if not height or not width:
            raise UserError("a video one pixel high or wide cannot be written: give --no-draw")
        if self._stream is None:
            self._stream = self._file.add_stream("libx264", rate=Fraction(self.rate).limit_denominator(1001))
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.options = {
                "preset": "veryfast",
                "crf": "23",
                "bf": "0",
                "g": str(max(1, round(2 * self.rate))),
            }
            self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, TICKS)
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        frame.pts, frame.time_base = round(seconds * TICKS), Fraction(1, TICKS)
        self._file.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write what the encoder holds back, and close."""
        if self._stream is not None:
            self._file.mux(self._stream.encode(None))
        self._file.close()


@dataclass(kw_only=True)
class Track:
    """A track: its class by most frames, first and last frame, best score."""

    first: int
    last: int
    best: float
    frames: int = 0
    classes: dict[str, int] = field(default_factory=dict)

    def summary(self, number: int) -> dict[str, object]:
        """For the summary file."""
        name = max(self.classes, key=self.classes.__getitem__)
        return {"track": number, "class": name, "first": self.first, "last": self.last, "frames": self.frames,
                "best": round(self.best, 5)}  # fmt: skip


def predict_video(
    *,
    detector: Detector,
    query: Query,
    source: VideoSource,
    out: Path,
    threshold: float | None = None,
    every: int = 1,
    track: bool = True,
    draw: bool = True,
    masks: bool = True,
    on_frame: Callable[[int, int | None, float], None] | None = None,
) -> int:
    """Find and follow things in a video.

    Writes ``NAME.jsonl``, a line for each object of each processed frame; ``NAME.json``, a summary with the tracks; and
    ``NAME.mp4`` with boxes, which frames in between take from the last processed one.

    Args:
        detector, query, threshold: see `Detector.answer`.
        source: open; is closed at the end.
        out: folder of the files; is made.
        every: process every n-th frame.
        track: follow objects.
        draw, masks: write the video; draw masks in it.
        on_frame: called after each frame with (frames done, frames in all or None, seconds since the start).

    Returns:
        frames read.

    Raises:
        UserError: a package is missing, or something cannot be written.
        KeyboardInterrupt: Ctrl-C in a file; all three files are whole up to there. A live source ends without it.
    """
    threshold = detector.threshold_for(query, threshold)
    tracker = Tracker(threshold=threshold, rate=source.rate / every) if track else None
    floor = threshold * WEAK if tracker else threshold
    begun = time.monotonic()
    tracked: Tracked | None = None
    writer = VideoWriter(out / f"{source.name}.mp4", rate=source.rate) if draw else None
    with (
        closing(source),
        TrackLog(out, source, every=every, threshold=threshold, names=query.names) as log,
        writer or nullcontext(),
    ):
        for seconds, pixels in source:
            if log.frames % every == 0:
                detections = detector.answer(pixels, query, threshold=floor)
                tracked = tracker.follow(detections) if tracker else untracked(detections)
                log.add(tracked, seconds)
            if writer is not None and tracked is not None:
                writer.write(draw_detections(pixels, tracked.labelled(), masks=masks), seconds)
            log.frames += 1
            if on_frame is not None:
                on_frame(log.frames, source.frames, time.monotonic() - begun)
    if not log.frames:
        for file in written_files(out, source.name):
            file.unlink(missing_ok=True)
        raise UserError(f"{source.name}: contains no readable frame")
    return log.frames


class TrackLog:
    """``NAME.jsonl``, a line for each object of a processed frame, and ``NAME.json``, the summary; a context manager.

    The summary is written at the end, whatever ends it. Ctrl-C is the usual end of a live source and is suppressed.

    Args:
        out: folder.
        source: of the frames.
        every, threshold, names: for the summary.

    Attributes:
        frames: done so far, which is also the number of the one being processed.
    """

    def __init__(self, out: Path, source: VideoSource, *, every: int, threshold: float, names: Sequence[str]) -> None:
        self.frames = 0
        self._out, self._source = out, source
        self._settings = {"every": every, "threshold": threshold, "classes": list(names)}
        self._tracks: dict[int, Track] = {}

    def __enter__(self) -> TrackLog:
        self._out.mkdir(parents=True, exist_ok=True)
        self._lines: TextIO = open(self._out / f"{self._source.name}.jsonl", "w", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self._lines.close()
        stopped = self._source.live and kind is not None and issubclass(kind, KeyboardInterrupt)
        summary = {
            "source": self._source.name, "frames": self.frames, "rate": self._source.rate, **self._settings,
            "complete": kind is None or stopped,
            "tracks": [track.summary(number) for number, track in sorted(self._tracks.items())],
        }  # fmt: skip
        write_atomically(
            self._out / f"{self._source.name}.json",
            (json.dumps(summary, ensure_ascii=False, indent=1) + "\n").encode(errors="backslashreplace"),
        )
        return stopped

    def add(self, tracked: Tracked, seconds: float) -> None:
        """Write the objects of the frame now read, and add them to their tracks."""
        detections, frame = tracked.detections, self.frames
        for i, number in enumerate(tracked.track.tolist()):
            name, score = detections.class_name[i], float(detections.confidence[i])
            row = {"frame": frame, "time": round(seconds, 3), "track": number or None, "class": name,
                   "score": round(score, 5), "box": [round(float(v), 2) for v in detections.xyxy[i]]}  # fmt: skip
            self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            if number:
                track = self._tracks.setdefault(number, Track(first=frame, last=frame, best=score))
                track.last, track.best, track.frames = frame, max(track.best, score), track.frames + 1
                track.classes[name] = track.classes.get(name, 0) + 1
        self._lines.flush()  # for programs that follow the file


def progress(done: int, total: int | None, seconds: float) -> None:
    """A line on standard error: rewritten on a terminal, every tenth of the way (or every 100 frames) otherwise."""
    rate = done / max(seconds, 1e-9)
    text = f"{done} frames, {rate:.1f} a second"
    if total:
        seconds_left = max(0.0, (total - done) / rate)
        text = f"{done} of {total} frames, {rate:.1f} a second, {_clock(seconds_left)} left"
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif (done * 10 // total > (done - 1) * 10 // total) if total else done % 100 == 0:
        print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{remainder:02}" if hours else f"{minutes}:{remainder:02}"
