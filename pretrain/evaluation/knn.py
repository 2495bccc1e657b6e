# SPDX-License-Identifier: Apache-2.0
"""The kNN evaluation: a weighted vote of the nearest neighbours, and the probe that measures it during a training.

Shapes: `N` queries, `M` bank, `D` features, `C` classes.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config_views import InputSpec
from pretrain.data.images import ImageSet
from pretrain.data.render import U8
from pretrain.engine import distributed
from pretrain.engine.errors import BadImageError, warn
from pretrain.evaluation.features import centre, features, labels


def knn(
    query_ND: Tensor, bank_MD: Tensor, labels_M: Tensor, *, classes: int, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """Scores (N, C) of the weighted vote (Wu et al., arXiv:1805.01978, §3.4): each of the k nearest by cosine adds
    exp(cosine / temperature) to its class. k = 200 and temperature .1 are what the field reports (MoCo's CIFAR demo).
    """
    query, bank = F.normalize(query_ND.float(), dim=1), F.normalize(bank_MD.float(), dim=1)
    labels_M = labels_M.to(bank.device)
    scores = []
    for part in query.split(1024):
        cosine, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, device=bank.device)
        scores.append(votes.scatter_add_(1, labels_M[nearest], ((cosine - 1) / temperature).exp()))  # − 1: no overflow
    return torch.cat(scores)


def accuracy(scores_NC: Tensor, labels_N: Tensor) -> float:
    """Share of rows whose largest score is the label's."""
    return float((scores_NC.argmax(1).cpu() == labels_N.cpu()).float().mean())


class KnnProbe:
    """kNN within a time budget, for ``Monitored``: a fixed bank and fixed queries, decoded once and kept.

    Bank and queries are taken in turns, so that a probe that runs out of time is smaller and still fair; the processes
    agree on where to stop.

    Args:
        train: bank.
        test: queries.
        inputs: size and pixel statistics the backbone expects.
        seconds: time budget of one probe.
        bank: pictures of the bank, at most.
        queries: queries, at most.
        k: neighbours.
        temperature: of the vote.
    """

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet,
        inputs: InputSpec,
        *,
        seconds: float,
        bank: int = 2000,
        queries: int = 1000,
        k: int = 20,
        temperature: float = 0.1,
        batch: int = 128,
    ) -> None:
        self.inputs, self.seconds, self.k, self.temperature = inputs, seconds, k, temperature
        self.batch = batch
        self.parts: list[tuple[bool, ImageSet, list[int]]] = []
        rng = np.random.default_rng(0)
        bank_indices = rng.permutation(len(train))[:bank].tolist()
        query_indices = rng.permutation(len(test))[:queries].tolist()
        pieces = -(-len(bank_indices) // batch)
        for i in range(pieces):
            self.parts += [(True, train, bank_indices[i::pieces]), (False, test, query_indices[i::pieces])]
        self._decoded: dict[tuple[bool, int], U8] = {}

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        """ "knn" accuracy, "seconds" it took, "bank" and "queries" used."""
        begun = time.perf_counter()
        rows: dict[bool, list[Tensor]] = {True: [], False: []}
        names: dict[bool, list[Tensor]] = {True: [], False: []}
        for number, (is_bank, source, indices) in enumerate(self.parts):
            late = distributed.all_sum([float(time.perf_counter() - begun > self.seconds)])[0] > 0
            if late and number >= 2 and number % 2 == 0:
                break
            if indices:
                cached = _CachedViews(source, is_bank, self._decoded, self.inputs.size)
                rows[is_bank].append(features(backbone, cached, indices, self.inputs, batch=self.batch))
                names[is_bank].append(labels(source, indices))
        bank, query = torch.cat(rows[True]), torch.cat(rows[False])
        y_bank, y_query = torch.cat(names[True]), torch.cat(names[False])
        classes = int(max(y_bank.max(), y_query.max())) + 1
        scores = knn(query, bank, y_bank, classes=classes, k=self.k, temperature=self.temperature)
        return {
            "knn": accuracy(scores, y_query),
            "seconds": time.perf_counter() - begun,
            "bank": float(len(bank)),
            "queries": float(len(query)),
        }


class _CachedViews:
    """Evaluation views, made once."""

    def __init__(self, source: ImageSet, is_bank: bool, cache: dict[tuple[bool, int], U8], size: int) -> None:
        self.source, self.is_bank, self.cache, self.size = source, is_bank, cache, size

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> U8:
        key = (self.is_bank, index)
        if key not in self.cache:
            try:
                self.cache[key] = centre(self.source.image(index), self.size)
            except BadImageError as error:  # a training does not end for it, and every process must go on alike
                warn(f"probe: a grey picture stands for {error}")
                self.cache[key] = np.full((self.size, self.size, 3), 128, np.uint8)
        return self.cache[key]

    def label(self, index: int) -> int:
        return self.source.label(index)
