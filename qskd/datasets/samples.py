"""A sample (one image and its objects) and a category: in memory, and as rows of an Arrow table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from qskd.printable import LONGEST_WORD, one_line

if TYPE_CHECKING:
    from qskd.datasets.pictures.facts import PictureFacts

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
LONGEST_CLASS_NAME = 1000  # characters; it is in every message, table and picture that speaks of the class
Problem = dict[str, str]  # where, found, dropped: what was wrong with a source and what was left out for it
_SHOWN_PROBLEMS = 3
MOST_PROBLEMS = 2**16  # in a manifest, some 16 MB, which every process of a training reads
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("encoded", pa.binary()),
        ("boxes_xyxy", pa.list_(pa.list_(pa.float32(), 4))),
        ("category_ids", pa.list_(pa.int64())),
        ("area", pa.list_(pa.float32())),
        ("iscrowd", pa.list_(pa.bool_())),
    ]
)
_EMPTY: dict[str, Any] = {"image_id": -1, "file_name": "", "width": 0, "height": 0, "encoded": b""}
ARRAYS: dict[str, type[np.generic]] = {
    "boxes_xyxy": np.float32,
    "category_ids": np.int64,
    "area": np.float32,
    "iscrowd": np.bool_,
}


def first_problems(problems: Sequence[Problem]) -> str:
    """For an error where nothing is left: how many there are and the first of them, a line each; empty where there are none."""
    shown = "".join(
        f"\n    {one_line(each['where'], LONGEST_WORD)}: {one_line(each['found'])}"
        for each in problems[:_SHOWN_PROBLEMS]
    )
    return f"; {len(problems)} problem(s), the first:{shown}" if problems else ""


def kept_problems(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """For a manifest: all, or as many as it has room for, those that lost something first, and how many more there are."""
    if len(problems) <= MOST_PROBLEMS:
        return tuple(problems)
    first = sorted(problems, key=lambda each: each.get("dropped", "").startswith("nothing"))[:MOST_PROBLEMS]
    more = f"{len(problems) - len(first)} more problems, for which there is no room here"
    return (*first, {"where": "the same dataset", "found": more, "dropped": "as of these"})


@dataclass(frozen=True)
class Category:
    """One object class, with the dataset's own id (COCO's have gaps)."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    id: Integer
    name: Annotated[str, Field(min_length=1, max_length=LONGEST_CLASS_NAME)]
    supercategory: str = ""


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its N objects.

    width, height: pixels, of the upright picture. encoded: the file's bytes, untouched. boxes_xyxy: float32 [N, 4],
    absolute pixels inside the upright image. category_ids: int64 [N], the dataset's own. area: float32 [N], square pixels,
    the JSON's (COCO: of the segmentation), else the box's. iscrowd: bool [N]. picture: what its source found out of the
    picture, which shards do not keep for each. labelled: False where nobody has said what is in it: it may hold anything, and
    lists no objects. Shards say it once for all, in their manifest.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    encoded: bytes = field(repr=False)
    boxes_xyxy: NDArray[np.float32]
    category_ids: NDArray[np.int64]
    area: NDArray[np.float32]
    iscrowd: NDArray[np.bool_]
    picture: PictureFacts | None = field(default=None, repr=False)
    labelled: bool = True


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Samples -> one row each, with SCHEMA's columns."""

    def column(field: pa.Field) -> pa.Array:
        values = [getattr(sample, field.name) for sample in samples]
        if field.name not in ARRAYS:
            return pa.array(values, field.type)
        offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int32())
        flat = np.concatenate(values).astype(ARRAYS[field.name], copy=False)
        inner = pa.array(flat.reshape(-1))
        return pa.ListArray.from_arrays(
            offsets, pa.FixedSizeListArray.from_arrays(inner, 4) if flat.ndim == 2 else inner
        )

    return pa.Table.from_arrays([column(entry).cast(entry.type) for entry in SCHEMA], schema=SCHEMA)


def flat_column(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """A list column as (offsets [rows + 1], all values in one array)."""
    lists = table.column(name).combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.flatten()
    if name == "boxes_xyxy":
        return offsets - offsets[0], values.flatten().to_numpy().reshape(-1, 4)
    return offsets - offsets[0], values.to_numpy(zero_copy_only=False)


def check_lengths(table: pa.Table) -> None:
    """ValueError unless the list columns that the table has are equally long in each row: they are of the same objects."""
    names = [name for name in ARRAYS if name in table.column_names]
    offsets = [flat_column(table, name)[0] for name in names]
    for name, other in zip(names[1:], offsets[1:], strict=True):
        if not np.array_equal(offsets[0], other):
            row = int(np.flatnonzero(offsets[0] != other)[0]) - 1
            raise ValueError(f"{names[0]} and {name} differ in length, first in row {row} of those read")


def to_samples(table: pa.Table, indices: Sequence[int]) -> list[Sample]:
    """These rows as samples; fields whose columns the table lacks are empty (image_id -1, size 0)."""
    flat = {name: flat_column(table, name) for name in ARRAYS if name in table.column_names}
    samples = []
    for index in indices:
        fields = {
            name: table.column(name)[index].as_py() if name in table.column_names else empty
            for name, empty in _EMPTY.items()
        }
        for name, kind in ARRAYS.items():
            if name in flat:
                offsets, values = flat[name]
                fields[name] = values[
                    offsets[index] : offsets[index + 1]
                ].copy()  # not a view that keeps all rows alive
            else:
                fields[name] = np.zeros((0, 4) if name == "boxes_xyxy" else 0, kind)
        samples.append(Sample(**fields))
    return samples


class BesideRow(Protocol):
    """What a second reader has for one view of one image."""

    @property
    def image_id(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class RowReader(Protocol):
    """A second reader of rows, one for each row of the image shards and view: the teacher's outputs are read by such a one.

    rows_read: of all rows asked for, those that were not in a spool. num_bytes: of all it can read. remedy: for messages, where a
    row is of another image. mirrored: a row -> that of the same view mirrored left and right. collate: rows -> arrays of one batch.
    """

    remedy: str

    @property
    def rows_read(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def where(self, shard: int, view: int) -> str: ...
    def group_rows(self, shard: int, view: int, row: int) -> range: ...
    def read(self, shard: int, view: int, rows: Sequence[int]) -> Sequence[BesideRow]: ...
    def mirrored(self, row: Any) -> BesideRow: ...
    def collate(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]]: ...
