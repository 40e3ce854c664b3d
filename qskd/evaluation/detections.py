"""Ground truth and detections, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Backend = Literal["pycocotools", "faster_coco_eval", "hotcoco"]


@dataclass(frozen=True)
class GroundTruth:
    """What is in I images: N objects of K categories, as arrays. An image without objects counts: all it gets is wrong.

    image_ids int64 [I], heights and widths int32 [I], pixels.
    object_image_ids int64 [N], boxes_xyxy float [N, 4] in pixels of the original image, category_ids int64 [N].
    area float [N]: the annotation's own, in square pixels (COCO's is the mask's, smaller than the box).
    iscrowd bool [N]: regions in which detections are neither right nor wrong.
    categories: (id, name) pairs.
    """

    image_ids: Array
    heights: Array
    widths: Array
    object_image_ids: Array
    boxes_xyxy: Array
    category_ids: Array
    area: Array
    iscrowd: Array
    categories: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Detections:
    """D detections: image_ids int64 [D], boxes_xyxy float32 [D, 4] in pixels of the original image, scores float32 [D],
    category_ids int64 [D] (the dataset's own)."""

    image_ids: Array
    boxes_xyxy: Array
    scores: Array
    category_ids: Array

    @classmethod
    def empty(cls) -> Detections:
        none = np.zeros(0, np.int64)
        return cls(none, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), none)

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """One after the other, in the order given; no parts make no detections."""
        if not parts:
            return cls.empty()
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
