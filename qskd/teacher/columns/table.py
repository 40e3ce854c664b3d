"""The columns of the cache: rows as they are stored, and the way from a teacher's record to rows, to a batch, and back.

A new column is a file beside this one and an entry of `COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qskd.teacher.columns.attended import unpacked
from qskd.teacher.columns.attention import Attention
from qskd.teacher.columns.column import Column, floats_of, host
from qskd.teacher.columns.memory import Grid, Memory
from qskd.teacher.columns.predictions import Predictions
from qskd.teacher.columns.sides import Sides
from qskd.teacher.columns.states import States
from qskd.teacher.manifest import CacheSizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qskd.structures import TeacherNeeds, TeacherRecord

COLUMNS: tuple[Column, ...] = (Predictions(), Grid(), Memory(), Attention(), Sides(), States())
PRECISIONS = ("int8", "float16", "float32")
ARRAYS = tuple(name for column in COLUMNS for name in column.arrays)
ALWAYS = tuple(name for column in COLUMNS if not column.optional for name in column.arrays)
COMPRESSION = {"image_id": "NONE"} | {
    name: "ZSTD" if name in column.compressed else "NONE" for column in COLUMNS for name in column.arrays
}


def _nothing() -> NDArray[Any]:
    """An array that was not read, or that the teacher does not give."""
    return np.zeros(0, np.float32)


if TYPE_CHECKING:

    class TeacherRow:
        """One view of one image: image_id, and every column's arrays by their names, empty where they were not read."""

        image_id: int
        nbytes: int

        def __init__(self, image_id: int, *arrays: NDArray[Any], **named: NDArray[Any]) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
else:
    TeacherRow = make_dataclass(
        "TeacherRow",
        [("image_id", int), *((name, NDArray[Any], field(default_factory=_nothing)) for name in ARRAYS)],
        namespace={
            "__module__": __name__,  # rows travel between processes
            "nbytes": property(lambda self: sum(getattr(self, name).nbytes for name in ARRAYS)),
        },
        frozen=True,
        eq=False,
    )


def schema_of(names: Sequence[str]) -> pa.Schema:
    """Of a file with these arrays."""
    return pa.schema([("image_id", pa.int64()), *((name, pa.binary()) for name in names)])


def stored(optional: Sequence[str]) -> tuple[str, ...]:
    """The arrays that a file has. optional: the recipe's `teacher.cache.columns`."""
    kept = [column for column in COLUMNS if not column.optional or column.name in optional]
    return tuple(name for column in kept for name in column.arrays)


def columns_for(needs: TeacherNeeds) -> tuple[str, ...]:
    """The Parquet columns that hold what a method needs."""
    return ("image_id", *(name for column in COLUMNS if column.asked(needs) for name in column.arrays))


def encode(record: TeacherRecord, image_ids: Sequence[int], precision: str) -> list[TeacherRow]:
    """A batch with memory and attention -> one row for each image, without padding.

    precision "int8": memory and attention are quantised, logits are float16. "float16" and "float32" store all three as that.
    Boxes stay float32.
    """
    import torch

    from qskd.boxes import extent_wh

    with torch.no_grad():
        parts = [extent_wh(part).flip(-1) for part in record.memory_valid]
        # A map's real part is a rectangle at the top left. A teacher of predictions alone has no map.
        shapes = host(torch.stack(parts, dim=1).int()) if parts else np.zeros((len(image_ids), 0, 2), np.int32)
        encoded = [
            [dict.fromkeys(column.arrays, _nothing())] * len(image_ids)
            if column.optional and column.name not in record.extra
            else column.encode(record, precision, shapes)
            for column in COLUMNS
        ]
    return [
        TeacherRow(int(image_id), **{name: array for rows in encoded for name, array in rows[i].items()})
        for i, image_id in enumerate(image_ids)
    ]


def row_from(
    image_id: int, buffers: Mapping[str, Any], sizes: CacheSizes, precision: str, attended: bool = False
) -> TeacherRow:
    """A row from its stored bytes. attended: the memory is of attended cells alone. ValueError where the bytes can't be those of
    the manifest's sizes."""
    arrays: dict[str, NDArray[Any]] = {}
    for column in COLUMNS:
        formats = column.formats(precision)
        flat = {name: np.frombuffer(buffers.get(name, b""), formats[name]) for name in column.arrays}
        if attended and column.name == "memory" and "memory" in buffers:
            flat["memory"] = unpacked(flat["memory"], arrays["memory_shapes"], sizes.stored)
        arrays |= column.shaped(flat, sizes) if column.arrays[0] in buffers else flat
    row = TeacherRow(image_id, **arrays)
    for column in COLUMNS:
        if column.arrays[0] in buffers:
            column.check(row, sizes, buffers, precision)
    return row


def mirrored(row: TeacherRow, sizes: CacheSizes, columns: Sequence[str]) -> TeacherRow:
    """The row of the same view mirrored left and right, as if the teacher were blind to the difference: boxes and maps are
    mirrored, what it says of each query stays. columns: those that were read. The row itself is left as it is."""
    changed: dict[str, NDArray[Any]] = {}
    for column in COLUMNS:
        if column.arrays[0] in columns:
            changed |= column.mirrored(row, sizes)
    return replace(row, **changed)  # type: ignore[type-var]


def collate(rows: Sequence[TeacherRow], sizes: CacheSizes, columns: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Rows -> one batch, still encoded. columns: the Parquet columns that were read. n rows, n may be 0."""
    batch: dict[str, NDArray[Any]] = {}
    for column in COLUMNS:
        if column.arrays[0] in columns:
            batch |= column.collate(rows, sizes)
    return batch


def decode_batch(tensors: Mapping[str, Tensor]) -> TeacherRecord:
    """What `collate` gave, as tensors, back to what the teacher said, float32; memory is 0 on padding, and of as many channels as
    are stored (`qskd.teacher.memory.basis.made_whole`). Runs on their device."""
    from qskd.structures import TeacherRecord

    known = {field.name for field in fields(TeacherRecord)}
    said: dict[str, Any] = {}
    for column in COLUMNS:
        said |= column.decode(tensors)
    extra = {name: value for name, value in said.items() if name not in known}
    derived = tensors.get("teacher_derived")
    return TeacherRecord(**{name: value for name, value in said.items() if name in known}, extra=extra, derived=derived)


def blank_extra(images: int, sizes: CacheSizes, device: torch.device, needs: TeacherNeeds) -> dict[str, Any]:
    """The optional columns' part of a record of zeros, of those that the method asks for."""
    extra: dict[str, Any] = {}
    for column in COLUMNS:
        if column.optional and column.asked(needs):
            extra |= column.blank(images, sizes, device)
    return extra


def largest_errors(found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
    """How far a decoded batch is from the true one: the largest absolute difference, by column."""
    errors: dict[str, float] = {}
    for column in COLUMNS:
        errors |= column.errors(found, true)
    return errors


def rounded(logits: Tensor, precision: str) -> Tensor:
    """Logits as they will be read back, float32: what depends on them should be decided on these."""
    return logits.to(floats_of(precision)).float()
