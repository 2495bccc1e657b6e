# SPDX-License-Identifier: Apache-2.0
"""English captions for pictures that show given nouns.

A caption names every object by its class noun and never by a synonym; no word of a template is itself a noun of
the vocabulary (tests check it), so what a caption says is in the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class RandomLike(Protocol):
    """Interface of a random generator of captions; `numpy.random.Generator` has it."""

    def random(self) -> float:
        """A number in [0, 1)."""


# Plurals and substances take no article.
BARE = frozenset(
    "ballet shoes|beans|blueberries|bowling pins|briefs|chains|cherries|french fries|glasses|gloves|goggles|grapes|"
    "jeans|maracas|nesting dolls|pancakes|peanuts|prayer beads|scissors|shopping bags|shorts|skis|socks|sunglasses|"
    "bacon|bread|broccoli|butter|canned food|cheese|cooked rice|coral|corn|curry rice|custard|dna|falafel|fondue|"
    "garlic|ginger root|green salad|leafy green|lipstick|mate|meat on bone|oden|popcorn|sake|salt|shaved ice|soap|"
    "spaghetti|sushi|thread|wood|yarn".split("|")
)
# Sound, not spelling, decides.
TAKES_A = frozenset({"unicorn", "one-piece swimsuit"})
TAKES_AN = frozenset({"hourglass"})

SINGLE = (
    "{a}",
    "{bare}",
    "a photo of {a}",
    "a drawing of {a}",
    "a cartoon of {a}",
    "a sticker of {a}",
    "an icon of {a}",
    "an emoji of {a}",
    "an illustration of {a}",
    "clip art of {a}",
    "a close-up of {a}",
    "an image of {a}",
    "a colourful {bare}",
    "a small image of {a}",
    "there is {a} in the scene",
    "this is {a}",
    "a view of {a} outdoors",
    "the {bare}",
)
JOINED = (
    "{list}",
    "a photo of {list}",
    "a drawing of {list}",
    "a scene with {list}",
    "an image with {list}",
    "stickers of {list}",
    "there is {list}",
    "{list} together",
    "a collage of {list}",
)


def with_article(noun: str) -> str:
    """`noun` with "a" or "an", or bare when it is a plural or a substance."""
    if noun in BARE:
        return noun
    vowel = noun[0].lower() in "aeiou"
    if (vowel and noun not in TAKES_A) or noun in TAKES_AN:
        return f"an {noun}"
    return f"a {noun}"


def _pick(items: Sequence[str], rng: RandomLike) -> str:
    return items[int(rng.random() * len(items))]


def caption_for(nouns: Sequence[str], rng: RandomLike) -> str:
    """One caption that names all of `nouns`, in their order.

    Args:
        nouns: class nouns; a repeated noun is named once. None gives "an empty scene".
        rng: source of random numbers in [0, 1).
    """
    names = list(dict.fromkeys(nouns))
    if not names:
        return "an empty scene"
    if len(names) == 1:
        template = _pick(SINGLE, rng)
        if names[0] in BARE:
            template = template.replace("a colourful {bare}", "colourful {bare}")
        return template.format(a=with_article(names[0]), bare=names[0])
    phrases = [with_article(name) for name in names]
    if len(phrases) == 2:
        joint = _pick((" and ", " next to ", " beside ", " with "), rng).join(phrases)
    else:
        joint = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return _pick(JOINED, rng).format(list=joint)
