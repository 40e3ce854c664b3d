"""Logits and boxes of every query: of the last decoder layer, or of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qskd.teacher.columns.column import Arrays, Column, float_format, floats_of, host, largest_gap
from qskd.teacher.manifest import CacheSizes

if TYPE_CHECKING:
    from torch import Tensor

    from qskd.structures import TeacherNeeds, TeacherRecord


class Predictions(Column):
    """logits [L', Q, K], in the dataset's class order; boxes_cxcywh float32 [L', Q, 4] in every precision: they decide which
    queries are selected, and are few."""

    name = "predictions"
    arrays = ("logits", "boxes_cxcywh")
    compressed = ("logits",)

    def asked(self, needs: TeacherNeeds) -> bool:
        return True

    def formats(self, precision: str) -> Mapping[str, str]:
        return {"logits": float_format(precision), "boxes_cxcywh": "<f4"}

    def encode(self, record: TeacherRecord, precision: str, shapes: NDArray[np.int32]) -> list[Arrays]:
        logits, boxes = host(record.logits.to(floats_of(precision))), host(record.boxes_cxcywh.float())
        return [{"logits": logits[:, i], "boxes_cxcywh": boxes[:, i]} for i in range(logits.shape[1])]

    def shaped(self, flat: Arrays, sizes: CacheSizes) -> Arrays:
        shape = (sizes.layers, sizes.queries)
        return {
            "logits": flat["logits"].reshape(*shape, sizes.classes),
            "boxes_cxcywh": flat["boxes_cxcywh"].reshape(*shape, 4),
        }

    def mirrored(self, row: Any, sizes: CacheSizes) -> Arrays:
        boxes = row.boxes_cxcywh.copy()
        boxes[..., 0] = 1 - boxes[..., 0]
        return {"boxes_cxcywh": boxes}

    def collate(self, rows: Sequence[Any], sizes: CacheSizes) -> Arrays:
        """teacher_logits [n, L', Q, K], teacher_boxes_cxcywh [n, L', Q, 4]."""
        shape = (0, sizes.layers, sizes.queries)
        if not rows:
            empty = np.zeros((*shape, sizes.classes), np.float32), np.zeros((*shape, 4), np.float32)
            return {"teacher_logits": empty[0], "teacher_boxes_cxcywh": empty[1]}
        return {f"teacher_{name}": np.stack([getattr(row, name) for row in rows]) for name in self.arrays}

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        # Rows are images; a record's first dimension is layers.
        return {name: tensors[f"teacher_{name}"].float().transpose(0, 1) for name in self.arrays}

    def errors(self, found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
        return {
            "logits": largest_gap(found.logits, true.logits),
            "probability": largest_gap(found.logits.sigmoid(), true.logits.sigmoid()),
            "boxes_cxcywh": largest_gap(found.boxes_cxcywh, true.boxes_cxcywh),
        }
