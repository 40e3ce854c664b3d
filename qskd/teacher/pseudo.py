"""What a teacher says of images that nobody has labelled, as objects to learn from: the one place where they get any.

Pseudo-objects are the queries of its last layer whose best class reaches a score. What it half sees, below that and from `UNSURE`
up, is kept as boxes of which nothing is known: no loss says that there is background (`qskd.losses.unsure`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou, xyxy_to_cxcywh
from qskd.structures import Targets, TeacherRecord

UNSURE = 0.1  # below this score the teacher has seen nothing
SAME = 0.7  # IoU from which on what it half sees is a pseudo-object once more, which one query is to show and no other


@torch.no_grad()
def with_pseudo_objects(targets: Targets, record: TeacherRecord, score: float, completed: bool = False) -> Targets:
    """The targets, with the teacher's predictions of at least this score as the objects of images without labels, and what it half
    sees there. completed: labelled images get them beside their own objects, where they overlap none by `SAME`; otherwise labelled
    images, and batches of them alone, are as they were. Of several teachers' predictions at one place (IoU `SAME`) the surest is
    the object: each takes another's objects for something of its own. Waits for the device: counts are on the host."""
    if targets.all_labelled and not completed:
        return targets
    device, images = targets.boxes_cxcywh.device, len(targets.counts)
    said = targets.labelled or (True,) * images
    labelled = torch.tensor(said, dtype=torch.bool, device=device)[:, None]
    own = targets.valid & labelled
    boxes_xyxy = cxcywh_to_xyxy(record.boxes_cxcywh[-1].float()).clamp(0, 1)
    best, labels = record.logits[-1].float().sigmoid().max(-1)  # [B, Q]
    seen = (boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all(-1) & (~labelled | completed)
    seen &= ~_same(boxes_xyxy, targets.boxes_cxcywh, own)
    sure = seen & (best >= score)
    if record.parts:
        sure &= ~_outdone(boxes_xyxy, best, sure, record.parts)
    unsure = seen & (best >= UNSURE) & ~sure

    places, counts = _first(sure)
    found = torch.arange(places.shape[1], device=device) < counts[:, None]
    theirs = xyxy_to_cxcywh(boxes_xyxy).gather(1, places[..., None].expand(-1, -1, 4)).to(targets.boxes_cxcywh.dtype)
    valid = torch.cat([own, found], dim=1)
    on_host = zip(targets.counts, said, counts.tolist(), strict=True)
    totals = tuple((count if known else 0) + pseudo for count, known, pseudo in on_host)
    order, _ = _first(valid)
    order = _widened(order, slots) if order.shape[1] < (slots := targets.valid.shape[1]) else order
    valid = torch.arange(order.shape[1], device=device) < valid.sum(1, keepdim=True)
    boxes = torch.cat([targets.boxes_cxcywh, theirs], dim=1).gather(1, order[..., None].expand(-1, -1, 4))
    all_labels = torch.cat([targets.labels, labels.gather(1, places)], dim=1).gather(1, order)
    boxes, all_labels = boxes.masked_fill(~valid[..., None], 0.0), all_labels.masked_fill(~valid, 0)

    half, half_counts = _first(unsure & ~_same(boxes_xyxy, boxes, valid))
    return replace(
        targets,
        boxes_cxcywh=boxes,
        labels=all_labels,
        valid=valid,
        counts=totals,
        unsure_xyxy=boxes_xyxy.gather(1, half[..., None].expand(-1, -1, 4)),
        unsure=torch.arange(half.shape[1], device=device) < half_counts[:, None],
        packed=None,
    )


def _outdone(boxes_xyxy: Tensor, best: Tensor, sure: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    """[B, Q] bool: where another teacher is surer of what it sees at the same place (as sure: one that is named before)."""
    counts = torch.tensor([queries for queries, _ in parts], device=best.device)
    whose = torch.arange(len(parts), device=best.device).repeat_interleave(counts, output_size=best.shape[1])
    same = iou(boxes_xyxy.unsqueeze(2), boxes_xyxy.unsqueeze(1)) >= SAME  # [B, Q, Q]
    surer = best.unsqueeze(1) > best.unsqueeze(2)
    first = (best.unsqueeze(1) == best.unsqueeze(2)) & (whose[None] < whose[:, None])
    rival = sure.unsqueeze(1) & (whose[None] != whose[:, None])
    return (same & rival & (surer | first)).any(-1)


def _same(boxes_xyxy: Tensor, objects_cxcywh: Tensor, valid: Tensor) -> Tensor:
    """[B, Q, 4], [B, M, 4], [B, M] -> [B, Q] bool: the boxes that are some object once more."""
    overlap = iou(boxes_xyxy.unsqueeze(2), cxcywh_to_xyxy(objects_cxcywh.float()).unsqueeze(1))
    return ((overlap >= SAME) & valid[:, None]).any(-1)


def _first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[B, Q] bool -> the places that are True, in order, first [B, most], and how many they are [B]."""
    counts = chosen.sum(1)
    order = torch.sort((~chosen).int(), dim=1, stable=True).indices
    return order[:, : int(counts.max()) if len(counts) else 0], counts


def _widened(values: Tensor, slots: int) -> Tensor:
    """[B, M, ...] -> [B, slots, ...], with zeros behind."""
    extra = values.new_zeros(len(values), slots - values.shape[1], *values.shape[2:])
    return torch.cat([values, extra], dim=1)
