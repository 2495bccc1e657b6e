# SPDX-License-Identifier: Apache-2.0
"""Labelling configurations: controls, words, and what is said of those that hold no boxes."""

from __future__ import annotations

import pytest

from ovd.label_studio.config import MAX_CONFIG, StudioLabel, read_config
from pretrain.engine.errors import UserError

IMAGE = '<Image name="image" value="$image"/>'
DOG = '<Label value="dog"/>'


def boxes(labels: str, more: str = "") -> str:
    return f'<View>{IMAGE}<RectangleLabels name="label" toName="image"{more}>{labels}</RectangleLabels></View>'


def test_labels__searched_by_value_stored_by_alias() -> None:
    labels = (
        '<Label value="Red_Cell" background="#FFA39E" hotkey="1"/><View><Label value="Tasse" alias="mug"/></View>'
        '<Label value="Hund" alias="d" predicted_values=" dog, puppy ,dog,"/><Label alias="cat"/>'
    )
    (control,) = read_config(boxes(labels, ' model_score_threshold="0.25"'))
    assert (control.name, control.image, control.field, control.rectangle) == ("label", "image", "image", None)
    assert control.threshold == 0.25
    assert control.labels == (
        StudioLabel(stored="Red_Cell", words=("Red_Cell",)),
        StudioLabel(stored="mug", words=("Tasse",)),
        StudioLabel(stored="d", words=("dog", "puppy")),
        StudioLabel(stored="cat", words=("cat",)),
    )


def test_controls__every_one_with_a_picture_is_served() -> None:
    config = f"""<View><Header value="&lt;"/><Image name="left" value="$a"/><image name="right" value="$b"/>
      <Text name="text" value="$t"/><Labels name="words" toName="text">{DOG}</Labels>
      <Choices name="c" toName="left"><Choice value="good"/></Choices>
      <Rectangle name="box" toName="left"/><Labels name="things" toName="left">{DOG}</Labels>
      <RectangleLabels name="label" toName="left, right">{DOG}</RectangleLabels></View>"""
    found = [(c.name, c.rectangle, c.image, c.field) for c in read_config(config)]
    assert found == [("things", "box", "left", "a"), ("label", None, "left", "a"), ("label", None, "right", "b")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("<View", "not XML"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><View/>', "document type"),
        (" " * (MAX_CONFIG + 1), "at most 1,000,000 are read"),
        ("<View/>", "no <Image>"),
        (f'<View>{IMAGE}<Labels name="l" toName="image">{DOG}</Labels></View>', "<Labels> and no <Rectangle>"),
        (f'<View>{IMAGE}<BrushLabels name="l" toName="image">{DOG}</BrushLabels></View>', "no <RectangleLabels>"),
        (f'<View>{IMAGE}<RectangleLabels name="l" toName="img">{DOG}</RectangleLabels></View>', "no <RectangleLabels>"),
        (boxes(""), r'<RectangleLabels name="label"> has no labels: write <Label value="dog"/> into it'),
        (boxes("", ' value="$words"'), "labels from the task's data are not served"),
        (boxes("<Label/>"), "a <Label> has no value"),
        (boxes(f'<Label value="{"x" * 101}"/>'), "at most 100 characters: predicted_values="),
        (boxes('<Label value="Dog"/><Label value="d2" predicted_values="dog"/>'), "'Dog' and 'd2' both ask for 'dog'"),
        (boxes(DOG, ' model_score_threshold="high"'), "model_score_threshold is 'high': give a number from 0 to 1"),
        (boxes(DOG).replace("$image", "a.jpg"), 'value must name a field of the tasks, as in value="\\$image"'),
        (boxes(DOG).replace("value=", "valueList=", 1), "several pictures in one task"),
    ],
)
def test_config__unsupported_one_is_explained(config: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(config)
