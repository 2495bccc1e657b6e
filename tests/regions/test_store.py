# SPDX-License-Identifier: Apache-2.0
"""The region store: round trip, refusal of mismatches, resuming, sharing, damage."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovd.regions import shard, writer
from ovd.regions.crops import embed_regions
from ovd.regions.layout import Identity, StoreSettings, read_sidecar
from ovd.regions.proposals import GroundTruthProposer, select_proposals
from ovd.regions.store import RegionStore
from ovd.regions.writer import WriteReport, estimate, remove_store, write_regions
from pretrain.engine.errors import BadImageError, UserError
from tests.engine.processes import REPOSITORY
from tests.regions.fakes import NoisePictures, RandomProposer, TinyEncoder

TOP = 6


def identity_of(encoder: TinyEncoder, source: NoisePictures, **settings: Any) -> Identity:
    values = {"proposals_per_image": TOP, "crop_size": encoder.image_size, "images_per_shard": 4, **settings}
    return Identity(
        encoder=encoder.fingerprint(),
        dim=encoder.embed_dim,
        proposals="random",
        source=source.fingerprint(),
        settings=StoreSettings(**values),
    )


def write(root: Path, *, length: int = 14, source: Any = None, proposer: Any = None, **options: Any) -> WriteReport:
    encoder, source = options.pop("encoder", None) or TinyEncoder(), source or NoisePictures(length)
    return write_regions(
        root,
        source=source,
        proposer=proposer or RandomProposer(),
        encoder=encoder,
        identity=options.pop("identity", None) or identity_of(encoder, source),
        batch_size=options.pop("batch_size", 16),
        **options,
    )


def content(root: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(root.iterdir())}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order everywhere, and forked children that never meet a thread pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "store"
    assert write(root).complete
    return root


def test_store__regions_come_back_by_picture_id(whole: Path) -> None:
    store, source, encoder = RegionStore.open(whole), NoisePictures(14), TinyEncoder()
    assert len(store) == 14 and list(store) == source.ids and store.dim == 16
    for index in (0, 3, 4, 13):
        image = source.image(index)
        boxes, scores = RandomProposer().propose(image, top=TOP)
        expected = select_proposals(boxes, scores, width=image.shape[1], height=image.shape[0], top=TOP)
        got_boxes, embeddings, got_scores = store[source.ids[index]]
        assert torch.equal(got_boxes, torch.from_numpy(expected.boxes))
        assert torch.equal(got_scores, torch.from_numpy(expected.scores))
        assert len(got_boxes) == len(expected.boxes) <= TOP
        assert embeddings.dtype == torch.float32 and embeddings.shape == (len(expected.boxes), 16)
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(embeddings)), atol=1e-6)
        assert torch.allclose(embeddings, embed_regions(encoder, image, expected.boxes), atol=2e-3)


def test_store__unknown_pictures_raise_key_error(whole: Path) -> None:
    store = RegionStore.open(whole)
    assert 1000 in store and 3 not in store
    with pytest.raises(KeyError, match="no picture 3 "):
        store[3]


def test_store__can_be_pickled_to_other_processes(whole: Path) -> None:
    store = RegionStore.open(whole)
    boxes = store[1000][0]
    sent = bytes(ForkingPickler.dumps(store))
    assert len(sent) < 20_000  # no mapped shard inside
    assert torch.equal(ForkingPickler.loads(sent)[1000][0], boxes)


def test_store__rows_are_padded_to_a_fixed_number(whole: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(whole / "shard-00003.safetensors")
    assert tensors["embeddings"].shape == (2, TOP, 16) and tensors["embeddings"].dtype == torch.float16
    assert tensors["boxes"].shape == (2, TOP, 4) and tensors["boxes"].dtype == torch.float32
    for row, valid in enumerate(tensors["valid"].tolist()):
        assert not tensors["boxes"][row, valid:].any() and not tensors["embeddings"][row, valid:].any()


def test_writer__broken_and_tiny_boxes_are_dropped(tmp_path: Path) -> None:
    class Broken:
        def propose(self, image: np.ndarray, *, top: int) -> tuple[np.ndarray, np.ndarray]:
            boxes = [
                [0, 0, 20, 20],
                [np.nan, 0, 9, 9],
                [5, 5, 6.5, 30],
                [-50, 5, 1, 30],
                [10, 10, 30, 30],
                [9, 9, 5, 30],
            ]
            return np.array(boxes), np.array([0.2, 0.9, 0.9, 0.9, 0.8, 0.9])

    write(tmp_path / "s", length=3, proposer=Broken())
    boxes, _, scores = RegionStore.open(tmp_path / "s")[1000]
    assert boxes.tolist() == [[10, 10, 30, 30], [0, 0, 20, 20]]  # best first
    assert scores.tolist() == pytest.approx([0.8, 0.2])


def test_store__a_picture_without_proposals_has_none(tmp_path: Path) -> None:
    class Empty:
        def propose(self, image: np.ndarray, *, top: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(0, 4), torch.zeros(0)

    assert write(tmp_path / "s", length=3, proposer=Empty()).complete
    boxes, embeddings, scores = RegionStore.open(tmp_path / "s")[1007]
    assert boxes.shape == (0, 4) and embeddings.shape == (0, 16) and scores.shape == (0,)


def test_store__ground_truth_boxes_round_trip(tmp_path: Path) -> None:
    truth = [np.array([[4.5, 5.25, 30, 31], [40, 10, 80, 60]]), np.zeros((0, 4)), np.array([[1, 1, 50.125, 50]])]
    write(tmp_path / "s", length=3, proposer=GroundTruthProposer(truth.__getitem__))
    store = RegionStore.open(tmp_path / "s")
    for index, boxes in enumerate(truth):
        assert np.array_equal(store[1000 + 7 * index][0].numpy(), boxes.astype(np.float32))


def test_settings__decide_the_embedding_of_a_region(tmp_path: Path) -> None:
    encoder, source = TinyEncoder(), NoisePictures(2)
    settings: dict[str, Any] = {"scales": (1.0, 2.0), "crop_mode": "pad", "border": "fill", "normalise_each": True}
    write(tmp_path / "s", source=source, identity=identity_of(encoder, source, **settings))
    boxes, embeddings, _ = RegionStore.open(tmp_path / "s")[1007]
    expected = embed_regions(
        encoder, source.image(1), boxes, scales=(1.0, 2.0), mode="pad", border="fill", normalise_each=True
    )
    assert torch.allclose(embeddings, expected, atol=2e-3)
    assert not torch.allclose(embeddings, embed_regions(encoder, source.image(1), boxes), atol=2e-3)


# --- refusing what does not belong together ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"encoder_fingerprint": "another"}, "encoder: it has '[0-9a-f]{64}', you have 'another'"),
        ({"proposals_fingerprint": "another"}, "proposals: it has 'random', you have 'another'"),
        ({"source_fingerprint": "another"}, "source: it has"),
        ({"settings": {"border": "fill"}}, "settings.border: it has 'clamp', you have 'fill'"),
        ({"settings": {"scales": (1.0,)}}, r"settings.scales: it has \[1.0, 1.5\], you have \[1.0\]"),
        ({"image_ids": [1000, 77]}, "1 pictures are not among the 14 .* such as 77"),
    ],
)
def test_open__with_something_else_is_refused_by_name(whole: Path, wanted: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        RegionStore.open(whole, **wanted)
    with pytest.raises(UserError, match=named):
        RegionStore.open(whole).require(**wanted)


def test_open__another_encoder_is_refused_in_one_line_that_names_both(tmp_path: Path) -> None:
    identity = identity_of(TinyEncoder(), NoisePictures(14))
    write(tmp_path / "s", identity=replace(identity, notes={"encoder": "clip-a", "proposer": "runs/boxes"}))
    with pytest.raises(UserError) as refused:
        RegionStore.open(tmp_path / "s", encoder_fingerprint="f" * 64, encoder_name="runs/b/exported")
    had, have = f"clip-a ({identity.encoder[:12]}…)", "runs/b/exported (ffffffffffff…)"
    assert f"encoder: it has {had}, you have {have}. Use what" in str(refused.value)
    assert "\n" not in str(refused.value)
    other = replace(identity, encoder="e" * 64, proposals="p", notes={"encoder": "clip-b", "proposer": "default"})
    with pytest.raises(UserError, match="proposals: it has runs/boxes .* you have default") as refused:
        write(tmp_path / "s", identity=other)
    assert "clip-b (eeeeeeeeeeee…)" in str(refused.value)


def test_open__with_what_it_was_made_from_is_accepted(whole: Path) -> None:
    encoder, source = TinyEncoder(), NoisePictures(14)
    identity = identity_of(encoder, source)
    store = RegionStore.open(
        whole,
        encoder_fingerprint=identity.encoder,
        proposals_fingerprint="random",
        source_fingerprint=identity.source,
        settings=identity.settings,
        image_ids=source.ids[:3],
    )
    assert store.settings == identity.settings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda i: replace(i, encoder="another"), "encoder: "),
        (lambda i: replace(i, proposals="another"), "proposals: "),
        (lambda i: replace(i, source="another"), "source: "),
        (lambda i: replace(i, dim=17), "dim: it has 16, you have 17"),
        (lambda i: replace(i, settings=replace(i.settings, crop_mode="center")), "settings.crop_mode: "),
        (lambda i: replace(i, settings=replace(i.settings, normalise_each=True)), "settings.normalise_each: "),
        (lambda i: replace(i, settings=replace(i.settings, precision="bf16")), "settings.precision: "),
        (lambda i: replace(i, settings=replace(i.settings, proposals_per_image=5)), "settings.proposals_per_image: "),
    ],
)
def test_resume__with_something_else_is_refused_and_changes_nothing(
    whole: Path, change: Callable[[Identity], Identity], named: str
) -> None:
    before = content(whole)
    with pytest.raises(UserError, match=named):
        write(whole, identity=change(identity_of(TinyEncoder(), NoisePictures(14))))
    assert content(whole) == before


def test_resume__with_other_pictures_is_refused(whole: Path) -> None:
    with pytest.raises(UserError, match=r"images.count: it has 14, you have 15"):
        write(whole, length=15)


def test_settings__notes_are_not_compared(whole: Path) -> None:
    identity = replace(identity_of(TinyEncoder(), NoisePictures(14)), notes={"moved": "elsewhere"})
    assert write(whole, identity=identity) == WriteReport(written=0, reused=4, bad_images=0, complete=True)


def test_open__a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no region store here"):
        RegionStore.open(tmp_path)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"not empty \(thesis.txt"):
        write(tmp_path)
    with pytest.raises(UserError, match="no region store here"):
        remove_store(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "ovd-regions/99"}'])
def test_open__an_unreadable_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a manifest of format"):
        RegionStore.open(tmp_path)


def test_writer__repeated_ids_are_refused(tmp_path: Path) -> None:
    source = NoisePictures(3)
    source.ids = [1, 2, 1]
    with pytest.raises(UserError, match="repeat"):
        write(tmp_path / "s", source=source)


# --- resuming ---------------------------------------------------------------------------------------------------------


class StopsAt(NoisePictures):
    """Fails at one picture, as if the process died there."""

    def __init__(self, length: int, stop: int) -> None:
        super().__init__(length)
        self.stop = stop

    def image(self, index: int) -> np.ndarray:
        if index == self.stop:
            raise RuntimeError("power cut")
        return super().image(index)


@pytest.mark.parametrize("stop", [2, 4, 9, 13])
def test_resume__equals_a_store_written_at_once(tmp_path: Path, whole: Path, stop: int) -> None:
    root = tmp_path / "s"
    with pytest.raises(RuntimeError, match="power cut"):
        write(root, source=StopsAt(14, stop))
    with pytest.raises(UserError, match=rf"incomplete \({stop // 4} of 4 shards\)"):
        RegionStore.open(root)
    report = write(root)
    assert (report.reused, report.written) == (stop // 4, 4 - stop // 4)
    assert content(root) == content(whole)


def test_resume__finished_shards_are_not_computed_again(tmp_path: Path) -> None:
    root = tmp_path / "s"
    with pytest.raises(RuntimeError):
        write(root, source=StopsAt(14, 9))
    source = NoisePictures(14)
    write(root, source=source)
    assert source.opened == 6 + 2  # the two of the estimate


def test_open__an_unfinished_store_can_be_read_in_part(tmp_path: Path) -> None:
    root = tmp_path / "s"
    with pytest.raises(RuntimeError):
        write(root, source=StopsAt(14, 9))
    store = RegionStore.open(root, partial=True)
    assert len(store[1000 + 7 * 7][0]) > 0
    with pytest.raises(KeyError, match="not written yet"):
        store[1000 + 7 * 8]


@pytest.mark.parametrize("point", ["write_bytes", "flush_to_disk", "os.replace", "write_json"])
def test_store__crash_loses_one_shard(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    root, calls = tmp_path / "s", 0
    owner: Any = {"os.replace": shard.os, "write_bytes": Path}.get(point, shard)
    name = point.removeprefix("os.")
    original = getattr(owner, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if any("shard-00001" in str(argument) for argument in args if not isinstance(argument, dict)):
            calls += 1
            if calls == 1:
                raise OSError("disk gone")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(OSError, match="disk gone"):
            write(root)
    assert RegionStore.open(root, partial=True)[1000][0].shape[1] == 4
    write(root)
    assert content(root) == content(whole)


class Slow(NoisePictures):
    """Takes its time for every picture, or for those after the first few."""

    def __init__(self, length: int, pause: float, *, first: int = 0) -> None:
        super().__init__(length)
        self.pause, self.first = pause, first

    def image(self, index: int) -> np.ndarray:
        time.sleep(self.pause if index >= self.first else 0)
        return super().image(index)


def start_writer(root: Path, pause: float, *, first: int = 0) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(root, pause, first))
    process.start()
    return process


def _write_slowly(root: Path, pause: float, first: int) -> None:
    write(root, source=Slow(14, pause, first=first))


def test_resume__after_kill_9_is_bit_exact(tmp_path: Path, whole: Path) -> None:
    root = tmp_path / "s"
    process = start_writer(root, 30, first=8)  # the first two shards at once, then it is long in the third
    deadline = time.monotonic() + 60
    while not ((root / "shard-00001.json").exists() and (root / "shard-00002.lease").exists()):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert list(root.glob("*.lease"))  # it died holding one
    report = write(root, lease_seconds=3600)  # ... which is taken over at once: its owner is dead
    assert report.complete and report.reused >= 2
    assert content(root) == content(whole)


def test_store__leftovers_of_killed_processes_are_removed_when_finished(tmp_path: Path, whole: Path) -> None:
    root = tmp_path / "s"
    shutil.copytree(whole, root)
    foreign_lease(root, 1, age=0)  # killed after its last file, before it gave the lease back
    (root / ".shard-00002.safetensors.0123.tmp").write_bytes(b"half")
    write(root)
    assert content(root) == content(whole)


def test_verify__a_damaged_shard_is_found_and_written_again(tmp_path: Path, whole: Path) -> None:
    root = tmp_path / "s"
    shutil.copytree(whole, root)
    file = root / "shard-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert RegionStore.open(root).verify() == ["shard-00002.safetensors: damaged (its sha256 differs)"]
    lines: list[str] = []
    assert write(root, log=lines.append).written == 1
    assert any("shard-00002.safetensors is damaged" in line for line in lines)
    assert content(root) == content(whole) and RegionStore.open(root).verify() == []


def test_open__a_cut_off_or_missing_shard_is_refused(tmp_path: Path, whole: Path) -> None:
    root = tmp_path / "s"
    shutil.copytree(whole, root)
    file = root / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: missing or of the wrong size"):
        RegionStore.open(root)
    file.unlink()
    with pytest.raises(UserError, match=r"shard-00001.safetensors: missing or of the wrong size"):
        RegionStore.open(root)
    assert write(root).written == 1 and content(root) == content(whole)


def test_open__a_changed_list_of_pictures_is_refused(tmp_path: Path, whole: Path) -> None:
    root = tmp_path / "s"
    shutil.copytree(whole, root)
    file = next(root.glob("images-*.json"))
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    with pytest.raises(UserError, match="missing or damaged"):
        RegionStore.open(root)


def test_store__removal_keeps_foreign_files(tmp_path: Path, whole: Path) -> None:
    root = tmp_path / "s"
    shutil.copytree(whole, root)
    (root / "thesis.txt").write_text("precious")
    remove_store(root)
    assert [file.name for file in root.iterdir()] == ["thesis.txt"]


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_writer__three_processes_write_the_same_store_as_one(tmp_path: Path, whole: Path) -> None:
    root = tmp_path / "s"
    processes = [start_writer(root, 0.02) for _ in range(3)]
    for process in processes:
        process.join(timeout=100)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert content(root) == content(whole)


def test_lease__threads_do_no_shard_twice(tmp_path: Path, whole: Path) -> None:
    root, sources, reports = tmp_path / "s", [Slow(14, 0.01) for _ in range(4)], []
    identity = identity_of(TinyEncoder(), sources[0])

    def work(source: NoisePictures) -> None:
        reports.append(write(root, source=source, encoder=encoders.pop(), identity=identity))

    encoders = [TinyEncoder() for _ in sources]  # made here: seeding is not safe between threads
    threads = [threading.Thread(target=work, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(report.complete for report in reports) and sum(report.written for report in reports) == 4
    assert content(root) == content(whole)


def foreign_lease(root: Path, shard: int, *, age: float) -> Path:
    lease = root / f"shard-{shard:05d}.lease"
    lease.write_text(json.dumps({"host": "another-machine", "pid": 1, "started": "1", "key": "k"}))
    os.utime(lease, (time.time() - age, time.time() - age))
    return lease


def test_lease__a_shard_leased_elsewhere_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "s"
    root.mkdir()
    write(tmp_path / "first", length=14)
    shutil.copy(tmp_path / "first" / "manifest.json", root)
    shutil.copy(next((tmp_path / "first").glob("images-*")), root)
    lease = foreign_lease(root, 2, age=0)
    report = write(root, wait=False)
    assert (report.written, report.complete) == (3, False)
    assert lease.exists() and not (root / "shard-00002.json").exists()


def test_lease__a_stale_one_is_taken_over(tmp_path: Path, whole: Path) -> None:
    root = tmp_path / "s"
    with pytest.raises(RuntimeError):
        write(root, source=StopsAt(14, 5))
    foreign_lease(root, 1, age=1000)
    assert write(root, lease_seconds=300).complete
    assert content(root) == content(whole)


def test_lease__a_long_shard_keeps_its_own_fresh(tmp_path: Path) -> None:
    root, stamps = tmp_path / "s", []

    class Watches(Slow):
        def image(self, index: int) -> np.ndarray:
            lease = root / "shard-00000.lease"
            if lease.exists():
                stamps.append(lease.stat().st_mtime)
                os.utime(lease, (0, 0))
            return super().image(index)

    write(root, source=Watches(4, 0.03), lease_seconds=0.1, batch_size=2)
    assert len(stamps) == 4 and all(stamp > 1e9 for stamp in stamps)


# --- size, disk, pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "per_shard", "top"), [(14, 4, 6), (200, 64, 30), (3, 100, 1)])
def test_estimate__is_close_to_the_real_size(tmp_path: Path, length: int, per_shard: int, top: int) -> None:
    encoder, source = TinyEncoder(embed_dim=64), NoisePictures(length)
    identity = identity_of(encoder, source, images_per_shard=per_shard, proposals_per_image=top)
    plan = estimate(length, identity=identity)
    write_regions(tmp_path / "s", source=source, proposer=RandomProposer(count=3), encoder=encoder, identity=identity)
    real = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    assert real <= plan.total_bytes + 2048 and plan.total_bytes - real < 0.1 * real + 4096
    assert plan.missing_images == length
    assert estimate(length, identity=identity, root=tmp_path / "s").missing_images == 0


def test_estimate__of_coco_is_what_the_literature_says() -> None:
    settings = StoreSettings(proposals_per_image=300, crop_size=224)
    identity = Identity(encoder="e", dim=512, proposals="p", source="s", settings=settings)
    assert estimate(118_287, identity=identity).total_bytes == pytest.approx(
        37.1e9, rel=0.01
    )  # 36.3 GB + boxes, scores


def test_estimate__size_and_time_are_reported_before_the_first_shard(tmp_path: Path) -> None:
    lines: list[str] = []
    write(tmp_path / "s", log=lines.append)
    assert "14 pictures x 6 proposals x 16 numbers: 9.9 kB" in lines[0] and re.search(r"about \d+\.\d min", lines[0])
    assert lines[1].startswith("shard 1/4: 4 pictures in ")


def test_estimate__a_small_disk_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 60_000_000))
    source = NoisePictures(14)
    with pytest.raises(UserError, match=r"are needed but only 60.0 MB are free"):
        write(tmp_path / "s", source=source)
    assert source.opened == 0


class Unreadable(NoisePictures):
    """Some pictures cannot be read."""

    def __init__(self, length: int, bad: set[int]) -> None:
        super().__init__(length)
        self.bad = bad

    def image(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise BadImageError(f"{index}.jpg", "truncated file")
        return super().image(index)


def test_unreadable_pictures__are_listed_and_have_no_regions(tmp_path: Path) -> None:
    report = write(tmp_path / "s", source=Unreadable(14, {5}))
    assert report.complete and report.bad_images == 1
    store = RegionStore.open(tmp_path / "s")
    sidecar = read_sidecar(tmp_path / "s", 1)
    assert sidecar is not None and sidecar["bad_images"] == [[1035, "truncated file"]]
    assert len(store[1035][0]) == 0 and len(store[1042][0]) > 0


def test_unreadable_pictures__too_many_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read, more than 1%"):
        write(tmp_path / "s", source=Unreadable(14, {5, 9}))
    with pytest.raises(UserError, match="cannot be read, more than 1%"):
        write(tmp_path / "s", source=Unreadable(14, {5, 9}))  # and they are not forgotten on resuming


def test_unreadable_pictures__a_store_of_nothing_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 pictures can be read; is it the right folder"):
        write(tmp_path / "s", source=Unreadable(1, {0}))


FORKED_READERS = """
import multiprocessing, sys
from ovd.regions.store import RegionStore

def total(image_id):
    return float(store[image_id][1].sum())

store = RegionStore.open(sys.argv[1])
expected = total(1000)  # its shard is mapped before the others are forked
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(total, [1000] * 4) == [expected] * 4
"""


def test_verify__does_not_disturb_other_workers(whole: Path) -> None:
    """In a process of its own: forked from this one, a worker could wait for a lock of another test's thread."""
    command = [sys.executable, "-c", FORKED_READERS, str(whole)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
