"""What a column of the cache has to say for itself: how it is asked for, encoded, read, collated, decoded and compared.

One column may be several arrays of a row (numbers and their scales). What needs torch imports it in the function, for the
processes that read rows start without.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qskd.teacher.manifest import CacheSizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qskd.structures import DetectorOutput, TeacherNeeds, TeacherRecord

Arrays = dict[str, NDArray[Any]]
TINY = 1e-20


class Column(ABC):
    """arrays: its Parquet columns, in the order in which a row has them. compressed: those that a compressor makes smaller.

    optional: kept only where `teacher.cache.columns` names it; its `name` is what a method's needs say. floored: kept of the
    queries that `teacher.cache.attention_giou_floor` lets in.
    """

    name: ClassVar[str]
    arrays: ClassVar[tuple[str, ...]]
    compressed: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False
    floored: ClassVar[bool] = False

    @abstractmethod
    def asked(self, needs: TeacherNeeds) -> bool:
        """Whether a method with these needs reads it."""

    def taken(self, output: DetectorOutput) -> dict[str, Tensor]:
        """What of a detector's output goes to `TeacherRecord.extra` for it; the fields of a record are filled elsewhere."""
        return {}

    def check_teacher(self, family: str) -> None:  # noqa: B027
        """QskdError where no teacher of this family can give it."""

    @abstractmethod
    def formats(self, precision: str) -> Mapping[str, str]:
        """numpy's format of each array, as it is stored."""

    @abstractmethod
    def encode(self, record: TeacherRecord, precision: str, shapes: NDArray[np.int32]) -> list[Arrays]:
        """Its arrays of each image of a batch, without padding. shapes: int32 [B, levels, 2], the real part of each map."""

    @abstractmethod
    def shaped(self, flat: Arrays, sizes: CacheSizes) -> Arrays:
        """The arrays of a row as `encode` gave them, from their stored numbers; ValueError where they can't be."""

    def check(  # noqa: B027
        self, row: Any, sizes: CacheSizes, present: Mapping[str, Any], precision: str
    ) -> None:
        """ValueError where the row's arrays don't agree with one another. present: the arrays that were read."""

    def mirrored(self, row: Any, sizes: CacheSizes) -> Arrays:
        """The arrays of the row that change when its view is mirrored left and right, as they then are. A column without this
        can't be read with derived flips (`mirrors`); a row's own arrays are left as they are."""
        raise NotImplementedError(self.name)

    @property
    def mirrors(self) -> bool:
        """Whether it can say what `mirrored` asks."""
        return type(self).mirrored is not Column.mirrored

    @abstractmethod
    def collate(self, rows: Sequence[Any], sizes: CacheSizes) -> Arrays:
        """Rows -> arrays of one batch, still encoded; n rows, n may be 0. Names begin with "teacher_"."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields of a TeacherRecord, float32, from what `collate` gave; others go to its `extra`. Nothing, or an empty value,
        where its arrays were not read."""

    def blank(self, images: int, sizes: CacheSizes, device: torch.device) -> dict[str, Any]:
        """What `decode` would give for images that stand in for none, as zeros: an optional column's entries of `extra`."""
        return {}

    @abstractmethod
    def errors(self, found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
        """How far a decoded batch is from the true one, by what is compared."""


def floats_of(precision: str) -> torch.dtype:
    """What numbers are stored as where they are not quantised."""
    import torch

    return torch.float32 if precision == "float32" else torch.float16


def float_format(precision: str) -> str:
    return "<f4" if precision == "float32" else "<f2"


def host(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


def levels_of(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """teacher_NAME_0, teacher_NAME_1 and so on, as many as there are."""
    found = (tensors.get(f"teacher_{name}_{level}") for level in range(len(tensors)))
    return tuple(tensor for tensor in found if tensor is not None)


def largest_gap(found: Tensor, true: Tensor) -> float:
    return float((found.float() - true.float()).abs().max()) if found.numel() else 0.0


def level_shapes(rows: Sequence[Any], level: int) -> tuple[list[tuple[int, int]], int, int]:
    """(height, width) of each row's map of a level, and the largest of both; 1 without rows."""
    shapes = [(int(high), int(wide)) for high, wide in (row.memory_shapes[level].tolist() for row in rows)]
    return shapes, max((high for high, _ in shapes), default=1), max((wide for _, wide in shapes), default=1)


def padded(parts: Sequence[NDArray[Any]], length: int, fill: int, dtype: type[np.generic]) -> NDArray[Any]:
    """Lines of different length as one table."""
    table = np.full((len(parts), length), fill, dtype)
    for line, part in zip(table, parts, strict=True):
        line[: len(part)] = part
    return table
