# SPDX-License-Identifier: Apache-2.0
"""A self-supervised method of one's own: VICReg (arXiv:2105.04906). `python extending_method.py --config my.yaml`"""

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pretrain.config_ssl import SslMethod
from pretrain.data.crops import ViewBatch
from pretrain.engine.errors import run_cli
from pretrain.methods.base import SelfSupervised
from pretrain.nets.heads import mlp
from pretrain.train import main


class VICRegMethod(SslMethod):
    name: Literal["vicreg"] = Field(description="VICReg.")
    dim: int = Field(default=512, ge=2, description="Length of the projection.")


class VICReg(SelfSupervised[VICRegMethod]):
    @classmethod
    def build_projector(cls, config: VICRegMethod, width: int) -> nn.Module:
        return mlp([width, config.dim, config.dim])

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        a_ND, b_ND = self.project(*self.augmented(batch))
        variance, covariance = (regularisers(a_ND)[i] + regularisers(b_ND)[i] for i in (0, 1))
        invariance = (a_ND - b_ND).square().mean()
        return 25 * invariance + 25 * variance + covariance, {"invariance": invariance.detach()}


def regularisers(z_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge on each channel's deviation, and squared covariance off the diagonal (§4.1)."""
    z_ND = z_ND - z_ND.mean(0)
    covariance_DD = z_ND.T @ z_ND / (len(z_ND) - 1)
    off_diagonal = covariance_DD.square().sum() - covariance_DD.diagonal().square().sum()
    return (1 - (z_ND.var(0) + 1e-4).sqrt()).relu().mean() / 2, off_diagonal / z_ND.shape[1]


if __name__ == "__main__":
    run_cli(partial(main, methods={VICRegMethod: VICReg}))
