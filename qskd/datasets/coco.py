"""COCO detection JSON -> samples and categories. Every complaint names the file, the image id and the annotation id."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qskd.datasets.findings.coco_marks import CocoMarks
from qskd.datasets.findings.finding import Finding
from qskd.datasets.findings.given_boxes import COCO, SLACK, GivenBoxes, Layout
from qskd.datasets.formats.coco_fields import is_a as _is
from qskd.datasets.formats.coco_fields import read_categories
from qskd.datasets.formats.coco_fields import some as _some
from qskd.datasets.formats.coco_fields import wrong_field as _wrong_field
from qskd.datasets.formats.coco_json import CocoFile, Irregular
from qskd.datasets.formats.columns import Ids, ListedImage, ObjectColumns, PlainBlock
from qskd.datasets.formats.outlines import with_bbox
from qskd.datasets.pictures.facts import Exif, fits_only_turned
from qskd.datasets.pictures.listed_dataset import ListedDataset, OnError
from qskd.datasets.pictures.reader import FIX
from qskd.datasets.samples import Category, Problem, Sample
from qskd.errors import QskdError
from qskd.printable import one_line, shown_path, shown_value
from qskd.untrusted import parse_large_json

__all__ = ["Category", "CocoDataset", "OnError", "Problem", "Sample", "read_coco"]
_BLOCK = 512  # annotations looked at together
_LONGEST_PATH = 4096  # characters: no system takes a longer one
_LARGEST_SIDE = 2**31 - 1  # pixels: a shard's column holds no more
_LARGEST_AREA = float(np.finfo(np.float32).max)  # square pixels: likewise


class CocoDataset(ListedDataset):
    """What `read_coco` found. The JSON is checked at once, pictures as `samples()` reaches them."""

    layout: Layout = COCO

    def __init__(self, annotations: Path, images: Path, on_error: OnError, exif: Exif = "auto") -> None:
        self.source = annotations.name
        super().__init__(annotations, images, on_error, exif)
        self._begin()
        self._read()
        if self._errors:
            first, more = self._errors[0], len(self._errors) - 1
            others = f" ({more} more such problems, the next at {self._errors[1].where})" if more else ""
            boxes = "".join(f"\n    {finding.found}" for finding in self._given.findings(self._example))
            raise QskdError(first.where, first.found + others + boxes, first.expected, first.remedy)

    @property
    def findings(self) -> list[Finding]:
        """What looks wrong; of turned pictures, as far as `samples()` has passed them."""
        return [*self._given.findings(self._example), *self._marks.findings(), *self._turned.findings()]

    def _image_where(self, image_id: Any, file_name: Any) -> str:
        name = one_line(file_name) if isinstance(file_name, str) else shown_value(file_name)
        return f"{self._path}: image {image_id} ({name})"

    def _annotation_where(self, image_id: int, annotation_id: int) -> str:
        return f"{self._path}: image {image_id}, annotation {annotation_id}"

    def _example(self, image_id: int, annotation_id: int) -> str:
        return f"image {image_id}, annotation {annotation_id}"

    def _as_given(self, entry: dict[str, Any]) -> list[float]:
        """The numbers of an annotation's box, as `layout` has them."""
        bbox: list[float] = entry["bbox"]
        return bbox

    def _complain(self, where: str, found: str, expected: str, dropped: str) -> None:
        error = QskdError(shown_path(where), found, expected, FIX)
        if self._on_error == "stop":
            self._errors.append(error)
        else:
            self._note(error, dropped)

    def _note(self, error: QskdError, dropped: str) -> None:
        self._problems.append({"where": error.where, "found": error.found, "dropped": dropped})

    def _begin(self) -> None:
        self._errors = list[QskdError]()
        self._marks, self._given, self._columns = CocoMarks(), GivenBoxes(self.layout), ObjectColumns()

    def _read(self) -> None:
        """Piece by piece; a file that is out of the ordinary is parsed as a whole."""
        try:
            file = CocoFile(self._path)
            images = self._read_images(file.images())
            self._read_lists(images, file.categories, file.annotations(), file.num_annotations, file.sha256)
        except (Irregular, OSError, ValueError):  # ValueError: a NUL in the path
            self._problems = []
            self._begin()
            self._read_whole()

    def _read_whole(self) -> None:
        document, sha256 = self._parse()
        images, annotations = self._read_images(document["images"]), document["annotations"]
        self._read_lists(images, document["categories"], annotations, len(annotations), sha256)

    def _read_lists(
        self,
        images: dict[int, ListedImage],
        categories: list[Any],
        annotations: Iterable[Any],
        num_annotations: int,
        sha256: str,
    ) -> None:
        if not os.path.isdir(self._root):  # also False for names that no file system takes
            raise QskdError(str(self._root), "no such folder", "the folder with the pictures", "check the path")
        self.categories = self._named(categories)
        self._images, self.listed_objects, self.source_sha256 = images, num_annotations, sha256
        for position, image in enumerate(images.values()):
            image.position = position
        if self._exif != "auto":
            self._take_sizes(self._exif)
        self._read_annotations(annotations)
        self._columns.group(len(images))

    def _named(self, entries: list[Any]) -> tuple[Category, ...]:
        return read_categories(entries, str(self._path))

    def _parse(self) -> tuple[dict[str, list[Any]], str]:
        path = self._path
        expected = "a COCO detection file: an object with the lists images, annotations and categories"
        try:
            raw = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise QskdError(str(path), f"can't be read: {reason}", expected, "check the path") from None
        document = parse_large_json(raw, str(path), expected, "was the file cut short?")
        if not isinstance(document, dict):
            raise QskdError(str(path), f"a {type(document).__name__} at the top", expected, "give the instances file")
        for key in ("images", "annotations", "categories"):
            if not isinstance(document.get(key), list):
                found = f"`{key}` is {'not a list' if key in document else 'missing'}; keys there: {_some(sorted(document))}"
                raise QskdError(str(path), found, expected, "give the instances file, not captions or results")
        return document, hashlib.sha256(raw).hexdigest()

    def _read_images(self, entries: Iterable[Any]) -> dict[int, ListedImage]:
        found: dict[int, ListedImage] = {}
        self._ambiguous: set[int] = set()
        needed: dict[str, type] = {"id": int, "file_name": str, "width": int, "height": int}
        for position, entry in enumerate(entries):
            problem = _wrong_field(entry, needed)
            if not problem and not (0 < entry["width"] <= _LARGEST_SIDE and 0 < entry["height"] <= _LARGEST_SIDE):
                problem = f"size {entry['width']} x {entry['height']}"
            if not problem and len(entry["file_name"]) > _LONGEST_PATH:
                problem = f"`file_name` has {len(entry['file_name'])} characters"
            if problem:
                where = f"{self._path}: images[{position}]"
                if isinstance(entry, dict) and _is(entry.get("id"), int):
                    where = self._image_where(entry["id"], entry.get("file_name"))
                    self._ambiguous.add(entry["id"])
                self._complain(where, problem, "integer id, width, height and a file_name", "the image")
                continue
            image = ListedImage(*(entry[key] for key in needed))
            known = found.setdefault(image.id, image)
            if known is not image:
                where = self._image_where(image.id, image.file_name)
                text, same = f"image id {image.id} is used twice (also for {one_line(known.file_name)})", known == image
                # With two different pictures under one id nobody can tell whose the annotations are.
                dropped = "the second entry" if same else "both images and the annotations of this id"
                self._complain(where, text, "one image for each id", dropped)
                if not same:
                    self._ambiguous.add(image.id)
        return {key: image for key, image in found.items() if key not in self._ambiguous}

    def _read_annotations(self, entries: Iterable[Any]) -> None:
        categories = {category.id for category in self.categories}
        seen, left, position = Ids(), iter(entries), 0
        while block := list(itertools.islice(left, _BLOCK)):
            try:
                with np.errstate(over="ignore", invalid="ignore"):
                    together: PlainBlock | None = PlainBlock(block, self._images, categories)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                together = None
            alone = np.ones(len(block), np.bool_) if together is None else ~together.plain
            first = 0
            for row in [*np.flatnonzero(alone).tolist(), len(block)]:
                if together is not None and first < row:
                    self._take_block(block, together, first, row, position, seen, categories)
                if row < len(block):
                    self._read_annotation(position + row, block[row], seen, categories)
                first = row + 1
            position += len(block)

    def _take_block(
        self,
        entries: list[Any],
        block: PlainBlock,
        first: int,
        stop: int,
        position: int,
        seen: Ids,
        categories: set[int],
    ) -> None:
        """Those from `first` to before `stop`, which are plain, if their ids are new. position: of the block's first."""
        for row in range(first, stop):
            if not seen.add(entries[row]["id"]):
                self._take_block_unseen(entries, block, first, row)
                self._read_annotation(position + row, entries[row], seen, categories)
                first = row + 1
        self._take_block_unseen(entries, block, first, stop)

    def _take_block_unseen(self, entries: list[Any], block: PlainBlock, first: int, stop: int) -> None:
        if first < stop:
            own = slice(first, stop)
            given = np.array([self._as_given(entry) for entry in entries[own]], np.float64)
            self._given.add_block(given, block.sizes[own], block.ids[own])
            others = block.category_ids[own], block.areas[own], block.crowds[own]
            self._columns.add_block(block.positions[own], block.boxes_xyxy[own], others)

    def _read_annotation(self, position: int, entry: Any, seen: Ids, categories: set[int]) -> None:
        needed: dict[str, type] = {"id": int, "image_id": int, "category_id": int, "bbox": list}
        entry, problem = with_bbox(entry, self._images)
        problem = problem or _wrong_field(entry, needed)
        if problem:
            named = isinstance(entry, dict) and _is(entry.get("id"), int)
            key = entry["id"] if named else f"number {position}"
            where = f"{self._path}: annotation {key}"
            self._complain(where, problem, "integer id, image_id, category_id and a bbox", "the annotation")
            return
        identifier, image = entry["id"], self._images.get(entry["image_id"])
        if image is None and entry["image_id"] in self._ambiguous:
            return  # went with its image, and was recorded there
        where = self._annotation_where(entry["image_id"], identifier)
        if not seen.add(identifier):
            found, expected = f"annotation id {identifier} is used twice", "one annotation for each id"
            self._complain(where, found, expected, "the second annotation")
            return
        if image is None:
            self._complain(where, f"unknown image_id {entry['image_id']}", "an id in `images`", "the annotation")
        elif entry["category_id"] not in categories:
            found = f"unknown category_id {entry['category_id']}"
            self._complain(where, found, f"one of {_some(sorted(categories))}", "the annotation")
        else:
            self._read_object(where, entry, image)

    def _read_object(self, where: str, entry: dict[str, Any], image: ListedImage) -> None:
        bbox = entry["bbox"]
        expected = f"[x, y, width, height] with an area inside the {image.width} x {image.height} image"
        if len(bbox) != 4 or not all(_is(value, float) and math.isfinite(value) for value in bbox):
            self._complain(where, f"bbox {shown_value(bbox)} is not four finite numbers", expected, "the annotation")
            return
        x, y, w, h = bbox
        self._given.add(self._as_given(entry), image.width, image.height, entry["image_id"], entry["id"])
        if fits_only_turned(bbox, (image.width, image.height)):
            expected += "; if EXIF turns the picture and its boxes were drawn on it upright: --exif upright"
        # Written so that a box rounded to float32, as samples hold it, is judged.
        left, top = np.float32(min(max(x, 0), image.width)), np.float32(min(max(y, 0), image.height))
        right, bottom = np.float32(max(0, min(x + w, image.width))), np.float32(max(0, min(y + h, image.height)))
        if w <= 0 or h <= 0:
            self._complain(where, f"bbox {bbox} has no area", expected, "the annotation")
            return
        if right <= left or bottom <= top:
            self._complain(where, f"bbox {bbox} is outside its image", expected, "the annotation")
            return
        if (
            not (0 <= x + w / 2 <= image.width and 0 <= y + h / 2 <= image.height)
            or w > 2 * image.width
            or h > 2 * image.height
        ):
            found = f"bbox {bbox} lies far outside its image: its centre does, or it is more than twice as large"
            self._complain(where, found, expected, "the annotation")
            return
        area, crowd = entry.get("area"), entry.get("iscrowd", 0)
        if area is not None and not (_is(area, float) and 0 <= area <= _LARGEST_AREA):  # False for NaN
            said, dropped = f"area {shown_value(area)}", "the area; width x height is used"
            self._complain(where, said, "a finite number of square pixels", dropped)
            area = None
        if not (isinstance(crowd, int | float) and crowd in (0, 1)):
            self._complain(where, f"iscrowd {shown_value(crowd)}", "0 or 1", "the annotation")
            return
        beyond = max(-x, -y, x + w - image.width, y + h - image.height)
        if beyond > SLACK:
            found = f"bbox {bbox} reaches {beyond:.1f} px outside its {image.width} x {image.height} image"
            self._note(QskdError(where, found), "nothing; the box was clipped")
        box = float(left), float(top), float(right), float(bottom)
        given = float(w * h if area is None else area)
        size = given if given <= _LARGEST_AREA else (box[2] - box[0]) * (box[3] - box[1])
        self._marks.add(entry, entry["image_id"], entry["id"])
        self._columns.add(image.position, box, entry["category_id"], size, bool(crowd))


def read_coco(annotations: Path, images: Path, on_error: OnError = "stop", exif: Exif = "auto") -> CocoDataset:
    """Check a COCO detection JSON and return its samples, lazily.

    on_error: "stop" raises QskdError at the first broken entry (and counts the others); "skip" drops broken images and
    annotations and lists them in `.problems`. Broken JSON, ambiguous categories and file names that leave `images` are
    errors in both modes. exif: what boxes refer to where EXIF turns a picture; "upright" and "stored" go before the JSON's
    sizes, and read each picture once more. "auto" does so from the first turned picture on whose own size can't tell.
    """
    return CocoDataset(Path(annotations), Path(images), on_error, exif)
