# SPDX-License-Identifier: Apache-2.0
"""Loading tensors into a module: what must be complete, what is reported, what stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.engine.errors import UserError
from pretrain.engine.state import load_tensors


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {name: torch.full_like(value, 3) for name, value in network().state_dict().items()}
    named = {name.replace("_", ".", 1): value for name, value in changes.items()}
    return {name: value for name, value in {**state, **named}.items() if value is not None}


@pytest.mark.parametrize("strict", ["both", "module", "file", "no"])
@pytest.mark.parametrize(
    ("change", "refused_by", "message"),
    [
        ({}, (), ""),
        ({"1_num_batches_tracked": None}, (), ""),
        ({"0_bias": None}, ("both", "module"), r"6 of 7 tensors match; 1 missing, such as 0\.bias"),
        ({"2_bias": torch.ones(1)}, ("both", "file"), r"7 of 7 tensors match; 1 unexpected, such as 2\.bias"),
        (
            {"0_weight": torch.ones(3, 2)},
            ("both", "module", "file"),
            r"6 of 7 .*; 1 of another shape, such as 0\.weight: \(3, 2\) instead of \(1, 2\)",
        ),
    ],
    ids=["whole", "no counter", "missing", "unexpected", "shape"],
)
def test_load_tensors__incomplete_state_is_refused(
    strict: Any, change: dict[str, Any], refused_by: tuple[str, ...], message: str
) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = tensors(**change)
    if strict in refused_by:
        with pytest.raises(UserError, match=rf"here does not fit this model: {message}.*\. Do that$"):
            load_tensors(model, given, source="here", strict=strict, hint="Do that")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    report = load_tensors(model, given, source="here", strict=strict)
    for name, value in model.state_dict().items():
        fits = name in given and given[name].shape == value.shape
        assert (name in report.loaded) == fits
        assert torch.equal(value, given[name] if fits else before[name]), name


def test_load_tensors__prefixes_are_skipped_and_optional_ones_may_be_missing() -> None:
    model = network()
    given = tensors(**{"1_running_mean": None})
    report = load_tensors(model, given, source="here", skip=("0.",), optional=("1.run",))
    assert report.skipped == ("0.weight", "0.bias") and report.missing == ("1.running_mean",)
    assert float(model[1].weight) == 3 and float(model[1].running_mean) == 0 and float(model[0].bias) != 3
    assert str(report) == "4 tensors loaded; missing 1: 1.running_mean; skipped 2: 0.weight, 0.bias"
