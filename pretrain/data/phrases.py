# SPDX-License-Identifier: Apache-2.0
"""Phrases and their teacher embeddings: what the text tower is distilled from.

A phrase file is UTF-8 text, one `phrase<TAB>weight<TAB>definition` per line; weight (1) and definition (none) may be
left out. The target of a phrase with a definition is the normalised sum of the teacher's embeddings of both: an encoder
embeds a bare rare noun badly, but its dictionary definition well. A target file is one safetensors file with
`embeddings` (P, D) float16 and `phrases` (bytes, one text per line), so that the two cannot be separated.

`python -m pretrain.data.phrases --wordnet DIR --out FILE` writes the phrase file of the shipped text tower.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pretrain.data.nouns import ARTIFACT_LIKE, DRAWABLE, SENSES_OF_SUPERCATEGORY, Synset, WordNet
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_text

if TYPE_CHECKING:
    import numpy as np
    import torch

# Sentences around a noun; the tower must not be thrown off by them. The ViLD and CLIP prompts are of these forms.
PROMPTS = (
    "a {}", "the {}", "a photo of a {}", "a photo of the {}", "a picture of a {}", "a drawing of a {}",
    "a sticker of a {}", "an icon of a {}", "a cartoon {}", "a small {}", "a large {}", "there is a {} in the scene",
    "a photo of a {} in the scene", "a close-up of a {}", "a {} on a photo", "many {}",
)  # fmt: skip


class Phrase(NamedTuple):
    """A text to learn, how often to draw it, and a sentence that defines it (or "")."""

    text: str
    weight: float = 1.0
    definition: str = ""


@dataclass(frozen=True)
class TeacherTargets:
    """`phrases` (P,) and their unit `embeddings` (P, D) float16."""

    phrases: tuple[str, ...]
    embeddings: torch.Tensor


def read_phrases(path: str | Path) -> list[Phrase]:
    """Read `phrase<TAB>weight<TAB>definition` lines.

    Raises:
        UserError: the file is unreadable, or a weight is no positive number.
    """
    phrases = []
    for number, line in enumerate(read_text(path, hint="phrases, one a line").splitlines(), 1):
        text, _, columns = line.partition("\t")
        weight, _, definition = columns.partition("\t")
        if not text.strip():
            continue
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = -1.0
        if not 0 < value < math.inf:
            raise UserError(f"{path}:{number}: the weight {weight!r} is not a positive number")
        phrases.append(Phrase(text, value, definition))
    return phrases


def write_phrases(path: str | Path, phrases: Sequence[Phrase]) -> None:
    """Write what `read_phrases` reads."""
    lines = [f"{p.text}\t{p.weight:.3f}" + (f"\t{p.definition}" if p.definition else "") + "\n" for p in phrases]
    Path(path).write_text("".join(lines), encoding="utf-8")


def write_targets(path: str | Path, phrases: Sequence[str], embeddings: np.ndarray) -> None:
    """Write a target file through a temporary name.

    Args:
        path: A `.safetensors` file.
        phrases: P phrases without line breaks.
        embeddings: (P, D) unit rows.
    """
    import torch

    from pretrain.engine.checkpoint import save_weights

    if len(phrases) != len(embeddings):
        raise ValueError(f"{len(phrases)} phrases but {len(embeddings)} embeddings")
    text = torch.frombuffer(bytearray("\n".join(phrases).encode()), dtype=torch.uint8)
    save_weights(Path(path), {"embeddings": torch.from_numpy(embeddings).half(), "phrases": text}, {"kind": "targets"})


def read_targets(path: str | Path) -> TeacherTargets:
    """Read what `write_targets` wrote.

    Raises:
        UserError: the file is missing or holds something else.
    """
    from pretrain.engine.checkpoint import load_weights

    if not Path(path).exists():
        raise UserError(
            f"no teacher targets at {path}: write them with scripts/teacher_embeddings.py (docs/guide/clip.md)"
        )
    tensors, _ = load_weights(Path(path))
    if not {"embeddings", "phrases"} <= tensors.keys():
        raise UserError(f"{path} holds {sorted(tensors)}, not the `embeddings` and `phrases` of a target file")
    phrases = tuple(bytes(tensors["phrases"].numpy()).decode().split("\n"))
    if len(phrases) != len(tensors["embeddings"]):
        raise UserError(f"{path}: {len(phrases)} phrases but {len(tensors['embeddings'])} embeddings")
    return TeacherTargets(phrases, tensors["embeddings"])


LONGEST_DEFINITION = 120  # characters
PROMPTED = 30_000  # WordNet nouns that come once more in a prompt


def define(synset: Synset) -> str:
    """`dog: a member of the genus Canis …`, cut at a word."""
    text = f"{synset.lemmas[0]}: {synset.definition}"
    return text if len(text) <= LONGEST_DEFINITION else text[:LONGEST_DEFINITION].rsplit(" ", 1)[0]


def build_phrases(
    wordnet: WordNet,
    nouns: Sequence[str],
    supercategories: Sequence[str],
    captions: Sequence[tuple[str, str | None]],
    *,
    definitions: int | None = None,
    seed: int = 0,
) -> list[Phrase]:
    """The training phrases, most useful first.

    The class names alone and in every prompt, the captions, every WordNet noun alone, and the `PROMPTED` most useful
    WordNet nouns once more in one drawn prompt each. Class names are defined by the sense that fits their
    supercategory, other nouns by their most common sense if it is a thing one can draw.

    Args:
        wordnet: the dictionary.
        nouns: class names.
        supercategories: one per class.
        captions: texts with the one class they name, or None when they name several.
        definitions: use only the first so many different definitions (those of the most useful phrases); None: all.
        seed: of the prompts drawn.
    """
    rng = random.Random(seed)
    phrases: dict[str, Phrase] = {}

    def add(text: str, weight: float, definition: str) -> None:
        key = " ".join(text.split())
        old = phrases.get(key)
        phrases[key] = Phrase(key, weight, definition) if old is None else old._replace(weight=max(weight, old.weight))

    meaning: dict[str, str] = {}
    for noun, group in zip(nouns, supercategories, strict=True):
        synset = wordnet.first_sense(noun, SENSES_OF_SUPERCATEGORY.get(group, ARTIFACT_LIKE))
        meaning[noun] = define(synset) if synset else ""
        add(noun, 12.0, meaning[noun])
        for prompt in PROMPTS:
            add(prompt.format(noun), 4.0, meaning[noun])
    for caption, only in captions:
        add(caption, 3.0, meaning[only] if only else "")
    ranked = [(text, weight, wordnet.first_sense(text)) for text, weight in wordnet.phrases()]
    for text, weight, synset in ranked:
        add(text, weight, define(synset) if synset and synset.lexfile in DRAWABLE else "")
    for plural, singular in wordnet.exceptions.items():
        if wordnet.counts.get(singular, 0) and singular in phrases:
            add(plural, 1.0, phrases[singular].definition)
    for text, weight, _ in ranked[:PROMPTED]:
        add(rng.choice(PROMPTS).format(text), weight / 2, phrases[text].definition if text in phrases else "")
    chosen = set(list(dict.fromkeys(p.definition for p in phrases.values() if p.definition))[:definitions])
    return [p if p.definition in chosen else p._replace(definition="") for p in phrases.values()]


def main(argv: list[str]) -> int:
    """Write the phrase file."""
    from pretrain.data.caption_templates import caption_for
    from pretrain.data.stickers import Stickers

    parser = argparse.ArgumentParser(prog="python -m pretrain.data.phrases", description="Write the training phrases.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet 3.0's files")
    parser.add_argument("--out", type=Path, required=True, help="text file, one phrase and weight per line")
    parser.add_argument("--captions", type=int, default=12_000, help="how many captions to draw")
    parser.add_argument(
        "--definitions", type=int, help="use so many definitions, of the most useful phrases (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    stickers = Stickers.load()
    rng = random.Random(args.seed)
    captions: list[tuple[str, str | None]] = []
    for i in range(args.captions):
        names = [stickers.nouns[i % len(stickers.nouns)], *rng.sample(stickers.nouns, rng.choice((0, 0, 0, 1, 2)))]
        captions.append((caption_for(names, rng), names[0] if len(names) == 1 else None))
    wordnet = WordNet.load(args.wordnet)
    phrases = build_phrases(
        wordnet, stickers.nouns, stickers.supercategory, captions, definitions=args.definitions, seed=args.seed
    )
    write_phrases(args.out, phrases)
    print(f"{len(phrases)} phrases written to {args.out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
