"""A file of detections as a teacher: COCO's results, or COCO annotations with scores, as `qskd label` writes them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from qskd.checkpoints.json_files import shown
from qskd.config import ResizeConfig
from qskd.datasets.formats.coco_json import CocoFile, Irregular, ListFile
from qskd.detectors import Preprocessing, classes_of
from qskd.errors import QskdError
from qskd.printable import one_line
from qskd.storage.files import sha256_of
from qskd.untrusted import is_number, parse_large_json

ENDING = ".json"
MOST_BOXES = 300  # of an image, the best: as many as a DETR has queries
_FORM = 'a list of {"image_id": 7, "category_id": 3, "bbox": [left, top, width, height], "score": 0.9}, or COCO JSON with scores'
_LONGEST_SIDE = 1e6  # pixels
UNSEEN = Preprocessing(ResizeConfig(mode="square", size=32))  # such a teacher's pictures are looked at by nobody


def is_results(path: str) -> bool:
    """Whether a teacher's path is meant as a file of detections."""
    return path.lower().endswith(ENDING)


@dataclass(frozen=True, eq=False)
class Results:
    """The detections of a file, by image; of an image the best first. image_ids: int64 [N], ascending. boxes_xyxy: float32 [N, 4],
    pixels. scores: float32 [N]. category_ids: int64 [N]. flat: entries beside these, without width or height above 0.

    categories: name by id, and sizes: (width, height) by image, of a file that has them; None of COCO's results, whose ids are the
    dataset's own.
    """

    path: str
    sha256: str
    image_ids: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int64]
    categories: Mapping[int, str] | None
    sizes: Mapping[int, tuple[int, int]] | None
    flat: int = 0

    @property
    def queries(self) -> int:
        """The most boxes that are taken of an image, at least one."""
        counts = np.unique(self.image_ids, return_counts=True)[1]
        return int(min(MOST_BOXES, counts.max(initial=1)))

    def of(self, image_id: int) -> slice:
        """The image's, the best first; empty of one that the file does not name."""
        first, end = np.searchsorted(self.image_ids, [image_id, image_id + 1]).tolist()
        return slice(first, min(end, first + MOST_BOXES))


def read_results(path: str) -> Results:
    """QskdError naming the entry that is none. The last file is kept: a cache's parts ask for it one after another."""
    file = Path(path).expanduser()
    try:
        found = file.stat()
    except OSError as error:
        raise QskdError(path, f"can't be read: {error.strerror or error}", f"a file of detections: {_FORM}") from None
    return _read(path, found.st_size, found.st_mtime_ns)


def teacher_labels(path: str, words: Sequence[str]) -> tuple[str, ...]:
    """By slot, of any teacher: a file's are its categories in their order, or, where it names none, the dataset's own."""
    if not is_results(path):
        return classes_of(path, words)
    named = read_results(path).categories
    return tuple(words) if named is None else tuple(named.values())


@lru_cache(maxsize=1)
def _read(path: str, size: int, changed_ns: int) -> Results:
    columns = _Columns(path)
    try:
        sha256, categories, sizes = _piecewise(path, columns)
    except Irregular:
        columns = _Columns(path)
        sha256, categories, sizes = _whole(path, columns)
    if not columns.count:
        raise QskdError(path, "no detection in it", _FORM)
    return columns.results(sha256, categories, sizes)


Found = tuple[str, Mapping[int, str] | None, Mapping[int, tuple[int, int]] | None]


def _piecewise(path: str, columns: _Columns) -> Found:
    file = Path(path).expanduser()
    with file.open("rb") as begun:
        is_list = begun.read(4096).lstrip()[:1] == b"["
    if is_list:
        listed = ListFile(file)
        for entries in listed.entries():
            columns.add(entries)
        return listed.sha256, None, None
    coco = CocoFile(file)
    sizes = dict(_sizes(path, coco.images()))
    columns.add(coco.annotations())
    return coco.sha256, _names(path, coco.categories), sizes


