"""What a row of the cache holds, and how rows become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qskd.teacher.manifest import CacheSizes

# The number formats of a precision. Boxes are float32 in each: they decide which queries are selected, and are few.
DTYPES: Mapping[str, Mapping[str, str]] = {
    "int8": {"logits": "<f2", "memory": "|i1", "attention": "|u1"},
    "float16": {"logits": "<f2", "memory": "<f2", "attention": "<f2"},
    "float32": {"logits": "<f4", "memory": "<f4", "attention": "<f4"},
}


@dataclass(frozen=True, eq=False)
class TeacherRow:
    """One view of one image. L' layers, Q queries, K classes; `levels` memory maps of C_l channels and h_l x w_l cells.

    logits: [L', Q, K]. boxes_cxcywh: float32 [L', Q, 4]. memory_shapes: int32 [levels, 2], (h_l, w_l), padding cut away.
    memory: the maps [C_l, h_l, w_l], flat, one after the other; with int8, each channel times its entry of memory_scale
    (float32, flat over levels). attention_queries: int32 [A], ascending; attention: [A, sum of h_l * w_l]; with uint8, each
    row times its entry of attention_scale (float32 [A]). Scales are empty where numbers are stored as they are.
    """

    image_id: int
    logits: NDArray[Any]
    boxes_cxcywh: NDArray[Any]
    memory_shapes: NDArray[Any]
    memory: NDArray[Any]
    memory_scale: NDArray[Any]
    attention_queries: NDArray[Any]
    attention: NDArray[Any]
    attention_scale: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in ARRAYS)


ARRAYS = tuple(field.name for field in fields(TeacherRow) if field.name != "image_id")
_ALWAYS = ("image_id", "logits", "boxes_cxcywh")
_MEMORY = ("memory_shapes", "memory", "memory_scale")
_ATTENTION = ("memory_shapes", "attention_queries", "attention", "attention_scale")
_SCHEMA = pa.schema([("image_id", pa.int64()), *((name, pa.binary()) for name in ARRAYS)])
# Quantised memory is noise to a compressor: it saves 4 % and costs a millisecond an image. Attention has many zeros.
_COMPRESSION = {name: "ZSTD" if name in ("logits", "attention") else "NONE" for name in _SCHEMA.names}


def columns_for(memory: bool, attention: bool) -> tuple[str, ...]:
    """The columns that hold what a method needs."""
    return tuple(dict.fromkeys(_ALWAYS + _MEMORY * memory + _ATTENTION * attention))


def collate(rows: Sequence[TeacherRow], sizes: CacheSizes, columns: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Rows -> one batch, still encoded, as `qskd.teacher.codec.EncodedRecord` takes it. n rows, n may be 0.

    teacher_logits [n, L', Q, K], teacher_boxes_cxcywh [n, L', Q, 4]; with memory or attention teacher_memory_sizes_l int32
    [n, 2] for each level l; with memory teacher_memory_l [n, C, H, W], zeros right of and below the real part, and
    teacher_memory_scale_l [n, C]; with attention teacher_attention_queries int32 [n, A], -1 = none, teacher_attention_l
    [n, A, H, W] and teacher_attention_scale [n, A]. Scales are left out where numbers are stored as they are.
    """
    shape = (len(rows), sizes.layers, sizes.queries)
    batch: dict[str, NDArray[Any]] = {
        "teacher_logits": _stack([row.logits for row in rows], (*shape, sizes.classes)),
        "teacher_boxes_cxcywh": _stack([row.boxes_cxcywh for row in rows], (*shape, 4)),
    }
    if "memory_shapes" not in columns:
        return batch
    most = max((len(row.attention_queries) for row in rows), default=0)
    start = [0] * len(rows)  # where in each row's flat memory the level begins, and in its attention
    cell = [0] * len(rows)
    channel = 0
    for level, width in enumerate(sizes.channels):
        shapes = [tuple(row.memory_shapes[level].tolist()) for row in rows]
        high, wide = (max((s[axis] for s in shapes), default=1) for axis in (0, 1))
        batch[f"teacher_memory_sizes_{level}"] = np.array(shapes, np.int32).reshape(-1, 2)
        if "memory" in columns:
            maps = np.zeros((len(rows), width, high, wide), rows[0].memory.dtype if rows else np.float32)
            for i, (row, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
                maps[i, :, :h, :w] = row.memory[start[i] : start[i] + width * h * w].reshape(width, h, w)
                start[i] += width * h * w
            batch[f"teacher_memory_{level}"] = maps
            if rows and len(rows[0].memory_scale):
                scales = [row.memory_scale[channel : channel + width] for row in rows]
                batch[f"teacher_memory_scale_{level}"] = np.stack(scales)
                channel += width
        if "attention" in columns:
            looks = np.zeros((len(rows), most, high, wide), rows[0].attention.dtype if rows else np.float32)
            for i, (row, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
                count = len(row.attention_queries)
                looks[i, :count, :h, :w] = row.attention[:, cell[i] : cell[i] + h * w].reshape(count, h, w)
                cell[i] += h * w
            batch[f"teacher_attention_{level}"] = looks
    if "attention" in columns:
        batch["teacher_attention_queries"] = _padded([row.attention_queries for row in rows], most, -1, np.int32)
        if any(len(row.attention_scale) for row in rows):
            batch["teacher_attention_scale"] = _padded([row.attention_scale for row in rows], most, 0, np.float32)
    return batch


def _stack(parts: Sequence[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.stack(parts) if parts else np.zeros(shape, np.float32)


def _padded(parts: Sequence[NDArray[Any]], length: int, fill: int, dtype: type[np.generic]) -> NDArray[Any]:
    table = np.full((len(parts), length), fill, dtype)
    for line, part in zip(table, parts, strict=True):
        line[: len(part)] = part
    return table
