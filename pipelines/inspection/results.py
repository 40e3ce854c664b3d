"""Predictions as files: COCO's results (JSON) and a table (CSV), with the ids of the dataset."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs

from pipelines.inspection.sources import is_video
from qskd.config import ONNX
from qskd.detectors import Detector
from qskd.errors import QskdError, check_writable, writing
from qskd.evaluation.detections import Detections
from qskd.printable import one_line, shown_value
from qskd.storage.files import publish_bytes
from qskd.storage.ownership import listed
from qskd.untrusted import parse_large_json

log = logging.getLogger("qskd")
JSON_FILE, CSV_FILE = "detections.json", "detections.csv"
COLUMNS = (
    *("file", "frame", "seconds", "image_id", "category_id", "category", "score"),
    *("left", "top", "width", "height"),
)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was found in an image, or in one frame of a video. picture: drawn of it, if any. found: boxes in its pixels, best first;
    its `category_ids` are the detector's labels' numbers. frame, seconds: of a video's frame."""

    source: Path
    picture: Path | None
    found: Detections
    frame: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Ids:
    """images: by source; a video's frames are numbered from its id on. categories: by label; labels of no category are left out
    of JSON and CSV."""

    images: Mapping[Path, int]
    categories: Mapping[int, int]

    def image(self, one: Prediction) -> int:
        return self.images[one.source] + (one.frame or 0)


def ids_for(detector: Detector, sources: Sequence[Path], annotations: Path | None, classes: Sequence[str] = ()) -> Ids:
    """Of the dataset: those of `annotations` (COCO JSON) where given, for every source then must be in it. Otherwise categories are
    numbered as the detector's config.json says, or by label; images by their file names, where those are numbers as COCO's are,
    or from 1 on in their order. classes: what a detector was asked for, which are its labels then."""
    if annotations is not None:
        images, categories = _read(annotations)
        return Ids(_named(images, sources, annotations), _matched(detector, categories, annotations))
    own = detector.category_ids
    if own is None:
        label = "label" if detector.family == ONNX else "label in its config.json"
        place = "class in --classes, from 0" if classes else label
        log.warning("the detector keeps no category ids: category_id is the number of the %s", place)
    numbers = [int(path.stem) if path.stem.isdecimal() and not is_video(path) else -1 for path in sources]
    right = len(set(numbers)) == len(numbers) and all(0 <= number < 2**53 for number in numbers)
    paths = dict(zip(sources, numbers, strict=True)) if right else _counted(sources)
    return Ids(paths, dict(enumerate(own or range(len(detector.labels)))))


