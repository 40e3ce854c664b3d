"""Hugging Face `datasets` with object annotations, on a local disk: a column of images, and `objects` with boxes and classes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.coco import OnError
from qskd.datasets.formats.box_formats import area_in_pixels, as_xywh, in_pixels, layout_of
from qskd.datasets.formats.columns import ListedImage
from qskd.datasets.formats.imported import ImportedDataset
from qskd.datasets.formats.reading import choose_split, names_of, picture_size, read_class_names, some
from qskd.datasets.formats.rows import Rows, find_splits, row_after
from qskd.datasets.pictures.facts import Exif
from qskd.datasets.pictures.reader import Pictures, Stamp
from qskd.datasets.samples import Problem, first_problems
from qskd.errors import QskdError
from qskd.printable import one_line, shown_value
from qskd.untrusted import is_number

_OBJECTS = ("objects", "annotations", "object")
_BOXES = ("bbox", "bboxes", "box", "boxes")
_CLASSES = (
    "category",
    "categories",
    "category_id",
    "label",
    "labels",
    "class",
    "classes",
    "class_label",
    "class_labels",
)
_Picture = tuple[Path, str, Callable[[], tuple[int, int]]]
_EXPECTED = "a column `image` (or `file_name`) and a column `objects` with `bbox` and `category`"


class _BadRow(Exception):
    """What is wrong with a row's picture."""


class _Embedded:
    """The pictures inside a table. Cheapest when they are asked for in its order; can be sent to another process. A picture's place
    is its row's, as `Rows.read` says it."""

    def __init__(self, rows: Rows, column: str) -> None:
        self._rows, self._column = rows, column
        self._left: Iterator[tuple[str, dict[str, Any]]] = iter(())
        self._next = ""  # the place of `_left`'s next row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_left": iter(()), "_next": ""}

    def locate(self, file_name: str, place: str, where: str) -> str:
        return place

    def changed_at(self, located: str) -> int:
        return 0

    def is_respelt(self, file_name: str) -> bool:
        return False

    def read_again(self, located: str, stamp: Stamp, into: NDArray[np.uint8]) -> bool:
        encoded = self.read(located, "", located)
        if len(encoded) == len(into):
            into[:] = np.frombuffer(encoded, np.uint8)
        return len(encoded) == len(into)

    def read(self, located: str, file_name: str, where: str) -> bytes:
        if located != self._next:
            self._left = self._rows.read([self._column], located)
        place, row = next(self._left, ("", {}))
        self._next = row_after(place) if place else ""
        if place != located:
            raise QskdError(where, "the row is gone", "a file that nobody changes meanwhile")
        try:
            return _encoded(row[self._column])
        except _BadRow as error:
            raise QskdError(where, str(error), _EXPECTED) from None


