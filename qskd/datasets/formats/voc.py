"""Pascal VOC: an XML file a picture. In a folder with Annotations, JPEGImages and ImageSets/Main, or XML and pictures together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml.ElementTree import fromstring

from qskd.datasets.coco import OnError
from qskd.datasets.findings.given_boxes import Layout
from qskd.datasets.formats.imported import ImportedDataset
from qskd.datasets.formats.reading import (
    choose_split,
    picture_size,
    pictures_below,
    read_class_names,
    read_text,
    some,
)
from qskd.datasets.pictures.facts import Exif
from qskd.datasets.samples import first_problems
from qskd.errors import QskdError
from qskd.printable import one_line, shown_value

_LARGEST_XML = 2**22  # bytes: of 10,000 objects
_PICTURE_FOLDERS = ("JPEGImages", "images", "Images", "imgs")
_EXPECTED = "Pascal VOC's XML: an `annotation` with `object`s that have a `name` and a `bndbox`"


@dataclass(frozen=True)
class _Object:
    name: str
    box_xyxy: tuple[float, float, float, float]  # as written
    difficult: bool


@dataclass
class _Annotation:
    """An XML file. key: its path in its folder without the suffix, which is also the picture's. errors: of its objects."""

    path: Path
    key: str
    size: tuple[int, int] | None
    file_name: str
    objects: list[tuple[str, _Object | QskdError]]


class VocDataset(ImportedDataset):
    """One split, or all, of a folder. pictures: the folder that holds them, where none of the usual ones does. classes: a file of
    class names, which are otherwise all names that occur in the folder (those of all splits), sorted."""

    layout = Layout("Pascal VOC's boxes", "[x1, y1, x2, y2]")

    def __init__(
        self,
        source: Path,
        pictures: Path | None,
        on_error: OnError,
        exif: Exif = "auto",
        split: str | None = None,
        classes: Path | None = None,
    ) -> None:
        self._given_pictures, self._split, self._classes = pictures, split, classes
        super().__init__(source, pictures or source, on_error, exif)

    def _import(self) -> None:
        self.source = self._path.resolve().name
        folder, keys = self._choose()
        xml_paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in _xml_below(folder)}
        pool, broken = self._parse_all(xml_paths, folder)
        names = read_class_names(self._classes) if self._classes else _names_in(pool.values())
        if not names:
            errors = [*broken.values()]
            errors += [each for one in pool.values() for _, each in one.objects if isinstance(each, QskdError)]
            problems = [{"where": error.where, "found": error.found} for error in errors]
            found = f"no object in any XML file{first_problems(problems)}"
            raise QskdError(str(folder), found, "at least one", "correct these" if problems else "check the folder")
        self._add_categories(names)
        class_ids = {name: index for index, name in names.items()}
        # VOC counts pixels from 1, and a box's last pixel is its own. A 0 anywhere shows a tool that wrote plain coordinates.
        starts = (
            min(found.box_xyxy[:2]) for each in pool.values() for _, found in each.objects if isinstance(found, _Object)
        )
        origin = 1 if min(starts, default=1) >= 1 else 0
        picture_folder = self._root = self._pictures_beside(folder)
        pictures = _by_key(picture_folder)
        for image_id, key in enumerate(keys):
            if key in broken:
                self._complain(broken[key].where, broken[key].found, broken[key].expected, "the image and its objects")
            elif key not in pool:
                where = str(folder / f"{key}.xml")
                self._complain(
                    where, "no such file", f"the annotations of {one_line(key)}, which the split lists", "the image"
                )
            else:
                self._add(image_id, pool[key], pictures.get(key, []), picture_folder, class_ids, origin)
        unlabelled = sorted(pictures.keys() - xml_paths.keys())
        if unlabelled:
            found = f"{len(unlabelled)} pictures without an XML file, the first {one_line(unlabelled[0])}"
            self._note(QskdError(str(picture_folder), found), "these pictures, which nobody annotated")

    # -- which files

    def _choose(self) -> tuple[Path, list[str]]:
        """(the folder with all XML, the keys of the split's files)."""
        root, annotations = self._path, self._path / "Annotations"
        lists = root / "ImageSets" / "Main"
        if not annotations.is_dir():
            return self._choose_folder(root)
        if lists.is_dir():
            there = sorted(path.stem for path in lists.glob("*.txt") if not _is_of_a_class(path))
            if there or self._split is not None:
                split = choose_split(there, self._split, str(root))
                self.source += f" ({split})"
                text = read_text(lists / f"{split}.txt", "a list of pictures' names, one a line", 2**28)
                # CVAT puts names with spaces in quotes.
                names = (line.strip().strip('"') for line in text.splitlines())
                return annotations, list(dict.fromkeys(filter(None, names)))
        elif self._split is not None:
            raise QskdError(
                "--split", self._split, f"lists of splits in {lists}", "leave it away to take all XML files"
            )
        return annotations, _keys(annotations, annotations)

    def _choose_folder(self, root: Path) -> tuple[Path, list[str]]:
        if self._split is None and any(root.glob("*.xml")):
            return root, _keys(root, root)
        there = [path.name for path in root.iterdir() if path.is_dir() and _xml_below(path)]
        if not there:
            raise QskdError(str(root), "no XML file in this folder or those in it", _EXPECTED, "check the path")
        split = choose_split(there, self._split, str(root))
        self.source += f" ({split})"
        return root, _keys(root / split, root)

    def _pictures_beside(self, folder: Path) -> Path:
        if self._given_pictures is not None:
            if not self._given_pictures.is_dir():
                raise QskdError(str(self._given_pictures), "no such folder", "the folder with the pictures")
            return self._given_pictures
        if folder.name == "Annotations":
            for name in _PICTURE_FOLDERS:
                if (folder.parent / name).is_dir():
                    return folder.parent / name
        return folder

    # -- what is in them

    def _parse_all(self, paths: dict[str, Path], folder: Path) -> tuple[dict[str, _Annotation], dict[str, QskdError]]:
        pool: dict[str, _Annotation] = {}
        broken: dict[str, QskdError] = {}
        for key, path in paths.items():
            try:
                pool[key] = _read_xml(path, key)
            except QskdError as error:
                broken[key] = error
        return pool, broken

    def _add(
        self,
        image_id: int,
        annotation: _Annotation,
        pictures: list[Path],
        folder: Path,
        class_ids: dict[str, int],
        origin: int,
    ) -> None:
        where = str(annotation.path)
        named = [path for path in pictures if path.name == Path(annotation.file_name).name] or pictures
        if len(named) != 1:
            found = f"pictures {some(path.name for path in named)}" if named else "no picture of this name"
            expected = f"one picture {one_line(annotation.key)}.jpg (.png, ...) in {folder}"
            self._complain(where, found, expected, "the image and its objects")
            return
        name = named[0].relative_to(folder).as_posix()
        located = self._located(folder, name, str(named[0]))
        try:
            width, height, turned = picture_size(located, str(named[0]))
        except QskdError as error:
            self._complain(error.where, error.found, error.expected, "the image and its objects")
            return
        seen, size = self._drawn_on(width, height, turned), annotation.size
        if size and size not in (seen, (width, height)):
            found = f"size {size[0]} x {size[1]}, where {named[0]} is {width} x {height}"
            self._complain(where, found, "the picture's own size", "the image and its objects")
            return
        self._add_image(image_id, name, *(size or seen), measured=size is None)
        for place, found_object in annotation.objects:
            if isinstance(found_object, QskdError):
                self._complain(place, found_object.found, found_object.expected, "the object")
            elif found_object.name not in class_ids:
                found = f"class {shown_value(found_object.name)}"
                self._complain(place, found, f"one of those in {self._classes}: {some(class_ids)}", "the object")
            else:
                left, top, right, bottom = found_object.box_xyxy
                bbox = [left - origin, top - origin, right - left + origin, bottom - top + origin]
                crowd = int(found_object.difficult)  # neither learned nor counted, as in VOC's own evaluation
                given = [*bbox[:2], right, bottom]
                self._add_object(place, image_id, class_ids[found_object.name], bbox, given, iscrowd=crowd)


