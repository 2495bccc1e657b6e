# SPDX-License-Identifier: Apache-2.0
"""Whose messages the page keeps."""

from __future__ import annotations

from ovd.demo.line import LastAskers


def test_askers_to_whom_nothing_happened_for_longest_are_forgotten() -> None:
    forgotten: list[str] = []
    askers: LastAskers[int] = LastAskers(3, forgotten=forgotten.append)
    for number, name in enumerate("abc"):
        askers[name] = number
    assert askers["a"] == 0  # a message to the first
    askers["d"] = 3
    assert forgotten == ["b"] and dict(askers) == {"c": 2, "a": 0, "d": 3}
    assert "c" in askers and askers.get("c") == 2  # asking whether they are known keeps nobody
    askers["e"] = 4
    assert forgotten == ["b", "c"] and "c" not in askers
