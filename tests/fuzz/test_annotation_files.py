# SPDX-License-Identifier: Apache-2.0
"""Whatever an annotation or a results file holds: the right answer, or one line that names the file.

Never a traceback, and never a number from labels that nobody gave.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovd import evaluate
from ovd.config import DataConfig
from ovd.regions.images import CocoPictures
from ovd.training.inputs import labelled_images
from pretrain.engine.errors import BadImageError, UserError
from tests.fuzz.damage import FUZZ, assert_one_line, files

HEIGHT, WIDTH = 80, 100
TRUTH: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "2.png", "width": WIDTH, "height": HEIGHT, "split": "val"},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": 0,
         "segmentation": [[10, 10, 40, 10, 40, 30, 10, 30]]},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": 0, "score": 0.5,
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": [810, 20, 60, 20, 7090]}},
        {"id": 3, "image_id": 2, "category_id": 2, "bbox": [50, 10, 30, 20], "area": 600, "iscrowd": 1,
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": "]S14PQ2"}},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}  # fmt: skip
RESULTS: list[dict[str, Any]] = [
    {"image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 20], "score": 0.9,
     "segmentation": {"size": [HEIGHT, WIDTH], "counts": [810, 20, 7170]}},
    {"image_id": 2, "category_id": 2, "bbox": [10, 10, 30, 20], "score": 0.8,
     "segmentation": [[10, 10, 40, 10, 40, 30]]},
]  # fmt: skip
TRUTH["annotations"][2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [4000, 20, 3980]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("1.png", "2.png"):
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(folder / name)
    return folder


@contextlib.contextmanager
def written(suffix: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(data)
        yield path


def about(error: UserError, path: Path) -> None:
    assert_one_line(error, path.name, "predictions", "annotations", "split")


def evaluated(truth: Path, results: Path) -> str | None:
    """What evaluation prints; None where it refuses."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        status = evaluate.main(["--annotations", str(truth), "--predictions", str(results)])
    assert status == 0
    return out.getvalue()


@FUZZ
@given(file=files(TRUTH))
def test_fuzz__evaluation_reads_or_refuses_any_annotation_file(file: tuple[str, bytes]) -> None:
    with written(*file) as truth, written(".json", b"[]") as results:
        try:
            assert "all" in (evaluated(truth, results) or "")
        except UserError as error:
            about(error, truth)


@FUZZ
@given(file=files(RESULTS))
def test_fuzz__evaluation_reads_or_refuses_any_results_file(file: tuple[str, bytes]) -> None:
    with written(".json", json.dumps(TRUTH).encode()) as truth, written(*file) as results:
        try:
            assert "all" in (evaluated(truth, results) or "")
        except UserError as error:
            about(error, results)


@FUZZ
@given(file=files(TRUTH), split=st.sampled_from(["all", "ovcoco"]))
def test_fuzz__training_and_embedding_read_or_refuse_any_annotation_file(
    file: tuple[str, bytes], split: str, pictures: Path
) -> None:
    with written(*file) as path, contextlib.redirect_stderr(io.StringIO()):
        try:
            data = DataConfig(kind="coco", labels="all", images=str(pictures), annotations=str(path), split=split)
            images = labelled_images(data)
            for index in range(len(images)):
                with contextlib.suppress(BadImageError):
                    one = images.load(index)
                    assert one.masks.shape == (len(one.boxes), HEIGHT, WIDTH) and len(one.classes) == len(one.boxes) > 0
                    assert np.isfinite(one.boxes).all() and (one.boxes[:, 2:] > one.boxes[:, :2]).all()
        except UserError as error:
            about(error, path)
        try:
            source = CocoPictures(path, pictures)
            for index in range(len(source.ids)):
                assert source.boxes(index).shape[1] == 4
        except UserError as error:
            about(error, path)
