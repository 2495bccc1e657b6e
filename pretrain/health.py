# SPDX-License-Identifier: Apache-2.0
"""Health of a self-supervised run: measures of the last forward pass, and alarms with cause and remedy.

The loss does not show health: a collapsed BYOL or SimSiam has the lowest of all. Nor does a single measure: SimSiam
without stop-gradient keeps the spread of its channels (through batch norm) while the rank falls to a tenth. And the
rank has no fixed threshold: a healthy MoCo v2 has a lower one than some collapsed runs. So an alarm compares a run
with itself and fires on a fall from the run's highest value.

Shapes: `N` samples of this process, `D` projection, `K` prototypes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.engine import distributed
from pretrain.engine.config import OptimConfig
from pretrain.engine.optim import ParamGroup
from pretrain.engine.task import Task

# --- measures --------------------------------------------------------------------------------------------------------


def effective_rank(x_ND: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values (RankMe, Garrido et al., arXiv:2210.02885, eq. 1).

    Not centred: around its mean, the noise of a constant projection would have full rank. Between 1 and min(N, D); not
    a number where the features are not finite.
    """
    if not bool(torch.isfinite(x_ND).all()):
        return torch.full((), math.nan, device=x_ND.device)
    singular = torch.linalg.svdvals(x_ND.detach().float())
    share = singular / singular.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()


def channel_spread(x_ND: Tensor) -> Tensor:
    """Standard deviation per channel of the unit vectors, times √D: 1 spread over the sphere, 0 collapsed.

    SimSiam (arXiv:2011.10566), §4.1.
    """
    unit = F.normalize(x_ND.detach().float(), dim=1)
    return unit.std(0, correction=0).mean() * math.sqrt(unit.shape[1])


def mean_cosine(x_ND: Tensor) -> Tensor:
    """Mean cosine between different samples: about 0 spread over the sphere, 1 collapsed."""
    unit = F.normalize(x_ND.detach().float(), dim=1)
    count = len(unit)
    return (unit.sum(0).square().sum() - unit.square().sum()) / max(1, count * (count - 1))


def prototype_use(scores_NK: Tensor) -> Tensor:
    """Share of prototypes in use: perplexity of the choices, over the number that could be chosen."""
    count, prototypes = scores_NK.shape
    share = torch.bincount(scores_NK.detach().argmax(1), minlength=prototypes).float() / count
    return torch.special.entr(share).sum().exp() / min(count, prototypes)


def margin(positive_N: Tensor, negative_N: Tensor) -> Tensor:
    """Cosine of the positive pair minus the mean cosine with the negatives."""
    return (positive_N.detach().float() - negative_N.detach().float()).mean()