def _counted(sources: Sequence[Path]) -> dict[Path, int]:
    """1 on; each video begins a million of its own, for its frames."""
    found, number = {}, 0
    for path in sources:
        number = (number // 1_000_000 + 1) * 1_000_000 if is_video(path) else number + 1
        found[path] = number
        number += 999_999 if is_video(path) else 0
    return found


def _read(annotations: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Ids of images by file_name, of categories by name."""
    expected = "COCO JSON with the lists images and categories"
    try:
        text = annotations.read_bytes()
    except OSError as error:
        raise QskdError(str(annotations), f"can't be read: {error.strerror}", expected, "check the path") from None
    document = parse_large_json(text, str(annotations), expected)
    found: list[dict[str, int]] = []
    for key, name in (("images", "file_name"), ("categories", "name")):
        entries = document.get(key) if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise QskdError(str(annotations), f"`{key}` is no list", expected, "give the instances file")
        ids: dict[str, int] = {}
        for place, entry in enumerate(entries):
            named = isinstance(entry, dict) and isinstance(entry.get(name), str) and type(entry.get("id")) is int
            if not named or ids.setdefault(entry[name], entry["id"]) != entry["id"]:
                where = f"{annotations}: {key}[{place}]"
                raise QskdError(where, shown_value(entry), f"an id and a {name} of its own", "correct the file")
        found.append(ids)
    return found[0], found[1]


def _named(images: Mapping[str, int], sources: Sequence[Path], annotations: Path) -> dict[Path, int]:
    by_last: dict[str, list[str]] = {}
    for name in images:
        by_last.setdefault(PurePosixPath(name).name, []).append(name)
    found: dict[Path, int] = {}
    for path in sources:
        parts = PurePosixPath(path.absolute().as_posix()).parts
        fitting = [n for n in by_last.get(path.name, []) if (own := PurePosixPath(n).parts) == parts[-len(own) :]]
        if len(fitting) != 1:
            said = f"{len(fitting)} images of this name"
            raise QskdError(str(path), f"{said} in {annotations}", "one image whose file_name ends its path")
        found[path] = images[fitting[0]]
    return found


def _matched(detector: Detector, categories: Mapping[str, int], annotations: Path) -> dict[int, int]:
    found = {label: categories[name] for label, name in enumerate(detector.labels) if name in categories}
    left = [name for name in detector.labels if name not in categories and name != "N/A"]
    if not found:
        raise QskdError(
            str(annotations),
            f"none of its categories ({listed(sorted(categories))}) is a class of the detector ({listed(left)})",
            "categories with the detector's names",
        )
    if left:
        log.warning("not in %s, and left out of JSON and CSV: %s", annotations, listed(left))
    return found


# --- files --------------------------------------------------------------------------------------------------------------
def check_results(folder: Path) -> None:
    """QskdError where a file would be replaced that is not qskd's (the table's first line tells, and it lies beside the JSON), or
    none could be written."""
    check_writable(folder)
    table = folder / CSV_FILE
    try:
        with open(table, "rb") as stream:
            ours = table.is_file() and stream.read(400).decode(errors="replace").splitlines()[:1] == [",".join(COLUMNS)]
    except OSError:
        ours = False
    there = [name for name in (CSV_FILE, JSON_FILE) if os.path.lexists(folder / name) and not ours]
    if there:
        remedy = "choose another folder, or move that file away; nothing was written"
        raise QskdError(str(folder / there[0]), "is there already, and qskd did not write it", "a new file", remedy)


def write_results(predictions: Sequence[Prediction], ids: Ids, labels: Sequence[str], folder: Path) -> None:
    """detections.json, as pycocotools' `loadRes` reads it, and detections.csv, with the same rows."""
    check_results(folder)
    results, table = coco_results(predictions, ids), io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    for one, result in results:
        label = labels[result["label"]]
        frame = ["" if one.frame is None else one.frame, "" if one.seconds is None else round(one.seconds, 4)]
        numbers = [result["image_id"], result["category_id"], label, result["score"], *result["bbox"]]
        rows.writerow([str(one.source), *frame, *numbers])
    entries = [{key: value for key, value in result.items() if key != "label"} for _, result in results]
    local = fs.LocalFileSystem()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        publish_bytes(table.getvalue().encode("utf-8", "backslashreplace"), local, str(folder / CSV_FILE))
        text = "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"
        publish_bytes(text.encode(), local, str(folder / JSON_FILE))


def coco_results(predictions: Sequence[Prediction], ids: Ids) -> list[tuple[Prediction, dict[str, Any]]]:
    """Entries of COCO's results, and the label of each. bbox: left, top, width, height in pixels."""
    found: list[tuple[Prediction, dict[str, Any]]] = []
    for one in predictions:
        boxes = one.found.boxes_xyxy.astype(float)
        for box, score, label in zip(boxes, one.found.scores, one.found.category_ids.tolist(), strict=True):
            if label in ids.categories:
                left, top, right, bottom = (round(float(side), 3) for side in box)
                entry = {
                    "image_id": ids.image(one),
                    "category_id": ids.categories[label],
                    "bbox": [left, top, round(right - left, 3), round(bottom - top, 3)],
                    "score": round(float(score), 6),
                    "file_name": one.source.name,
                    "label": label,
                }
                found.append((one, entry | ({} if one.frame is None else {"frame": one.frame})))
    return found


def told(one: Prediction, labels: Sequence[str], most: int = 8) -> str:
    """What was found, for a terminal: labels and scores, the best first."""
    pairs = list(zip(one.found.category_ids.tolist(), one.found.scores.tolist(), strict=True))
    shown = [f"{one_line(labels[label])} {score:.2f}" for label, score in pairs[:most]]
    more = [f"and {len(pairs) - most} more"] if len(pairs) > most else []
    count = f"{len(pairs)} object{'' if len(pairs) == 1 else 's'}" if pairs else "nothing"
    return f"{count}: {', '.join([*shown, *more])}" if pairs else count


def told_of_video(frames: Sequence[Prediction], labels: Sequence[str], most: int = 8) -> str:
    """The same of all frames: how often each class was found."""
    counts = Counter(label for one in frames for label in one.found.category_ids.tolist())
    shown = [f"{one_line(labels[label])} {count} times" for label, count in counts.most_common(most)]
    more = [f"and {len(counts) - most} more classes"] if len(counts) > most else []
    return f"{len(frames)} frames: {', '.join([*shown, *more]) or 'nothing'}"
