"""Looks at the samples of a dataset, whatever their source, while they are written."""

from __future__ import annotations

import hashlib
import shlex
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.findings.alike import RepeatedObjects, alike_categories
from qskd.datasets.findings.finding import MOST_EXAMPLES, Finding, Tally
from qskd.datasets.samples import Category, Sample
from qskd.printable import one_line

COUNTED = 100  # detections of an image that COCO's AP counts
_FEWEST = 10  # boxes, before their places together say anything
MORE_EXAMPLES = 12  # of categories: who prepares wants to see them all


class Survey:
    """Passes samples on and counts. images, objects (crowds excluded), crowds: so far. most_objects: of one image, crowds
    excluded, and most_objects_in its id."""

    def __init__(self) -> None:
        self.images = self.objects = self.crowds = 0
        self.most_objects, self.most_objects_in = 0, 0
        self._category_ids: set[int] = set()
        self._empty, self._crowded, self._tiny = Tally(), Tally(), Tally()
        self._repeated = RepeatedObjects()
        self._largest = 0.0  # pixels: the farthest right or lower edge of a box
        self._share = 0.0  # the same, of its image's width or height
        self._names: list[str] = []
        self._ids, self._contents = array("q"), array("Q")

    def counted(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.add(sample)
            yield sample

    def add(self, sample: Sample) -> None:
        """A sample; `encoded` may be empty, and is then not compared with others'."""
        where = f"image {sample.image_id} ({sample.file_name})"
        objects = int((~sample.iscrowd).sum())
        self.images += 1
        self.objects += objects
        self.crowds += len(sample.iscrowd) - objects
        self._names.append(sample.file_name)
        self._ids.append(sample.image_id)
        self._contents.append(content_of(sample.encoded) if sample.encoded else 0)
        if objects > self.most_objects:
            self.most_objects, self.most_objects_in = objects, sample.image_id
        if objects > COUNTED:
            self._crowded.add(f"{where}: {objects}")
        if not len(sample.iscrowd):
            self._empty.add(where)
            return
        self._repeated.add(sample, where)
        self._category_ids.update(sample.category_ids.tolist())
        edges = sample.boxes_xyxy[:, 2:]
        self._largest = max(self._largest, float(edges.max()))
        self._share = max(self._share, float((edges / (sample.width, sample.height)).max()))
        self._tiny.add(where, int((edges - sample.boxes_xyxy[:, :2] < 1).any(axis=1).sum()))

    def absorb(self, later: Survey) -> None:
        """Add what another has seen of images that come after these."""
        self.images += later.images
        self.objects += later.objects
        self.crowds += later.crowds
        if later.most_objects > self.most_objects:
            self.most_objects, self.most_objects_in = later.most_objects, later.most_objects_in
        self._category_ids |= later._category_ids
        for tally, more in (
            (self._empty, later._empty),
            (self._crowded, later._crowded),
            (self._tiny, later._tiny),
        ):
            tally.absorb(more)
        self._repeated.absorb(later._repeated)
        self._largest, self._share = max(self._largest, later._largest), max(self._share, later._share)
        self._names += later._names
        self._ids += later._ids
        self._contents += later._contents

    def hashes(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Of all pictures so far: `content_of` each, and its image's id."""
        return np.array(self._contents, np.uint64), np.array(self._ids, np.int64)

    def findings(self, categories: Sequence[Category], labelled: bool = True) -> list[Finding]:
        """What looks wrong in the samples so far. categories: the dataset's. labelled: False where nobody has said what is in
        them."""
        if not labelled:
            return self._same_files()
        total = self.objects + self.crowds
        found = [*self._same_files(), *alike_categories(categories), *self._repeated.findings(), *self._boxes(total)]
        if not self.objects:
            meaning = "Nothing can be learned from it (training on it is refused), and no AP can be measured on it."
            remedy = (
                "are these the annotations of these images? The problems that were skipped, if any, are in the manifest"
            )
            found.append(
                Finding(
                    "no-objects", self.images, f"not one of {self.images} images has an object", (), meaning, remedy
                )
            )
        else:
            said = f"{{count}} of {self.images} images have no object"
            meaning = "They are backgrounds: all that is detected in them counts as wrong."
            remedy = "nothing, if they are meant to be; else see whether their annotations have the right image_id"
            found += self._empty.finding("images-without-objects", said, meaning, remedy)
            found += self._unused(categories)
        found += self._crowded.finding(
            "crowded-images",
            f"{{count}} image(s) have more than {COUNTED} objects, at most {self.most_objects}",
            f"COCO's AP counts {COUNTED} detections of an image: what is beyond can't be found.",
            "`qskd evaluate --max-detections N` counts more; give the student as many queries (student.queries)",
        )
        return found

    def _boxes(self, total: int) -> list[Finding]:
        remedy = "multiply x and width by the image's width, y and height by its height"
        if total and self._largest <= 2:  # two corners that are taken for a corner and a size add up to 2
            found = f"all {total} boxes lie within 0..{1 if self._largest <= 1 else 2}, in the upper left corner"
            meaning = "They seem to be relative to the image's size; COCO's boxes are in pixels."
            return [Finding("relative-boxes", total, found, tuple(self._tiny.examples), meaning, remedy)]
        tiny = self._tiny.finding(
            "boxes-under-a-pixel",
            f"{{count}} of {total} boxes are narrower or lower than a pixel",
            "Nothing can be seen in them; they may be relative to the image's size, where COCO's boxes are in pixels.",
            f"if they are relative, {remedy}; else take them out",
        )
        if total < _FEWEST or self._share > 0.5:
            return tiny
        corner = Finding(
            "boxes-in-one-corner",
            total,
            f"all {total} boxes lie in the upper left quarter of their images",
            (),
            "They may be in percent, or in pixels of smaller pictures than these.",
            "draw a few of them: `qskd explain` with --annotations; then scale them",
        )
        return [*tiny, corner]

    def _same_files(self) -> list[Finding]:
        """Images with one file, by its name, and by what is in it."""
        contents, ids = self.hashes()
        names = np.array([content_of(name.encode(errors="surrogatepass")) for name in self._names], np.uint64)
        by_name, by_content = Tally(), Tally()
        twice = _repeated(names)
        for rows in twice:
            by_name.add(f"{self._names[rows[0]]}: images {_listed(ids[rows])}")
        once = ~np.isin(np.arange(len(names)), np.concatenate([np.zeros(0, np.int64), *twice]))
        for rows in _repeated(contents, once & (contents != 0)):
            by_content.add(", ".join(f"image {ids[row]} ({one_line(self._names[row])})" for row in rows[:3]))
        return [
            *by_name.finding(
                "one-file-many-ids",
                "{count} file(s) are each listed under more than one image id",
                "The annotations of at least one of the ids belong to another picture: frames of two videos under one name?",
                "give each picture a file name of its own (its folder may tell them apart), or join the ids",
            ),
            *by_content.finding(
                "same-pictures",
                "{count} picture(s) are there more than once, byte for byte, under other names",
                "They count more than once, and their annotations may contradict each other.",
                "keep one of each",
            ),
        ]

    def _unused(self, categories: Sequence[Category]) -> list[Finding]:
        unused = [category for category in categories if category.id not in self._category_ids]
        if not unused:
            return []
        above = {category.supercategory for category in categories if category.supercategory != category.name}
        parents = [category for category in unused if category.name in above]
        said = [
            f"{c.id} {one_line(c.name)}{' (parent of others)' if c in parents else ''}" for c in unused[:MORE_EXAMPLES]
        ]
        named = parents or unused
        options = " ".join(f"--leave-out {shlex.quote(one_line(category.name))}" for category in named[:MOST_EXAMPLES])
        return [
            Finding(
                "unused-categories",
                len(unused),
                f"{len(unused)} of {len(categories)} categories have no annotation",
                tuple(said),
                "A detector gets a class for each, which it can't learn, and a teacher must have a label for it. Exporters such "
                "as Roboflow add a parent category that nothing is annotated with.",
                f"leave those that no split has out of every split: {options}{' ...' if len(named) > MOST_EXAMPLES else ''}",
            )
        ]


def content_of(data: bytes) -> int:
    """64 bits that tell pictures apart: never 0."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") or 1


def _repeated(values: NDArray[np.uint64], among: NDArray[np.bool_] | None = None) -> list[NDArray[np.int64]]:
    """The rows of each value that is there more than once, by the first; among: the rows that are looked at."""
    rows = np.arange(len(values)) if among is None else np.flatnonzero(among)
    _, place, counts = np.unique(values[rows], return_inverse=True, return_counts=True)
    rows, place = rows[counts[place] > 1], place[counts[place] > 1]
    if not len(rows):
        return []
    order = np.argsort(place, kind="stable")
    groups = np.split(rows[order], np.flatnonzero(np.diff(place[order])) + 1)
    return sorted(groups, key=lambda group: int(group[0]))


def _listed(ids: NDArray[np.int64]) -> str:
    return ", ".join(map(str, ids[:MOST_EXAMPLES].tolist())) + (", ..." if len(ids) > MOST_EXAMPLES else "")
