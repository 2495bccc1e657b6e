# SPDX-License-Identifier: Apache-2.0
"""A loss of your own: decoupled contrastive learning (Yeh et al., arXiv:2110.06848), SimCLR's with fewer terms."""

import torch
from torch import Tensor
from torch.nn import functional as F


def decoupled_contrastive(z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """Mean over both directions of −positive + log-sum of the 2N − 2 negatives (eq. 6).

    Args:
        z_a, z_b: (N, D) projections of two views, N ≥ 2; row i of both is the same picture.
        temperature: Divides the cosines.
    """
    z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)
    cosine = z @ z.T / temperature
    n = len(z_a)
    index = torch.arange(2 * n, device=z.device)
    partner = (index + n) % (2 * n)
    positive = cosine[index, partner]
    others = cosine.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    others[index, partner] = -torch.inf
    return (others.logsumexp(dim=1) - positive).mean()
