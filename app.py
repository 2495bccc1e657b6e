# SPDX-License-Identifier: Apache-2.0
"""The web page: ``python app.py`` is ``wordbox demo`` (`ovd.demo.command`)."""

from __future__ import annotations

from ovd.demo.command import main, parser
from pretrain.engine.errors import run_cli

__all__ = ["main", "parser"]

if __name__ == "__main__":
    run_cli(main)
