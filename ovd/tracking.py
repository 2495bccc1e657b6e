# SPDX-License-Identifier: Apache-2.0
"""Tracks objects from frame to frame with ByteTrack, from the package trackers (split off supervision)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovd.detections import Detections
from pretrain.engine.errors import UserError

# The package asks for opencv-python, whose window functions need libraries that servers lack, and which overwrites the
# headless one that is installed with wordbox; hence --no-deps.
NEEDED = (
    "tracks need the packages trackers and supervision, and an annotated video av: pip install av supervision; pip "
    "install --no-deps trackers pydeprecate. Or give --no-track: each frame by itself"
)
WEAK = 0.5  # of the threshold: down to there ByteTrack looks for an object it has followed so far


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The detections of a frame and the track of each.

    Attributes:
        detections: of the frame.
        track: (n,) int64 number of the track from 1, 0 where there is none (yet).
    """

    detections: Detections
    track: NDArray[np.int64]

    def labelled(self) -> Detections:
        """The detections with the track behind the class name, for drawing."""
        pairs = zip(self.detections.class_name, self.track.tolist(), strict=True)
        return replace(self.detections, class_name=[f"{name} #{track}" if track else name for name, track in pairs])


class Tracker:
    """ByteTrack with thresholds from the detector's.

    Args:
        threshold: of the detections; weaker ones only prolong tracks.
        rate: frames per second that it sees.

    Raises:
        UserError: the packages are not installed.
    """

    def __init__(self, *, threshold: float, rate: float) -> None:
        try:
            from trackers import ByteTrackTracker
        except ImportError as problem:
            raise UserError(NEEDED) from problem
        self.threshold = threshold
        self._tracker: Any = ByteTrackTracker(
            frame_rate=max(rate, 1.0), track_activation_threshold=threshold, high_conf_det_threshold=threshold
        )

    def follow(self, detections: Detections) -> Tracked:
        """Give the detections of the next frame their tracks; weak ones without a track are left out.

        Args:
            detections: with scores down to `WEAK` times the threshold.
        """
        from supervision import Detections as Target

        tracked = self._tracker.update(
            Target(
                xyxy=detections.xyxy.copy(),
                confidence=detections.confidence.copy(),
                class_id=detections.class_id.astype(int),
                data={"row": np.arange(len(detections))},
            )
        )
        track = np.zeros(len(detections), dtype=np.int64)
        if len(tracked):  # numbers begin at 0, -1 is none
            track[tracked.data["row"].astype(int)] = np.maximum(tracked.tracker_id.astype(np.int64) + 1, 0)
        keep = np.flatnonzero((track > 0) | (detections.confidence >= np.float32(self.threshold)))
        return Tracked(detections=detections.chosen(keep), track=track[keep])


def untracked(detections: Detections) -> Tracked:
    """Detections without tracks."""
    return Tracked(detections=detections, track=np.zeros(len(detections), dtype=np.int64))
