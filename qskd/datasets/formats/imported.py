"""A dataset of another format as COCO's reader sees one: an importer lists images, objects and categories; all checks, samples
and shards are the same from there on."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

from qskd.datasets.coco import CocoDataset, OnError
from qskd.datasets.pictures.facts import Exif
from qskd.datasets.pictures.files import PictureFolder
from qskd.datasets.samples import first_problems
from qskd.errors import QskdError
from qskd.printable import shown_path


class ImportedDataset(CocoDataset):
    """What all importers share. One of them fills the lists in `_import`: `_root`, the folder of all pictures; `_add_image`, then
    `_add_object` for what is in it; and `_complain` for each entry that can't be read, which stops or is skipped as `--on-error`
    says."""

    def __init__(self, source: Path, root: Path, on_error: OnError, exif: Exif) -> None:
        self._object_places: list[str] = []  # annotation id -> where it stands, for messages
        self._measured: set[int] = set()
        self._folders: dict[Path, PictureFolder] = {}
        self._given_boxes: list[list[float]] = []  # annotation id -> its box as `layout` has it, in pixels
        self._lost_objects = 0  # at least: entries that can't be read, of objects or of all of an image's
        self._document: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
        super().__init__(source, root, on_error, exif)
        self.listed_objects += self._lost_objects

    @abstractmethod
    def _import(self) -> None:
        """Fill the lists. Raises QskdError for what is no sample's fault."""

    def _read(self) -> None:
        self._read_whole()

    def _parse(self) -> tuple[dict[str, list[Any]], str]:
        self._import()
        if not self._document["images"] and not self._errors:
            first = first_problems(self._problems)
            raise QskdError(str(self._path), f"no usable image{first}", "at least one", "give the dataset's folder")
        # What was read, not the files themselves: of the same dataset in another place the shards are the same.
        return self._document, _sha256_of(self._document)

    def _add_categories(self, names: dict[int, str]) -> None:
        self._document["categories"] = [{"id": key, "name": name} for key, name in sorted(names.items())]

    def _located(self, folder: Path, file_name: str, where: str) -> Path:
        """A picture's real path. QskdError when it leaves its folder, which is no entry to skip."""
        known = self._folders.get(folder)
        if known is None:
            known = self._folders[folder] = PictureFolder(folder.resolve())
        return known.locate(file_name, where)

    def _drawn_on(self, width: int, height: int, turned: bool) -> tuple[int, int]:
        """The size of what boxes were drawn on: the picture as a person sees it, as annotation tools have it, unless told."""
        return (height, width) if turned and self._exif != "stored" else (width, height)

    def _add_image(self, image_id: int, file_name: str, width: int, height: int, *, measured: bool) -> None:
        """file_name: relative to `_root`. width, height: pixels. measured: of the file, the dataset itself has no size."""
        if measured:
            self._measured.add(image_id)
        entry = {"id": image_id, "file_name": file_name, "width": width, "height": height}
        self._document["images"].append(entry)

    def _add_object(
        self, where: str, image_id: int, category_id: int, bbox_xywh: Any, given: list[float], **others: Any
    ) -> None:
        """bbox_xywh: left, top, width, height in pixels. given: the same box in the order that `layout` says, in pixels. others:
        `area`, `iscrowd`."""
        entry = {"id": len(self._object_places), "image_id": image_id, "category_id": category_id, "bbox": bbox_xywh}
        self._document["annotations"].append(entry | others)
        self._object_places.append(shown_path(where))
        self._given_boxes.append(given)

    def _image_where(self, image_id: Any, file_name: Any) -> str:
        return shown_path(self._root / file_name)

    def _annotation_where(self, image_id: int, annotation_id: int) -> str:
        return self._object_places[annotation_id]

    def _example(self, image_id: int, annotation_id: int) -> str:
        return self._object_places[annotation_id]

    def _as_given(self, entry: dict[str, Any]) -> list[float]:
        return self._given_boxes[entry["id"]]

    def _complain(self, where: str, found: str, expected: str, dropped: str) -> None:
        self._lost_objects += "object" in dropped or "label" in dropped
        super()._complain(where, found, expected, dropped)


def _sha256_of(document: dict[str, list[Any]]) -> str:
    """Of `json.dumps(document, sort_keys=True)`, whose text is as large as all entries together, and is not made."""
    digest = hashlib.sha256()
    for number, (key, entries) in enumerate(sorted(document.items())):
        digest.update(f"{', ' if number else '{'}{json.dumps(key)}: [".encode())
        for place, entry in enumerate(entries):
            digest.update(f"{', ' if place else ''}{json.dumps(entry, sort_keys=True)}".encode())
        digest.update(b"]")
    digest.update(b"}")
    return digest.hexdigest()
