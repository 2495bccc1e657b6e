# SPDX-License-Identifier: Apache-2.0
"""``python -m pretrain.data.stickers``: scenes as a COCO data set, see `pretrain.data.export`."""

from __future__ import annotations

from pretrain.data.export import main
from pretrain.engine.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
