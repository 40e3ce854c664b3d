"""The three programs that count matches for COCO's average precision: pycocotools, faster-coco-eval, hotcoco.

Each is given the same ground truth and detections, checked and in order by `average_precision`, in the form it wants.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from qskd.evaluation.detections import Backend, Detections, GroundTruth


Array = npt.NDArray[Any]


def _xywh(boxes_xyxy: Array) -> Array:
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def _image_dicts(truth: GroundTruth) -> list[dict[str, Any]]:
    columns = zip(truth.image_ids.tolist(), truth.heights.tolist(), truth.widths.tolist(), strict=True)
    return [{"id": number, "height": height, "width": width, "file_name": ""} for number, height, width in columns]


def _category_dicts(truth: GroundTruth) -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for number, name in truth.categories]


def _annotations(ids: Array, categories: Array, boxes_xyxy: Array, **more: Array) -> list[dict[str, Any]]:
    """COCO annotations in memory. Ids start at 1: pycocotools takes a match with id 0 for none."""
    names = ("image_id", "category_id", "bbox", *more)
    columns = [column.tolist() for column in (ids, categories, _xywh(boxes_xyxy), *more.values())]
    return [{"id": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(zip(*columns, strict=True), 1)]


def _coco_dicts(truth: GroundTruth, found: Detections) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ground truth and detections as two COCO datasets."""
    shared = {"images": _image_dicts(truth), "categories": _category_dicts(truth), "info": {}}
    where = (truth.object_image_ids, truth.category_ids, truth.boxes_xyxy)
    objects = _annotations(*where, area=truth.area, iscrowd=truth.iscrowd.astype(np.int64))
    area = _xywh(found.boxes_xyxy)[:, 2:].prod(axis=1)
    where = (found.image_ids, found.category_ids, found.boxes_xyxy)
    detected = _annotations(*where, area=area, iscrowd=np.zeros(len(area), np.int64), score=found.scores)
    return {**shared, "annotations": objects}, {**shared, "annotations": detected}


def _count_pycocotools(truth: GroundTruth, found: Detections, limits: list[int]) -> tuple[Array, Array]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        known, detected = COCO(), COCO()
        known.dataset, detected.dataset = _coco_dicts(truth, found)
        known.createIndex()
        detected.createIndex()
        return _counted(COCOeval(known, detected, "bbox"), limits)


def _count_faster_coco_eval(truth: GroundTruth, found: Detections, limits: list[int]) -> tuple[Array, Array]:
    from faster_coco_eval import COCO, COCOeval_faster

    return _counted(COCOeval_faster(*map(COCO, _coco_dicts(truth, found)), "bbox"), limits)


def _count_hotcoco(truth: GroundTruth, found: Detections, limits: list[int]) -> tuple[Array, Array]:
    from hotcoco import COCO, COCOeval

    crowd, where = truth.iscrowd.astype(np.int64), (truth.object_image_ids, truth.category_ids, _xywh(truth.boxes_xyxy))
    known = COCO.from_arrays(_image_dicts(truth), _category_dicts(truth), *where, area=truth.area, iscrowd=crowd)
    rows = np.column_stack([found.image_ids, _xywh(found.boxes_xyxy), found.scores, found.category_ids])
    return _counted(COCOeval(known, known.load_res(rows), "bbox"), limits)


def _counted(run: Any, limits: list[int]) -> tuple[Array, Array]:
    """Precision [10 IoUs, 101 recalls, K, 4 areas, 3 limits] and recall [10, K, 4, 3] of any of the three programs."""
    run.params.maxDets = limits
    run.evaluate()
    run.accumulate()
    return np.asarray(run.eval["precision"]), np.asarray(run.eval["recall"])


COUNT: dict[Backend, Callable[[GroundTruth, Detections, list[int]], tuple[Array, Array]]] = {
    "pycocotools": _count_pycocotools,
    "faster_coco_eval": _count_faster_coco_eval,
    "hotcoco": _count_hotcoco,
}
