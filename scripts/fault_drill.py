# SPDX-License-Identifier: Apache-2.0
"""Kill trainings at random moments, take their disk away, damage their checkpoints, and see whether they survive.

    python scripts/fault_drill.py                              25 kills of each kind of training, and all other faults
    python scripts/fault_drill.py --kinds ssl --kills 2 --faults kill term        some of it

Each kind of training (SSL, CLIP, Mask R-CNN, DETR) is a real command on a few tiny pictures, `python -m pretrain.train`
or `python -m ovd.train`. What must hold: a run that was killed, however often, ends with the weights of one that was
not, bit for bit; every refusal is one line and status 2; no fault costs the last good checkpoint. Prints a table, and
exits with status 1 when anything does not hold. Needs Linux; the faults of disks need `unshare` and its right to mount.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.engine.checkpoint import newest, step_folders, verify
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import sha256_of

LOOP = ["loop.workers=0", "loop.threads=1", "loop.device=cpu", "loop.log_every=1", "optim.warmup_steps=0"]
DETECTION = [
    "data.kind=coco", "data.images={data}", "data.annotations={data}/boxes.json", "data.split=all", "data.labels=all",
    "data.short_side=64", "data.long_side=96", "data.extra_styles=false", "loop.batch_size=2", "loop.precision=fp32",
]  # fmt: skip
KINDS: dict[str, list[str]] = {
    "ssl": [
        "pretrain.train", "--config", "pretrain/simclr.yaml", "method.hidden=32", "method.dim=16",
        "method.views=[{{size: 24, count: 2}}]", "data={{kind: folder, root: {data}}}", "watch.probe_every=0",
        "loop.batch_size=8",
    ],
    "clip": [
        "pretrain.train", "--config", "paper/clip.yaml", "data={{kind: caption_table, path: {data}/captions.csv}}",
        "method.encoder.embed_dim=16", "method.encoder.image={{kind: vit, patch_size: 8, width: 32, layers: 1, "
        "heads: 2, image_size: 32}}", "method.encoder.text={{kind: transformer, width: 32, layers: 1, heads: 2}}",
        "method.chunk=null", "loop.batch_size=8", "loop.precision=fp32",
    ],
    "rcnn": ["ovd.train", "--config", "mask_rcnn.yaml", *DETECTION],
    "detr": [
        "ovd.train", "--config", "detr.yaml", *DETECTION, "cache=null", "model.width=32", "model.heads=2",
        "model.ffn=48", "model.encoder_layers=1", "model.decoder_layers=1",
    ],
}  # fmt: skip
KEEP = 2
LIMIT = 600.0  # seconds after which a run counts as hanging
SAVED_WITHIN = 30.0  # seconds from SIGTERM to the end: what Kubernetes gives


@dataclass
class Outcome:
    """How often a fault was tried, and what did not hold."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.wrong.append(otherwise)


def make_data(folder: Path) -> None:
    """Twelve noise pictures with boxes and captions."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    names = [f"{number:02}.png" for number in range(12)]
    for name in names:
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / name)
    truth = {
        "images": [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [8, 8, 30, 24], "area": 720, "iscrowd": 0}
            for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (folder / "boxes.json").write_text(json.dumps(truth))
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a cat {name}\n" for name in names))


class Run:
    """A training in a process of its own, forked from this one, which has the libraries loaded already."""

    def __init__(self, kind: str, *, data: Path, out: Path, steps: int, more: Sequence[str] = (), log: Path) -> None:
        module, *rest = (part.format(data=data) for part in KINDS[kind])
        self.out, self.log = out, log
        arguments = [*rest, *LOOP, f"loop.steps={steps}", "loop.save_every=1", f"loop.keep={KEEP}", f"out={out}", *more]
        self.begun = time.monotonic()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._child(module, arguments)

    def _child(self, module: str, arguments: list[str]) -> None:
        os.setsid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status: object = 1
        try:
            from ovd import train as detectors
            from pretrain import train as encoders

            run_cli(detectors.main if module == "ovd.train" else encoders.main, arguments)
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)

    def ended(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = None if pid == 0 else os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """Exit status; None when ``until`` came true before. One that hangs is killed, and its status is that of it."""
        while (status := self.ended()) is None:
            if until():
                return None
            if time.monotonic() - self.begun > LIMIT:
                self.kill()
            time.sleep(0.02)
        return status

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to the whole process group."""
        os.killpg(self.pid, signum)

    def said(self) -> str:
        """Its output."""
        return self.log.read_text(errors="replace")

    def saved(self) -> int:
        """The step of its newest checkpoint, whole or not; 0 without."""
        steps = [step for step, _ in step_folders(self.out / "checkpoints")]
        return max(steps, default=0)


