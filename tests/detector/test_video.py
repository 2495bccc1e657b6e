# SPDX-License-Identifier: Apache-2.0
"""Videos: every frame's boxes, one number per object, a file that plays whatever ends the command."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ovd import predict, video
from ovd.predict_video import is_video
from ovd.tracking import Tracker
from ovd.video import VideoSource, predict_video
from pretrain.engine.errors import UserError
from tests.detector.fakes import make_detector, picture

FRAMES, RATE = 24, 12.0


def frame(number: int) -> np.ndarray:
    """A red rectangle moves right, a blue one stands still and is away for three frames."""
    shown = [("red", 5 + 3 * number, 10, 45 + 3 * number, 50)]
    shown += [] if 10 <= number < 13 else [("blue", 90, 70, 150, 115)]
    return picture(shown)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (160, 120))
    for number in range(FRAMES):
        writer.write(cv2.cvtColor(frame(number), cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def run(clip: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    detector = make_detector(cache_size=0)
    predict_video(
        detector=detector, query=detector.query("red, blue"), source=VideoSource.open(str(clip)), out=out, **options
    )
    return [json.loads(line) for line in (out / "clip.jsonl").read_text().splitlines()]


def decoded(path: Path) -> list[tuple[float, np.ndarray]]:
    """(time, RGB) of every frame, by another reader than the one under test."""
    av = pytest.importorskip("av")
    frames = []
    with av.open(str(path)) as file, contextlib.suppress(av.error.InvalidDataError):  # the end of a file that is cut
        for one in file.decode(video=0):
            frames.append((float(one.time), one.to_ndarray(format="rgb24")))
    return frames


def test_video__every_frame_has_boxes_and_time(clip: Path, tmp_path: Path) -> None:
    rows = run(clip, tmp_path / "out", track=False, draw=False)
    red = {row["frame"]: row for row in rows if row["class"] == "red"}
    assert sorted(red) == list(range(FRAMES))
    for number, row in red.items():
        assert row["box"] == pytest.approx([5 + 3 * number, 10, 45 + 3 * number, 50], abs=2)
        assert row["time"] == pytest.approx(number / RATE, abs=0.002) and row["track"] is None
    assert not (tmp_path / "out/clip.mp4").exists()


def test_tracks__id_survives_an_occlusion(clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackers")
    rows = run(clip, tmp_path / "out", draw=False)
    numbers = {name: {r["track"] for r in rows if r["class"] == name and r["track"]} for name in ("red", "blue")}
    assert len(numbers["red"]) == len(numbers["blue"]) == 1 and numbers["red"] != numbers["blue"]
    summary = json.loads((tmp_path / "out/clip.json").read_text())
    by_class = {one["class"]: one for one in summary["tracks"]}
    assert summary["complete"] and by_class["blue"]["last"] == FRAMES - 1
    assert by_class["red"]["frames"] - by_class["blue"]["frames"] == 3


def test_video__every_n_processes_some_and_writes_all(clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    rows = run(clip, tmp_path / "out", every=5, track=False)
    assert {row["frame"] for row in rows} == {0, 5, 10, 15, 20}
    frames = decoded(tmp_path / "out/clip.mp4")
    assert len(frames) == FRAMES
    assert [time for time, _ in frames] == pytest.approx([n / RATE for n in range(FRAMES)], abs=0.01)
    grey = np.abs(frames[7][1].astype(int) - frame(7)).mean(axis=2)
    assert grey[30:60].mean() > 2  # the box of frame 5 is still drawn


def test_video__ctrl_c_leaves_playable_files(clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")

    def stop(done: int, total: int | None, seconds: float) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(clip, tmp_path / "out", track=False, on_frame=stop)
    assert len(decoded(tmp_path / "out/clip.mp4")) == 10
    rows = [json.loads(line) for line in (tmp_path / "out/clip.jsonl").read_text().splitlines()]
    assert max(row["frame"] for row in rows) == 9
    summary = json.loads((tmp_path / "out/clip.json").read_text())
    assert (summary["frames"], summary["complete"]) == (10, False)


def test_video__truncated_output_is_playable(tmp_path: Path) -> None:
    """What a killed process leaves: fragments without an end."""
    pytest.importorskip("av")
    with video.VideoWriter(tmp_path / "a.mp4", rate=10) as writer:
        for number in range(60):
            writer.write(frame(number % FRAMES), number / 10)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert 10 <= len(decoded(tmp_path / "cut.mp4")) < 60


class Camera:
    """What OpenCV gives for a camera: frames without end, no count, no times."""

    def __init__(self) -> None:
        self.read_frames = 0

    def isOpened(self) -> bool:
        return True

    def get(self, key: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray]:
        self.read_frames += 1
        if self.read_frames > 4:
            raise KeyboardInterrupt  # the person at the keyboard
        return True, cv2.cvtColor(frame(0), cv2.COLOR_RGB2BGR)

    def release(self) -> None: ...


def test_camera__runs_until_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: Camera())
    source = VideoSource.open("0")
    assert (source.name, source.live, source.frames, source.rate) == ("camera0", True, None, video.USUAL_RATE)
    detector = make_detector(cache_size=0)
    query = detector.query("red")
    done = predict_video(detector=detector, query=query, source=source, out=tmp_path, track=False, draw=False)
    assert done == 4 and json.loads((tmp_path / "camera0.json").read_text())["complete"]
    times = [json.loads(line)["time"] for line in (tmp_path / "camera0.jsonl").read_text().splitlines()]
    assert times == sorted(times)


def test_video__without_frames_is_refused_and_leaves_nothing(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Camera, "read", lambda self: (False, None))
    monkeypatch.setattr(cv2, "VideoCapture", lambda name: Camera())
    with pytest.raises(UserError, match="clip: contains no readable frame"):
        run(clip, tmp_path / "out", track=False, draw=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_predict__videos_in_a_folder_are_skipped_with_a_warning(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="contains no picture"):
        predict.main([str(tmp_path), "--classes", "red", "--out", str(tmp_path / "out")])
    assert f"1 videos skipped; give their paths to run them, as in wordbox predict {clip}" in capsys.readouterr().err


def test_camera__missing_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="camera 97: cannot be opened as a video; is it connected, and free"):
        VideoSource.open("97")
    assert capfd.readouterr() == ("", "")


def test_tracks__weak_boxes_only_extend_tracks() -> None:
    pytest.importorskip("trackers")
    detector = make_detector(cache_size=0)
    tracker = Tracker(threshold=0.5, rate=10)
    for number, score in enumerate((0.9, 0.9, 0.4)):
        found = detector.answer(frame(number), detector.query("red"), threshold=0.1)
        found.confidence[:] = score
        tracked = tracker.follow(found)
        assert len(tracked.detections) == 1
    assert tracked.track.tolist() == [1] and tracked.labelled().class_name == ["red #1"]
    fresh = Tracker(threshold=0.5, rate=10)
    assert len(fresh.follow(found).detections) == 0


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load(options: object, examples: object, *, masks: bool) -> tuple[object, object]:
        detector = make_detector(cache_size=0, masks=masks)
        return detector, detector.query("red, blue")

    monkeypatch.setattr("ovd.predict_video.load_query", load)
    yield


def test_predict__video_reports_progress(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(clip), "--classes", "red", "--out", str(tmp_path / "out"), "--no-track", "--no-draw"]
    assert predict.main(arguments) == 0
    err = capsys.readouterr().err
    assert f"{FRAMES} of {FRAMES} frames" in err and "0:00 left" in err
    with pytest.raises(UserError, match=r"clip\.jsonl: already exists"):
        predict.main(arguments)
    assert predict.main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--no-draw", "--overwrite"]])
def test_video__is_never_overwritten_by_its_result(more: list[str], clip: Path) -> None:
    own = clip.rename(clip.with_suffix(".mp4"))
    before = own.read_bytes()
    with pytest.raises(UserError, match=r"clip\.mp4: is an input video and would be overwritten"):
        predict.main([str(own), "--classes", "red", "--out", str(clip.parent), "--no-track", *more])
    assert own.read_bytes() == before and [file.name for file in clip.parent.iterdir()] == ["clip.mp4"]


def test_video__foreign_output_file_is_kept(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/clip.mp4").write_bytes(b"kept")
    with pytest.raises(UserError, match=r"clip\.mp4: already exists"):
        predict.main([str(clip), "--classes", "red", "--out", str(tmp_path / "out"), "--no-track"])
    assert (tmp_path / "out/clip.mp4").read_bytes() == b"kept"


@pytest.mark.parametrize("ending", [".mjpeg", ".MJPG"])
def test_video__motion_jpeg_frames_are_all_processed(ending: str, tmp_path: Path) -> None:
    """Its bytes begin as a JPEG picture's do: read as a picture it would be the first frame alone."""
    file = tmp_path / f"clip{ending}"
    frames = [cv2.imencode(".jpg", cv2.cvtColor(frame(n), cv2.COLOR_RGB2BGR))[1].tobytes() for n in range(6)]
    file.write_bytes(b"".join(frames))
    out = tmp_path / "out"
    assert predict.main([str(file), "--classes", "red", "--out", str(out), "--no-track", "--no-draw"]) == 0
    rows = [json.loads(line) for line in (out / "clip.jsonl").read_text().splitlines()]
    assert {row["frame"] for row in rows if row["class"] == "red"} == set(range(6))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["photo.jpg"], "is a video; run pictures and videos separately"),
        (["--format", "yolo"], "--format is for pictures"),
        (["gone.mp4"], "gone.mp4: no such file"),
    ],
)
def test_video__wrong_arguments_are_refused_first(more: list[str], said: str, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        predict.main([str(clip), *more, "--classes", "red", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_video__not_a_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(UserError, match=r"a\.mp4: cannot be opened as a video"):
        VideoSource.open(str(tmp_path / "a.mp4"))


@pytest.mark.parametrize(
    ("package", "options", "said"),
    [
        ("av", {"track": False}, r"pip install av\. Or give --no-draw"),
        ("trackers", {"draw": False}, r"pip install --no-deps trackers pydeprecate\. Or give --no-track"),
    ],
)
def test_video__missing_package_is_named(
    package: str, options: dict[str, bool], said: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=said):
        run(clip, tmp_path / "out", **options)


def test_video__truncated_source_is_reported(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) // 2])
    arguments = [str(clip), "--classes", "red", "--out", str(tmp_path / "out"), "--no-track", "--no-draw"]
    assert predict.main(arguments) == 0
    done = json.loads((tmp_path / "out/clip.json").read_text())["frames"]
    assert 0 < done < FRAMES
    assert f"clip: ends after {done} of the {FRAMES} frames" in capsys.readouterr().err


def test_is_video__not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "frames.mp4").mkdir()
    assert not is_video(str(tmp_path / "frames.mp4"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((name, True) for name in ("a.mp4", "A.MOV", "a.mjpeg", "A.MJPG", "0", "rtsp://host/x")),
        *((name, False) for name in ("a.jpg", "photos", "https://host/a.JPG?b=1")),
    ],
)
def test_is_video__by_extension_index_or_url(text: str, expected: bool) -> None:
    assert is_video(text) is expected


def test_video__a_name_that_is_not_utf_8_is_read(tmp_path: Path) -> None:
    """OpenCV crashed on it: the process was gone without a word."""
    plain = tmp_path / "plain.avi"
    writer = cv2.VideoWriter(str(plain), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))  # type: ignore[attr-defined]
    for grey in range(3):
        writer.write(np.full((48, 64, 3), 40 * grey, np.uint8))
    writer.release()
    odd = tmp_path / os.fsdecode(b"caf\xe9 1?.avi")
    plain.rename(odd)
    with contextlib.closing(VideoSource.open(str(odd))) as source:
        assert len(list(source)) == 3 and source.name == "caf\ufffd 1?"
