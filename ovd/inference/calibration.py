# SPDX-License-Identifier: Apache-2.0
"""Fitting a checkpoint's :class:`~ovd.inference.scoring.Calibration` on scenes that no training and no evaluation
uses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fit_platt(raw: Tensor, correct: Tensor, *, eps: float = 1e-6, iterations: int = 50) -> tuple[float, float]:
    """Slope and offset of ``sigmoid(slope · logit(raw) + offset)`` by Newton's method on the log-likelihood.

    Args:
        raw: (N,) scores in [0, 1].
        correct: (N,) whether the detection was right: bool, or its probability.
        eps: scores are kept so far from 0 and 1.
        iterations: at most.

    Returns:
        (slope, offset); (1, 0) when all are right or all wrong, where the likelihood has no maximum.
    """
    target = correct.double()
    if len(raw) == 0 or target.min() == target.max():
        return 1.0, 0.0
    x = torch.stack([torch.logit(raw.double(), eps=eps), torch.ones(len(raw), dtype=torch.float64)], dim=1)
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64)
    ridge = 1e-4 * torch.eye(2, dtype=torch.float64)  # where right and wrong separate, the likelihood has no maximum

    def cost(w: Tensor) -> Tensor:
        logits = x @ w
        return (F.softplus(logits) - target * logits).sum() + 0.5 * w @ ridge @ w

    for _ in range(iterations):
        p = (x @ weight).sigmoid()
        gradient = x.T @ (p - target) + ridge @ weight
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge
        step = torch.linalg.solve(hessian, gradient)
        # Far from the optimum Newton's step overshoots and would oscillate: halve it until the likelihood improves.
        while cost(weight - step) > cost(weight) and float(step.abs().max()) > 1e-10:
            step = step / 2
        weight = weight - step
        if float(step.abs().max()) < 1e-9:
            break
    return float(weight[0]), float(weight[1])


def absent_class_threshold(best_absent: Tensor, *, rate: float = 0.95) -> float:
    """The score that a class which is not in the picture stays below in ``rate`` of the pictures.

    Args:
        best_absent: (N,) best score of one absent class in each of N pictures.
    """
    if len(best_absent) == 0:
        raise ValueError("no absent classes were scored")
    return float(torch.quantile(best_absent.double(), rate))