def weights_of(out: Path) -> str:
    """Of what the run exported, and of its last checkpoint."""
    last = newest(out / "checkpoints", warn=lambda _: None)
    assert last is not None
    return sha256_of(out / "exported" / "model.safetensors") + sha256_of(last.folder / "model.safetensors")


@dataclass(kw_only=True)
class Drill:
    """One kind of training under every fault.

    Attributes:
        kind: a key of `KINDS`.
        folder: where everything is written.
        steps: of a run.
        kills: that are wanted.
        dice: of the moments.
    """

    kind: str
    folder: Path
    steps: int
    kills: int
    dice: random.Random
    expected: str = ""
    seconds: float = 0.0

    def start(self, name: str, *more: str, folder: Path | None = None, log: Path | None = None) -> Run:
        """Begin a run, or go on with ``--resume``."""
        out = (folder or self.folder) / f"{self.kind}_{name}"
        log = log or self.folder / f"{out.name}.log"
        return Run(self.kind, data=self.folder / "data", out=out, steps=self.steps, more=more, log=log)

    def undisturbed(self) -> Outcome:
        """What every other run has to end with."""
        outcome = Outcome(tried=1)
        run = self.start("whole")
        status = run.wait()
        self.seconds = time.monotonic() - run.begun
        if status != 0:
            raise UserError(f"{self.kind}: the undisturbed run ended with status {status}: {run.said()[-500:]}")
        self.expected = weights_of(run.out)
        outcome.notes["seconds"] = round(self.seconds, 1)
        return outcome

    def finish(self, outcome: Outcome, name: str, *, folder: Path | None = None, what: str) -> None:
        """Resume to the end and compare."""
        run = self.start(name, "--resume", folder=folder)
        status = run.wait()
        outcome.expect(status == 0, f"{what}: resuming ended with {status}: {run.said()[-300:]}")
        if status == 0:
            outcome.expect(weights_of(run.out) == self.expected, f"{what}: other weights")
            left = len(step_folders(run.out / "checkpoints"))
            outcome.expect(left == KEEP, f"{what}: {left} checkpoints left")
        shutil.rmtree(run.out, ignore_errors=True)

    def killed(self) -> Outcome:
        """kill -9 at random moments, of runs that go on, until there were enough; each run to its end."""
        outcome = Outcome()
        after_a_checkpoint = 0
        while outcome.tried < self.kills:
            for _ in range(4):  # kills of one run
                run = self.start("killed", "--resume")
                moment = run.begun + self.dice.uniform(0.02, 1.0) * self.seconds
                status = run.wait(lambda moment=moment: time.monotonic() > moment)  # type: ignore[misc]
                if status is not None:
                    outcome.expect(status == 0, f"ended with {status}: {run.said()[-300:]}")
                    break
                run.kill()
                run.wait()
                outcome.tried += 1
                after_a_checkpoint += run.saved() > 0
                if outcome.tried == self.kills:
                    break
            self.finish(outcome, "killed", what=f"after kill {outcome.tried}")
        outcome.notes["after a checkpoint"] = after_a_checkpoint
        return outcome

    def terminated(self, times: int = 3) -> Outcome:
        """SIGTERM in the middle: status 143, a checkpoint of the step that was begun, within the limit."""
        outcome, longest = Outcome(), 0.0
        for _ in range(min(times, self.kills)):
            run = self.start("terminated", "--resume")
            wanted = run.saved() + self.dice.randrange(1, self.steps - 2)
            if run.wait(lambda run=run, wanted=wanted: run.saved() >= wanted) is None:  # type: ignore[misc]
                sent = time.monotonic()
                run.kill(signal.SIGTERM)
                status = run.wait()
                longest = max(longest, time.monotonic() - sent)
                outcome.tried += 1
                outcome.expect(status == 143, f"SIGTERM: status {status}: {run.said()[-300:]}")
                outcome.expect("continue with --resume" in run.said(), "SIGTERM: it does not say how to go on")
                verify(run.out / "checkpoints" / f"step_{run.saved()}")
            self.finish(outcome, "terminated", what="after SIGTERM")
        outcome.expect(longest < SAVED_WITHIN, f"SIGTERM: {longest:.0f} s until it had saved")
        outcome.notes["longest, seconds"] = round(longest, 2)
        return outcome

    def two_in_one_folder(self) -> Outcome:
        """The second is refused, the first is not disturbed."""
        outcome = Outcome(tried=1)
        first = self.start("two")
        first.wait(lambda: first.saved() > 0)
        first_log = first.log.rename(first.log.with_suffix(".first"))
        second = self.start("two", "--resume")
        status = second.wait()
        refused = status == 2 and "another training writes here" in second.said()
        outcome.expect(refused or first.ended() is not None, f"the second ended with {status}: {second.said()[-300:]}")
        outcome.expect(first.wait() == 0, f"the first was disturbed: {first_log.read_text()[-300:]}")
        outcome.expect(weights_of(first.out) == self.expected, "the first has other weights")
        shutil.rmtree(first.out)
        return outcome

    def flipped(self, bits: int = 30) -> Outcome:
        """A bit of each file of the newest checkpoint: noticed, told, and the one before is taken."""
        outcome = Outcome()
        root = self.folder / f"{self.kind}_whole" / "checkpoints"
        last = root / f"step_{self.steps}"
        for name in sorted(path.name for path in last.iterdir()):
            good = (last / name).read_bytes()
            for number in range(bits):
                bit = self.dice.randrange(8 * len(good))
                with open(last / name, "r+b") as file:
                    file.seek(bit // 8)
                    file.write(bytes([good[bit // 8] ^ 1 << bit % 8]))
                told: list[str] = []
                try:
                    found = newest(root, warn=told.append)
                except UserError as error:
                    found, told = None, [str(error)]
                outcome.tried += 1
                outcome.expect(
                    found is not None and found.step == self.steps - 1 and len(told) == 1 and str(last) in told[0],
                    f"{name}, bit {bit}: {told}",
                )
                if number == 0:  # and the whole way once
                    shutil.copytree(root.parent, self.folder / f"{self.kind}_flipped", symlinks=True)
                    self.finish(outcome, "flipped", what=f"a flipped bit in {name}")
                (last / name).write_bytes(good)
        return outcome

    def full_disk(self) -> Outcome:
        """A disk that fills up while a run writes there; then it goes on."""
        outcome = Outcome()
        used = sum(path.stat().st_size for path in (self.folder / f"{self.kind}_whole").rglob("*") if path.is_file())
        roomy = 2 * used + (64 << 20)
        for share in (0.1, 0.5, 0.9):  # of a checkpoint that still fits
            with disk(self.folder / f"{self.kind}_disk", size=roomy) as small:
                run = self.start("disk", folder=small)
                if run.wait(lambda run=run: run.saved() > 1) is None:  # type: ignore[misc]
                    _mount(f"remount,size={_used(small) + int(share * used / KEEP)}", small)
                status, said = run.wait(), run.said()
                outcome.tried += 1
                lines = [line for line in said.splitlines() if line.startswith("error: ")]
                outcome.expect(status == 2 and len(lines) == 1, f"status {status}: {said[-300:]}")
                outcome.expect("Traceback" not in said, f"a traceback: {said[-900:]}")
                _mount(f"remount,size={roomy}", small)
                self.finish(outcome, "disk", folder=small, what="after a full disk")
        return outcome

    def read_only_disk(self) -> Outcome:
        """Nothing can be written: neither a new run nor one that would go on begins; later it goes on."""
        outcome = Outcome()
        with disk(self.folder / f"{self.kind}_disk", size=1 << 31) as there:
            shutil.copytree(self.folder / f"{self.kind}_whole", there / f"{self.kind}_disk", symlinks=True)
            shutil.rmtree(there / f"{self.kind}_disk" / "checkpoints" / f"step_{self.steps}")
            logs = self.folder / f"{self.kind}_read_only.log"
            _mount("remount,ro", there)
            for name in ("new", "disk"):
                run = self.start(name, "--resume", folder=there, log=logs)
                status, said = run.wait(), run.said()
                outcome.tried += 1
                lines = [line for line in said.splitlines() if line.startswith("error: ")]
                outcome.expect(
                    status == 2 and len(lines) == 1 and "Traceback" not in said, f"status {status}: {said[-300:]}"
                )
            _mount("remount,rw", there)
            self.finish(outcome, "disk", folder=there, what="after a read-only disk")
        return outcome


@contextmanager
def disk(where: Path, *, size: int) -> Iterator[Path]:
    """A file system of its own, in memory."""
    where.mkdir(exist_ok=True)
    _mount(f"size={size}", where)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def _mount(options: str, where: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], check=True)


def _used(where: Path) -> int:
    status = os.statvfs(where)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def can_mount() -> bool:
    """Whether this process may mount; `main` begins in a name space of its own where it may."""
    return shutil.which("mount") is not None and os.environ.get("FAULT_DRILL_MOUNTS") == "1"


FAULTS: dict[str, tuple[str, Callable[[Drill], Outcome]]] = {
    "kill": ("kill -9", Drill.killed),
    "term": ("SIGTERM", Drill.terminated),
    "two": ("two runs in one folder", Drill.two_in_one_folder),
    "flip": ("flipped bit", Drill.flipped),
    "full": ("full disk", Drill.full_disk),
    "readonly": ("read-only disk", Drill.read_only_disk),
}
OF_DISKS = ("full", "readonly")


def drill(one: Drill, faults: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Faults of one kind of training, by what they are."""
    yield "undisturbed", one.undisturbed()
    for fault in faults:
        if fault not in OF_DISKS or can_mount():
            what, meet = FAULTS[fault]
            yield what, meet(one)
    shutil.rmtree(one.folder / f"{one.kind}_whole")


def main(argv: list[str]) -> int:
    """Parse, drill, print; returns the exit status."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="of training")
    flags.add_argument("--faults", nargs="+", choices=tuple(FAULTS), default=list(FAULTS), help="to meet")
    flags.add_argument("--kills", type=int, default=25, help="of each kind")
    flags.add_argument("--steps", type=int, default=8, help="of a run, each with a checkpoint")
    flags.add_argument("--seed", type=int, default=0, help="of the moments and bits")
    flags.add_argument("--folder", type=Path, default=None, help="to work in (default: a new one under /tmp)")
    options = flags.parse_args(argv)
    if set(OF_DISKS) & set(options.faults) and shutil.which("unshare") and "FAULT_DRILL_MOUNTS" not in os.environ:
        inside = ["unshare", "--user", "--map-root-user", "--mount"]
        allowed = subprocess.run([*inside, "true"], check=False, capture_output=True).returncode == 0
        os.environ["FAULT_DRILL_MOUNTS"] = "1" if allowed else "0"
        if allowed:
            return subprocess.run([*inside, sys.executable, *sys.argv], check=False).returncode
    import torch

    import pretrain.train  # noqa: F401  (loaded once, for all that are forked)

    torch.set_num_threads(1)  # a fork must not find other threads in the middle of something
    folder = Path(tempfile.mkdtemp(prefix="fault_drill_", dir=options.folder))
    wrong = 0
    try:
        make_data(folder / "data")
        print(f"| training | fault | tried | did not hold | |\n|{' --- |' * 5}", flush=True)
        for kind in options.kinds:
            dice = random.Random(f"{options.seed} {kind}")
            one_kind = Drill(kind=kind, folder=folder, steps=options.steps, kills=options.kills, dice=dice)
            for fault, one in drill(one_kind, options.faults):
                notes = ", ".join(f"{name} {value:g}" for name, value in one.notes.items())
                print(f"| {kind} | {fault} | {one.tried} | {len(one.wrong)} | {notes} |", flush=True)
                for text in one.wrong:
                    print(f"{kind}, {fault}: {text}", file=sys.stderr)
                wrong += len(one.wrong)
        if not can_mount() and set(OF_DISKS) & set(options.faults):
            print("full and read-only disks were not tried: this needs `unshare` and its right to mount")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    run_cli(main)
