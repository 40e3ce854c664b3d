"""Several forms of one detector over the same images: how far each is from the first, and the AP of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qskd.deploy.export import TOLERANCE, likeness
from qskd.deploy.onnx_detect import probabilities_of
from qskd.deploy.runtimes import Run
from qskd.deploy.variants import Differences
from qskd.detectors import Detector
from qskd.errors import QskdError
from qskd.evaluation.average_precision import detections_from, evaluate_coco
from qskd.evaluation.detections import Detections, GroundTruth
from qskd.families.detr import from_softmax


@dataclass(frozen=True, eq=False)
class Pictures:
    """Some images as a graph takes them: pixel_values float32 [n, 3, S, S]; and, of each file's image, its id and [n, 2] height,
    width. Without ids nothing is known of what is in them."""

    pixels: np.ndarray
    image_ids: np.ndarray | None = None
    original_sizes: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Truth:
    """What AP is measured against. slots: the logit of each class in category_ids."""

    ground_truth: GroundTruth
    category_ids: Sequence[int]
    slots: Sequence[int]


@dataclass(frozen=True, eq=False)
class Measured:
    """differences: to the first; of the first itself None. metrics: of `qskd.evaluation`; empty without a truth."""

    differences: Differences | None
    metrics: Mapping[str, float]


class _Gaps:
    """Sums of differences, image by image."""

    def __init__(self) -> None:
        self.images, self.reordered = 0, 0
        self.largest, self.means = np.zeros(2), np.zeros(2)

    def add(self, mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray], reorder: bool) -> None:
        """Boxes [Q, 4] and probabilities [Q, K] of one image."""
        gaps = [np.abs(a - b) for a, b in zip(mine, theirs, strict=True)]
        if reorder and not max(gap.max() for gap in gaps) <= TOLERANCE:
            order = likeness(mine, theirs)
            gaps = [np.abs(a - b[order]) for a, b in zip(mine, theirs, strict=True)]
            self.reordered += int((order != np.arange(len(order))).sum())
        self.images += 1
        self.largest = np.maximum(self.largest, [gap.max() for gap in gaps])
        self.means = self.means + [gap.mean() for gap in gaps]

    @property
    def found(self) -> Differences:
        (box, probability), means = self.largest.tolist(), (self.means / max(1, self.images)).tolist()
        return Differences(self.images, probability, means[1], box, means[0], self.reordered)


def side_by_side(
    detector: Detector, runs: Mapping[str, Run], pictures: Iterable[Pictures], batch: int, truth: Truth | None = None
) -> dict[str, Measured]:
    """Every one over every image; the others are compared with the first. batch: images that each takes at a time; the last are
    filled up. Where queries are chosen in each image, they are compared by likeness, as `compare` does.

    Raises QskdError where one gives something that is no number.
    """
    gaps = {name: _Gaps() for name in runs}
    found: dict[str, list[Detections]] = {name: [Detections.empty()] for name in runs}
    for some in pictures:
        first: list[tuple[np.ndarray, np.ndarray]] = []
        for name, run in runs.items():
            logits, boxes = _filled(run, some.pixels, batch)
            if not (np.isfinite(boxes).all() and np.isfinite(logits).all()):
                raise QskdError(
                    f"{detector.family}, {name}",
                    "outputs that are no numbers",
                    "finite ones",
                    "leave this precision away; nothing was written",
                )
            said = list(zip(boxes, probabilities_of(logits, detector.family), strict=True))
            first = first or said
            for mine, theirs in zip(first, said, strict=True):
                gaps[name].add(mine, theirs, detector.chooses_queries)
            if truth is not None:
                found[name].append(_detections(detector, logits, boxes, some, truth))
    metrics: dict[str, Mapping[str, float]] = {name: {} for name in runs}
    if truth is not None:
        metrics = {
            name: evaluate_coco(truth.ground_truth, Detections.concatenate(some)).metrics
            for name, some in found.items()
        }
    reference = next(iter(runs))
    return {name: Measured(None if name == reference else gaps[name].found, metrics[name]) for name in runs}


def _filled(run: Run, pixels: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """`batch` images at a time; the last are filled up with the last image."""
    parts = []
    for start in range(0, len(pixels), batch):
        some = pixels[start : start + batch]
        there = len(some)
        if there < batch:
            some = np.concatenate([some, np.repeat(some[-1:], batch - there, 0)])
        logits, boxes = run(some)
        parts.append((logits[:there].copy(), boxes[:there].copy()))
    logits, boxes = (np.concatenate(values) for values in zip(*parts, strict=True))
    return logits, boxes


def _detections(detector: Detector, logits: np.ndarray, boxes: np.ndarray, some: Pictures, truth: Truth) -> Detections:
    if some.image_ids is None or some.original_sizes is None:
        raise ValueError("images without ids have no ground truth")
    values = torch.from_numpy(logits)
    values = from_softmax(values)[0] if detector.classification == "softmax" else values
    sizes = torch.from_numpy(some.original_sizes)
    ids = some.image_ids.tolist()
    return detections_from(values[..., list(truth.slots)], torch.from_numpy(boxes), ids, sizes, truth.category_ids)
