# SPDX-License-Identifier: Apache-2.0
"""A detector's boxes as Label Studio's predictions.

Label Studio sends all tasks of *Retrieve Predictions* in one request, waits 100 seconds for it, and drops the whole
answer when that time is over. So a request has a time budget here: tasks that it does not reach get no prediction, are
not stored as done, and are what the next *Retrieve Predictions* asks for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovd.inference.example_scorers import SimilarRegions, similar_regions
from ovd.label_studio.answers import Prediction, Result, prediction_of, results_of
from ovd.label_studio.config import BoxControl, read_config
from ovd.label_studio.interactive import DrawnRegion, similar_results
from ovd.pictures import to_rgb
from ovd.query import Query
from ovd.vocabulary import Vocabulary, VocabularyClass
from pretrain.engine.errors import BadImageError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ovd.detector import Detector
    from ovd.label_studio.pictures import PictureSource

log = logging.getLogger(__name__)

SECONDS = 80.0
"""Budget of a request, below the 100 that Label Studio waits (``ML_TIMEOUT_PREDICT``)."""
PLANS = 32
"""Labelling configurations that are cached: each costs an embedding of its words."""


@dataclass(frozen=True, kw_only=True)
class StudioTask:
    """A task: its number, and its data as imported."""

    id: int | None
    data: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The queries of a labelling configuration.

    Attributes:
        controls: with the query of each.
        version: of weights, settings and words together: with other words predictions are old.
    """

    controls: tuple[tuple[BoxControl, Query], ...]
    version: str


class Backend:
    """Predicts tasks. Threads may share it; they wait for one another in the detector.

    Args:
        detector: the detector.
        pictures: where the tasks' pictures come from.
        name: of the weights, for the version.
        threshold: lowest score where a control says none; None: the calibrated one.
        seconds: budget of a request.
    """

    def __init__(
        self,
        detector: Detector,
        pictures: PictureSource,
        *,
        name: str,
        threshold: float | None = None,
        seconds: float = SECONDS,
    ) -> None:
        self._detector = detector
        self._pictures = pictures
        self._name = name
        self._threshold = threshold
        self._seconds = seconds
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._lock = threading.Lock()

    def versions(self) -> list[str]:
        """Versions of the cached configurations, the newest first."""
        with self._lock:
            return list(dict.fromkeys(plan.version for plan in reversed(self._plans.values())))

    def plan(self, config: str) -> Plan:
        """The queries of a labelling configuration, cached.

        Raises:
            UserError: see `read_config`.
        """
        with self._lock:
            if config in self._plans:
                self._plans.move_to_end(config)
                return self._plans[config]
        controls = tuple((control, self._query(control)) for control in read_config(config))
        for control, query in controls:
            if query.notices:
                log.warning(f"labels of {control.name!r}: {'; '.join(query.notices)}")  # whole: alike lines come once
        record: list[object] = [self._detector.card.get("sha256", ""), self._detector.card.get("settings", "")]
        record += [
            [c.name, [label.stored for label in c.labels], q.hash, self._threshold_of(c, q)] for c, q in controls
        ]
        digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]
        plan = Plan(controls=controls, version=f"{self._name}-{digest}")
        with self._lock:
            self._plans[config] = plan
            while len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        return plan

    def predict(self, config: str, tasks: Sequence[StudioTask], *, since: float) -> list[list[Prediction]]:
        """The predictions of each task: one, or none for a task whose picture cannot be read or whose turn never came.

        Args:
            config: the labelling configuration.
            tasks: in the request's order.
            since: `time.monotonic` when the request came.

        Raises:
            UserError: see `read_config`, or what is wrong with the pictures where none of them can be used.
        """
        plan = self.plan(config)
        answers: list[list[Prediction]] = []
        problems: list[UserError] = []
        for number, task in enumerate(tasks):
            if number and time.monotonic() - since > self._seconds:
                log.warning(
                    "%d of %d tasks in %.0f seconds; choose Retrieve Predictions again for the others",
                    *(number, len(tasks), time.monotonic() - since),
                )
                answers += [[] for _ in range(len(tasks) - number)]
                break
            try:
                answers.append([self._predict_task(plan, task)])
            except UserError as problem:
                problems.append(problem)
                log.warning(f"task {task.id} gets no prediction: {problem}")
                answers.append([])
        if problems and not any(answers):
            raise problems[0]
        return answers

    def similar(self, config: str, task: StudioTask, drawn: DrawnRegion) -> Prediction:
        """Boxes that resemble the object in a drawn rectangle, under its label; no words are used.

        Where no region fits the rectangle, its crop is searched for as an example.

        Raises:
            UserError: see `read_config`; a rectangle that is too small or belongs to no control; a picture that cannot
                be used; weights that cannot search by example.
        """
        plan = self.plan(config)
        names = {part.control for part in drawn.parts}
        for control, _ in plan.controls:
            if control.image == drawn.image and names & {control.name, control.rectangle}:
                break
        else:
            raise UserError(f"the rectangle was drawn with {', '.join(sorted(names))!r}, which takes no boxes here")
        pixels = self._pixels(task, control)
        size = (pixels.shape[0], pixels.shape[1])
        box = drawn.box(*size)
        similar = similar_regions(self._detector.embed(pixels).regions, box)
        if similar is None:
            query = self._detector.query(examples=[(drawn.name, box)], picture=pixels)
            detections = self._detector.answer(pixels, query, threshold=self._threshold)
            similar = SimilarRegions(detections.xyxy, detections.confidence)
        return prediction_of(plan.version, similar_results(drawn, similar, size))

    def _query(self, control: BoxControl) -> Query:
        classes = tuple(VocabularyClass(label.words[0], label.words[1:]) for label in control.labels)
        return self._detector.query(Vocabulary(classes, self._detector.templates))

    def _threshold_of(self, control: BoxControl, query: Query) -> float:
        threshold = self._threshold if control.threshold is None else control.threshold
        return self._detector.threshold_for(query, threshold)

    def _predict_task(self, plan: Plan, task: StudioTask) -> Prediction:
        results: list[Result] = []
        for control, query in plan.controls:
            pixels = self._pixels(task, control)
            detections = self._detector.answer(pixels, query, threshold=self._threshold_of(control, query))
            results += results_of(control, detections)
        return prediction_of(plan.version, results)

    def _pixels(self, task: StudioTask, control: BoxControl) -> NDArray[np.uint8]:
        value = task.data.get(control.field)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"the task's data has no {control.field!r}, where its picture should be named")
        try:
            return to_rgb(self._pictures.read(value, task=task.id))
        except BadImageError as problem:
            raise UserError(f"its picture: {problem.reason}") from problem
