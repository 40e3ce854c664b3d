"""YOLO's data.yaml and its label files, as ultralytics reads them: `images` in a picture's path is `labels` in its labels'."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qskd.datasets.coco import OnError
from qskd.datasets.findings.finding import Finding, Tally
from qskd.datasets.findings.given_boxes import Layout
from qskd.datasets.formats.imported import ImportedDataset
from qskd.datasets.formats.reading import (
    PICTURES,
    choose_split,
    class_name,
    names_of,
    picture_size,
    pictures_below,
    read_text,
    some,
)
from qskd.datasets.pictures.facts import Exif
from qskd.errors import QskdError
from qskd.printable import shown_value
from qskd.untrusted import parse_yaml

_EXPECTED = "YOLO's data.yaml: `names`, and `train` and `val` with folders of pictures"
_SPLITS = {"train", "val", "test", "valid", "validation", "minival"}
_NO_SPLITS = {"names", "path", "download"}
_ROUNDING = 0.01  # relative to the picture: how far outside 0..1 a number may be for rounding's sake


class YoloDataset(ImportedDataset):
    """One split of a data.yaml. root: the folder that its entries are relative to, instead of what `path:` says."""

    layout = Layout("YOLO's boxes", "[centre x, centre y, width, height]", "relative to the picture")

    def __init__(
        self, source: Path, root: Path | None, on_error: OnError, exif: Exif = "auto", split: str | None = None
    ) -> None:
        self._given_root, self._split = root, split
        self._repeated = Tally()
        super().__init__(source, root or source.parent, on_error, exif)

    @property
    def findings(self) -> list[Finding]:
        """As of any source, and the lines that are there twice."""
        repeated = self._repeated.finding(
            "repeated-lines",
            "{count} line(s) of label files are there twice or more",
            "Each counts once: the others are left out.",
            "take them out; were labels of two people, or of two exports, joined?",
        )
        return [*super().findings, *repeated]

    def _import(self) -> None:
        where = str(self._path)
        text = read_text(self._path, _EXPECTED)
        config = parse_yaml(text, where, _EXPECTED, text_keys=False)  # names: {0: cat, 1: dog}
        if not isinstance(config, dict) or not ("names" in config or "nc" in config):
            keys = f"; keys there: {some(sorted(map(str, config)))}" if isinstance(config, dict) else ""
            raise QskdError(where, f"no `names`{keys}", _EXPECTED, "give COCO JSON, a data.yaml, or a folder")
        names = _read_names(config, where)
        self._add_categories(names)
        split = _split_of(config, self._split, where)
        self.source = f"{self._path.name} ({split})"
        pose = "kpt_shape" in config
        labelled, sought = 0, ""
        real: set[Path] = set()
        pictures = list(self._pictures(config, split))
        if pictures:
            self._root = Path(os.path.commonpath([folder for folder, _ in pictures]))
        for image_id, (folder, path) in enumerate(pictures):
            located = self._located(folder, path.relative_to(folder).as_posix(), str(path))
            if located in real:
                self._note(QskdError(str(path), "the picture is listed twice"), "the second entry")
                continue
            real.add(located)
            try:
                width, height = self._drawn_on(*picture_size(located, str(path)))
            except QskdError as error:
                self._complain(error.where, error.found, error.expected, "the image and its labels")
                continue
            self._add_image(image_id, path.relative_to(self._root).as_posix(), width, height, measured=True)
            label = next((place for place in _label_places(path, located) if os.path.isfile(place)), None)
            sought = sought or str(next(_label_places(path, located)))
            if label:
                labelled += 1
                self._read_labels(label, image_id, width, height, names, pose)
        if self._document["images"] and not labelled:
            found = f"none of the {len(self._document['images'])} pictures of `{split}` has a label file"
            expected = f"for the first one {sought}"
            remedy = (
                "put the label files there: `images` in a picture's path is `labels` in theirs, or they lie beside it"
            )
            raise QskdError(where, found, expected, remedy)

    # -- the pictures

    def _pictures(self, config: dict[str, Any], split: str) -> Iterator[tuple[Path, Path]]:
        """(folder that a picture must not leave, its path), for all entries of the split."""
        entries = config[split] if isinstance(config[split], list) else [config[split]]
        where = f"{self._path}: `{split}`"
        for entry in entries:
            if not isinstance(entry, str) or not entry or "\0" in entry:
                raise QskdError(
                    where, shown_value(entry), "a folder of pictures, a .txt file that lists some, or a list"
                )
            if "://" in entry:
                remedy = "download the dataset, and write its folder"
                raise QskdError(where, f"{entry}: a URL", "a folder on a local disk", remedy)
            root, place = self._find(config, entry.replace("\\", "/"), where)  # as Windows writes it
            if os.path.isdir(place):
                found = pictures_below(place)
                if not found:
                    kinds = f"files that end in {some(sorted(PICTURES), 30)}"
                    raise QskdError(str(place), f"no picture in this folder of `{split}`", kinds, "check the path")
                yield from ((place, path) for path in found)
                self._look_for_orphans(place, found)
            elif place.suffix.lower() == ".txt":
                yield from self._listed(place, root)
            else:
                yield place.parent, place

    def _find(self, config: dict[str, Any], entry: str, where: str) -> tuple[Path, Path]:
        """(dataset's root, where an entry of a split is): relative to `path:`, which is itself relative to the data.yaml or the
        working folder, else to the data.yaml's folder; without the leading ../ that Roboflow writes, where it leads nowhere."""
        beside = self._path.absolute().parent
        said, given = config.get("path"), self._given_root and Path(os.path.normpath(self._given_root.absolute()))
        roots = [beside]
        if isinstance(said, str) and said and "\0" not in said:
            home = os.path.expanduser(said)
            there = [beside / home, Path(home).absolute()]
            roots = [root for root in there if os.path.isdir(root)] or [*there, beside]
        roots = [given, *roots] if given else roots
        tried = []
        hint = ", or get the dataset first (nothing of `download:` is run here)" if "download" in config else ""
        remedy = (
            f"give the folder that it is relative to: `qskd prepare {self._path} FOLDER DESTINATION --split NAME`{hint}"
        )
        for root in dict.fromkeys(roots):
            places = [Path(os.path.normpath(root / name)) for name in dict.fromkeys((entry, entry.removeprefix("../")))]
            # The given folder may itself be what the entry names, as COCO's images are.
            there = [place for place in places if os.path.exists(place) and (not given or place.is_relative_to(given))]
            if len(there) > 1:  # two datasets, unpacked in a folder and in one inside
                raise QskdError(where, f"{entry}: there are {some(there)}", "one of them", remedy)
            if there:
                return Path(os.path.normpath(root)), there[0]
            tried += places
        raise QskdError(where, f"{entry}: no such folder or file", f"one of {some(dict.fromkeys(tried))}", remedy)

    def _listed(self, listing: Path, root: Path) -> Iterator[tuple[Path, Path]]:
        """The pictures of a .txt file, one path a line: relative to the file when they begin with ./, else to the root."""
        text = read_text(listing, "a list of pictures, one a line", 2**28)
        folders = [Path(os.path.normpath(folder)) for folder in dict.fromkeys((root, listing.parent))]
        for number, line in enumerate(text.split("\n"), 1):
            name = line.strip().replace("\\", "/")
            if not name:
                continue
            where = f"{listing}: line {number}"
            first = listing.parent if name.startswith("./") else root
            places = [Path(os.path.normpath(folder / name)) for folder in dict.fromkeys((first, *folders))]
            path = next((place for place in places if os.path.isfile(place)), None)
            if path is None:
                tried = f"a picture at {some(dict.fromkeys(places))}"
                self._complain(where, f"{shown_value(name)}: no such file", tried, "the image and its labels")
                continue
            folder = next((folder for folder in folders if path.is_relative_to(folder)), None)
            if folder is None:  # refused even when skipping, as with COCO JSON
                remedy = f"name the folder that holds them: `qskd prepare {self._path} FOLDER DESTINATION`"
                raise QskdError(where, f"{shown_value(name)} leaves the dataset", f"a file inside {root}", remedy)
            yield folder, path

    # -- the labels

    def _look_for_orphans(self, folder: Path, pictures: list[Path]) -> None:
        """Label files whose picture is not there are told of: a download may have stopped half-way."""
        labels = next(_label_places(folder / "a.jpg", folder / "a.jpg")).parent
        if labels == folder or not os.path.isdir(labels):
            return
        known = {path.relative_to(folder).with_suffix(".txt") for path in pictures}
        orphans = [path for path in sorted(labels.rglob("*.txt")) if path.relative_to(labels) not in known]
        orphans = [path for path in orphans if path.name != "classes.txt"]  # labelImg's
        if orphans:
            found = f"{len(orphans)} label files without a picture in {folder}, the first {orphans[0].name}"
            self._note(QskdError(str(labels), found), "these label files")

    def _read_labels(
        self, path: Path, image_id: int, width: int, height: int, names: dict[int, str], pose: bool
    ) -> None:
        try:
            text = read_text(path, "a label file")
        except QskdError as error:
            self._complain(error.where, error.found, error.expected, "the image's labels")
            return
        seen: dict[tuple[str, ...], int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = tuple(line.split())
            if not words:
                continue
            where = f"{path}: line {number}"
            if (first := seen.setdefault(words, number)) != number:
                self._note(QskdError(where, f"the same object as in line {first}"), "the second one")
                self._repeated.add(f"{where}, as line {first}")
                continue
            try:
                index, box_xyxy = _read_object(words, pose)
                if index not in names:
                    raise ValueError(f"class {index}, of {len(names)} classes ({min(names)} to {max(names)})")
            except ValueError as error:
                expected = "class x-centre y-centre width height, or class x1 y1 x2 y2 x3 y3 ..., relative to the picture (0..1)"
                self._complain(where, str(error), expected, "the object")
                continue
            left, top, right, bottom = box_xyxy
            bbox = [left * width, top * height, (right - left) * width, (bottom - top) * height]
            centre = [(left + right) / 2 * width, (top + bottom) / 2 * height]
            self._add_object(where, image_id, index, bbox, [*centre, *bbox[2:]])


def _read_object(words: tuple[str, ...], pose: bool) -> tuple[int, tuple[float, float, float, float]]:
    """A line's class and box (left, top, right, bottom, relative). ValueError when it is none."""
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"not all numbers: {shown_value(' '.join(words))}") from None
    if not math.isfinite(values[0]) or values[0] != int(values[0]):
        raise ValueError(f"class {words[0]}")
    index, numbers = int(values[0]), values[1:5] if pose else values[1:]
    if len(numbers) == 5:
        raise ValueError("6 numbers: a prediction's line, with its confidence?")
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(f"{len(words)} numbers")
    outside = [word for word in words[1:][: len(numbers)] if not -_ROUNDING <= float(word) <= 1 + _ROUNDING]
    if outside:
        raise ValueError(f"{outside[0]} is not relative to the picture" + " (pixels?)" * (abs(float(outside[0])) > 2))
    if len(numbers) == 4:
        x, y, w, h = numbers
        return index, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    xs, ys = numbers[::2], numbers[1::2]  # the outline of a segment, or the corners of a turned box
    return index, (min(xs), min(ys), max(xs), max(ys))


def _label_places(picture: Path, located: Path) -> Iterator[Path]:
    """Where a picture's labels may be: the last folder `images` in its path (then in its path without links, `located`) replaced
    by `labels`; else beside it."""
    for path in (picture, located):
        parts = list(path.parent.parts)
        for position in reversed(range(len(parts))):
            if parts[position] == "images":
                yield Path(*parts[:position], "labels", *parts[position + 1 :], f"{path.stem}.txt")
                break
    yield picture.with_suffix(".txt")


def _read_names(config: dict[str, Any], where: str) -> dict[int, str]:
    count = config.get("nc")
    if "names" not in config:
        if type(count) is not int or not 0 < count <= 100_000:
            raise QskdError(f"{where}: `nc`", shown_value(count), "the number of classes, and their `names`")
        return {index: f"class_{index}" for index in range(count)}  # ultralytics' names for them
    value = config["names"]
    names = {0: class_name(value, where)} if isinstance(value, str) else names_of(value, f"{where}: `names`")
    if count is not None and count != len(names):
        raise QskdError(
            f"{where}: `nc`", shown_value(count), f"{len(names)}, as there are `names`", "correct one of them"
        )
    return names


def _split_of(config: dict[str, Any], given: str | None, where: str) -> str:
    there = {str(key) for key, value in config.items() if isinstance(value, str | list) and value} - _NO_SPLITS
    known = there & _SPLITS
    if not known and given not in there:
        raise QskdError(where, "no `train` or `val`", _EXPECTED, "write the folders of pictures there")
    return choose_split(there if given in there else known, given, where)
