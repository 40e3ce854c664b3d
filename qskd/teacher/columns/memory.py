"""The encoder's memory maps, and the sizes of all maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qskd.teacher.columns.column import (
    TINY,
    Arrays,
    Column,
    float_format,
    floats_of,
    host,
    largest_gap,
    level_shapes,
    levels_of,
)
from qskd.teacher.manifest import CacheSizes

if TYPE_CHECKING:
    from torch import Tensor

    from qskd.structures import TeacherNeeds, TeacherRecord


class Grid(Column):
    """memory_shapes: int32 [levels, 2], height and width of each map in cells, padding cut away."""

    name = "grid"
    arrays = ("memory_shapes",)

    def asked(self, needs: TeacherNeeds) -> bool:
        return needs.memory or needs.attention

    def formats(self, precision: str) -> Mapping[str, str]:
        return {"memory_shapes": "<i4"}

    def encode(self, record: TeacherRecord, precision: str, shapes: NDArray[np.int32]) -> list[Arrays]:
        return [{"memory_shapes": shape} for shape in shapes]

    def shaped(self, flat: Arrays, sizes: CacheSizes) -> Arrays:
        return {"memory_shapes": flat["memory_shapes"].reshape(len(sizes.channels), 2)}

    def check(self, row: Any, sizes: CacheSizes, present: Mapping[str, Any], precision: str) -> None:
        shapes: list[list[int]] = row.memory_shapes.tolist()
        if any(side <= 0 for shape in shapes for side in shape):
            raise ValueError(f"maps of {shapes} cells")

    def mirrored(self, row: Any, sizes: CacheSizes) -> Arrays:
        return {}

    def collate(self, rows: Sequence[Any], sizes: CacheSizes) -> Arrays:
        """teacher_memory_sizes_l: int32 [n, 2] for each level l."""
        return {
            f"teacher_memory_sizes_{level}": np.array(level_shapes(rows, level)[0], np.int32).reshape(-1, 2)
            for level in range(len(sizes.channels))
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """memory_valid, of the size of whatever maps came too."""
        import torch

        maps = levels_of(tensors, "memory") or levels_of(tensors, "attention")
        valid = []
        for sizes, map_ in zip(levels_of(tensors, "memory_sizes"), maps, strict=True):
            rows = torch.arange(map_.shape[-2], device=map_.device) < sizes[:, :1]
            columns = torch.arange(map_.shape[-1], device=map_.device) < sizes[:, 1:]
            valid.append(rows[:, :, None] & columns[:, None, :])
        return {"memory_valid": tuple(valid)}

    def errors(self, found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
        return {}


class Memory(Column):
    """memory: the maps [C_l, h_l, w_l], flat, one after the other; with int8, 255 steps of its channel's largest value in the
    image, which is 127 times the channel's entry of memory_scale (float32, flat over levels). Where memory is kept along few
    directions (`qskd.teacher.memory.basis`), these are the channels, K_l of them."""

    name = "memory"
    arrays = ("memory", "memory_scale")  # quantised, it is noise to a compressor: 4 % for a millisecond an image

    def asked(self, needs: TeacherNeeds) -> bool:
        return needs.memory

    def formats(self, precision: str) -> Mapping[str, str]:
        return {"memory": "|i1" if precision == "int8" else float_format(precision), "memory_scale": "<f4"}

    def encode(self, record: TeacherRecord, precision: str, shapes: NDArray[np.int32]) -> list[Arrays]:
        import torch

        memory, scales = [], []
        for map_, valid in zip(record.memory, record.memory_valid, strict=True):
            map_ = map_.float() * valid[:, None]
            if precision != "int8":
                memory.append(host(map_.to(floats_of(precision))))
                continue
            scale = map_.abs().amax((2, 3)) / 127
            steps = (map_ / scale.clamp(min=TINY)[:, :, None, None]).round_().clamp_(-127, 127)
            memory.append(host(steps.to(torch.int8)))
            scales.append(host(scale))
        rows = []
        for i, sizes in enumerate(shapes.tolist()):
            parts = [m[i, :, :h, :w].ravel() for m, (h, w) in zip(memory, sizes, strict=True)]
            steps_of = np.concatenate([each[i] for each in scales]) if scales else np.zeros(0, np.float32)
            cells = np.concatenate(parts) if parts else np.zeros(0, np.int8)
            rows.append({"memory": cells, "memory_scale": steps_of})
        return rows

    def shaped(self, flat: Arrays, sizes: CacheSizes) -> Arrays:
        return flat

    def check(self, row: Any, sizes: CacheSizes, present: Mapping[str, Any], precision: str) -> None:
        shapes = row.memory_shapes.tolist()
        cells = sum(width * high * wide for width, (high, wide) in zip(sizes.stored, shapes, strict=True))
        wanted = {"memory": cells, "memory_scale": sum(sizes.stored) if precision == "int8" else 0}
        check_counts(row, wanted, present, shapes)

    def mirrored(self, row: Any, sizes: CacheSizes) -> Arrays:
        return {"memory": mirrored_maps(row.memory, sizes.stored, row.memory_shapes)}

    def collate(self, rows: Sequence[Any], sizes: CacheSizes) -> Arrays:
        """teacher_memory_l [n, C, H, W], zeros right of and below the real part; teacher_memory_scale_l [n, C], left out where
        numbers are stored as they are."""
        batch: Arrays = {}
        start = [0] * len(rows)  # where in each row's flat memory the level begins
        channel = 0
        for level, width in enumerate(sizes.stored):
            shapes, high, wide = level_shapes(rows, level)
            maps = np.zeros((len(rows), width, high, wide), rows[0].memory.dtype if rows else np.float32)
            for i, (row, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
                maps[i, :, :h, :w] = row.memory[start[i] : start[i] + width * h * w].reshape(width, h, w)
                start[i] += width * h * w
            batch[f"teacher_memory_{level}"] = maps
            if rows and len(rows[0].memory_scale):
                batch[f"teacher_memory_scale_{level}"] = np.stack(
                    [row.memory_scale[channel : channel + width] for row in rows]
                )
                channel += width
        return batch

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        memory = tuple(map_.float() for map_ in levels_of(tensors, "memory"))
        if scales := levels_of(tensors, "memory_scale"):
            memory = tuple(m * scale[:, :, None, None] for m, scale in zip(memory, scales, strict=True))
        return {"memory": memory}

    def errors(self, found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
        """Also over its channel's largest value."""
        if not found.memory:
            return {}
        pairs = [(f, t * v[:, None]) for f, t, v in zip(found.memory, true.memory, true.memory_valid, strict=True)]
        return {
            "memory": max(largest_gap(f, t) for f, t in pairs),
            "memory_relative": max(
                float(((f - t).abs() / t.abs().amax((2, 3), keepdim=True).clamp(min=TINY)).max()) for f, t in pairs
            ),
        }


def mirrored_maps(flat: NDArray[Any], widths: Sequence[int], shapes: NDArray[np.int32]) -> NDArray[Any]:
    """Maps [width, h, w], flat, one after the other, each mirrored left and right. flat: [..., sum of width * h * w]."""
    found, end = np.empty_like(flat), 0
    for width, (high, wide) in zip(widths, shapes.tolist(), strict=True):
        start, end = end, end + width * high * wide
        lines = (*flat.shape[:-1], width * high, wide)  # the last axis is split, so that both are looked at, not copied
        found[..., start:end].reshape(lines)[:] = flat[..., start:end].reshape(lines)[..., ::-1]
    return found


def check_counts(row: Any, wanted: Mapping[str, int], present: Mapping[str, Any], shapes: Any) -> None:
    """ValueError unless the flat arrays are as long as the maps' sizes have it: `collate` makes room for those sizes."""
    for name, count in wanted.items():
        if name in present and getattr(row, name).size != count:
            raise ValueError(f"{name} has {getattr(row, name).size} numbers, not {count}, for maps of {shapes} cells")
