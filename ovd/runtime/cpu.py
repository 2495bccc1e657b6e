# SPDX-License-Identifier: Apache-2.0
"""Instruction sets of the CPU, known on Linux only."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def cpu_flags() -> str | None:
    """What Linux says of the CPU, read once per process; None elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def computes_bfloat16() -> bool:
    """Whether there are instructions for bfloat16, in which torch runs the networks."""
    return "_bf16" in (cpu_flags() or "")


def computes_int8() -> bool | None:
    """Whether products of 8 bits are added up in one instruction (VNNI, or Arm's dot product); None: not known."""
    flags = cpu_flags()
    return None if flags is None else "_vnni" in flags or "asimddp" in flags
