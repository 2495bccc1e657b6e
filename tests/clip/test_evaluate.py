# SPDX-License-Identifier: Apache-2.0
"""Zero-shot and synonym figures, with encoders whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pretrain.data.nouns import SynonymPair, load_pairs
from pretrain.data.phrases import Phrase, write_phrases, write_targets
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import UserError
from pretrain.evaluate import (
    SYNONYMS,
    defined_teacher,
    embed_words,
    keyword_pairs,
    synonym_accuracy,
    teacher_lookup,
    zero_shot,
)


def test_zero_shot__perfect_encoder_scores_1() -> None:
    labels = torch.tensor([0, 1, 2, 3, 2])
    report = zero_shot(torch.eye(4)[labels], labels, torch.eye(4), base=frozenset({0, 1}))
    assert {k: v for k, v in report.items() if k.startswith("top")} == {
        f"top{k}_{group}{suffix}": 1.0
        for k in (1, 5)
        for group in ("all", "base", "novel")
        for suffix in ("", "_merged")
    }
    assert (report["pictures_all"], report["pictures_base"], report["pictures_novel"]) == (5, 2, 3)


def test_zero_shot__counts_base_novel_and_near_synonyms() -> None:
    classes = torch.eye(8)
    labels = torch.tensor([0, 1, 2, 3])
    seen = (
        torch.eye(8)[[0, 7, 4, 3]] + 0.5 * torch.eye(8)[labels]
    )  # 1 taken for 7, 2 taken for 4; the truth comes second
    report = zero_shot(seen, labels, classes, base=frozenset({0, 1}), near_synonyms=[frozenset({2, 4})])
    assert report["top1_all"] == 0.5
    assert report["top1_base"] == 0.5
    assert report["top1_novel"] == 0.5
    assert report["top1_novel_merged"] == 1.0
    assert report["top1_base_merged"] == 0.5
    assert report["top5_all"] == 1.0


def test_top5__ignores_the_sixth_name() -> None:
    image = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    for label, expected in ((4, 1.0), (5, 0.0)):
        assert zero_shot(image, torch.tensor([label]), torch.eye(6), base=frozenset())["top5_all"] == expected


def test_zero_shot__group_without_pictures_is_nan() -> None:
    report = zero_shot(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), base=frozenset({0, 1}))
    assert report["pictures_novel"] == 0
    assert "top1_novel" not in report


def test_synonym_accuracy__by_kind_and_by_class() -> None:
    pairs = [
        SynonymPair("automobile", (0,), "synonym", True),
        SynonymPair("cab", (0, 1), "hyponym", False),
        SynonymPair("oak", (2,), "hyponym", True),
        SynonymPair("elm", (2,), "hyponym", False),
    ]
    answers = torch.eye(3)[[0, 1, 0, 2]]  # oak is taken for 0
    report = synonym_accuracy(pairs, answers, torch.eye(3))
    assert report["top1"] == 0.75
    assert report["top1_synonym"] == 1.0
    assert report["top1_hyponym"] == pytest.approx(2 / 3)
    assert (report["pairs_common"], report["top1_common"]) == (2, 0.5)
    assert report["top1_per_class"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert report["top5"] == 1.0


class Echo(torch.nn.Module):
    """A text encoder that knows one number per text: its length."""

    embed_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.length = torch.nn.Parameter(torch.tensor(5.0))

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(t)] for t in texts])

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        angle = tokens[:, 0] / 10
        return self.length * torch.stack([angle.cos(), angle.sin()], 1)


def test_embed_words__normalised_mean_over_templates() -> None:
    got = embed_words(Echo(), ["dog", "kitten"], ["{}", "a {}"])  # type: ignore[arg-type]
    for row, length in zip(got, (3, 6), strict=True):
        angles = torch.tensor([length / 10, (length + 2) / 10])
        expected = F.normalize(torch.stack([angles.cos(), angles.sin()], 1).mean(0), dim=0)
        torch.testing.assert_close(row, expected)


def test_teacher__unknown_phrases_are_named(tmp_path: Path) -> None:
    write_targets(tmp_path / "t.safetensors", ["dog", "cat"], torch.eye(2).numpy())
    embed = teacher_lookup(tmp_path / "t.safetensors")
    torch.testing.assert_close(embed(["cat", "dog"]), torch.eye(2)[[1, 0]])
    with pytest.raises(UserError, match="lacks 1 phrases, such as 'mouse'"):
        embed(["dog", "mouse"])


def test_teacher__embedding_includes_the_definition(tmp_path: Path) -> None:
    write_targets(tmp_path / "t.safetensors", ["dog", "cat", "dog: a pet"], torch.eye(3).numpy())
    write_phrases(tmp_path / "p.txt", [Phrase("dog", 1.0, "dog: a pet"), Phrase("cat")])
    taught = defined_teacher(tmp_path / "t.safetensors", tmp_path / "p.txt")
    torch.testing.assert_close(taught(["cat", "dog"]), torch.tensor([[0, 1, 0], [0.5**0.5, 0, 0.5**0.5]]))


def test_keyword_pairs__name_one_class_and_share_no_word() -> None:
    stickers = Stickers.load()
    pairs = keyword_pairs(stickers)
    found = {p.query: [stickers.nouns[a] for a in p.answers] for p in pairs}
    assert len(pairs) > 300
    assert found["aeroplane"] == ["airplane"]
    assert "dogs" not in found and "pet" not in found  # a class in the plural; a keyword of several classes


def test_shipped_synonyms__are_no_class_and_in_no_caption() -> None:
    nouns = Stickers.load().nouns
    pairs = load_pairs(SYNONYMS, nouns)
    assert len(pairs) > 1000
    words = {word for noun in nouns for word in noun.lower().split()}
    for pair in pairs:
        assert not words & set(pair.query.lower().split()), pair
        assert pair.answers
    found = {p.query: [nouns[a] for a in p.answers] for p in pairs}
    assert found["puppy"] == ["dog"] and found["automobile"] == ["car"]
    rows = json.loads(SYNONYMS.read_text(encoding="utf-8"))
    assert [r["query"] for r in rows] == sorted({r["query"] for r in rows})
