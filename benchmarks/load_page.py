# SPDX-License-Identifier: Apache-2.0
"""The page with many people: answers a second, how long they wait, what is refused or lost, memory and files.

Starts ``app.py`` and lets 1, 4, 16 and 64 people ask it, each for a minute (``--people``, ``--seconds``): every second
one with gradio_client, the others with plain HTTP. Each person uploads a picture, asks, and asks on when the answer is
there; who is refused comes back when the page says. Every answer is compared with the one that a single person gets at
the start. The people run in one process on the same machine and take their share of it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
from _common import ROOT, cpu_seconds, parser, percentile, pictures, report

WORDS = (
    "dog, cat, car",
    "apple, banana, cup: mug",
    "tree\nhouse\nboat",
    "bird, fish, -plant",
    "key, umbrella, hat, shoe",
)
TIMES = ("ms", "cached")  # differ from answer to answer
PATIENCE = 300.0  # seconds until an answer counts as lost


class Full(Exception):
    """The page is full; come back after so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"full, {seconds} s")
        self.seconds = seconds


class Asker(Protocol):
    """One person's way to the page."""

    def ask(self, picture: Path, words: str) -> dict[str, Any]:
        """The answer.

        Raises:
            Full: with the time to come back.
        """


class PlainHttp:
    """Upload, ``call/detect``, and the stream with the answer."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/gradio_api", timeout=PATIENCE, trust_env=False)

    def ask(self, picture: Path, words: str) -> dict[str, Any]:
        """See `Asker`."""
        sent = self._http.post("/upload", files={"files": (picture.name, picture.read_bytes())})
        sent.raise_for_status()
        file = {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}
        asked = self._http.post("/call/detect", json={"data": [file, words, None, None]})
        if asked.status_code == 503:
            raise Full(float(asked.headers["retry-after"]))
        asked.raise_for_status()
        stream = self._http.get(f"/call/detect/{asked.json()['event_id']}").text
        kind, _, data = stream.rstrip().rpartition("event: ")[2].partition("\n")
        if kind != "complete":
            raise RuntimeError(f"no answer: {stream[-300:]}")
        answer: dict[str, Any] = json.loads(data.removeprefix("data: "))[0]
        return answer


class GradioClient:
    """The client library that the page's own documentation shows."""

    def __init__(self, url: str) -> None:
        from gradio_client import Client

        self._client = Client(url, verbose=False)

    def ask(self, picture: Path, words: str) -> dict[str, Any]:
        """See `Asker`."""
        from gradio_client import handle_file
        from gradio_client.exceptions import AppError
        from gradio_client.utils import QueueError

        try:
            answer: dict[str, Any] = self._client.predict(handle_file(str(picture)), words, None, api_name="/detect")
        except (QueueError, AppError) as problem:
            raise Full(5.0) from problem  # the client keeps the time to itself
        return answer


@dataclass
class Figures:
    """What happened while so many people asked."""

    people: int
    seconds: float
    in_time: int = 0  # answers within these seconds; the last ones come later
    cpu: float = 0.0  # seconds that the page took of the processor, for all answers and refusals
    accepted: list[float] = field(default_factory=list)  # from the question that was taken to its answer
    waited: list[float] = field(default_factory=list)  # from a person's first try to the answer
    refused: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    different: int = 0

    def row(self) -> str:
        """One line of the table."""
        tries = len(self.accepted) + self.refused + self.lost.total()
        if not self.accepted:
            return f"no answer ({dict(self.lost)})"
        return (
            f"{self.in_time / self.seconds:.2f} answers/s, {self.cpu / len(self.accepted):.2f} s of CPU each; "
            f"taken to answered {_spread(self.accepted)}; "
            f"first try to answered {_spread(self.waited)}; refused {self.refused / tries:.0%}, "
            f"lost {self.lost.total()}, other answers {self.different} of {len(self.accepted)}"
        )


