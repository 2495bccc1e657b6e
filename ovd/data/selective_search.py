# SPDX-License-Identifier: Apache-2.0
"""Boxes around likely objects, without learning: a small selective search (Uijlings et al., IJCV 2013).

The picture is divided into small even segments; neighbours of similar colour are merged, small and nested ones first,
until one is left. Every segment on the way is a candidate, ranked by its colour contrast with its surroundings (Alexe
et al., What is an object?, CVPR 2010).
"""

from __future__ import annotations

import heapq
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # x1, y1, x2, y2

SIDE = 128  # of the picture that is searched
SEED_STEP = 8  # pixels between the seeds of the first segments: some 200 of them
BINS = 8  # of a segment's histogram, per colour channel
RING = 0.2  # width of the surroundings, in longer sides of the box


def likely_boxes(
    image: NDArray[np.uint8], *, scale: tuple[float, float], max_aspect: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Candidates and how much each stands out.

    Args:
        image: (H, W, 3) uint8 RGB.
        scale: least and most of the square root of area(box) / area(picture).
        max_aspect: of the longer to the shorter side.

    Returns:
        (K, 4) boxes in pixels, the most outstanding first, and (K,) Lab distance to the surroundings times the share of
        its box that the segment fills, halved for each border of the picture it touches. Both may be empty.
    """
    height, width = image.shape[:2]
    factor = SIDE / max(height, width)
    size = (max(8, round(width * factor)), max(8, round(height * factor)))
    lab = cv2.cvtColor(
        cv2.GaussianBlur(cv2.resize(image, size, interpolation=cv2.INTER_AREA), (0, 0), 0.8), cv2.COLOR_RGB2LAB
    )
    tree = _merged(_segments(lab), lab)
    h, w = lab.shape[:2]
    total = cv2.integral(lab.astype(np.float64))
    boxes, values = [], []
    for area, (x1, y1, x2, y2), colour in tree:
        bw, bh = x2 - x1, y2 - y1
        if not scale[0] <= (bw * bh / (h * w)) ** 0.5 <= scale[1] or max(bw / bh, bh / bw) > max_aspect:
            continue
        margin = round(RING * max(bw, bh)) + 1
        a, b, c, d = max(0, x1 - margin), max(0, y1 - margin), min(w, x2 + margin), min(h, y2 + margin)
        around = total[d, c] - total[b, c] - total[d, a] + total[b, a] - colour * area
        contrast = np.linalg.norm(colour - around / max((c - a) * (d - b) - area, 1))
        borders = (x1 == 0) + (y1 == 0) + (x2 == w) + (y2 == h)
        boxes.append([x1 * width / w, y1 * height / h, x2 * width / w, y2 * height / h])
        values.append(float(contrast) * area / (bw * bh) * 0.5**borders)
    order = np.argsort(np.negative(values), kind="stable")
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)[order], np.array(values, dtype=np.float64)[order]


def _segments(lab: NDArray[np.uint8]) -> NDArray[Any]:
    """(h, w) numbers of even segments: a watershed of the gradient from seeds at its minima, one per cell of a grid."""
    height, width = lab.shape[:2]
    steps = [cv2.Sobel(lab.astype(np.float32), -1, dx, 1 - dx) for dx in (0, 1)]
    gradient = np.sqrt(sum((step**2).sum(2) for step in steps))
    seeds = np.zeros((height, width), dtype=np.int32)
    number = 0
    for y in range(0, height, SEED_STEP):
        for x in range(0, width, SEED_STEP):
            cell = gradient[y : y + SEED_STEP, x : x + SEED_STEP]
            row, column = np.unravel_index(int(cell.argmin()), cell.shape)
            number += 1
            seeds[y + row, x + column] = number
    labels = np.maximum(cv2.watershed(np.ascontiguousarray(lab), seeds), 0).astype(np.float32)
    while not labels.all():  # dividing lines and the border are a pixel wide, mostly: they go to a neighbour
        labels = np.where(labels > 0, labels, cv2.dilate(labels, np.ones((3, 3))))
    return labels.astype(int)


def _merged(segments: NDArray[Any], lab: NDArray[np.uint8]) -> list[tuple[int, Box, NDArray[Any]]]:
    """(pixels, box, mean colour) of every segment and merged segment, in the order of their creation."""
    count = int(segments.max()) + 1
    flat = segments.ravel()
    areas = np.bincount(flat, minlength=count).astype(float)
    colours = lab.reshape(-1, 3)
    sums = np.stack([np.bincount(flat, colours[:, c], count) for c in range(3)], 1)
    bins = colours.astype(int) * BINS // 256 + np.arange(3) * BINS
    histogram = np.stack([np.bincount(flat * 3 * BINS + bins[:, c], minlength=count * 3 * BINS) for c in range(3)])
    shares = list(histogram.sum(0).reshape(count, 3 * BINS) / np.maximum(areas, 1)[:, None] / 3)
    rows, columns = np.indices(segments.shape)
    low = np.full((count, 2), 10**6)
    high = np.zeros((count, 2), dtype=int)
    for axis, position in enumerate((columns.ravel(), rows.ravel())):
        np.minimum.at(low[:, axis], flat, position)
        np.maximum.at(high[:, axis], flat, position + 1)
    area = list(areas)
    total = list(sums)
    box: list[Box] = [(*low[i].tolist(), *high[i].tolist()) for i in range(count)]
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for a, b in ((segments[:, :-1], segments[:, 1:]), (segments[:-1], segments[1:])):
        for i, j in np.unique(np.stack([a.ravel(), b.ravel()], 1)[a.ravel() != b.ravel()], axis=0).tolist():
            neighbours[i].add(j)
            neighbours[j].add(i)
    pixels = float(segments.size)

    def similarity(i: int, j: int) -> float:
        """Colour, size and fill of the paper, each from 0 to 1."""
        x1, y1, x2, y2 = _around(box[i], box[j])
        colour = float(np.minimum(shares[i], shares[j]).sum())
        return colour + 1 - (area[i] + area[j]) / pixels + 1 - ((x2 - x1) * (y2 - y1) - area[i] - area[j]) / pixels

    alive = [bool(a) for a in area]
    heap = [(-similarity(i, j), i, j) for i in range(count) for j in neighbours[i] if i < j]
    heapq.heapify(heap)
    while heap:
        _, i, j = heapq.heappop(heap)
        if not (alive[i] and alive[j]):
            continue
        alive[i] = alive[j] = False
        new = len(area)
        area.append(area[i] + area[j])
        total.append(total[i] + total[j])
        shares.append((area[i] * shares[i] + area[j] * shares[j]) / area[new])
        box.append(_around(box[i], box[j]))
        neighbours.append({k for k in neighbours[i] | neighbours[j] if alive[k]})
        alive.append(True)
        for k in neighbours[new]:
            neighbours[k].add(new)
            heapq.heappush(heap, (-similarity(k, new), k, new))
    return [(int(area[i]), box[i], total[i] / area[i]) for i in range(len(area)) if area[i]]


def _around(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
