"""A dataset as its annotations list it, in memory: images one by one, objects as columns, some 40 bytes each.

As Python tuples ten million objects are 2.7 GB, as columns 0.4 GB.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
