# SPDX-License-Identifier: Apache-2.0
"""Losses of 2 and 4 processes, and the gradients averaged over them, are those of one process on the global batch."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pretrain.engine.distributed import rank, world_size
from pretrain.losses import (
    barlow_twins,
    byol_regression,
    clip_contrastive,
    moco_infonce,
    negative_cosine,
    nt_xent,
    sinkhorn,
    swav_loss,
)
from tests.ssl.test_clip_chunks import batch_of, task_of

BATCH, WIDTH, DIM = 16, 6, 5


def fixed(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mine(whole: Tensor) -> Tensor:
    """This process's slice."""
    part = len(whole) // world_size()
    return whole[rank() * part : (rank() + 1) * part]


def swav(a: Tensor, b: Tensor, p: Tensor, *, queue: bool) -> Tensor:
    prototypes = F.normalize(p, dim=1)
    scores = [F.normalize(z, dim=1) @ prototypes.T for z in (a, b, a + b.square())]
    earlier = [mine(F.normalize(fixed(8, 7, seed=20 + i), dim=1)) for i in range(2)] if queue else None
    return swav_loss(scores, temperature=0.1, epsilon=0.05, iterations=3, queue_scores=earlier)


LABELS = torch.tensor([0, 1, 2, 0, 1, 1, 3, 0, 2, 2, 3, 0, 0, 1, 2, 3])

# Views (n, WIDTH) @ weight -> embeddings; the third weight is what else a loss learns.
CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "nt_xent": lambda a, b, p: nt_xent(a, b, temperature=0.1),
    "moco": lambda a, b, p: moco_infonce(a, b, F.normalize(fixed(9, DIM, seed=5), dim=1), temperature=0.07),
    "byol": lambda a, b, p: byol_regression(a @ p.T, (b @ p.T).detach()),
    "cosine": lambda a, b, p: negative_cosine(a @ p.T, (b @ p.T).detach()),
    "swav": lambda a, b, p: swav(a, b, p, queue=False),
    "swav_queue": lambda a, b, p: swav(a, b, p, queue=True),
    "barlow": lambda a, b, p: barlow_twins(a, b, lambd=0.0051),
    "clip": lambda a, b, p: clip_contrastive(a, b, p.mean() + 2),
    "clip_labels": lambda a, b, p: clip_contrastive(a, b, p.mean() + 2, labels_N=mine(LABELS), names_CD=p[:4]),
}


def found(name: str) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient as one vector, averaged over the processes as DistributedDataParallel does."""
    weight = fixed(WIDTH, DIM, seed=1).requires_grad_()
    other = fixed(7, DIM, seed=2).requires_grad_()
    loss = CASES[name](mine(fixed(BATCH, WIDTH, seed=3)) @ weight, mine(fixed(BATCH, WIDTH, seed=4)) @ weight, other)
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (weight, other)]
    result = torch.cat([loss.detach().flatten(), *(grad.flatten() for grad in grads)])
    if world_size() > 1:
        dist.all_reduce(result)
    return result[0] / world_size(), result[1:] / world_size()


def codes() -> Tensor:
    scores = F.normalize(fixed(BATCH, WIDTH, seed=3), dim=1) @ F.normalize(fixed(7, WIDTH, seed=4), dim=1).T
    return sinkhorn(mine(scores), epsilon=0.05, iterations=3)


def clip_gradient(chunk: int | None) -> Tensor:
    """Of the whole method, through DistributedDataParallel where there are several processes."""
    task = task_of(chunk=chunk)
    model = DistributedDataParallel(task) if world_size() > 1 else task
    whole = batch_of(BATCH)
    part = slice(rank() * BATCH // world_size(), (rank() + 1) * BATCH // world_size())
    loss, _ = model({name: value[part] for name, value in whole.items()})
    loss.backward()
    return torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])


def _process(number: int, world: int, folder: str) -> None:
    os.environ.update(RANK=str(number), WORLD_SIZE=str(world), LOCAL_RANK=str(number))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=world)
    results: dict[str, object] = {name: found(name) for name in CASES}
    results["codes"], results["chunked"] = codes(), clip_gradient(2)
    torch.save(results, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each process found; one start per number of processes, because importing torch is the slow part."""
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    mp.start_processes(_process, args=(request.param, str(folder)), nprocs=request.param, start_method="spawn")
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(request.param)]


def close(ours: Tensor, true: Tensor) -> None:
    assert float(true.norm()) > 1e-3
    assert float(F.cosine_similarity(ours.double(), true.double(), dim=0)) > 1 - 1e-6
    assert float(ours.norm() / true.norm()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_distributed_losses__loss_and_gradient_are_those_of_the_global_batch(
    processes: list[dict[str, object]], name: str
) -> None:
    loss, gradient = found(name)
    for one in processes:
        value, ours = one[name]  # type: ignore[misc]
        assert float(value) == pytest.approx(float(loss), rel=1e-9)
        close(ours, gradient)
        torch.testing.assert_close(ours, gradient, rtol=1e-8, atol=1e-10)


def test_distributed_losses__codes_are_assigned_over_all_processes(processes: list[dict[str, object]]) -> None:
    torch.testing.assert_close(torch.cat([one["codes"] for one in processes]), codes())  # type: ignore[misc]


def test_distributed_losses__clip_in_chunks_has_the_gradient_of_the_whole_batch(
    processes: list[dict[str, object]],
) -> None:
    true = clip_gradient(None)
    for one in processes:
        close(one["chunked"], true)  # type: ignore[arg-type]
