# SPDX-License-Identifier: Apache-2.0
"""Phrases and their teacher embeddings: what the text tower is distilled from.

A phrase file is UTF-8 text, one `phrase<TAB>weight` per line (the weight may be left out: 1). A target file is one
safetensors file with `embeddings` (P, D) float16 and `phrases` (bytes, one phrase per line), so that the two cannot be
separated.

`python -m pretrain.data.phrases --wordnet DIR --out FILE` writes the phrase file of the shipped text tower.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data.nouns import WordNet
from pretrain.engine.errors import UserError, run_cli

if TYPE_CHECKING:
    import numpy as np
    import torch

# Sentences around a noun; the tower must not be thrown off by them. The ViLD and CLIP prompts are of these forms.
PROMPTS = (
    "a {}", "the {}", "a photo of a {}", "a photo of the {}", "a picture of a {}", "a drawing of a {}",
    "a sticker of a {}", "an icon of a {}", "a cartoon {}", "a small {}", "a large {}", "there is a {} in the scene",
    "a photo of a {} in the scene", "a close-up of a {}", "a {} on a photo", "many {}",
)  # fmt: skip


@dataclass(frozen=True)
class Targets:
    """`phrases` (P,) and their unit `embeddings` (P, D) float16."""

    phrases: tuple[str, ...]
    embeddings: torch.Tensor


def read_phrases(path: str | Path) -> list[tuple[str, float]]:
    """Read `phrase<TAB>weight` lines.

    Raises:
        UserError: The file is unreadable, or a weight is no positive number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the phrases {path}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        phrase, _, weight = line.partition("\t")
        if not phrase.strip():
            continue
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = -1.0
        if not value > 0:
            raise UserError(f"{path}:{number}: the weight {weight!r} is not a positive number")
        found.append((phrase, value))
    return found


def write_phrases(path: str | Path, phrases: Sequence[tuple[str, float]]) -> None:
    """Write what `read_phrases` reads."""
    Path(path).write_text("".join(f"{p}\t{w:.3f}\n" for p, w in phrases), encoding="utf-8")


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


def read_targets(path: str | Path) -> Targets:
    """Read what `write_targets` wrote.

    Raises:
        UserError: The file is missing or holds something else.
    """
    from pretrain.engine.checkpoint import load_weights

    if not Path(path).exists():
        raise UserError(f"no teacher targets at {path}: write them with scripts/teacher_embeddings.py (docs/clip.md)")
    tensors, _ = load_weights(Path(path))
    if not {"embeddings", "phrases"} <= tensors.keys():
        raise UserError(f"{path} holds {sorted(tensors)}, not the `embeddings` and `phrases` of a target file")
    phrases = tuple(bytes(tensors["phrases"].numpy()).decode().split("\n"))
    if len(phrases) != len(tensors["embeddings"]):
        raise UserError(f"{path}: {len(phrases)} phrases but {len(tensors['embeddings'])} embeddings")
    return Targets(phrases, tensors["embeddings"])


def build_phrases(
    wordnet: WordNet, nouns: Sequence[str], captions: Sequence[str], *, prompted: int = 30_000, seed: int = 0
) -> list[tuple[str, float]]:
    """The training phrases, most useful first (a run that is cut short keeps the best).

    The class names alone and in every prompt, the captions, every WordNet noun alone, and the `prompted` most useful
    WordNet nouns once more in one drawn prompt each.
    """
    rng = random.Random(seed)
    weights: dict[str, float] = {}

    def add(phrase: str, weight: float) -> None:
        key = " ".join(phrase.split())
        weights[key] = max(weight, weights.get(key, 0.0))

    for noun in nouns:
        add(noun, 12.0)
        for prompt in PROMPTS:
            add(prompt.format(noun), 4.0)
    for caption in captions:
        add(caption, 3.0)
    ranked = wordnet.phrases()
    for phrase, weight in ranked:
        add(phrase, weight)
    for plural, singular in wordnet.exceptions.items():
        if wordnet.counts.get(singular, 0):
            add(plural, 1.0)
    for phrase, weight in ranked[:prompted]:
        add(rng.choice(PROMPTS).format(phrase), weight / 2)
    return list(weights.items())


def main(argv: list[str]) -> int:
    """Write the phrase file."""
    from pretrain.data.stickers import Stickers, caption_for

    parser = argparse.ArgumentParser(prog="python -m pretrain.data.phrases", description="Write the training phrases.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet 3.0's files")
    parser.add_argument("--out", type=Path, required=True, help="text file, one phrase and weight per line")
    parser.add_argument("--captions", type=int, default=12_000, help="how many captions to draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    stickers = Stickers.load()
    rng = random.Random(args.seed)
    captions = []
    for i in range(args.captions):
        names = [stickers.nouns[i % len(stickers.nouns)], *rng.sample(stickers.nouns, rng.choice((0, 0, 0, 1, 2)))]
        captions.append(caption_for(names, rng))
    phrases = build_phrases(WordNet.load(args.wordnet), stickers.nouns, captions, seed=args.seed)
    write_phrases(args.out, phrases)
    print(f"{len(phrases)} phrases written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
