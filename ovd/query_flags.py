# SPDX-License-Identifier: Apache-2.0
"""What a command looks for: its flags, shared by ``predict`` and ``label``, and the detector with the query."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ovd.runtime.choice import Runtime
from pretrain.engine.errors import UserError
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
    words.add_argument(
        "--classes",
        help='"dog, mug: cup, -poster": synonyms after a colon, minus excludes; "everything": all words known',
    )
    words.add_argument("--vocabulary", type=Path, help="file with names, one a line, or a saved vocabulary (.json)")
    flags.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="[NAME=]CROP",
        help="a picture of the thing to find, may be given often, also beside words; crops of one NAME are averaged, "
        "the file's name is the default; --example=-NAME=CROP excludes",
    )
    flags.add_argument("--threshold", type=share, default=None, help="lowest score (default: the calibrated one)")
    flags.add_argument("--weights", default="default", help="name of shipped weights, or a folder written by ovd.train")
    add_encoder_flag(flags.add_argument)
    add_sides_flag(flags.add_argument)
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    flags.add_argument(
        "--runtime",
        choices=get_args(Runtime),
        default="auto",
        help="what runs the networks; onnx-int8: in 8 bits (default auto)",
    )
    flags.add_argument("--threads", type=integer(1), default=None, help="CPU threads (default: all cores)")


def add_encoder_flag(add: Callable[..., argparse.Action]) -> None:
    """``--encoder``, of every command that runs a detector."""
    add(
        "--encoder",
        metavar="SPEC",
        help="name crops of the boxes by another image-text encoder: open_clip:MODEL:TAG (fetched once, its size is "
        "said first), open_clip:MODEL:FILE, or a folder (slow on a CPU)",
    )


def add_sides_flag(add: Callable[..., argparse.Action]) -> None:
    """``--sides``, of every command that runs a detector."""
    add(
        "--sides",
        type=integer(1),
        nargs="+",
        metavar="N",
        help="longest sides, in pixels, at which a detector of photographs looks for boxes: 416 is fast, 832 640 416 "
        "finds smaller things (default: as shipped, 640 416)",
    )


def check_words(options: argparse.Namespace) -> tuple[Example, ...]:
    """Report mistakes in words and examples before anything slow is loaded; returns the examples.

    Raises:
        UserError: nothing to look for, or words or crops that cannot be read.
    """
    if options.vocabulary is None and options.classes is None and not options.example:
        raise UserError('nothing to look for: give --classes "mug, lamp", --vocabulary FILE or --example CROP')
    from ovd.examples import parse_examples
    from ovd.vocabulary import Vocabulary

    examples = parse_examples([named_example(text) for text in options.example])
    if options.vocabulary is not None:
        Vocabulary.load(options.vocabulary)
    elif not any(not e.negative for e in examples):
        Vocabulary.parse(options.classes or "")
    return tuple(examples)


def load_query(options: argparse.Namespace, examples: tuple[Example, ...], *, masks: bool) -> tuple[Detector, Query]:
    """The detector, and what it is asked: the words are read again, with the detector's prompts.

    Args:
        options: of `add_query_flags`.
        examples: of `check_words`.
        masks: False finds boxes only, in less time.
    """
    from ovd.detector import Detector
    from ovd.vocabulary import Vocabulary

    detector = Detector.load(
        options.weights,
        device=options.device,
        runtime=options.runtime,
        threads=options.threads,
        masks=masks,
        cache_size=0,
        encoder=options.encoder,
        sides=options.sides,
    )
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
        raise UserError(f"--example {text}: no such file {str(path)!r}; expected NAME=CROP or CROP, e.g. mug=mug.png")
    return (name if equals and name.strip() else path.stem), path
