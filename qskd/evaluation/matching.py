"""Which detections are right, which are wrong and which objects are missed, one by one: what thresholds and confusions are counted
from. AP is not: `average_precision` leaves that to the three programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qskd.evaluation.detections import Array, Detections, GroundTruth

RIGHT, WRONG, NEITHER = 1, 0, -1
LEAST_IOU = 0.5


@dataclass(frozen=True, eq=False)
class Verdicts:
    """scores float [D], category_ids int [D] and verdict int8 [D] (RIGHT, WRONG, NEITHER) of the detections that count, best
    first; `NEITHER` lies in a crowd region of its class."""

    scores: Array
    category_ids: Array
    verdict: Array


def ious(boxes_xyxy: Array, objects_xyxy: Array, crowd: Array) -> Array:
    """[D, 4], [N, 4], bool [N] -> float64 [D, N]; with a crowd region it is the share of the detection that lies in it, as
    COCO has it."""
    from pycocotools import mask

    def xywh(boxes: Array) -> Array:
        boxes = np.asarray(boxes, np.float64)
        return np.ascontiguousarray(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1))

    if not len(boxes_xyxy) or not len(objects_xyxy):
        return np.zeros((len(boxes_xyxy), len(objects_xyxy)))
    return np.asarray(mask.iou(xywh(boxes_xyxy), xywh(objects_xyxy), crowd.astype(np.uint8).tolist()))


def judge(truth: GroundTruth, found: Detections, most: int = 100) -> Verdicts:
    """COCO's matching at IoU 0.5, class by class: in falling order of score each detection takes the free object of its class that
    it overlaps best. A higher threshold on scores leaves what is above it matched as it was. most: detections of a class in an
    image that count, as AP counts them."""
    order, starts = _groups(found)
    rank = np.arange(len(order)) - np.repeat(starts[:-1], np.diff(starts))
    verdict = np.full(len(order), WRONG, np.int8)
    objects = _objects_by_group(truth)
    images, categories = found.image_ids[order], found.category_ids[order]
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        theirs = objects.get((int(images[start]), int(categories[start])))
        if theirs is not None:
            chosen = order[start : min(end, start + most)]
            crowd = truth.iscrowd[theirs]
            overlaps = ious(found.boxes_xyxy[chosen], truth.boxes_xyxy[theirs], crowd)
            taken = _match(overlaps, crowd)
            verdict[start : start + len(chosen)] = np.where(
                taken < 0, WRONG, np.where(crowd[np.maximum(taken, 0)], NEITHER, RIGHT)
            )
    kept = rank < most
    scores, categories, verdict = found.scores[order][kept], categories[kept], verdict[kept]
    best = np.argsort(-scores, kind="stable")
    return Verdicts(scores[best].astype(np.float64), categories[best], verdict[best])


def confusions(truth: GroundTruth, found: Detections, threshold: float) -> dict[tuple[int | None, int | None], int]:
    """(true category, predicted category) -> how often, of detections of at least this score, at IoU 0.5 whatever the class. None
    as the prediction: missed objects; None as the truth: detections where no object is. What lies in a crowd region of its class
    is left out."""
    counted: dict[tuple[int | None, int | None], int] = {}
    kept = np.flatnonzero(found.scores >= threshold)
    kept = kept[np.lexsort((-found.scores[kept], found.image_ids[kept]))]
    of = {int(image): part for image, part in _split(found.image_ids[kept], kept)}
    objects = np.argsort(truth.object_image_ids, kind="stable")
    there = {int(image): part for image, part in _split(truth.object_image_ids[objects], objects)}
    nothing = np.zeros(0, np.int64)
    for image in of.keys() | there.keys():
        mine, theirs = of.get(image, nothing), there.get(image, nothing)
        crowd = truth.iscrowd[theirs]
        overlaps = ious(found.boxes_xyxy[mine], truth.boxes_xyxy[theirs], crowd)
        predicted, actual = found.category_ids[mine], truth.category_ids[theirs]
        overlaps[:, crowd] *= predicted[:, None] == actual[crowd]
        taken = _match(overlaps, crowd)
        pairs: list[tuple[int | None, int | None]] = []
        for label, place in zip(predicted.tolist(), taken.tolist(), strict=True):
            if place < 0:
                pairs.append((None, label))
            elif not crowd[place]:
                pairs.append((int(actual[place]), label))
        missed = np.setdiff1d(np.flatnonzero(~crowd), taken)
        pairs += [(int(label), None) for label in actual[missed]]
        for pair in pairs:
            counted[pair] = counted.get(pair, 0) + 1
    return counted


def _match(overlaps: Array, crowd: Array) -> Array:
    """[D, N] in falling order of score -> the column that each row takes, -1 for none: of the free ones that it overlaps enough the
    best (the last of equals, as COCO), and a crowd region, which may be taken often, where no object is free."""
    taken = np.full(len(overlaps), -1, np.int64)
    if not overlaps.size:
        return taken
    real, regions = np.flatnonzero(~crowd), np.flatnonzero(crowd)
    enough = overlaps >= LEAST_IOU
    free = np.ones(len(real), bool)
    for row in np.flatnonzero(enough.any(1)):
        open_ = real[free & enough[row, real]]
        if len(open_):
            taken[row] = open_[len(open_) - 1 - np.argmax(overlaps[row, open_[::-1]])]
            free[real == taken[row]] = False
        elif enough[row, regions].any():
            taken[row] = regions[np.argmax(overlaps[row, regions])]
    return taken


def _groups(found: Detections) -> tuple[Array, Array]:
    """An order of the detections by image, class and falling score, and where each image and class starts, and the end."""
    order = np.lexsort((-found.scores, found.category_ids, found.image_ids))
    images, categories = found.image_ids[order], found.category_ids[order]
    new = np.ones(len(order), bool)
    new[1:] = (images[1:] != images[:-1]) | (categories[1:] != categories[:-1])
    return order, np.append(np.flatnonzero(new), len(order))


def _objects_by_group(truth: GroundTruth) -> dict[tuple[int, int], Array]:
    """(image, category) -> the objects."""
    order = np.lexsort((truth.category_ids, truth.object_image_ids))
    found: dict[tuple[int, int], Array] = {}
    for image, part in _split(truth.object_image_ids[order], order):
        for category, inner in _split(truth.category_ids[part], part):
            found[int(image), int(category)] = inner
    return found


def _split(keys: Array, values: Array) -> Iterator[tuple[int, Array]]:
    """Values of equal keys together; the keys come in runs."""
    if len(keys):
        starts = np.append(0, np.flatnonzero(keys[1:] != keys[:-1]) + 1)
        for start, part in zip(starts, np.split(values, starts[1:]), strict=True):
            yield int(keys[start]), part
