# SPDX-License-Identifier: Apache-2.0
"""Every claim with every seed: `python benchmarks/claims/run_all.py`. Interrupted, it goes on where it was."""

from __future__ import annotations

import sys

import barlow_width
import batch_size
import byol_norm
import collapse
import simsiam_alternating
import swav

if __name__ == "__main__":
    for claim in (collapse, swav, byol_norm, simsiam_alternating, barlow_width, batch_size):
        claim.main(sys.argv[1:])
