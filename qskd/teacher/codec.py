"""Teacher outputs <-> the compact numbers that the cache stores. Runs on the device the tensors are on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qskd.structures import TeacherRecord
from qskd.teacher.columns import TeacherRow

_FLOATS = {"int8": torch.float16, "float16": torch.float16, "float32": torch.float32}
_TINY = 1e-20


@dataclass(frozen=True)
class EncodedRecord:
    """A batch of cache rows as tensors, encoded (`qskd.teacher.columns.collate` says how); scales are empty when absent."""

    logits: Tensor
    boxes_cxcywh: Tensor
    memory_sizes: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]
    memory_scale: tuple[Tensor, ...]
    attention_queries: Tensor | None
    attention: tuple[Tensor, ...]
    attention_scale: Tensor | None


def encoded_record(tensors: Mapping[str, Tensor]) -> EncodedRecord:
    """What `collate` gave, as tensors."""

    def levels(name: str) -> tuple[Tensor, ...]:
        found = (tensors.get(f"teacher_{name}_{level}") for level in range(len(tensors)))
        return tuple(tensor for tensor in found if tensor is not None)

    return EncodedRecord(
        logits=tensors["teacher_logits"],
        boxes_cxcywh=tensors["teacher_boxes_cxcywh"],
        memory_sizes=levels("memory_sizes"),
        memory=levels("memory"),
        memory_scale=levels("memory_scale"),
        attention_queries=tensors.get("teacher_attention_queries"),
        attention=levels("attention"),
        attention_scale=tensors.get("teacher_attention_scale"),
    )


def decode(encoded: EncodedRecord) -> TeacherRecord:
    """Back to what the teacher said, float32; memory is 0 on padding."""
    maps = encoded.memory or encoded.attention
    valid = []
    for sizes, map_ in zip(encoded.memory_sizes, maps, strict=True):
        rows = torch.arange(map_.shape[-2], device=map_.device) < sizes[:, :1]
        columns = torch.arange(map_.shape[-1], device=map_.device) < sizes[:, 1:]
        valid.append(rows[:, :, None] & columns[:, None, :])
    memory = tuple(map_.float() for map_ in encoded.memory)
    if encoded.memory_scale:
        memory = tuple(m * scale[:, :, None, None] for m, scale in zip(memory, encoded.memory_scale, strict=True))
    attention = tuple(map_.float() for map_ in encoded.attention)
    if encoded.attention_scale is not None:
        attention = tuple(map_ * encoded.attention_scale[:, :, None, None] for map_ in attention)
    queries = encoded.attention_queries
    return TeacherRecord(
        logits=encoded.logits.float().transpose(0, 1),  # rows are images; a record's first dimension is layers
        boxes_cxcywh=encoded.boxes_cxcywh.float().transpose(0, 1),
        memory=memory,
        memory_valid=tuple(valid),
        attention_queries=None if queries is None else queries.long(),
        attention=attention,
    )


def _host(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array


def _valid_shapes(valid: Sequence[Tensor]) -> np.ndarray:
    """[B, levels, 2] int32: height and width of each map's real part, a rectangle at the top left."""
    shapes = [torch.stack([part.any(2).sum(1), part.any(1).sum(1)], dim=-1) for part in valid]
    return _host(torch.stack(shapes, dim=1).int())


def rounded(logits: Tensor, precision: str) -> Tensor:
    """Logits as they will be read back, float32: what depends on them should be decided on these."""
    return logits.to(_FLOATS[precision]).float()


