"""A dataset as its annotations list it, in memory: images one by one, objects as columns, some 40 bytes each.

As Python tuples ten million objects are 2.7 GB, as columns 0.4 GB.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.findings.given_boxes import SLACK
from qskd.datasets.samples import Sample


@dataclass(slots=True)
class ListedImage:
    """width, height: pixels, as listed. position: its number among the images, once these are known."""

    id: int
    file_name: str
    width: int
    height: int
    position: int = field(default=-1, compare=False)


class ObjectColumns:
    """Objects in the order in which they are added; after `group`, by image, each image's in that order."""

    def __init__(self) -> None:
        self._positions, self._category_ids = array("q"), array("q")
        self._boxes_xyxy, self._areas, self._crowds = array("f"), array("f"), array("b")
        self._starts, self._first = np.zeros(1, np.int64), 0
        self._columns: tuple[NDArray[Any], ...] = ()

    def add(
        self, position: int, box_xyxy: tuple[float, float, float, float], category_id: int, area: float, crowd: bool
    ) -> None:
        """position: of the object's image."""
        self._positions.append(position)
        self._boxes_xyxy.extend(box_xyxy)
        self._category_ids.append(category_id)
        self._areas.append(area)
        self._crowds.append(crowd)

    def add_block(self, positions: NDArray[Any], boxes_xyxy: NDArray[Any], others: Sequence[NDArray[Any]]) -> None:
        """The same of many: positions [N]; boxes [N, 4]; category ids, areas and crowds, [N] each."""
        category_ids, areas, crowds = others
        self._positions.frombytes(positions.astype(np.int64).tobytes())
        self._boxes_xyxy.frombytes(boxes_xyxy.astype(np.float32).tobytes())
        self._category_ids.frombytes(category_ids.astype(np.int64).tobytes())
        self._areas.frombytes(areas.astype(np.float32).tobytes())
        self._crowds.frombytes(crowds.astype(np.int8).tobytes())

    @property
    def added(self) -> int:
        """Objects so far, before `group`."""
        return len(self._positions)

    def group(self, images: int) -> None:
        """Nothing can be added after this. images: how many there are."""
        positions = np.asarray(self._positions, np.int64)
        columns = [
            np.asarray(self._boxes_xyxy).reshape(-1, 4),
            np.asarray(self._category_ids, np.int64),
            np.asarray(self._areas),
            np.asarray(self._crowds).view(np.bool_),
        ]
        if (np.diff(positions) < 0).any():  # most files list an image's objects together, and images in their order
            order = np.argsort(positions, kind="stable")
            columns = [column[order] for column in columns]
        self._columns = tuple(columns)
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(positions, minlength=images))])
        self._positions = array("q")

    def count(self, position: int) -> int:
        """Objects of the image."""
        return int(self._starts[position + 1] - self._starts[position])

    def cut(self, first: int, stop: int) -> ObjectColumns:
        """The objects of the images from position `first` to before `stop`, to be sent elsewhere."""
        own, part = slice(int(self._starts[first]), int(self._starts[stop])), ObjectColumns()
        part._first, part._starts = first, self._starts[first : stop + 1] - own.start
        part._columns = tuple(column[own] for column in self._columns)
        return part

    def sample(self, image: ListedImage) -> Sample:
        """The image with its objects, whose arrays are views of the columns, and no picture."""
        at = image.position - self._first
        own = slice(int(self._starts[at]), int(self._starts[at + 1]))
        boxes, category_ids, areas, crowds = (column[own] for column in self._columns)
        return Sample(image.id, image.file_name, image.width, image.height, b"", boxes, category_ids, areas, crowds)