class HuggingFaceDataset(ImportedDataset):
    """One split. classes: a file of class names, for datasets whose categories are bare numbers, or to fix the order of names.
    box_format: one of BOX_FORMATS; without it COCO's xywh, unless the boxes show that they are not."""

    def __init__(
        self,
        source: Path,
        on_error: OnError,
        exif: Exif = "auto",
        split: str | None = None,
        classes: Path | None = None,
        box_format: str | None = None,
    ) -> None:
        self._split, self._classes, self._box_format = split, classes, box_format
        self.layout = layout_of(box_format or "xywh")
        self._image_places: dict[int, str] = {}
        self._sizes: dict[int, tuple[int, int]] = {}  # image id -> width, height
        self._boxes: list[tuple[float, ...]] = []  # four numbers as written, and the picture's width and height
        super().__init__(source, source if source.is_dir() else source.parent, on_error, exif)

    def _import(self) -> None:
        splits = find_splits(self._path)
        name = choose_split(splits, self._split if splits.keys() != {""} else self._split or "", str(self._path))
        self.source = self._path.resolve().name + (f" ({name})" if name else "")
        self._rows = rows = Rows(splits[name])
        rows.check_one_split()
        self._root = rows.folder
        self._image = self._image_column(rows)
        self._embedded = _Embedded(rows, str(self._image))
        self._file_name = "file_name" if not self._image and "file_name" in rows.columns else None
        self._objects = next((column for column in _OBJECTS if column in rows.columns), None)
        inside = [self._objects] if self._objects else [key for key in (*_BOXES, *_CLASSES) if key in rows.columns]
        for there, what in ((self._image or self._file_name, "image"), (set(inside) - set(_CLASSES), "`objects`")):
            if not there:
                raise QskdError(str(self._path), f"no {what}; columns there: {some(rows.columns)}", _EXPECTED)
        names = self._names(rows, [Rows(files) for key, files in splits.items() if key != name])
        self._add_categories(names)
        class_ids = {name: index for index, name in names.items()}
        self._sized = {"width", "height"} <= set(rows.columns)
        wanted = [key for key in ("image_id", "width", "height", self._file_name) if key in rows.columns]
        if not self._sized:
            wanted += [self._image] if self._image else []
        for number, (where, row) in enumerate(rows.read([*inside, *filter(None, wanted)])):
            image_id = self._add_row(number, where, row)
            if image_id is not None:
                self._add_objects(where, row, image_id, class_ids)
        self._check_format()

    def _add_row(self, number: int, where: str, row: dict[str, Any]) -> int | None:
        """The row's image id, or None when its picture can't be used."""
        key = row.get("image_id")
        image_id = key if isinstance(key, int) and not isinstance(key, bool) else number
        if image_id in self._sizes:
            self._complain(where, f"image_id {image_id} is used twice", "one image for each id", "the second image")
            return None
        try:
            name, file = self._picture(row, where)
            if isinstance(file, Path):
                file = self._located(self._rows.folder, name, f"{where} ({one_line(name)})")
        except _BadRow as error:
            self._complain(where, str(error), _EXPECTED, "the image and its objects")
            return None
        try:
            width, height = (
                self._drawn_on(*picture_size(file, where)) if file else (row.get("width"), row.get("height"))
            )
        except QskdError as error:
            self._complain(error.where, error.found, error.expected, "the image and its objects")
            return None
        if not all(isinstance(side, int) and 0 < side < 2**31 for side in (width, height)):
            self._complain(where, f"size {shown_value(width)} x {shown_value(height)}", "pixels", "the image")
            return None
        self._image_places[image_id] = where
        self._sizes[image_id] = int(width or 0), int(height or 0)
        self._add_image(image_id, name, *self._sizes[image_id], measured=file is not None)
        return image_id

    def _add_objects(self, where: str, row: dict[str, Any], image_id: int, class_ids: dict[str, int]) -> None:
        try:
            objects = list(_objects_of(row.get(self._objects) if self._objects else row))
        except ValueError as error:
            self._complain(where, str(error), _EXPECTED, "the image's objects")
            return
        for position, entry in enumerate(objects):
            place = f"{where}, object {position}"
            try:
                index = self._class_id(_first(entry, _CLASSES), class_ids)
                box = self._box(_first(entry, _BOXES), *self._sizes[image_id])
            except ValueError as error:
                self._complain(place, str(error), _EXPECTED, "the object")
                continue
            others = {key: entry[key] for key in ("area", "iscrowd") if entry.get(key) is not None}
            if "area" in others:
                others["area"] = area_in_pixels(others["area"], self._box_format or "xywh", *self._sizes[image_id])
            self._add_object(place, image_id, index, as_xywh(box, self._box_format or "xywh"), box, **others)

    # -- pictures

    @staticmethod
    def _image_column(rows: Rows) -> str | None:
        typed = [key for key, kind in rows.features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]
        return next((key for key in (*typed, "image", "img") if key in rows.columns), None)

    def _picture(self, row: dict[str, Any], where: str) -> tuple[str, Path | io.BytesIO | None]:
        """A row's file name, and what has its size: a file, bytes, or None when the row itself says it."""
        if self._file_name:
            name = row.get(self._file_name)
            if not isinstance(name, str) or not name:
                raise _BadRow(f"`file_name` is {shown_value(name)}")
            return name, None if self._sized else self._rows.folder / name
        value = row.get(str(self._image))
        said = value.get("path") if isinstance(value, dict) else None
        name = Path(said).name if isinstance(said, str) else ""
        return name or where.rpartition(": ")[2], None if self._sized else io.BytesIO(_encoded(value))

    def _image_where(self, image_id: Any, file_name: Any) -> str:
        return f"{self._image_places[image_id]} ({one_line(str(file_name))})"

    def _picture_source(self) -> Pictures:
        return super()._picture_source() if self._file_name else self._embedded

    def _picture_place(self, image: ListedImage) -> str:
        return "" if self._file_name else self._image_places[image.id]

    # -- classes and boxes

    def _names(self, rows: Rows, others: list[Rows]) -> dict[int, str]:
        if self._classes:
            return read_class_names(self._classes)
        if noted := _class_label(rows.features.get(self._objects) if self._objects else rows.features):
            return names_of(noted, f"{self._path}: the names of its ClassLabel")
        words: set[str] = set()
        numbers = False
        problems: list[Problem] = []
        for each in (rows, *others):
            columns = [
                key for key in ([self._objects] if self._objects else [*_BOXES, *_CLASSES]) if key in each.columns
            ]
            for where, row in each.read(columns) if columns else ():
                try:
                    found = [
                        _first(entry, _CLASSES)
                        for entry in _objects_of(row.get(self._objects) if self._objects else row)
                    ]
                except ValueError as error:
                    problems.append({"where": where, "found": str(error)})
                    continue  # complained of where the row is added
                words |= {value for value in found if isinstance(value, str) and value}
                numbers = numbers or any(isinstance(value, int) for value in found)
        if not words:
            found_classes = "classes as numbers, without their names" if numbers else "no object with a class"
            remedy = "pass `--classes names.txt`, with one name a line, the first for number 0"
            if problems and not numbers:
                found_classes, remedy = f"{found_classes}{first_problems(problems)}", "correct these"
            raise QskdError(str(self._path), found_classes, "names, or a ClassLabel", remedy)
        return dict(enumerate(sorted(words)))

    @staticmethod
    def _class_id(value: Any, class_ids: dict[str, int]) -> int:
        if isinstance(value, str) and value in class_ids:
            return class_ids[value]
        if isinstance(value, int) and not isinstance(value, bool) and value in class_ids.values():
            return value
        raise ValueError(f"class {shown_value(value)}, not one of {some(class_ids)}")

    def _box(self, value: Any, width: int, height: int) -> list[float]:
        """The four numbers, in pixels and in the order that they have."""
        if not isinstance(value, list) or len(value) != 4 or not all(is_number(part) for part in value):
            raise ValueError(f"bbox {shown_value(value)} is not four finite numbers")
        numbers, box_format = [float(part) for part in value], self._box_format or "xywh"
        self._boxes.append((*numbers, width, height))
        return in_pixels(numbers, box_format, width, height)

    def _check_format(self) -> None:
        """Boxes that show to be no COCO boxes are not guessed at: QskdError with what to type."""
        if self._box_format or not self._boxes:
            return
        where, count = str(self._path), len(self._boxes)
        expected = "boxes as COCO has them: left, top, width, height in pixels"
        if all(max(box[:4]) <= 1 for box in self._boxes):
            remedy = "say how they are written: `--box-format xywh-relative`, xyxy-relative or cxcywh-relative"
            raise QskdError(where, f"all numbers of its {count} boxes are within 0..1", expected, remedy)
        leave = sum(a + c > width + 1 or b + d > height + 1 for a, b, c, d, width, height in self._boxes)
        corners = all(a < c <= width + 1 and b < d <= height + 1 for a, b, c, d, width, height in self._boxes)
        if leave and corners:
            found = f"{leave} of its {count} boxes leave their pictures, but none does as left, top, right, bottom"
            raise QskdError(
                where, found, expected, "pass `--box-format xyxy`; or `--box-format xywh`, if that is right"
            )


