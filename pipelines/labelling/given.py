"""A COCO JSON as it was given, and what is put beside its entries: labels of a detector (`qskd label --onto`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.labelling.parts import MADE_BY
from qskd.datasets.coco import CocoDataset, OnError
from qskd.datasets.formats.coco_fields import is_a
from qskd.datasets.formats.coco_json import LISTS
from qskd.datasets.formats.columns import Ids, PlainBlock
from qskd.datasets.pictures.facts import Seen, stored_boxes

JOINED_TO = "joined_to_info"  # of the JSON's `info`: what has the name of an entry of ours


class GivenCoco(CocoDataset):
    """Keeps the whole JSON. document: its content. taken: those of its annotations that are objects, as they were given, but for
    an area that was left out."""

    document: dict[str, Any]

    def __init__(self, annotations: Path, images: Path, on_error: OnError) -> None:
        super().__init__(annotations, images, on_error)
        self.images: dict[int, dict[str, Any]] = {}
        for entry in self.document["images"]:
            if isinstance(entry, dict) and is_a(entry.get("id"), int):
                self.images.setdefault(entry["id"], entry)

    def _begin(self) -> None:
        super()._begin()
        self.taken = list[dict[str, Any]]()

    def _read(self) -> None:
        self._read_whole()

    def _parse(self) -> tuple[dict[str, list[Any]], str]:
        self.document, sha256 = super()._parse()
        return self.document, sha256

    def _take_block_unseen(self, entries: list[Any], block: PlainBlock, first: int, stop: int) -> None:
        super()._take_block_unseen(entries, block, first, stop)
        self.taken += entries[first:stop]

    def _read_annotation(self, position: int, entry: Any, seen: Ids, categories: set[int]) -> None:
        objects, problems = self._columns.added, len(self._problems)
        super()._read_annotation(position, entry, seen, categories)
        if self._columns.added > objects:
            no_area = any(each["dropped"].startswith("the area") for each in self._problems[problems:])
            self.taken.append({key: value for key, value in entry.items() if key != "area"} if no_area else entry)


def put_beside(given: GivenCoco, ours: Mapping[str, Any], stored: Mapping[int, Seen]) -> dict[str, Any]:
    """A COCO JSON's entries as they are, of our images, then ours; annotations of ours get ids that are free. All else in the JSON
    stays too; where its `info` has a name of ours, that is below JOINED_TO.

    stored: pictures, by image id, whose boxes are on the stored pixels in the JSON. Ours are upright, and are turned.
    """
    listed = {one["id"] for one in ours["images"]}
    own = [entry for entry in given.taken if entry["image_id"] in listed]
    used, categories = {entry["id"] for entry in given.taken}, given.document["categories"]
    free = (number for number in itertools.count(1) if number not in used)
    known = {one["id"] for one in categories}
    added = [{**entry, "id": next(free)} for entry in ours["annotations"]]
    for entry in added:
        if seen := stored.get(entry["image_id"]):
            entry["bbox"] = _on_stored(entry["bbox"], seen)
    return {
        "info": _joined_info({**MADE_BY, **ours["info"]}, given.document.get("info", {})),
        "categories": [*categories, *(one for one in ours["categories"] if one["id"] not in known)],
        "images": [given.images[one["id"]] for one in ours["images"]],
        "annotations": [*own, *added],
        **{key: value for key, value in given.document.items() if key not in (*LISTS, "info")},
    }


def _joined_info(ours: Mapping[str, Any], theirs: Any) -> dict[str, Any]:
    if not isinstance(theirs, dict):
        return {**ours, JOINED_TO: theirs}
    same = {key: value for key, value in theirs.items() if key in ours or key == JOINED_TO}
    rest = {key: value for key, value in theirs.items() if key not in same}
    return {**ours, **rest, **({JOINED_TO: same} if same else {})}


def _on_stored(bbox_xywh: list[float], seen: Seen) -> list[float]:
    left, top, width, height = bbox_xywh
    box_xyxy = np.array([[left, top, left + width, top + height]], np.float32)
    left, top, right, bottom = stored_boxes(box_xyxy, seen.upright, seen.orientation)[0].tolist()
    return [round(side, 3) for side in (left, top, right - left, bottom - top)]