class Ids:
    """A set of 64-bit integers that tells those that are there already: a bit for each where they are numbers that follow one
    another, as ids mostly are; as much as Python's own set where they are not."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}  # of 2^12 ids each
        self._others: set[int] = set()
        self._held = 0
        self._room = 64  # pages that may be begun: one more comes with every sixteen ids that pages hold

    def add(self, number: int) -> bool:
        """Whether it is new."""
        page = self._pages.get(number >> 12)
        if page is None:
            if number in self._others:
                return False
            if not self._room:
                self._others.add(number)
                return True
            self._room -= 1
            page = self._pages[number >> 12] = bytearray(512)
        at, bit = (number >> 3) & 511, 1 << (number & 7)
        if page[at] & bit or (self._others and number in self._others):
            return False
        page[at] |= bit
        self._held += 1
        if not self._held & 15:
            self._room += 1
        return True


_MARKS = frozenset(
    {"ignore", "ignored", "difficult", "attributes", "rotation", "bbox_mode"}
)  # what `CocoMarks` looks at
_LARGEST = 2.0**31  # of a number in a box: more is looked at one by one


class PlainBlock:
    """Annotations of COCO as arrays, looked at together: a fifth of the time of one by one. `plain` [N] says of which there is
    nothing to say; the others are for who looks at one.

    Raises ValueError, TypeError, KeyError or OverflowError where entries are no such annotations at all: then none is plain.
    """

    def __init__(self, entries: Sequence[Any], images: Mapping[int, ListedImage], categories: AbstractSet[int]) -> None:
        ids, image_ids, category_ids = ([entry[key] for entry in entries] for key in ("id", "image_id", "category_id"))
        boxes = [entry["bbox"] for entry in entries]
        areas, crowds = [entry.get("area") for entry in entries], [entry.get("iscrowd", 0) for entry in entries]
        numbers = chain.from_iterable(boxes)
        if not (
            {*map(type, ids), *map(type, image_ids), *map(type, category_ids)} <= {int}
            and {*map(type, boxes)} <= {list}
        ):
            raise TypeError
        if not (
            {*map(type, numbers), *map(type, areas)} <= {int, float, NoneType}
            and {*map(type, crowds)} <= {int, float, bool}
        ):
            raise TypeError
        self.ids = np.array([image_ids, ids], np.int64).T
        self.boxes_xywh = x, y, w, h = np.array(boxes, np.float64).reshape(len(entries), 4).T
        found = [images.get(image_id) for image_id in image_ids]
        places = [(0, 1, 1) if image is None else (image.position, image.width, image.height) for image in found]
        self.positions, width, height = np.array(places, np.int64).T
        self.sizes = np.stack([width, height], axis=1)
        edges = np.stack(
            [np.clip(x, 0, width), np.clip(y, 0, height), np.clip(x + w, 0, width), np.clip(y + h, 0, height)]
        )
        self.boxes_xyxy = edges.astype(np.float32).T
        self.category_ids = np.array(category_ids, np.int64)
        given = np.array(areas, np.float64)  # NaN where there is none
        none = np.array([area is None for area in areas])
        self.areas, self.crowds = np.where(none, w * h, given), np.array(crowds, np.float64)
        beyond = np.max([-x, -y, x + w - width, y + h - height], axis=0)
        self.plain = (
            np.array([image is not None for image in found])
            & np.isin(self.category_ids, list(categories))
            & (np.abs(self.boxes_xywh) < _LARGEST).all(axis=0)  # False for NaN
            & ~(np.signbit(self.boxes_xywh) & (self.boxes_xywh == 0)).any(axis=0)  # -0.0, which stays so in a shard
            & (self.boxes_xyxy[:, 2:] > self.boxes_xyxy[:, :2]).all(axis=1)
            & ((w > 0) & (h > 0) & (w <= 2 * width) & (h <= 2 * height) & (beyond <= SLACK))
            & ((x + w / 2 >= 0) & (x + w / 2 <= width) & (y + h / 2 >= 0) & (y + h / 2 <= height))
            & ((self.areas >= 0) & (self.areas <= np.finfo(np.float32).max))
            & ((self.crowds == 0) | (self.crowds == 1))
            & np.array([_MARKS.isdisjoint(entry) for entry in entries])
        )