@dataclass
class Page:
    """The process that serves."""

    process: subprocess.Popen[str]
    url: str
    uploads: Path

    def state(self) -> dict[str, float]:
        """Memory in MB, open files, threads, and what lies in the folder of uploads."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        files = [f for f in self.uploads.rglob("ovd-page-*/**/*") if f.is_file()]
        return {
            "memory": int(lines["VmRSS"].split()[0]) / 1024,
            "peak": int(lines["VmHWM"].split()[0]) / 1024,
            "threads": int(lines["Threads"]),
            "open files": len(os.listdir(f"/proc/{self.process.pid}/fd")),
            "uploads": len(files),
            "uploads MB": sum(f.stat().st_size for f in files) / 1e6,
        }

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        return cpu_seconds(self.process.pid)

    def rest(self, seconds: float = 10.0) -> float:
        """Percent of one core that it takes while nobody asks."""
        before = self.cpu()
        time.sleep(seconds)
        return 100 * (self.cpu() - before) / seconds


def start_page(folder: Path, weights: str, threads: int | None) -> tuple[Page, float]:
    """The page, and the seconds until it answered with status 200."""
    command = [sys.executable, "app.py", "--port", "0", "--weights", weights]
    command += ["--threads", str(threads)] if threads else []
    begun = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"TMPDIR": str(folder)}
        )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://[\w.:\[\]]+", line):
            httpx.get(found.group(), trust_env=False, timeout=60).raise_for_status()
            return Page(process, found.group(), folder), time.perf_counter() - begun
    raise SystemExit("error: the page did not start:\n" + (folder / "log.txt").read_text())


def write_questions(folder: Path, count: int) -> list[tuple[Path, str]]:
    """Pictures as JPEG files, each with words."""
    from PIL import Image

    questions = []
    for i, pixels in enumerate(pictures((384, 512), count)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        path = folder / f"question-{i}.jpg"
        path.write_bytes(buffer.getvalue())
        questions.append((path, WORDS[i % len(WORDS)]))
    return questions


def comparable(answer: dict[str, Any]) -> str:
    """What has to be the same in every answer to one question."""
    return json.dumps({key: value for key, value in answer.items() if key not in TIMES}, sort_keys=True)


def person(
    number: int, url: str, questions: list[tuple[Path, str]], right: list[str], figures: Figures,
    start: threading.Barrier, lock: threading.Lock,
) -> None:  # fmt: skip
    """Ask until the time is over; a question that was begun is finished."""
    asker: Asker = GradioClient(url) if number % 2 else PlainHttp(url)
    chance = random.Random(number)
    start.wait()
    end = time.monotonic() + figures.seconds
    while time.monotonic() < end:
        which = chance.randrange(len(questions))
        first = time.monotonic()
        while True:
            tried = time.monotonic()
            try:
                answer = comparable(asker.ask(*questions[which]))
            except Full as full:
                with lock:
                    figures.refused += 1
                if time.monotonic() > end:
                    break
                time.sleep(full.seconds * chance.uniform(0.7, 1.3))
                continue
            except Exception as problem:  # whatever it is, the person has no answer
                with lock:
                    figures.lost[f"{type(problem).__name__}: {problem}"[:80]] += 1
                break
            now = time.monotonic()
            with lock:
                figures.accepted.append(now - tried)
                figures.waited.append(now - first)
                figures.in_time += now <= end
                figures.different += answer != right[which]
            break


def ask_together(
    page: Page, people: int, seconds: float, questions: list[tuple[Path, str]], right: list[str]
) -> Figures:
    """Let so many people ask for so long."""
    figures = Figures(people, seconds)
    barrier, lock = threading.Barrier(people + 1), threading.Lock()
    crowd = [
        threading.Thread(target=person, args=(i, page.url, questions, right, figures, barrier, lock))
        for i in range(people)
    ]
    for one in crowd:
        one.start()
    barrier.wait()
    before = page.cpu()
    for one in crowd:
        one.join()
    figures.cpu = page.cpu() - before
    return figures


def main() -> None:
    """Run all sizes of crowd, and print."""
    flags = parser(__doc__ or "", weights=True)
    flags.add_argument("--people", type=_numbers, default=[1, 4, 16, 64], help="sizes of the crowd (default 1,4,16,64)")
    flags.add_argument("--seconds", type=float, default=60.0, help="for each size of the crowd (default 60)")
    flags.add_argument("--pictures", type=int, default=64, help="different questions (the page remembers 8 pictures)")
    options = flags.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="load-page-"))
    page = None
    try:
        (folder / "questions").mkdir()
        (folder / "page").mkdir()
        questions = write_questions(folder / "questions", options.pictures)
        page, started = start_page(folder / "page", options.weights, options.threads)
        started_cpu = page.cpu()
        time.sleep(5)
        states, rest = [("at rest, before", page.state())], page.rest()
        single = PlainHttp(page.url)
        right = [comparable(single.ask(*question)) for question in questions]
        crowds = []
        for people in options.people:
            crowds.append(ask_together(page, people, options.seconds, questions, right))
            print(f"{people} people: {crowds[-1].row()} {dict(crowds[-1].lost) or ''}", flush=True)
        states.append(("at once after", page.state()))
        time.sleep(10)
        states.append(("10 s later", page.state()))
        rest_after = page.rest()
        log = (folder / "page" / "log.txt").stat().st_size
    finally:
        if page is not None:
            page.process.terminate()
            page.process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
    rows = [
        ("start to HTTP 200", f"{started:.1f} s, {started_cpu:.1f} s of CPU", "below 5 s"),
        ("CPU at rest", f"{rest:.2f} %", "below .3 %"),
    ]
    rows.append(("CPU at rest, afterwards", f"{rest_after:.2f} %", "below .3 %"))
    rows += [(f"{c.people} people", c.row(), "") for c in crowds]
    rows += [(what, "; ".join(f"{k} {v:.0f}" for k, v in state.items()), "") for what, state in states]
    rows.append(("log", f"{log / 1e3:.1f} kB", ""))
    report(
        "The page under load", rows,
        {"crowds": [vars(c) for c in crowds], "states": dict(states), "start": started, "rest": rest}, options.json,
    )  # fmt: skip


def _spread(seconds: list[float]) -> str:
    return f"p50 {percentile(seconds, 0.5):.2f}, p99 {percentile(seconds, 0.99):.2f} s"


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.isdecimal() and int(part) > 0]
    if len(numbers) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 1,4,16,64")
    return numbers


if __name__ == "__main__":
    main()