def _is_of_a_class(path: Path) -> bool:
    """Whether a list is one of those that say of each picture whether a class is in it (aeroplane_train.txt: name and -1, 0, 1).
    Names may have spaces, and end in a 1 now and then."""
    with path.open(errors="replace") as file:
        lines = [line.split() for line in file.readlines(2**16) if line.strip()]
    return bool(lines) and all(len(words) > 1 and words[-1] in ("-1", "0", "1") for words in lines)


def _xml_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.xml") if path.is_file() and not path.name.startswith("."))


def _keys(folder: Path, root: Path) -> list[str]:
    return [path.relative_to(root).with_suffix("").as_posix() for path in _xml_below(folder)]


def _by_key(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in pictures_below(folder):
        found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return found


def _names_in(pool: Iterable[_Annotation]) -> dict[int, str]:
    names = {found.name for each in pool for _, found in each.objects if isinstance(found, _Object)}
    return dict(enumerate(sorted(names)))


def _read_xml(path: Path, key: str) -> _Annotation:
    try:
        if path.stat().st_size > _LARGEST_XML:
            raise QskdError(str(path), f"{path.stat().st_size} bytes", f"{_EXPECTED}, of at most {_LARGEST_XML}")
        root = fromstring(path.read_bytes())  # refuses entities, which could grow without bound or read files
    except (OSError, ParseError, ValueError, LookupError, RecursionError) as error:
        raise QskdError(str(path), f"not XML: {one_line(str(error)) or type(error).__name__}", _EXPECTED) from None
    if root.tag != "annotation":
        raise QskdError(str(path), f"`{one_line(root.tag)}` at the top", _EXPECTED)
    objects = [
        _read_object(entry, f"{path}: object {number}") for number, entry in enumerate(root.findall("object"), 1)
    ]
    return _Annotation(path, key, _size(root), _text(root, "filename"), objects)


def _read_object(entry: Element, where: str) -> tuple[str, _Object | QskdError]:
    name, box = _text(entry, "name"), entry.find("bndbox")
    if not name:
        return where, QskdError(where, "no `name`", _EXPECTED)
    where = f"{where} ({one_line(name)})"
    if box is None:
        return where, QskdError(where, f"no `bndbox`; it has {some(child.tag for child in entry)}", _EXPECTED)
    corners = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        value = _number(_text(box, side))
        if value is None:
            return where, QskdError(where, f"`{side}` is {shown_value(_text(box, side))}", "a number of pixels")
        corners.append(value)
    left, top, right, bottom = corners
    return where, _Object(name, (left, top, right, bottom), _text(entry, "difficult").lower() in ("1", "true"))


def _size(root: Element) -> tuple[int, int] | None:
    """(width, height), or None where tools wrote none, or zeros."""
    size = root.find("size")
    sides = [_number(_text(size, side)) if size is not None else None for side in ("width", "height")]
    if not all(side and side >= 1 for side in sides):
        return None
    return int(sides[0] or 0), int(sides[1] or 0)


def _text(element: Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(text: str) -> float | None:
    try:
        value: Any = float(text) if len(text) < 100 else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
