# SPDX-License-Identifier: Apache-2.0
"""From words to text embeddings: prompt ensembling, a per-phrase memory and a file cache.

ViLD (§3.2): each prompt is encoded and normalised, the mean over the prompts is normalised again; with synonyms the
mean runs over synonyms × templates, as in the released LVIS embeddings.

Shapes: C classes, D embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd.locks import ComputeLock
from ovd.vocabulary import Vocabulary
from pretrain.engine.distributed import device_of


class TextEncoder(Protocol):
    """What is needed of an encoder; `pretrain.nets.towers.JointEncoder` is one."""

    embed_dim: int

    @property
    def has_image_tower(self) -> bool:
        """Whether it also embeds pictures, as a `ovd.regions.crops.RegionEncoder`."""

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return (N, T) token ids."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return (N, D) embeddings, not normalised."""

    def fingerprint(self) -> str:
        """Return a hash over configuration and weights."""


@torch.inference_mode()
def embed_phrases(phrases: list[str], encoder: TextEncoder, *, batch_size: int = 512) -> Tensor:
    """Encode texts as they are.

    Args:
        phrases: N complete texts.
        encoder: text encoder in eval mode.
        batch_size: texts per forward pass; bounds memory.

    Returns:
        (N, D) float32 unit rows on the CPU.
    """
    if not phrases:
        return torch.zeros(0, encoder.embed_dim)
    device = device_of(encoder)
    rows = []
    for start in range(0, len(phrases), batch_size):
        tokens = encoder.tokenize(phrases[start : start + batch_size]).to(device)
        rows.append(F.normalize(encoder.encode_text(tokens).float(), dim=-1).cpu())
    return torch.cat(rows)


def cut_phrases(vocabulary: Vocabulary, encoder: TextEncoder) -> list[str]:
    """Names and synonyms of which the encoder's tokenizer drops the end, in the longest of their prompts."""
    phrases = list(dict.fromkeys(phrase for one in vocabulary.classes for phrase in one.phrases))
    prompts = [max(vocabulary.prompts(phrase), key=len) for phrase in phrases]
    room = encoder.tokenize([""]).shape[1]
    # No tokenizer makes more tokens than there are bytes, and two that open and close the text.
    long = [i for i, prompt in enumerate(prompts) if len(prompt.encode("utf-8", "replace")) + 2 > room]
    if not long:
        return []
    whole = encoder.tokenize([prompts[i] for i in long])
    shorter = encoder.tokenize([prompts[i][:-1] for i in long])
    longer = encoder.tokenize([f"{prompts[i]} zebra" for i in long])
    # What is cut stays the same whether its end is taken away or something is added.
    same = ((whole == shorter) & (whole == longer)).all(dim=1).tolist()
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
        self._memory: OrderedDict[tuple[str, tuple[tuple[str, ...], bool, bool]], Tensor] = OrderedDict()
        self._lock = ComputeLock()

    def embed(self, vocabulary: Vocabulary) -> Tensor:
        """Embed all classes of a vocabulary, negative words included, in the order of ``vocabulary.classes``.

        Returns:
            (C, D) float32 unit rows.
        """
        if not vocabulary.classes:
            return torch.zeros(0, self.encoder.embed_dim)
        cached = self._read(vocabulary)
        if cached is not None:
            return cached
        phrases = list(dict.fromkeys(p for c in vocabulary.classes for p in c.phrases))
        with self._lock:
            means = self._phrase_means(vocabulary, phrases)
        row_of = {phrase: i for i, phrase in enumerate(phrases)}
        owner = torch.tensor([i for i, c in enumerate(vocabulary.classes) for _ in c.phrases])
        member = torch.tensor([row_of[p] for c in vocabulary.classes for p in c.phrases])
        # All phrases have as many templates: a sum of means points where the mean over all prompts points.
        sums = torch.zeros(len(vocabulary.classes), means.shape[1]).index_add_(0, owner, means[member])
        result = F.normalize(sums, dim=-1)
        self._write(vocabulary, result)
        return result

    def _phrase_means(self, vocabulary: Vocabulary, phrases: list[str]) -> Tensor:
        style = (vocabulary.templates, vocabulary.this_is, vocabulary.parity)
        known = {p: self._memory[(p, style)] for p in phrases if (p, style) in self._memory}
        missing = {p: vocabulary.prompts(p) for p in phrases if p not in known}
        if missing:
            unique = list(dict.fromkeys(text for prompts in missing.values() for text in prompts))
            row_of = {text: i for i, text in enumerate(unique)}
            rows = embed_phrases(unique, self.encoder)
            for p, prompts in missing.items():
                known[p] = rows[[row_of[text] for text in prompts]].mean(0)
        for p in phrases:
            self._memory[(p, style)] = known[p]
            self._memory.move_to_end((p, style))
        while len(self._memory) > self.max_phrases:
            self._memory.popitem(last=False)
        return torch.stack([known[p] for p in phrases])

    def _file(self, vocabulary: Vocabulary) -> Path | None:
        if self.cache_dir is None:
            return None
        return self.cache_dir / f"{vocabulary.hash}-{self.fingerprint[:16]}.safetensors"

    def _read(self, vocabulary: Vocabulary) -> Tensor | None:
        file = self._file(vocabulary)
        if file is None or not file.is_file():
            return None
        from pretrain.engine.checkpoint import load_weights

        tensors, metadata = load_weights(file)
        rows = tensors.get("embeddings")
        wanted = (len(vocabulary.classes), self.encoder.embed_dim)
        if rows is None or tuple(rows.shape) != wanted or metadata.get("fingerprint") != self.fingerprint:
            return None  # another encoder with the same 16 digits, or a foreign file: embed again and overwrite it
        return rows.float()

    def _write(self, vocabulary: Vocabulary, rows: Tensor) -> None:
        file = self._file(vocabulary)
        if file is None:
            return
        from pretrain.engine.checkpoint import save_weights

        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"vocabulary": vocabulary.hash, "fingerprint": self.fingerprint}
        save_weights(file, {"embeddings": rows.contiguous()}, metadata)


def embed_vocabulary(vocabulary: Vocabulary, encoder: TextEncoder, *, cache_dir: str | Path | None = None) -> Tensor:
    """Embed all classes of a vocabulary, negative words included; see `TextEmbedder` to keep phrases in memory.

    Args:
        vocabulary: C classes.
        encoder: text encoder in eval mode.
        cache_dir: folder of a file cache keyed by (vocabulary hash, encoder fingerprint), or None.

    Returns:
        (C, D) float32 unit rows, in the order of ``vocabulary.classes``.
    """
    return TextEmbedder(encoder=encoder, cache_dir=cache_dir).embed(vocabulary)
