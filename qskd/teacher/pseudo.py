"""What a teacher says of images that nobody has labelled, as objects to learn from: the one place where they get any.

Pseudo-objects are the queries of its last layer whose best class reaches a score. What it half sees, below that and from `UNSURE`
up, is kept as boxes of which nothing is known: no loss says that there is background (`qskd.losses.unsure`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou, xyxy_to_cxcywh
from qskd.structures import Targets, TeacherRecord

UNSURE = 0.1  # below this score the teacher has seen nothing
SAME = 0.7  # IoU from which on what it half sees is a pseudo-object once more, which one query is to show and no other


@torch.no_grad()
def with_pseudo_objects(targets: Targets, record: TeacherRecord, score: float) -> Targets:
    """The targets, with the teacher's predictions of at least this score as the objects of images without labels, and what it half
    sees there. Labelled images, and batches of them alone, are as they were. Waits for the device: counts are on the host."""
    if targets.all_labelled:
        return targets
    device = targets.boxes_cxcywh.device
    boxes_xyxy = cxcywh_to_xyxy(record.boxes_cxcywh[-1].float()).clamp(0, 1)
    best, labels = record.logits[-1].float().sigmoid().max(-1)  # [B, Q]
    ours = ~torch.tensor(targets.labelled, device=device)[:, None]
    seen = ours & (boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all(-1)
    sure, unsure = seen & (best >= score), seen & (best >= UNSURE) & (best < score)

    places, counts = _first(sure)
    slots = max(targets.valid.shape[1], places.shape[1])
    boxes, own_labels, valid = (_widened(each, slots) for each in (targets.boxes_cxcywh, targets.labels, targets.valid))
    found = torch.zeros_like(valid)
    found[:, : places.shape[1]] = torch.arange(places.shape[1], device=device) < counts[:, None]
    places = _widened(places, slots)
    theirs = xyxy_to_cxcywh(boxes_xyxy).gather(1, places[..., None].expand(-1, -1, 4)).to(boxes.dtype)
    boxes = torch.where(ours[..., None], theirs.masked_fill(~found[..., None], 0.0), boxes)
    own_labels = torch.where(ours, labels.gather(1, places).masked_fill(~found, 0), own_labels)
    valid = torch.where(ours, found, valid)

    twice = iou(boxes_xyxy.unsqueeze(2), cxcywh_to_xyxy(boxes.float()).unsqueeze(1)) >= SAME
    half, half_counts = _first(unsure & ~(twice & valid[:, None]).any(-1))
    on_host = zip(targets.counts, targets.labelled, counts.tolist(), strict=True)
    return replace(
        targets,
        boxes_cxcywh=boxes,
        labels=own_labels,
        valid=valid,
        counts=tuple(own if labelled else pseudo for own, labelled, pseudo in on_host),
        unsure_xyxy=boxes_xyxy.gather(1, half[..., None].expand(-1, -1, 4)),
        unsure=torch.arange(half.shape[1], device=device) < half_counts[:, None],
    )


def _first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[B, Q] bool -> the places that are True, in order, first [B, most], and how many they are [B]."""
    counts = chosen.sum(1)
    order = torch.sort((~chosen).int(), dim=1, stable=True).indices
    return order[:, : int(counts.max()) if len(counts) else 0], counts


def _widened(values: Tensor, slots: int) -> Tensor:
    """[B, M, ...] -> [B, slots, ...], with zeros behind."""
    extra = values.new_zeros(len(values), slots - values.shape[1], *values.shape[2:])
    return torch.cat([values, extra], dim=1)
