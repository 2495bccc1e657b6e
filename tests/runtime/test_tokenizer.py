# SPDX-License-Identifier: Apache-2.0
"""The tokenizer without torch gives the tokens of CLIP's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovd.runtime.files import MERGES
from ovd.runtime.tokenizer import BytePairs
from pretrain.engine.errors import UserError
from pretrain.nets.towers import ClipTokenizer
from tests.fuzz.damage import FUZZ

LENGTH = 32
TEXTS = [
    "", "a photo of a golden retriever", "  Two   SPACES ", "it's 2024, don't!", "naïve café", "\u6905\u5b50", "🙂🙃",
    "x" * 300, "&amp;lt;b&gt; mug", "â€œquotedâ€\x9d", "ﬁne ①", "<start_of_text> dog <END_OF_TEXT>", "a\tb\nc", "…---…",
    "zebra " * 40, "\u0130stanbul \u1e9e", "ǅ", "\u0661\u0662",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(exported: Path) -> BytePairs:
    return BytePairs(exported / MERGES, context_length=LENGTH)


def test_tokenizer__equals_open_clip(pairs: BytePairs) -> None:
    np.testing.assert_array_equal(pairs(TEXTS), ClipTokenizer(LENGTH)(TEXTS).numpy())


@settings(FUZZ, max_examples=100)
@given(text=st.text(max_size=60))
def test_tokenizer__equals_open_clip_on_any_text(pairs: BytePairs, text: str) -> None:
    np.testing.assert_array_equal(pairs([text]), ClipTokenizer(LENGTH)([text]).numpy())


def test_tokenizer__a_single_text_and_a_missing_file_are_refused(pairs: BytePairs, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        pairs("dog")
    with pytest.raises(UserError, match=r"merges\.txt: cannot be read"):
        BytePairs(tmp_path / "merges.txt", context_length=LENGTH)(["dog"])