def _whole(path: str, columns: _Columns) -> Found:
    """Says where a file is no JSON, which `Irregular` does not."""
    file = Path(path).expanduser()
    tree = parse_large_json(file.read_bytes(), path, _FORM)
    sha256 = sha256_of(file.open("rb"))
    if isinstance(tree, list):
        columns.add(tree)
        return sha256, None, None
    lists: list[Any] = (
        [tree.get(name) for name in ("images", "annotations", "categories")] if isinstance(tree, dict) else []
    )
    if not lists or not all(isinstance(one, list) for one in lists):
        raise QskdError(path, f"JSON, but {shown(tree)}", _FORM)
    images, annotations, categories = lists
    columns.add(annotations)
    return sha256, _names(path, categories), dict(_sizes(path, images))


def _sizes(path: str, images: Iterator[Any] | Sequence[Any]) -> Iterator[tuple[int, tuple[int, int]]]:
    for one in images:
        entry: Mapping[str, Any] = one if isinstance(one, Mapping) else {}
        numbers = [entry.get(name) for name in ("id", "width", "height")]
        if not all(type(each) is int and each >= 0 for each in numbers):
            raise QskdError(path, f"images: {shown(one)}", "id, width and height of each")
        image_id, width, height = (int(each) for each in numbers if each is not None)
        yield image_id, (width, height)


def _names(path: str, categories: Sequence[Any]) -> dict[int, str]:
    found: dict[int, str] = {}
    for one in categories:
        entry = one if isinstance(one, Mapping) else {}
        number, name = entry.get("id"), entry.get("name")
        if type(number) is not int or not isinstance(name, str) or number in found:
            raise QskdError(path, f"categories: {shown(one)}", "an id of its own and a name of each")
        found[number] = name
    return found


class _Columns:
    """Detections as they are read, 40 bytes each: a COCO training set has ten million."""

    def __init__(self, path: str) -> None:
        self.path, self.count, self.flat = path, 0, 0
        self.images, self.categories, self.numbers = array("q"), array("q"), array("f")

    def add(self, entries: Iterator[Any] | Sequence[Any]) -> None:
        for entry in entries:
            self.count += 1
            if isinstance(entry, Mapping) and entry.get("iscrowd"):
                continue
            said: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
            image, category, box, score = (said.get(name) for name in ("image_id", "category_id", "bbox", "score"))
            if not (_is_id(image) and _is_id(category)):
                raise self._refused(entry, "image_id and category_id, whole numbers")
            if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_side, box)):
                raise self._refused(entry, "bbox: left, top, width and height in pixels")
            if not (is_number(score) and 0 <= score <= 1):
                raise self._refused(entry, "score: 0 to 1, how sure the detector is")
            left, top, width, height = box
            if not (width > 0 and height > 0):  # of nothing nobody learns where it is
                self.flat += 1
            else:
                self.images.append(image)
                self.categories.append(category)
                self.numbers.extend((left, top, left + width, top + height, score))

    def _refused(self, entry: Any, expected: str) -> QskdError:
        said = one_line(str(entry)[:100]) if isinstance(entry, Mapping) else shown(entry)
        return QskdError(self.path, f"entry {self.count}: {said}", expected, f"expected is {_FORM}")

    def results(
        self, sha256: str, categories: Mapping[int, str] | None, sizes: Mapping[int, tuple[int, int]] | None
    ) -> Results:
        images, kinds = (np.asarray(each, np.int64) for each in (self.images, self.categories))
        numbers = np.asarray(self.numbers, np.float32).reshape(-1, 5)
        if categories is not None and (strange := sorted(set(np.unique(kinds).tolist()) - categories.keys())):
            raise QskdError(self.path, f"category_id {strange[0]}", f"one of its categories: {sorted(categories)[:20]}")
        order = np.lexsort((-numbers[:, 4], images))
        images, kinds, numbers = images[order], kinds[order], numbers[order]
        return Results(self.path, sha256, images, numbers[:, :4], numbers[:, 4], kinds, categories, sizes, self.flat)


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 2**62


def _is_side(value: Any) -> bool:
    return is_number(value) and abs(value) <= _LONGEST_SIDE
