# SPDX-License-Identifier: Apache-2.0
"""Check that heads and queues fit the memory before they are allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pretrain.config_ssl import SslMethod
from pretrain.engine.errors import UserError
from pretrain.methods.base import SelfSupervised

COPIES = 3  # of each parameter while it trains: itself, its gradient, its velocity
GIB = 2.0**30


def refuse_too_wide(method: type[SelfSupervised[Any]], config: SslMethod, width: int, device: torch.device) -> None:
    """Refuse heads, a queue or a correlation matrix (Barlow Twins) that exceed the memory.

    Args:
        method: the method.
        config: its section.
        width: of the backbone's features.
        device: whose memory it is.

    Raises:
        UserError: more than there is.
    """
    with torch.device("meta"):
        memory = method.head_memory(config, width)
    heads, free = COPIES * memory.trained, free_memory(device)
    if heads + memory.extra <= free:
        return
    sizes = config.model_dump()
    widths = ("dims", "hidden", "dim", "queue", "queue_length", "prototypes")
    named = {name: sizes[name] for name in widths if sizes.get(name)}
    largest = max(named, key=lambda name: max(named[name]) if name == "dims" else named[name], default="")
    extra = f" and {memory.extra / GIB:.1f} GiB for {memory.extra_for}" if memory.extra_for else ""
    key = f"method.{largest}" if largest else f"method {config.name}"  # the largest is the likeliest mistake
    raise UserError(
        f"{key}: heads of {', '.join(f'{name} {value}' for name, value in named.items())} need about "
        f"{heads / GIB:.1f} GiB to train{extra}; {free / GIB:.1f} GiB are free on {device}. Take smaller ones"
    )


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:  # not the free pages alone: the page cache gives way
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux: all that the machine has
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
