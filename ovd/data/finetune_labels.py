# SPDX-License-Identifier: Apache-2.0
"""Checks of the labels that classes are fine-tuned on: names that cannot be typed, and files without an object."""

from __future__ import annotations

from collections.abc import Sequence

from ovd.inference.everything import is_everything
from ovd.vocabulary import MAX_NAME, Vocabulary
from ovd.words import cleaned, name_key
from pretrain.data.coco import Annotation
from pretrain.engine.errors import UserError, shorten


def name_notices(written: Sequence[str], *, where: str) -> list[str]:
    """Notices on classes whose names cannot be typed.

    Args:
        written: the names as in the file.
        where: the file, for messages.

    Raises:
        UserError: two classes are the same when typed, or the name of one is nothing.
    """
    keys: dict[str, str] = {}
    notices = []
    for category in written:
        name = cleaned(category)
        if not name:
            raise UserError(f"{where}: class {category!r} is of invisible characters only; give it a name")
        if (other := keys.setdefault(name_key(name), category)) is not category:
            raise UserError(f"{where}: classes {other!r} and {category!r} are the same when typed; rename one of them")
        if not _can_be_typed(name):
            notices.append(
                f"{where}: class {shorten(name)!r} cannot be typed as it is; rename it without commas, colons, quotes "
                f"or a minus in front, in {MAX_NAME} characters at most, and not 'everything'"
            )
    return notices


def no_object_message(annotations: Sequence[Annotation], *, confident: float) -> str:
    """Why none of the annotations is an object to train on, and what to do."""
    crowds = sum(annotation["iscrowd"] for annotation in annotations)
    flat = sum(min(annotation["bbox"][2:]) <= 0 for annotation in annotations)
    below = sum(annotation.get("score", 1.0) < confident for annotation in annotations)
    reasons = [
        (crowds, f"{crowds} are crowds (COCO's iscrowd, Pascal VOC's difficult; write 0 where each is one object)"),
        (flat, f"{flat} are without area"),
        (below, f"{below} have a score below data.confident={confident}"),
    ]
    texts = [text for count, text in reasons if count]
    if not texts:
        return "no box to train on; label the objects of your classes in some photos"
    return f"no box to train on: of {len(annotations)}, {', '.join(texts)}"


def _can_be_typed(name: str) -> bool:
    """Whether the name, typed alone, asks for one class of this name."""
    try:
        return Vocabulary.parse(name).names == (name,) and not is_everything(name)
    except UserError:
        return False
