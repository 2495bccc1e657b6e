# SPDX-License-Identifier: Apache-2.0
"""Label Studio's labelling configuration: which controls take boxes, on which pictures, and which words they ask for.

    <View>
      <Image name="image" value="$image"/>
      <RectangleLabels name="label" toName="image">
        <Label value="Dog"/>                                       asked as "Dog", stored as "Dog"
        <Label value="Tasse" alias="mug" predicted_values="mug, cup"/>    asked as mug and cup, stored as "mug"
      </RectangleLabels>
    </View>

``predicted_values`` and ``model_score_threshold`` are the names that Label Studio's own backends give to a label's
words and a control's lowest score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from ovd.vocabulary import MAX_NAME, MAX_SYNONYMS
from ovd.words import cleaned
from pretrain.engine.errors import UserError, shorten

MAX_CONFIG = 1_000_000
"""Characters."""
EXAMPLE = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="dog"/>'
    "</RectangleLabels></View>"
)


@dataclass(frozen=True, kw_only=True)
class StudioLabel:
    """One ``<Label>``.

    Attributes:
        stored: what results call it: its ``alias``, else its ``value``.
        words: of the detector's query, synonyms after the first.
    """

    stored: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BoxControl:
    """A control that takes boxes on a picture.

    Attributes:
        name: of the control that holds the labels, ``from_name`` of results.
        rectangle: of the ``<Rectangle>`` beside ``<Labels>``; None: the labels are a ``<RectangleLabels>``.
        image: name of the ``<Image>``, ``to_name`` of results.
        field: of a task's data, where the picture is named.
        labels: in the order of the configuration.
        threshold: lowest score, or None.
    """

    name: str
    rectangle: str | None
    image: str
    field: str
    labels: tuple[StudioLabel, ...]
    threshold: float | None


def read_config(text: str) -> tuple[BoxControl, ...]:
    """The controls of a labelling configuration that take boxes.

    Raises:
        UserError: no XML, no such control, or one that cannot be served, with what to change.
    """
    root = _parsed(text)
    elements = list(root.iter())
    images = {element.get("name", ""): element for element in elements if _has_tag(element, "Image")}
    controls = [control for element in elements for control in _controls(element, images, elements)]
    if not controls:
        raise UserError(_no_boxes_reason(elements, images))
    return tuple(controls)


def _parsed(text: str) -> ElementTree.Element:
    if len(text) > MAX_CONFIG:
        raise UserError(f"the labelling configuration has {len(text):,} characters; at most {MAX_CONFIG:,} are read")
    if "<!DOCTYPE" in text:
        raise UserError("the labelling configuration has a document type (DOCTYPE), which is not read; remove it")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as problem:
        raise UserError(f"the labelling configuration is not XML: {problem}") from problem


def _has_tag(element: ElementTree.Element, tag: str) -> bool:
    return isinstance(element.tag, str) and element.tag.casefold() == tag.casefold()


def _controls(
    element: ElementTree.Element, images: dict[str, ElementTree.Element], elements: list[ElementTree.Element]
) -> Iterator[BoxControl]:
    """The controls of one element: one for each of its pictures."""
    pair = _has_tag(element, "Labels")
    if not pair and not _has_tag(element, "RectangleLabels"):
        return
    name = element.get("name", "")
    for image in _names(element):
        if image not in images:
            continue  # text, audio, video
        rectangle = None
        if pair:
            rectangle = next((e.get("name") for e in elements if _has_tag(e, "Rectangle") and image in _names(e)), None)
            if rectangle is None:
                continue
        yield BoxControl(
            name=name,
            rectangle=rectangle,
            image=image,
            field=_field(images[image]),
            labels=_labels(element, name),
            threshold=_threshold(element, name),
        )


def _names(element: ElementTree.Element) -> list[str]:
    """The objects that a control belongs to."""
    return [name.strip() for name in element.get("toName", "").split(",") if name.strip()]


def _field(image: ElementTree.Element) -> str:
    value = image.get("value", "").strip()
    if value.startswith("$") and len(value) > 1:
        return value[1:]
    name = image.get("name", "")
    if image.get("valueList"):
        raise UserError(f'<Image name="{name}">: several pictures in one task (valueList) are not served; use value')
    raise UserError(f'<Image name="{name}">: value must name a field of the tasks, as in value="$image"')


def _labels(control: ElementTree.Element, name: str) -> tuple[StudioLabel, ...]:
    where = f'<{control.tag} name="{name}">'
    labels = []
    for element in control.iter():
        if not _has_tag(element, "Label"):
            continue
        value, alias = element.get("value", ""), element.get("alias", "")
        if not (alias or value):
            raise UserError(f"{where}: a <Label> has no value")
        predicted = [cleaned(word) for word in element.get("predicted_values", "").split(",")]
        words = tuple(dict.fromkeys(word for word in predicted if word)) or (cleaned(value or alias),)
        if not words[0] or any(len(word) > MAX_NAME for word in words) or len(words) > MAX_SYNONYMS:
            raise UserError(
                f"{where}, label {shorten(value or alias)!r}: no words for the detector; give it some of at most "
                f'{MAX_NAME} characters: predicted_values="dog, puppy"'
            )
        labels.append(StudioLabel(stored=alias or value, words=words))
    if not labels:
        dynamic = " (labels from the task's data are not served)" if control.get("value") else ""
        raise UserError(f'{where} has no labels{dynamic}: write <Label value="dog"/> into it')
    first: dict[str, StudioLabel] = {}
    for label in labels:
        other = first.setdefault(label.words[0].casefold(), label)
        if other is not label:
            raise UserError(
                f"{where}: the labels {other.stored!r} and {label.stored!r} both ask for {label.words[0]!r}; remove "
                "one, or give it other words with predicted_values"
            )
    return tuple(labels)


def _threshold(control: ElementTree.Element, name: str) -> float | None:
    text = control.get("model_score_threshold", "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f'<{control.tag} name="{name}">: model_score_threshold is {text!r}: give a number from 0 to 1')
    return value


def _no_boxes_reason(elements: list[ElementTree.Element], images: dict[str, ElementTree.Element]) -> str:
    """Why a configuration takes no boxes, and what to change."""
    if not images:
        return f"the labelling configuration has no <Image>; wordbox draws boxes on pictures, as in {EXAMPLE}"
    if any(_has_tag(element, "Labels") for element in elements):
        return (
            "the labelling configuration has <Labels> and no <Rectangle>; make it <RectangleLabels>, or add "
            '<Rectangle name="box" toName="image"/>'
        )
    return (
        "the labelling configuration has no <RectangleLabels> for its <Image>; wordbox draws boxes, no other regions: "
        f"{EXAMPLE}"
    )
