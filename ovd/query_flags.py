# SPDX-License-Identifier: Apache-2.0
"""Flags that commands share: the detector, its device and the classes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ovd.runtime.choice import Runtime
from pretrain.engine.errors import UserError, absent
from pretrain.engine.flags import CommandParser, integer, share

if TYPE_CHECKING:
    from ovd.detector import Detector
    from ovd.examples import Example
    from ovd.query import Query

RARE = ("vocabulary", "encoder", "sides", "device", "runtime", "threads")
"""Of the shared flags those that ``--help-all`` shows."""


def add_query_flags(flags: CommandParser) -> None:
    """Words, examples, threshold, weights, device."""
    words = flags.add_mutually_exclusive_group()
    words.add_argument("--classes", metavar="WORDS",
        help='class names, "dog, mug: cup, -poster": synonyms after a colon, a minus excludes; "everything": all '
        "known words")  # fmt: skip
    words.add_argument("--vocabulary", type=Path, help="file with one name per line, or a saved vocabulary (.json)")
    flags.add_argument("--example", action="append", default=[], metavar="[NAME=]CROP",
        help="picture of an object to find; may be repeated, and combined with words. Crops of one NAME are averaged "
        "(default: the file name); --example=-NAME=CROP excludes")  # fmt: skip
    flags.add_argument("--threshold", type=share, default=None, help="minimum score (default: calibrated)")
    add_detector_flags(flags.add_argument)


def add_detector_flags(add: Callable[..., argparse.Action], *, sides: bool = True) -> None:
    """Weights, encoder, sizes of the pictures (unless ``sides`` is False), device, runtime and threads."""
    add("--weights", default="default", help="name of shipped weights, or a folder exported by ovd.train")
    add_encoder_flag(add)
    if sides:
        add_sides_flag(add)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--runtime", choices=get_args(Runtime), default="auto",
        help="inference runtime; onnx-int8: in 8 bits (default auto)")  # fmt: skip
    add("--threads", type=integer(1, 1024), default=None, help="CPU threads (default: all cores)")


def add_encoder_flag(add: Callable[..., argparse.Action]) -> None:
    """``--encoder``, of every command that runs a detector."""
    add("--encoder", metavar="SPEC",
        help="classify crops of the boxes with another image-text encoder: open_clip:MODEL:TAG (prints its size, "
        "downloads it once), open_clip:MODEL:FILE, or a folder; slow on a CPU")  # fmt: skip


def add_sides_flag(add: Callable[..., argparse.Action]) -> None:
    """``--sides``, of every command that runs a detector."""
    add("--sides", type=integer(1), nargs="+", metavar="N",
        help="input sizes (longest side, pixels) of a detector of photographs: 416 is fast, 832 640 416 finds smaller "
        "objects (default: 640, as shipped)")  # fmt: skip


def check_words(options: argparse.Namespace) -> tuple[Example, ...]:
    """Report mistakes in words and examples before anything slow is loaded; returns the examples.

    Raises:
        UserError: no classes, or words or crops that cannot be read.
    """
    if options.vocabulary is None and options.classes is None and not options.example:
        raise UserError('no classes: give --classes "mug, lamp", --vocabulary FILE or --example CROP')
    from ovd.examples import parse_examples
    from ovd.vocabulary import Vocabulary

    examples = parse_examples([named_example(text) for text in options.example])
    if options.vocabulary is not None:
        Vocabulary.load(options.vocabulary)
    elif not any(not e.negative for e in examples):
        Vocabulary.parse(options.classes or "")
    return tuple(examples)


def load_detector(
    options: argparse.Namespace, *, weights: str | Path | None = None, masks: bool = True, cache_size: int = 8
) -> Detector:
    """The detector that `add_detector_flags` describe.

    Args:
        options: the flags.
        weights: others than theirs.
        masks, cache_size: see `ovd.Detector.load`.
    """
    from ovd.detector import Detector

    return Detector.load(
        options.weights if weights is None else weights,
        device=options.device,
        runtime=options.runtime,
        threads=options.threads,
        masks=masks,
        cache_size=cache_size,
        encoder=options.encoder,
        sides=options.sides,
    )


def load_query(options: argparse.Namespace, examples: tuple[Example, ...], *, masks: bool) -> tuple[Detector, Query]:
    """The detector and its query; the words are read again, with the detector's prompts.

    Args:
        options: of `add_query_flags`.
        examples: of `check_words`.
        masks: False finds boxes only, in less time.
    """
    from ovd.vocabulary import Vocabulary

    detector = load_detector(options, masks=masks, cache_size=0)
    words: Vocabulary | str | None = options.classes
    if options.vocabulary is not None:
        words = Vocabulary.load(options.vocabulary, templates=detector.templates)
    return detector, detector.query(words, examples)


def named_example(text: str) -> tuple[str, Path]:
    """``NAME=CROP`` or ``CROP`` → (name, path); a file whose own name has an equals sign needs a NAME in front.

    Raises:
        UserError: no such file.
    """
    name, equals, file = text.partition("=")
    path = Path(file if equals else text)
    if not path.is_file():
        fact = absent(path, f"no such file {str(path)!r}; expected NAME=CROP or CROP, e.g. mug=mug.png")
        raise UserError(f"--example {text}: {fact}")
    return (name if equals and name.strip() else path.stem), path
