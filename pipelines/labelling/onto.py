"""A detector's labels joined to a dataset's own (`qskd label --onto`): old classes beside the ground truth of new ones.

The rule is that of CL-DETR (arXiv 2304.03110): of an image's best predictions of the classes that the dataset does not label, those
that overlap no object of the dataset. docs/new_classes.md says what of it is ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.labelling.given import GivenCoco, put_beside
from qskd.boxes import iou
from qskd.datasets.classes import NOBODY, Explicit, Side, known_classes, listing
from qskd.datasets.formats.columns import ListedImage
from qskd.datasets.pictures.facts import Seen, seen_by_header
from qskd.datasets.samples import Category, Problem
from qskd.datasets.splits import united
from qskd.errors import QskdError

KEPT = "all"  # of the dataset's JSON; before, its boxes alone
BEST = 10  # (query, class) pairs of an image that may become labels: CL-DETR's K
OVERLAP = 0.7  # IoU with an object of the dataset from which on a prediction is none: CL-DETR's
JOINED = (
    f"of the {BEST} best (query, class) pairs of an image, of classes that the dataset has no object of, those whose IoU with "
    f"every object of the dataset is below {OVERLAP:g} (CL-DETR's rule), and whose score reaches the class's threshold "
    "(CL-DETR has none)"
)


class LabelledPictures:
    """A COCO JSON's images and objects, each picture looked at once, as `qskd prepare` reads them: upright, in pixels.

    A broken entry or picture stops, or is left out and recorded. given: the JSON as it is. boxes_xyxy: [n, 4] of each image's
    objects, by image id. stored: the pictures whose boxes are on the stored pixels in the JSON, by image id.
    """

    def __init__(self, source: Path, images: Path, on_error: Literal["stop", "skip"]) -> None:
        if source.suffix.lower() not in (".json", ""):
            raise QskdError(f"--onto {source}", f"a {source.suffix} file", "COCO JSON, of the pictures to label")
        self.given = dataset = GivenCoco(source, images, on_error)
        self.root, self.categories, self.sha256 = images.resolve(), dataset.categories, dataset.source_sha256
        self.digests: dict[int, str] = {}
        self.boxes_xyxy: dict[int, NDArray[np.float32]] = {}
        self.stored: dict[int, Seen] = {}
        self.labelled = set[int]()
        self._listed: list[ListedImage] = []
        for sample in dataset.samples():
            self._listed.append(ListedImage(sample.image_id, sample.file_name, sample.width, sample.height))
            self.digests[sample.image_id] = hashlib.sha256(sample.encoded).hexdigest()
            self.boxes_xyxy[sample.image_id] = sample.boxes_xyxy
            self.labelled.update(sample.category_ids.tolist())
            if sample.picture and sample.picture.boxes_turned and (seen := seen_by_header(sample.encoded)):
                self.stored[sample.image_id] = seen
        self.problems: Sequence[Problem] = dataset.problems
        self.decides = [self.sha256, OVERLAP, BEST, KEPT]  # with the detector, what is written

    def __len__(self) -> int:
        return len(self._listed)

    def listed(self) -> list[ListedImage]:
        return self._listed

    def with_labels(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON with these labels beside its own: `put_beside`."""
        return put_beside(self.given, ours, self.stored)


@dataclass(frozen=True)
class JoinedClasses:
    """categories: the dataset's, with their ids, then those of the detector's classes that it does not have. places: of the
    detector's classes, those that are labelled; names: their categories, in that order. left: names of the others, whose objects
    the dataset has."""

    categories: tuple[Category, ...]
    places: tuple[int, ...]
    named: tuple[Category, ...]
    left: tuple[str, ...]


def join_classes(
    dataset: LabelledPictures, theirs: Sequence[Category], keys: Sequence[int], explicit: Explicit, side: Side
) -> JoinedClasses:
    """Of the union by name. theirs: what the detector's classes are called, each with the id that it would have alone; keys: the
    number of each by which `explicit` may name it. explicit: a category of the dataset -> the detector's name for it, or None.

    A class of which the dataset has objects is the dataset's: the detector labels it no more. One that it lists without any object
    is labelled, under the dataset's id: tools write all their categories into each file. Raises QskdError where none is left.
    """
    by_key = dict(zip(keys, range(len(keys)), strict=True))
    labels = dict(zip(keys, (one.name for one in theirs), strict=True))
    slots = known_classes([one.name for one in dataset.categories], labels, explicit, side)
    places = [by_key.get(slot, NOBODY) for slot in slots]
    categories, ids = united(dataset.categories, theirs, places)
    by_id = {one.id: one for one in categories}
    asked = [place for place, number in enumerate(ids) if number not in dataset.labelled]
    named = [by_id[ids[place]] for place in asked]
    left = [by_id[number].name for number in ids if number in dataset.labelled]
    if not named:
        raise QskdError(
            "--onto",
            f"objects of every class of the detector: {listing(left)}",
            "a class that the detector knows and the dataset does not label",
            "there is nothing for this detector to add",
        )
    return JoinedClasses(categories, tuple(asked), tuple(named), tuple(left))


def overlapping(boxes_xyxy: NDArray[Any], objects_xyxy: NDArray[Any]) -> NDArray[np.bool_]:
    """[n, 4], [m, 4] -> [n]: the boxes whose IoU with some object reaches OVERLAP."""
    both = (torch.from_numpy(np.asarray(boxes, np.float32).reshape(-1, 4)) for boxes in (boxes_xyxy, objects_xyxy))
    ours, theirs = both
    found: NDArray[np.bool_] = (iou(ours[:, None], theirs[None]) >= OVERLAP).any(1).numpy()
    return found


def own_classes(labels: Sequence[str], ids: Sequence[int] | None) -> tuple[tuple[Category, ...], tuple[int, ...]]:
    """The detector's classes as categories; slots without a name of their own are none."""
    numbers = list(ids or range(len(labels)))
    slots = [slot for slot, name in enumerate(labels) if name != "N/A"]
    slots = [slot for slot in slots if labels.index(labels[slot]) == slot]
    return tuple(Category(numbers[slot], labels[slot]) for slot in slots), tuple(slots)