def _objects_of(value: Any) -> Iterator[dict[str, Any]]:
    """The objects of a row: a list of them, or a mapping of lists, as `datasets` turns one into the other. ValueError."""
    if value is None:
        return
    if isinstance(value, list):
        if not all(isinstance(entry, dict) for entry in value):
            raise ValueError(f"objects {shown_value(value)}")
        yield from value
        return
    if not isinstance(value, dict):
        raise ValueError(f"objects {shown_value(value)}")
    boxes, classes = _first(value, _BOXES), _first(value, _CLASSES)
    if not isinstance(boxes, list) or not isinstance(classes, list):
        if not boxes and not classes:
            return
        raise ValueError(f"`bbox` and `category` are not both lists; keys there: {some(value)}")
    if len(boxes) != len(classes):
        raise ValueError(f"{len(boxes)} boxes and {len(classes)} classes")
    for position in range(len(boxes)):
        others = {key: value[key] for key in ("area", "iscrowd") if isinstance(value.get(key), list)}
        others = {key: part[position] for key, part in others.items() if len(part) == len(boxes)}
        yield {"bbox": boxes[position], "category": classes[position], **others}


def _first(entry: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _class_label(features: Any) -> Any:
    """The names of the ClassLabel that a feature has somewhere below a key for classes; None without one."""
    if isinstance(features, list):
        return next((found for each in features if (found := _class_label(each))), None)
    if not isinstance(features, dict):
        return None
    if features.get("_type") == "ClassLabel":
        return features.get("names")
    inner = [features[key] for key in (*_CLASSES, "feature") if key in features]
    return next((found for each in inner if (found := _class_label(each))), None)


def _encoded(value: Any) -> bytes:
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(encoded, bytes) and encoded:
        return encoded
    raise _BadRow("no bytes of a picture; `save_to_disk` and `push_to_hub` write them")
