# SPDX-License-Identifier: Apache-2.0
"""A set of pictures of one's own: a .npy file of a (N, H, W, 3) uint8 array. `python extending_images.py --config …`"""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pretrain.config_views import ImageData
from pretrain.data.folder import U8
from pretrain.engine.errors import UserError, run_cli
from pretrain.train import main


class ArrayData(ImageData):
    kind: Literal["array"] = Field(description="Pictures in a .npy file.")
    path: Path = Field(description="The file.")


class ArraySet:
    def __init__(self, config: ArrayData) -> None:
        if not config.path.is_file():
            raise UserError(f"data.path {config.path} does not exist; give a .npy file")
        self.pictures = np.load(config.path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int) -> U8:
        return np.array(self.pictures[index])

    def label(self, index: int) -> int:
        return -1  # none


if __name__ == "__main__":
    run_cli(partial(main, data={ArrayData: ArraySet}))
