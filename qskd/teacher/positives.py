"""What a teacher says of the objects of images, as numbers for people: how well its positives fit, and how like two of its
records are, one of them derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou
from qskd.config import DetectionLossConfig
from qskd.distillation.shared.apart import matched, prediction
from qskd.losses.dense_head import cell_centres
from qskd.losses.matching import assign
from qskd.structures import Targets, TeacherRecord


@dataclass(frozen=True)
class Positives:
    """The queries matched to objects, of classes that the teacher knows. matched: [B, M], -1 = none. For each match [N], row by
    row: the IoU of its box and the object's, and its probability of the object's class."""

    matched: Tensor
    ious: Tensor
    confidences: Tensor


@torch.no_grad()
def positives(record: TeacherRecord, targets: Targets, costs: DetectionLossConfig) -> Positives:
    """Of the last layer, by the detection loss's own matching."""
    last = replace(record, logits=record.logits[-1:], boxes_cxcywh=record.boxes_cxcywh[-1:], absent=None)
    (pairs,) = assign([prediction(last)], targets, costs)
    known = (~record.silent)[targets.labels] & targets.valid
    found = torch.where(known, matched(last, pairs, targets)[-1], -1)
    image, slot = (found >= 0).nonzero(as_tuple=True)
    query, label = found[image, slot], targets.labels[image, slot]
    theirs = cxcywh_to_xyxy(record.boxes_cxcywh[-1][image, query].float())
    true = cxcywh_to_xyxy(targets.boxes_cxcywh[image, slot].float())
    return Positives(found, iou(theirs, true), record.logits[-1][image, query, label].float().sigmoid())


def mirrored_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """The loader's arrays, its images finished -> those of the same views mirrored left and right, bit for bit: a view is
    mirrored after it is resized."""
    images, boxes = arrays["images"].copy(), arrays["boxes_cxcywh"].copy()
    for image, (_, width) in zip(images, arrays["sizes"].tolist(), strict=True):
        image[:, :width] = image[:, :width][:, ::-1]
    for line, count in zip(boxes, arrays["counts"].tolist(), strict=True):
        line[:count, 0] = 1 - line[:count, 0]
    return {**arrays, "images": images, "boxes_cxcywh": boxes}


class Agreement:
    """Sums over batches of how like a derived record is to the one that the teacher gives when it is asked."""

    def __init__(self, costs: DetectionLossConfig) -> None:
        self._costs = costs
        self._of_objects: dict[str, list[Tensor]] = {}
        self._residual = self._spread = 0.0
        self._levels: list[tuple[Tensor, Tensor, int]] = []  # of the real maps in objects: sum, sum of squares, cells

    @torch.no_grad()
    def add(self, derived: TeacherRecord, real: TeacherRecord, targets: Targets) -> None:
        """A batch, of the view that `real` was asked about. Both have memory and attention."""
        records = {"derived": derived, "real": real}
        found = {name: positives(record, targets, self._costs) for name, record in records.items()}
        for name, each in found.items():
            self._keep(f"iou_{name}", each.ious)
            self._keep(f"confidence_{name}", each.confidences)
        looks = [_looks(record, found[name].matched) for name, record in records.items()]
        if all(look is not None for look in looks):
            (mine, known), (theirs, known_too) = (look for look in looks if look is not None)
            both = known & known_too & (found["real"].matched >= 0)
            self._keep("attention_overlap", torch.minimum(mine, theirs).sum(-1)[both])
        for level, (mine, theirs) in enumerate(zip(derived.memory, real.memory, strict=True)):
            inside = _in_objects(real.memory_valid[level], targets)
            goal = theirs.float().movedim(1, -1)[inside].double()
            self._residual += float((mine.float().movedim(1, -1)[inside].double() - goal).square().sum())
            if level == len(self._levels):
                self._levels.append((goal.new_zeros(goal.shape[-1]), goal.new_zeros(goal.shape[-1]), 0))
            total, squares, cells = self._levels[level]
            self._levels[level] = total + goal.sum(0), squares + goal.square().sum(0), cells + len(goal)

    def summary(self) -> dict[str, float]:
        """objects: how many. iou_*, confidence_*: of positives, means over objects, in the derived and the real records.
        attention_overlap: what two positives' attention has in common, 1 = alike. memory_unexplained: mean square of derived
        minus real memory over its variance, in objects; 0 = alike, 1 = no better than the mean."""
        means = {name: torch.cat(values).float() for name, values in self._of_objects.items()}
        found = {"objects": float(len(means.get("iou_real", ())))}
        found |= {name: float(values.mean()) for name, values in means.items() if len(values)}
        spread = sum(float((squares - total.square() / max(1, n)).sum()) for total, squares, n in self._levels)
        return found | ({"memory_unexplained": self._residual / spread} if spread > 0 else {})

    def _keep(self, name: str, values: Tensor) -> None:
        self._of_objects.setdefault(name, []).append(values.cpu())


def _looks(record: TeacherRecord, matched: Tensor) -> tuple[Tensor, Tensor] | None:
    """The attention of the matched queries [B, M, cells of all levels], and whether it is known [B, M]."""
    if record.attention_queries is None or not record.attention or not record.attention_queries.shape[1]:
        return None
    same = matched[:, :, None] == record.attention_queries[:, None]
    known, place = same.any(-1) & (matched >= 0), same.int().argmax(-1)
    flat = torch.cat([each.flatten(2) for each in record.attention], dim=-1).float()
    return flat.gather(1, place[:, :, None].expand(-1, -1, flat.shape[-1])), known


def _in_objects(valid: Tensor, targets: Targets) -> Tensor:
    """[B, H, W] bool: the cells of the real part whose centre lies in some object."""
    centres = cell_centres(valid).unflatten(1, valid.shape[1:])
    corners = cxcywh_to_xyxy(targets.boxes_cxcywh.float())[:, :, None, None]
    within = (centres[:, None] >= corners[..., :2]) & (centres[:, None] <= corners[..., 2:])
    return (within.all(-1) & targets.valid[:, :, None, None]).any(1) & valid
