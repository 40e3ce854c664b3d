"""What a teacher said of a view, made into what it is taken to say of a crop of it (`data.views.derived: flip_and_crop`)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from qskd.distillation.shared.maps import resample, whole_region
from qskd.structures import SILENT_LOGIT, TeacherRecord

_TINY = 1e-12


@torch.no_grad()
def cropped(record: TeacherRecord, crops_xyxy: Tensor, min_visible: float) -> TeacherRecord:
    """The record of crops [B, 4]: left, top, right, bottom (0..1) of what it was said of. Where that is all, it stays as it is.

    Boxes are cut to the crop, as objects are, and become relative to it. A query is dropped where less than `min_visible` of
    its box's area, or nothing, is inside (`TeacherRecord.absent`). Maps show the crop on as many cells as they showed the
    whole on, by bilinear interpolation; what each query's attention then has sums to 1 again, or is 0 where it looked elsewhere.
    """
    whole = whole_region(crops_xyxy)
    boxes, absent = _moved(record.boxes_cxcywh.float(), crops_xyxy, min_visible)
    absent = absent & ~whole[:, None]

    def shown(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        valid = record.memory_valid[: len(maps)]
        pairs = zip(maps, valid, strict=True)
        return tuple(resample(m, v, v, crops_xyxy) * v[:, None] for m, v in pairs)

    attention = shown(record.attention)
    if attention:
        total = torch.stack([part.flatten(2).sum(2) for part in attention]).sum(0)
        scale = torch.where(whole[:, None] | (total <= _TINY), 1.0, 1 / total.clamp(min=_TINY))
        attention = tuple(part * scale[:, :, None, None] for part in attention)
    return replace(
        record,
        logits=record.logits.masked_fill(absent[..., None], SILENT_LOGIT),
        boxes_cxcywh=torch.where(whole[:, None, None], record.boxes_cxcywh, boxes),
        memory=shown(record.memory),
        attention=attention,
        absent=absent,
    )


def _moved(boxes_cxcywh: Tensor, crops_xyxy: Tensor, min_visible: float) -> tuple[Tensor, Tensor]:
    """[L, B, Q, 4] relative to the crops, cut to them, and [L, B, Q] whether too little is left."""
    corners = cxcywh_to_xyxy(boxes_cxcywh)
    first, last = crops_xyxy[:, None, :2], crops_xyxy[:, None, 2:]
    low, high = (torch.minimum(torch.maximum(each, first), last) for each in corners.split(2, -1))
    visible, area = (high - low).prod(-1), boxes_cxcywh[..., 2:].prod(-1)
    # The slack is for rounding: an untouched box has all of its area only up to the last bits.
    absent = (visible <= 0) | (visible < area * min_visible * (1 - 1e-5))
    return xyxy_to_cxcywh(torch.cat([(low - first) / (last - first), (high - first) / (last - first)], -1)), absent
