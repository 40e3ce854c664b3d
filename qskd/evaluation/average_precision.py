"""COCO average precision: detections out of a model's output, and the standard numbers by any of three programs.

The programs (`coco_backends`) count matches; the averaging is done here, once, for all of them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy
from qskd.errors import QskdError
from qskd.evaluation.coco_backends import COUNT
from qskd.evaluation.detections import Array, Backend, Detections, GroundTruth

logger = logging.getLogger(__name__)
FASTEST_FIRST: tuple[Backend, ...] = ("hotcoco", "faster_coco_eval", "pycocotools")
# COCO's twelve, and AP at IoU 0.9, which tells well placed boxes from very well placed ones.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", "AP90")
_SLOW_FROM_IMAGES = 1000


@dataclass(frozen=True, eq=False)
class CocoResult:
    """metrics: those of `METRICS` as fractions, -1 where nothing could be measured (as pycocotools has it).
    per_class: AP of each category by name, in the order given. backend: the program that counted. precision: float
    [10 IoUs, 101 recalls, K categories in the order given], -1 where nothing could be measured."""

    metrics: dict[str, float]
    per_class: dict[str, float]
    backend: Backend
    precision: Array

    def class_ap(self, place: int, iou: int | None = None) -> float:
        """AP of the category at this place of those given; iou: 0 to 9, for one of the ten IoUs alone."""
        return _mean(self.precision[slice(None) if iou is None else iou, :, place])

    @property
    def ap(self) -> float:
        return self.metrics["AP"]


def detections_from(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    image_ids: Sequence[int] | Array,
    original_sizes: Tensor,
    category_ids_of_label: Sequence[int] | Array,
    top_k: int = 100,
    one_a_query: bool = False,
) -> Detections:
    """The `top_k` best (query, class) pairs of each image, best first, as transformers' sigmoid DETR families give them
    in `post_process_object_detection`: a query may appear with several classes, boxes are not clipped to the image.
    one_a_query: with its best class alone, as DETR's own.

    logits [B, Q, K]; boxes_cxcywh [B, Q, 4] relative to the image; original_sizes [B, 2] height, width in pixels;
    category_ids_of_label: the dataset's category id of each of the K classes. Half precision is computed in float32. QskdError
    where one that is kept is no number: it would be below every threshold, and the image empty.
    """
    images, _, classes = logits.shape
    if len(image_ids) != images or tuple(original_sizes.shape) != (images, 2) or len(category_ids_of_label) != classes:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, but there are {len(image_ids)} image ids, sizes of shape "
            f"{tuple(original_sizes.shape)} and {len(category_ids_of_label)} category ids"
        )
    probabilities = logits.detach().float().sigmoid()
    if one_a_query:
        best = probabilities.argmax(-1, keepdim=True)
        probabilities = torch.full_like(probabilities, -1.0).scatter(-1, best, probabilities.gather(-1, best))
        top_k = min(top_k, logits.shape[1])
    probabilities = probabilities.flatten(1)
    kept = min(top_k, probabilities.shape[1])
    scores, places = torch.topk(probabilities, kept, dim=1)
    queries = torch.div(places, classes, rounding_mode="floor")
    height, width = original_sizes.to(scores.device).unbind(1)
    boxes_xyxy = cxcywh_to_xyxy(boxes_cxcywh.detach().float()).gather(1, queries.unsqueeze(-1).expand(-1, -1, 4))
    boxes_xyxy = boxes_xyxy * torch.stack([width, height, width, height], dim=1)[:, None, :]
    categories = np.asarray(category_ids_of_label, dtype=np.int64)
    if bad := [ids for ids, fine in zip(image_ids, _finite(scores, boxes_xyxy), strict=True) if not fine]:
        found = f"scores or boxes that are no numbers, in image {bad[0]}"
        remedy = "its weights are damaged, or its training came apart: take an earlier checkpoint"
        raise QskdError("the detector", found, "finite numbers", remedy)
    return Detections(
        np.repeat(np.asarray(image_ids, dtype=np.int64), kept),
        boxes_xyxy.reshape(-1, 4).cpu().numpy().astype(np.float32),
        scores.reshape(-1).cpu().numpy(),
        categories[(places % classes).reshape(-1).cpu().numpy()],
    )


def _finite(scores: Tensor, boxes: Tensor) -> list[bool]:
    """Of each image: [B, N] and [B, N, 4]."""
    fine: list[bool] = (scores.isfinite().all(1) & boxes.isfinite().flatten(1).all(1)).tolist()
    return fine


def evaluate_coco(
    ground_truth: GroundTruth,
    detections: Detections,
    backend: Backend | Literal["auto"] = "auto",
    max_detections: int = 100,
) -> CocoResult:
    """COCO's bounding box evaluation. Prints nothing.

    `max_detections` per image and class is what AP and "AR100", "ARs", "ARm", "ARl" are measured at; it is above 10.
    Equal scores are ranked by image id, then in the order given, whichever the backend.

    Raises QskdError for ids that are repeated or unknown, for numbers that are not finite, and for a backend that is
    not installed; ValueError for arrays that don't fit together.
    """
    if max_detections <= 10:
        raise ValueError(f"max_detections is {max_detections}, but AR10 is measured too: it must be above 10")
    truth, found = _checked(ground_truth, detections)
    chosen = choose_backend(backend)
    if chosen == "pycocotools" and backend == "auto" and len(truth.image_ids) > _SLOW_FROM_IMAGES:
        _notice_slow_path()
    if len(truth.object_image_ids):
        precision, recall = COUNT[chosen](truth, found, [1, 10, max_detections])
    else:  # nothing to find, nothing to measure; not every program takes an empty table
        precision, recall = np.full((10, 101, len(truth.categories), 4, 3), -1.0), np.full((10, 0, 4, 3), -1.0)
    given = precision[:, :, [rank - 1 for rank, _ in truth.categories], 0, 2]
    return CocoResult(_averages(precision, recall), _per_class(given, ground_truth.categories), chosen, given)


def choose_backend(asked: Backend | Literal["auto"] = "auto") -> Backend:
    """The program that counts; of "auto" the fastest that is installed. QskdError for one that is not known or not installed."""
    if asked == "auto":
        return next((name for name in FASTEST_FIRST if _importable(name)), "pycocotools")
    if asked not in COUNT:
        raise QskdError("COCO evaluation", f"the backend {asked!r}", f"auto or {' or '.join(COUNT)}")
    if not _importable(asked):
        remedy = f"pip install {asked.replace('_', '-')}"
        raise QskdError("COCO evaluation", f"{asked} can't be imported", "the backend asked for", remedy)
    return asked


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a broken binary wheel is as good as none, whatever it raises
        return False
    return True


@cache  # once a process: every epoch would say the same
def _notice_slow_path() -> None:
    logger.warning("COCO AP is computed with pycocotools, about 100 times slower than hotcoco: pip install hotcoco")


def _checked(truth: GroundTruth, found: Detections) -> tuple[GroundTruth, Detections]:
    """Both with the types and order every backend needs: detections by image id, then as given."""
    integers, floats = np.int64, np.float64
    boxes = np.asarray(truth.boxes_xyxy).reshape(-1, 4)
    objects = (truth.object_image_ids, boxes, truth.category_ids, truth.area, truth.iscrowd)
    image_ids, heights, widths = _columns("images", (truth.image_ids, truth.heights, truth.widths), [integers] * 3)
    of, boxes, labels, area, crowd = _columns("objects", objects, (integers, floats, integers, floats, np.bool_))
    categories = [(int(number), str(name)) for number, name in truth.categories]
    truth = GroundTruth(image_ids, heights, widths, of, boxes, labels, area, crowd, categories)
    boxes = np.asarray(found.boxes_xyxy).reshape(-1, 4)
    detected = (found.image_ids, boxes, found.scores, found.category_ids)
    columns = _columns("detections", detected, (integers, floats, floats, integers))
    order = np.argsort(columns[0], kind="stable")
    found = Detections(*(column[order] for column in columns))

    category_ids = np.array([number for number, _ in categories], integers)
    for what, known, of_objects, of_detections in (
        ("image id", image_ids, truth.object_image_ids, found.image_ids),
        ("category id", category_ids, truth.category_ids, found.category_ids),
    ):
        _no_repeats(f"{what}s of the ground truth", known)
        _all_known(f"{what} of objects", of_objects, known)
        _all_known(f"{what} of detections", of_detections, known)
    _all_finite("objects", truth.object_image_ids, np.column_stack([truth.boxes_xyxy, truth.area]))
    _all_finite("detections", found.image_ids, np.column_stack([found.boxes_xyxy, found.scores]))

    # Ids become ranks, from 1: hotcoco takes detections as float64, which can't tell ids above 2^53 apart, and no negative ones.
    ranks, of_category = np.sort(image_ids), np.sort(category_ids)
    image_ids, of = np.searchsorted(ranks, image_ids) + 1, np.searchsorted(ranks, of) + 1
    labels = np.searchsorted(of_category, labels) + 1
    detected_as = np.searchsorted(of_category, found.category_ids) + 1
    found = replace(found, image_ids=np.searchsorted(ranks, found.image_ids) + 1, category_ids=detected_as)
    named = [(int(np.searchsorted(of_category, number)) + 1, name) for number, name in categories]
    return replace(truth, image_ids=image_ids, object_image_ids=of, category_ids=labels, categories=named), found


def _columns(what: str, columns: Sequence[Array], kinds: Sequence[type[np.generic]]) -> tuple[Any, ...]:
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"arrays of {what} have different lengths: {[len(column) for column in columns]}")
    return tuple(np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True))


def _all_finite(who: str, ids: Array, numbers: Array) -> None:
    bad = ids[~np.isfinite(numbers).all(axis=1)]
    if len(bad):
        found = f"{len(bad)} with numbers that are not finite, the first in image {bad[0]}"
        raise QskdError(f"boxes, areas and scores of {who}", found, "finite numbers")


def _no_repeats(what: str, ids: Array) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise QskdError(what, f"repeated: {values[counts > 1][:5].tolist()}", "each id once", "correct the annotations")


def _all_known(what: str, ids: Array, known: Array) -> None:
    unknown = np.unique(ids[~np.isin(ids, known)])
    if len(unknown):
        found = f"{len(unknown)} unknown to the ground truth: {unknown[:5].tolist()}{' …' if len(unknown) > 5 else ''}"
        remedy = "evaluate on the dataset the detections were made of, with its own category ids"
        raise QskdError(what, found, f"one of its {len(known)}, such as {known[:5].tolist()}", remedy)


def _mean(values: Array) -> float:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _averages(precision: Array, recall: Array) -> dict[str, float]:
    """COCO's averages. IoU thresholds are 0.5, 0.55, … 0.95; areas all, small, medium, large; limits 1, 10, most."""
    values = [
        *(_mean(precision[ious, :, :, 0, 2]) for ious in (slice(None), 0, 5)),
        *(_mean(precision[:, :, :, area, 2]) for area in (1, 2, 3)),
        *(_mean(recall[:, :, 0, limit]) for limit in (0, 1, 2)),
        *(_mean(recall[:, :, area, 2]) for area in (1, 2, 3)),
        _mean(precision[8, :, :, 0, 2]),
    ]
    return dict(zip(METRICS, values, strict=True))


def _per_class(precision: Array, categories: Sequence[tuple[int, str]]) -> dict[str, float]:
    names = [name for _, name in categories]
    return {
        name if names.count(name) == 1 else f"{name} (id {number})": _mean(precision[:, :, place])
        for place, (number, name) in enumerate(categories)
    }
