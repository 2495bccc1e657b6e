# SPDX-License-Identifier: Apache-2.0
"""Monitoring of a training: the health panel and, where there are labels, a kNN probe."""

from __future__ import annotations

from pretrain.config_ssl import WatchConfig
from pretrain.config_views import DataSection, InputSpec
from pretrain.engine.distributed import is_main
from pretrain.engine.task import Task
from pretrain.health import Monitored


def monitored(task: Task, watch: WatchConfig, data: DataSection, inputs: InputSpec) -> Monitored:
    """The task with its health panel and, where there are labels and ``watch`` wants one, a kNN probe.

    Args:
        task: the method.
        watch: what to measure.
        data: what is learned from; its labelled pictures are the probe's if ``watch`` names none.
        inputs: what the backbone expects.

    Raises:
        UserError: the probe's pictures are not there.
    """
    if not watch.probe_every:
        return Monitored(task)
    named = watch.probe_data or data.labelled_halves()
    if named is None:
        if is_main():
            print("no kNN while training: watch.probe_data names no labelled pictures (a folder with train/ and val/)")
        return Monitored(task)
    from pretrain.evaluation.data import open_data
    from pretrain.evaluation.knn import KnnProbe

    train, test, _ = open_data(named, size=inputs.size, key="watch.probe_data")
    probe = KnnProbe(
        train,
        test,
        inputs,
        seconds=watch.probe_seconds,
        bank=watch.probe_pictures,
        queries=watch.probe_pictures // 2,
    )
    name = f"{named}, {watch.probe_pictures} pictures"
    return Monitored(task, probe=probe, probe_every=watch.probe_every, probe_name=name)