@torch.no_grad()
def encode(record: TeacherRecord, image_ids: Sequence[int], precision: str) -> list[TeacherRow]:
    """A batch with memory and attention -> one row for each image, without padding.

    precision "int8": memory is rounded to 255 steps of its channel's largest value in the image, attention to 255 steps of
    its query's largest, logits are float16. "float16" and "float32" store all three as that. Boxes stay float32.
    """
    floats = _FLOATS[precision]
    shapes, whole = _valid_shapes(record.memory_valid), precision != "int8"
    memory, scales = [], []
    for map_, valid in zip(record.memory, record.memory_valid, strict=True):
        map_ = map_.float() * valid[:, None]
        if whole:
            memory.append(_host(map_.to(floats)))
            continue
        scale = map_.abs().amax((2, 3)) / 127
        steps = (map_ / scale.clamp(min=_TINY)[:, :, None, None]).round_().clamp_(-127, 127)
        memory.append(_host(steps.to(torch.int8)))
        scales.append(_host(scale))
    queries = record.attention_queries
    attention: list[np.ndarray] = []
    looks = np.zeros((len(image_ids), 0), np.float32)
    if queries is None or not record.attention:
        kept = np.full((len(image_ids), 0), -1, np.int32)
    else:
        kept = _host(queries.int())
        both = zip(record.attention, record.memory_valid, strict=True)
        flat = torch.cat([part.flatten(2) * valid.flatten(1)[:, None] for part, valid in both], dim=-1)
        if whole:
            flat = flat.to(floats)
        else:
            top = flat.amax(-1) / 255
            flat = (flat / top.clamp(min=_TINY)[..., None]).round_().clamp_(0, 255).to(torch.uint8)
            looks = _host(top)
        areas = [part.shape[-2] * part.shape[-1] for part in record.attention]
        attention = [
            _host(p.unflatten(-1, a.shape[-2:])) for p, a in zip(flat.split(areas, -1), record.attention, strict=True)
        ]
    logits, boxes = _host(record.logits.to(floats)), _host(record.boxes_cxcywh.float())
    rows = []
    for i, image_id in enumerate(image_ids):
        sizes = [tuple(size) for size in shapes[i].tolist()]
        chosen = np.flatnonzero(kept[i] >= 0)
        parts = [a[i, chosen, :h, :w].reshape(len(chosen), h * w) for a, (h, w) in zip(attention, sizes, strict=False)]
        rows.append(
            TeacherRow(
                image_id=int(image_id),
                logits=logits[:, i],
                boxes_cxcywh=boxes[:, i],
                memory_shapes=shapes[i],
                memory=np.concatenate([m[i, :, :h, :w].ravel() for m, (h, w) in zip(memory, sizes, strict=True)]),
                memory_scale=np.concatenate([scale[i] for scale in scales]) if scales else np.zeros(0, np.float32),
                attention_queries=kept[i, chosen],
                attention=np.concatenate(parts, axis=1) if parts else np.zeros((0, 0), np.uint8),
                attention_scale=looks[i, chosen] if looks.shape[1] else np.zeros(0, np.float32),
            )
        )
    return rows


def largest_errors(found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
    """How far a decoded batch is from the true one, by column: the largest absolute difference; and for memory the largest
    over its channel's largest value, for attention over its query's largest. Attention is compared for `found`'s queries."""
    errors = {
        "logits": _gap(found.logits, true.logits),
        "probability": _gap(found.logits.sigmoid(), true.logits.sigmoid()),
        "boxes_cxcywh": _gap(found.boxes_cxcywh, true.boxes_cxcywh),
    }
    if found.memory:
        pairs = [(f, t * v[:, None], v) for f, t, v in zip(found.memory, true.memory, true.memory_valid, strict=True)]
        errors["memory"] = max(_gap(f, t) for f, t, _ in pairs)
        errors["memory_relative"] = max(
            float(((f - t).abs() / t.abs().amax((2, 3), keepdim=True).clamp(min=_TINY)).max()) for f, t, _ in pairs
        )
    if found.attention and found.attention_queries is not None and true.attention_queries is not None:
        # `true` may know other queries at other places: look each of found's up.
        match = found.attention_queries.unsqueeze(-1) == true.attention_queries.unsqueeze(1)
        known = (found.attention_queries >= 0) & match.any(-1)
        place = match.int().argmax(-1)
        tops = torch.stack([t.flatten(2).amax(-1) for t in true.attention]).amax(0).gather(1, place)
        gaps = []
        for f, t in zip(found.attention, true.attention, strict=True):
            theirs = t.gather(1, place[:, :, None, None].expand(-1, -1, *t.shape[2:]))
            gaps.append((f - theirs).abs().flatten(2).amax(-1) * known)
        gap = torch.stack(gaps).amax(0)
        errors["attention"] = float(gap.max()) if gap.numel() else 0.0
        errors["attention_relative"] = float((gap / tops.clamp(min=_TINY)).max()) if gap.numel() else 0.0
        errors["attention_queries_missing"] = float(((found.attention_queries >= 0) & ~match.any(-1)).sum())
    return errors


def _gap(found: Tensor, true: Tensor) -> float:
    return float((found.float() - true.float()).abs().max()) if found.numel() else 0.0
