"""Memory of attended cells alone (`teacher.cache.cells: attended`): those that the kept attention reaches, and their neighbours.

A mask of AGFD without background is 0 in every other cell, so that what was said there counts for nothing. With their eight
neighbours the kept cells are all that bilinear interpolation reads where it makes such a mask more than 0, on a grid that is at
least half as fine (`qskd.distillation.shared.maps.resampler`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from qskd.teacher.columns.table import TeacherRow

CELLS = "teacher.cache.cells"  # of a cache's identity
ATTENDED = "attended"
MOST = 2**20  # cells of an image: a few bytes that say that none of more is kept must not ask for gigabytes


def attended_cells(row: TeacherRow) -> NDArray[np.bool_]:
    """[sum of h_l * w_l] bool, the maps one after the other."""
    reached = (row.attention > 0).any(0) if len(row.attention_queries) else np.zeros(0, bool)
    shapes = row.memory_shapes.tolist()
    if not len(reached):
        return np.zeros(sum(high * wide for high, wide in shapes), bool)
    parts, end = [], 0
    for high, wide in shapes:
        start, end = end, end + high * wide
        around = np.pad(reached[start:end].reshape(high, wide), 1)
        rows = around[:-2] | around[1:-1] | around[2:]
        parts.append((rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]).ravel())
    return np.concatenate(parts)


def silenced(row: TeacherRow, widths: Sequence[int]) -> TeacherRow:
    """The row with zeros for the memory of all other cells. widths: of each map."""
    memory, kept, at, cell = row.memory.copy(), attended_cells(row), 0, 0
    for width, (high, wide) in zip(widths, row.memory_shapes.tolist(), strict=True):
        cells = high * wide
        memory[at : at + width * cells].reshape(width, cells)[:, ~kept[cell : cell + cells]] = 0
        at, cell = at + width * cells, cell + cells
    return replace(row, memory=memory)  # type: ignore[type-var]


def packed(row: TeacherRow, widths: Sequence[int]) -> TeacherRow:
    """The row as it is stored: memory is which cells are kept, a bit each, in whole numbers of its format, and then the kept
    cells' [C_l, kept_l] of each map."""
    kept, at, cell = attended_cells(row), 0, 0
    bits = np.packbits(kept)
    head = np.zeros(_head(len(kept), row.memory.itemsize), np.uint8)
    head[: len(bits)] = bits
    parts = [head.view(row.memory.dtype)]
    for width, (high, wide) in zip(widths, row.memory_shapes.tolist(), strict=True):
        cells = high * wide
        parts.append(row.memory[at : at + width * cells].reshape(width, cells)[:, kept[cell : cell + cells]].ravel())
        at, cell = at + width * cells, cell + cells
    return replace(row, memory=np.concatenate(parts))  # type: ignore[type-var]


def unpacked(stored: NDArray[Any], shapes: NDArray[np.int32], widths: Sequence[int]) -> NDArray[Any]:
    """The memory of `packed`, as it was before, with zeros for the cells that are not kept. ValueError where it can't be that
    of maps of these sizes."""
    sides = shapes.reshape(-1, 2).tolist()
    areas = [high * wide for high, wide in sides]
    if len(areas) != len(widths) or any(side <= 0 for both in sides for side in both) or sum(areas) > MOST:
        raise ValueError(f"maps of {shapes.tolist()} cells")
    head = _head(sum(areas), stored.itemsize)
    first = head // stored.itemsize
    if stored.nbytes < head:
        raise ValueError(f"memory has {stored.nbytes} bytes, too few to say which of {sum(areas)} cells are kept")
    kept = np.unpackbits(stored[:first].view(np.uint8), count=sum(areas)).astype(bool)
    parts, end = np.split(kept, np.cumsum(areas)[:-1]), first
    wanted = first + sum(width * int(part.sum()) for width, part in zip(widths, parts, strict=True))
    if stored.size != wanted:
        raise ValueError(f"memory has {stored.size} numbers, not {wanted}, for {int(kept.sum())} kept cells")
    memory = []
    for width, part in zip(widths, parts, strict=True):
        start, end = end, end + width * int(part.sum())
        whole = np.zeros((width, len(part)), stored.dtype)
        whole[:, part] = stored[start:end].reshape(width, -1)
        memory.append(whole.ravel())
    return np.concatenate(memory)


def _head(cells: int, itemsize: int) -> int:
    """Bytes that say which of so many cells are kept."""
    return -(-cells // (8 * itemsize)) * itemsize
