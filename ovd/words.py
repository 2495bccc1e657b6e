# SPDX-License-Identifier: Apache-2.0
"""Normal form of typed words, from any keyboard, page or file.

Texts that look the same must be the same word: an invisible character copied along with a word would otherwise make it
another class with another score.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Iterable

from pretrain.engine.errors import UserError, shorten

# What keyboards of other scripts type for comma, semicolon, colon and minus; and the presentation forms of these.
COMMAS = ",，、،﹐︐﹑︑፣､՝߸᠂᠈⸲⸴⹁⹉⹌꓾꘍꛵"
SEMICOLONS = ";；؛﹔︔፤⁏⸵꛶"
COLONS = ":：﹕︓∶፡꞉"
MINUS = "-−–—－﹣‐‑‒―➖"
_SEPARATORS = str.maketrans(
    {**dict.fromkeys(COMMAS, ","), **dict.fromkeys(SEMICOLONS, ";"), **dict.fromkeys(COLONS, ":")}
)

# Format characters (category Cf) that leave no mark, variation selectors among them. Arabic number signs, which are of
# the same category, do.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff9-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_JOINERS = "\u200c\u200d"  # zero width (non-)joiner: they change the letters beside them in Arabic and Indic scripts
_EMOJI_PARTS = re.compile("[\u200d\ufe0e\ufe0f\u20e3\U000e0020-\U000e007f]")
_EMOJI_KINDS = ("So", "Sk")


# Letters and digits as wide as a Chinese character, as keyboards of East Asia type them.
_FULL_WIDTH = {0xFEE0 + ord(c): c for c in string.ascii_letters + string.digits}


_BULLET = re.compile(r"\s*[•‣⁃▪▫●○◦∙·*+]\s+")
_NUMBER_IN_A_LIST = re.compile(r"\s*[0-9]{1,5}[.):]\s+")
_COMMENT = re.compile(r"\s*(#|//)\s")
_SEVERAL = re.compile(r"\S\t+\S|[。｡]\s*\S|\s[|.]\s|\.\s.*\.$")  # as spreadsheets, Chinese and other detectors separate


def listed_lines(text: str) -> tuple[list[str], list[str]]:
    """The lines of a list without the bullets or numbers in front of them and without comments; notices of these."""
    lines = text.splitlines()
    comments = [line.strip() for line in lines if _COMMENT.match(line)]
    lines = [
        _BULLET.sub("", line, count=1) if _BULLET.match(line) else line for line in lines if not _COMMENT.match(line)
    ]
    written = [line for line in lines if line.strip()]
    if len(written) > 1 and all(map(_NUMBER_IN_A_LIST.match, written)):
        lines = [_NUMBER_IN_A_LIST.sub("", line, count=1) for line in lines]
    return lines, [f"Left out as comments: {', '.join(map(repr, comments[:3]))}"] if comments else []


def notices_of_groups(names: Iterable[str]) -> list[str]:
    """A notice of typed names that may be meant as several, or as parts of a group: brackets and quotes make none."""
    doubtful = [name.strip() for name in names if _looks_grouped(name)]
    if not doubtful:
        return []
    more = f" and {len(doubtful) - 1} more" if len(doubtful) > 1 else ""
    return [
        f"Searched as one name: {shorten(repr(doubtful[0]))}{more}. Commas and lines separate names, brackets and "
        "quotes do not group them"
    ]


def _looks_grouped(name: str) -> bool:
    pairs = (("(", ")"), ("[", "]"), ("{", "}"), ("“", "”"), ("«", "»"))
    alone = any(name.count(opening) != name.count(closing) for opening, closing in pairs)
    return alone or name.count('"') % 2 == 1 or _SEVERAL.search(name) is not None


def table_of(text: str) -> str | None:
    """What a text is, if not names: a table of several columns, or a label map; None for names."""
    rows = [row for row in text.splitlines() if row.strip()]
    if any(row.split() == ["item", "{"] for row in rows):
        return "a label map of TensorFlow"
    if len(rows) > 1 and any(all(separator in row for row in rows) for separator in (",", ";", "\t")):
        return "a table"
    return None


def with_plain_separators(text: str) -> str:
    """The text with the commas, semicolons and colons of all scripts written as ``,``, ``;`` and ``:``."""
    return text.translate(_SEPARATORS)


def cleaned(text: str) -> str:
    """The text in NFC, on one line, single spaced, without characters that leave no mark.

    Joiners and selectors stay where they mean something: inside emoji, and joiners between the letters of scripts that
    join (Arabic, Indic).
    """
    text = unicodedata.normalize("NFC", text).translate(_FULL_WIDTH)
    if _INVISIBLE.search(text):
        text = "".join(c for i, c in enumerate(text) if not _INVISIBLE.match(c) or _means_something(text, i))
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c for c in text)
    return " ".join(text.split())


def name_key(name: str) -> str:
    """Key of names that are one class when typed: ``Red_Cell`` and ``red  cell``."""
    return cleaned(name.replace("_", " ")).casefold()


def _means_something(text: str, index: int) -> bool:
    """Whether the invisible character at ``index`` changes how its neighbours look."""
    character = text[index]
    before = next((c for c in reversed(text[:index]) if not _EMOJI_PARTS.match(c)), "")
    if _EMOJI_PARTS.match(character) and before:
        keycap = character == "\ufe0f" and before in "0123456789#*" and text[index + 1 : index + 2] == "\u20e3"
        joins = character != "\u200d" or text[index + 1 : index + 2] not in ("", " ")
        if keycap or (joins and unicodedata.category(before) in _EMOJI_KINDS):
            return True
    if character in _JOINERS and index:
        after = text[index + 1 : index + 2]
        return bool(after) and _joining(text[index - 1]) and _joining(after)
    return False


# Arabic to Sinhala, Myanmar, Khmer and Mongolian: scripts whose letters join.
_JOINING_SCRIPTS = (("\u0600", "\u0dff"), ("\u1000", "\u109f"), ("\u1780", "\u18af"))


def _joining(character: str) -> bool:
    """Whether it is a letter or mark of a script whose letters join."""
    joins = any(low <= character <= high for low, high in _JOINING_SCRIPTS)
    return joins and unicodedata.category(character)[0] in "LM"


def listed(value: object, *, where: str) -> list[str] | None:
    """Class names in the lists that other tools write; None where the value is no such list.

    Understood are ``["dog", "cat"]``, ``{0: "dog", 1: "cat"}``, both below ``names`` too (YOLO), and
    ``{"categories": [{"name": "dog"}, …]}`` (COCO).

    Args:
        value: what a JSON or YAML reader returned.
        where: the file, for messages.

    Raises:
        UserError: a list, ``names`` or ``categories`` that holds something else than names.
    """
    names: object = value
    if isinstance(value, dict) and "categories" in value:
        names = value["categories"]
        if isinstance(names, list):
            names = [entry.get("name") if isinstance(entry, dict) else entry for entry in names]
    elif isinstance(value, dict) and ("names" in value or (value and math.inf not in map(_number, value))):
        names = value.get("names", value)
        if isinstance(names, dict):
            names = [name for _, name in sorted(names.items(), key=lambda item: _number(item[0]))]
    elif not isinstance(value, list):
        return None
    if not isinstance(names, list) or not all(_is_name(name) for name in names):
        raise UserError(f'{where}: a list of class names must contain strings only, like ["dog", "cat"]')
    return [str(name) for name in names]


def _is_name(name: object) -> bool:
    return type(name) in (int, float) or (isinstance(name, str) and bool(name.strip()))


def _number(key: object) -> float:
    """The number of a class in YOLO's table, which JSON writes as text; other keys sort last."""
    if isinstance(key, str) and key.isascii() and key.isdigit():
        return int(key)
    return key if isinstance(key, int | float) else math.inf