def diagonal(a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Of the correlation between two views' channels: the mean on the diagonal, the root mean square off it."""
    a, b = a_ND.detach().float(), b_ND.detach().float()
    a, b = ((v - v.mean(0)) / v.std(0, correction=0).clamp(min=1e-6) for v in (a, b))
    correlation_DD = a.T @ b / len(a)
    on, size = correlation_DD.diagonal(), len(correlation_DD)
    off = correlation_DD.square().sum() - on.square().sum()
    return on.mean(), (off.clamp(min=0) / max(1, size * (size - 1))).sqrt()


def ema_distance(online: Tensor, target: Tensor) -> Tensor:
    """Length of the difference between two flat parameter vectors, over the length of the first."""
    online, target = online.detach().float(), target.detach().float()
    return (online - target).norm() / online.norm().clamp(min=1e-12)


def panel(health: Mapping[str, Tensor]) -> dict[str, float]:
    """The measures that a method's ``health()`` allows.

    Args:
        health: "projection" (N, D); if the method has them: "projection_b" (N, D) of the other view, "scores" (N, K)
            to prototypes, "positive" and "negative" (N,) cosines, "own_caption" and "other_captions" likewise,
            "online_parameters" and "target_parameters", flat.

    Returns:
        values by name, each beginning with ``health/``.
    """
    z = health["projection"]
    measures = {"rank": effective_rank(z), "spread": channel_spread(z), "cosine": mean_cosine(z)}
    if "projection_b" in health:
        measures["on_diagonal"], measures["off_diagonal"] = diagonal(z, health["projection_b"])
    if "scores" in health:
        measures["prototype_use"] = prototype_use(health["scores"])
    if "positive" in health and "negative" in health:
        measures["queue_margin"] = margin(health["positive"], health["negative"])
    if "own_caption" in health and "other_captions" in health:
        measures["caption_margin"] = margin(health["own_caption"], health["other_captions"])
    if "online_parameters" in health and "target_parameters" in health:
        measures["ema_distance"] = ema_distance(health["online_parameters"], health["target_parameters"])
    return {f"health/{name}": float(value) for name, value in measures.items()}


# --- alarms ----------------------------------------------------------------------------------------------------------


class Alarm(NamedTuple):
    """One way to fail; ``unhealthy`` is given the value and the run's highest so far."""

    value: str
    unhealthy: Callable[[float, float], bool]
    cause: str
    remedy: str
    settled: float = 0.0  # judged from this share of the run on: at the beginning this is how it has to be
    falls: bool = False  # compared with the run's highest


EPS = 1e-9
ALARMS = (  # a new one goes last: checkpoints hold a value for each, in this order
    Alarm(
        "health/rank",
        lambda value, best: value < 0.2 * best,
        "the projections collapse into few directions; without negatives the cause is a missing stop-gradient or "
        "predictor, or too high a learning rate",
        "check that the target branch is detached and the predictor is trained; lower optim.lr or lengthen "
        "optim.warmup_steps; if the kNN probe has fallen as well, restart the run",
        falls=True,
    ),
    Alarm(
        "health/spread",
        lambda value, best: value < 0.2,
        "the projection is nearly the same for every picture",
        "lower optim.lr, raise the target's momentum, see that the head's norm layers are there; swav: epsilon .03",
        settled=0.1,
    ),
    Alarm(
        "health/off_diagonal",
        lambda value, best: value > 0.6,
        "the projection's channels repeat each other; Barlow Twins without its off-diagonal term looks like this",
        "raise lambd (barlow_twins); otherwise lower optim.lr",
        settled=0.1,
    ),
    Alarm(
        "health/prototype_use",
        lambda value, best: value < 0.1,
        "nearly all pictures choose the same few prototypes",
        "epsilon .03, freeze the prototypes for longer, take fewer prototypes, see that the batch (with the queue) has "
        "several samples for each prototype",
        settled=0.1,
    ),
    Alarm(
        "health/loss_over_ln_k",
        lambda value, best: value > 0.94,
        "the loss is stuck at ln K: every code is uniform, so there is nothing to predict",
        "epsilon .03, freeze the prototypes for longer, fewer prototypes or crops, a lower optim.lr",
        settled=0.1,
    ),
    Alarm(
        "health/queue_margin",
        lambda value, best: value < 0.02,
        "the positive key is no nearer than the negatives",
        "check that queue and keys come from the same encoder; raise momentum; lower optim.lr; weaken the views",
        settled=0.1,
    ),
    Alarm(
        "health/ema_distance",
        lambda value, best: value < EPS,
        "the target network equals the online network",
        "check that the momentum is not 0 and that after_step is called once per optimiser step",
        settled=0.1,
    ),
    Alarm(
        "probe/knn",
        lambda value, best: value < 0.7 * best,
        "the features separate classes less well although the loss still falls",
        "use the checkpoint from before the drop; then as for a falling rank",
        falls=True,
    ),
    Alarm(
        "health/caption_margin",
        lambda value, best: value < 0.005,
        "a picture's own caption is no nearer than those of other pictures",
        "check that captions belong to their pictures (a table may be shifted by a row); lower optim.lr or lengthen "
        "optim.warmup_steps; take a larger loop.batch_size, with method.chunk if memory is short",
        settled=0.25,
    ),
)
PATIENCE = 3  # measurements in a row: a single bad batch is no collapse


class Monitored(Task):
    """Wrap a task: its health panel in each log line, alarms, and a kNN probe now and then.

    The measures are means over the processes. What alarms compare with is kept in buffers, so that a resumed run
    raises the same alarms.

    Args:
        task: overrides `Task.health` (see `panel`).
        probe: called with the task's backbone every ``probe_every`` steps, in every process; returns values by name.
        probe_every: steps between probes; 0: never.
        probe_name: what the probe measures on. A run that goes on with another forgets its best kNN.
    """

    progress: Tensor
    best: Tensor
    ill_for: Tensor
    probed: Tensor
    probed_on: Tensor

    def __init__(
        self,
        task: Task,
        *,
        probe: Callable[[nn.Module], dict[str, float]] | None = None,
        probe_every: int = 0,
        probe_name: str = "",
    ) -> None:
        super().__init__()
        self.task = task
        self.probe, self.probe_every = probe, probe_every
        self.untracked = tuple(f"task.{prefix}" for prefix in task.untracked)
        self.find_unused_parameters, self.check_samples = task.find_unused_parameters, task.check_samples
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))  # share of the run that is done
        self.register_buffer("best", torch.full((len(ALARMS),), -math.inf, dtype=torch.float64))
        self.register_buffer("ill_for", torch.zeros(len(ALARMS), dtype=torch.int64))  # measurements in a row
        self.register_buffer("probed", torch.full((), -1.0, dtype=torch.float64))  # newest kNN; -1: reported already
        self.register_buffer("probed_on", torch.full((), -1, dtype=torch.int64))  # digest of the probe's name; -1: none
        self._probe_digest = zlib.crc32(probe_name.encode())
        self._seconds = 0.0  # that it took; a measured time is no part of what a resumed run repeats
        self._loss = math.nan

    @property
    def backbone(self) -> nn.Module:
        """The online backbone."""
        return self.task.backbone  # type: ignore[return-value]

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        """The task's own."""
        return self.task.param_groups(optim)

    def after_backward(self, step: int) -> None:
        """The task's own."""
        self.task.after_backward(step)

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        loss, metrics = self.task(batch)
        self._loss = loss.detach()
        return loss, metrics

    def after_step(self, step: int, total: int) -> None:
        """The task's own, then the probe when it is due."""
        self.task.after_step(step, total)
        self.progress.fill_((step + 1) / total)
        if self.probe is not None and self.probe_every and (step + 1) % self.probe_every == 0:
            result = self.probe(self.backbone)
            if int(self.probed_on) != self._probe_digest:
                for number, alarm in enumerate(ALARMS):
                    if alarm.value.startswith("probe/"):
                        self.best[number], self.ill_for[number] = -math.inf, 0
                self.probed_on.fill_(self._probe_digest)
            self.probed.fill_(result["knn"])
            self._seconds = result["seconds"]

    def upgrade(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a run that began before an alarm was added: what it never judged starts as in a new run."""
        initial = {"best": torch.full_like(self.best, -math.inf), "ill_for": torch.zeros_like(self.ill_for)}
        upgraded = {"probed_on": torch.full_like(self.probed_on, -1), **state}
        for name, default in initial.items():
            value = upgraded.get(name)
            if isinstance(value, Tensor) and value.ndim == 1 and len(value) < len(default):
                upgraded[name] = torch.cat([value, default[len(value) :].to(value)])
        return upgraded

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Values for the log line, and new alarms. Every process must call it."""
        health = self.task.health()
        values = panel(health)
        if "scores" in health:
            values["health/loss_over_ln_k"] = float(self._loss) / math.log(health["scores"].shape[1])
        names = sorted(values)
        sums = distributed.all_sum([values[name] for name in names])
        values = {name: total / distributed.world_size() for name, total in zip(names, sums, strict=True)}
        if self.probed >= 0:
            values |= {"probe/knn": float(self.probed), "probe/seconds": self._seconds}
            self.probed.fill_(-1.0)
        return values, self._judge(values)

    def _judge(self, values: Mapping[str, float]) -> list[str]:
        texts = []
        for number, alarm in enumerate(ALARMS):
            if alarm.value not in values or self.progress < alarm.settled:
                continue
            value, best = values[alarm.value], float(self.best[number])
            unhealthy = not math.isfinite(value) or alarm.unhealthy(value, best)
            patience = 1 if alarm.value.startswith("probe/") else PATIENCE
            self.ill_for[number] = self.ill_for[number] + 1 if unhealthy else 0
            if int(self.ill_for[number]) == patience:
                since = f", after {best:.3g} in this run" if alarm.falls else ""
                texts.append(f"{alarm.value} is {value:.3g}{since}: {alarm.cause}. What to do: {alarm.remedy}")
            if math.isfinite(value):
                self.best[number] = max(best, value)
        return texts
