# SPDX-License-Identifier: Apache-2.0
"""Text embeddings of words: prompt ensembling, a cache per phrase and a file cache.

ViLD (§3.2): each prompt is encoded and normalised, the mean over the prompts is normalised again; with synonyms the
mean runs over synonyms × templates, as in the released LVIS embeddings.

Shapes: C classes, D embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, unit_rows
from ovd.locks import ComputeLock
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError
from pretrain.engine.files import write_atomically


class TextEncoder(Protocol):
    """Interface of a text encoder; `pretrain.nets.towers.JointEncoder` is one."""

    embed_dim: int

    @property
    def has_image_tower(self) -> bool:
        """Whether it also embeds pictures, as a `ovd.regions.cutting.CropEncoder`."""

    def token_ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(N, T) tokens; longer texts are cut off."""

    def text_rows(self, texts: Sequence[str]) -> Floats:
        """(N, D) embeddings, not normalised."""

    def fingerprint(self) -> str:
        """Return a hash over configuration and weights."""


def embed_phrases(phrases: list[str], encoder: TextEncoder, *, batch_size: int = 512) -> Floats:
    """Encode texts as they are.

    Args:
        phrases: N complete texts.
        encoder: text encoder in eval mode.
        batch_size: texts per forward pass; bounds memory.

    Returns:
        (N, D) float32 unit rows.
    """
    if not phrases:
        return np.zeros((0, encoder.embed_dim), np.float32)
    starts = range(0, len(phrases), batch_size)
    return np.concatenate([unit_rows(encoder.text_rows(phrases[start : start + batch_size])) for start in starts])


def cut_phrases(vocabulary: Vocabulary, encoder: TextEncoder) -> list[str]:
    """Names and synonyms of which the encoder's tokenizer drops the end, in the longest of their prompts."""
    phrases = list(dict.fromkeys(phrase for entry in vocabulary.classes for phrase in entry.phrases))
    prompts = [max(vocabulary.prompts(phrase), key=len) for phrase in phrases]
    room = encoder.token_ids([""]).shape[1]
    # No tokenizer makes more tokens than there are bytes, and two that open and close the text.
    long = [i for i, prompt in enumerate(prompts) if len(prompt.encode("utf-8", "replace")) + 2 > room]
    if not long:
        return []
    full = encoder.token_ids([prompts[i] for i in long])
    shorter = encoder.token_ids([prompts[i][:-1] for i in long])
    longer = encoder.token_ids([f"{prompts[i]} zebra" for i in long])
    # What is cut stays the same whether its end is taken away or something is added.
    same = ((full == shorter) & (full == longer)).all(axis=1).tolist()
    return [phrases[i] for i, cut in zip(long, same, strict=True) if cut]


class TextEmbedder:
    """Embeds vocabularies with one encoder and remembers the phrases seen last.

    The memory holds, per (phrase, templates), the mean of the normalised prompt embeddings: the mean over a class's
    synonyms is then exactly the mean over synonyms × templates, and a synonym moved to another class costs nothing.

    Args:
        encoder: text encoder in eval mode.
        max_phrases: so many phrases are remembered; the least recently used one goes first; 20,000 × 384 floats: 31 MB.
        cache_dir: folder for embeddings of whole vocabularies, or None.
    """

    def __init__(self, *, encoder: TextEncoder, max_phrases: int = 20_000, cache_dir: str | Path | None = None) -> None:
        self.encoder = encoder
        self.max_phrases = max_phrases
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self.fingerprint = encoder.fingerprint()
        self._memory: OrderedDict[tuple[str, tuple[tuple[str, ...], bool, bool]], Floats] = OrderedDict()
        self._lock = ComputeLock()

    def embed(self, vocabulary: Vocabulary) -> Floats:
        """Embed all classes of a vocabulary, negative words included, in the order of ``vocabulary.classes``.

        Returns:
            (C, D) float32 unit rows.
        """
        if not vocabulary.classes:
            return np.zeros((0, self.encoder.embed_dim), np.float32)
        cached = self._read(vocabulary)
        if cached is not None:
            return cached
        phrases = list(dict.fromkeys(p for c in vocabulary.classes for p in c.phrases))
        with self._lock:
            means = self._phrase_means(vocabulary, phrases)
        row_of = {phrase: i for i, phrase in enumerate(phrases)}
        first = np.cumsum([0, *(len(c.phrases) for c in vocabulary.classes[:-1])])
        member = [row_of[p] for c in vocabulary.classes for p in c.phrases]
        # All phrases have as many templates: a sum of means points where the mean over all prompts points.
        result = unit_rows(np.add.reduceat(means[member], first))
        self._write(vocabulary, result)
        return result

    def _phrase_means(self, vocabulary: Vocabulary, phrases: list[str]) -> Floats:
        style = (vocabulary.templates, vocabulary.this_is, vocabulary.parity)
        mean_of = {p: self._memory[(p, style)] for p in phrases if (p, style) in self._memory}
        missing = {p: vocabulary.prompts(p) for p in phrases if p not in mean_of}
        if missing:
            unique = list(dict.fromkeys(text for prompts in missing.values() for text in prompts))
            row_of = {text: i for i, text in enumerate(unique)}
            rows = embed_phrases(unique, self.encoder)
            for p, prompts in missing.items():
                mean_of[p] = rows[[row_of[text] for text in prompts]].mean(0)
        for p in phrases:
            self._memory[(p, style)] = mean_of[p]
            self._memory.move_to_end((p, style))
        while len(self._memory) > self.max_phrases:
            self._memory.popitem(last=False)
        return np.stack([mean_of[p] for p in phrases])

    def _file(self, vocabulary: Vocabulary) -> Path | None:
        if self.cache_dir is None:
            return None
        return self.cache_dir / f"{vocabulary.hash}-{self.fingerprint[:16]}.safetensors"

    def _read(self, vocabulary: Vocabulary) -> Floats | None:
        file = self._file(vocabulary)
        if file is None or not file.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="np") as stored:
                metadata = stored.metadata() or {}
                rows: Floats | None = stored.get_tensor("embeddings") if "embeddings" in stored.keys() else None
        except (SafetensorError, OSError) as problem:
            raise UserError(f"{file}: cannot be read ({problem}); delete it; it is rebuilt") from problem
        shape = (len(vocabulary.classes), self.encoder.embed_dim)
        if rows is None or rows.shape != shape or metadata.get("fingerprint") != self.fingerprint:
            return None  # another encoder with the same 16 digits, or a foreign file: embed again and overwrite it
        return rows.astype(np.float32)

    def _write(self, vocabulary: Vocabulary, rows: Floats) -> None:
        file = self._file(vocabulary)
        if file is None:
            return
        from safetensors.numpy import save

        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"vocabulary": vocabulary.hash, "fingerprint": self.fingerprint}
        write_atomically(file, save({"embeddings": np.ascontiguousarray(rows)}, metadata))


def embed_vocabulary(vocabulary: Vocabulary, encoder: TextEncoder, *, cache_dir: str | Path | None = None) -> Floats:
    """Embed all classes of a vocabulary, negative words included; see `TextEmbedder` to keep phrases in memory.

    Args:
        vocabulary: C classes.
        encoder: text encoder in eval mode.
        cache_dir: folder of a file cache keyed by (vocabulary hash, encoder fingerprint), or None.

    Returns:
        (C, D) float32 unit rows, in the order of ``vocabulary.classes``.
    """
    return TextEmbedder(encoder=encoder, cache_dir=cache_dir).embed(vocabulary)
