"""Which image is meant, and what is known to be in it: from a recipe's shards, from COCO JSON, or nothing at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines.predict import read_image
from qskd.coco import CocoDataset
from qskd.config import Config
from qskd.errors import QskdError
from qskd.explain import Subject
from qskd.loader import label_index
from qskd.samples import Sample
from qskd.shards import ShardReader
from qskd.views import View, decode_image, make_view

log = logging.getLogger("qskd")


@dataclass(frozen=True)
class Entry:
    """A row of a recipe's shards."""

    split: str
    shard: int
    row: int
    image_id: int
    file_name: str

    def __str__(self) -> str:
        return f"{self.file_name} (image {self.image_id} of {self.split})"


def _alike(a: str, b: str) -> bool:
    """Whether one is how the other's path ends."""
    ours, theirs = PurePosixPath(a).parts, PurePosixPath(b).parts
    few = min(len(ours), len(theirs))
    return few > 0 and ours[-few:] == theirs[-few:]


class Dataset:
    """The images of a recipe's data.val and data.train (in this order), by id and by name. A split that is not given, or
    can't be read (said in a warning), has none."""

    def __init__(self, config: Config) -> None:
        self.readers: dict[str, ShardReader] = {}
        self.entries: list[Entry] = []
        for split in ("data.val", "data.train"):
            uri = getattr(config.data, split.removeprefix("data."))
            if not uri:
                continue
            try:
                self._read(split, ShardReader(uri))
            except QskdError as error:
                log.warning("%s is left out: %s", split, error)

    def _read(self, split: str, reader: ShardReader) -> None:
        for shard in range(len(reader.manifest.shards)):
            table = reader.read_table(shard, ["image_id", "file_name"])
            pairs = zip(table.column("image_id").to_pylist(), table.column("file_name").to_pylist(), strict=True)
            self.entries += [Entry(split, shard, row, *pair) for row, pair in enumerate(pairs)]
        self.readers[split] = reader

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; none without data."""
        return next((reader.manifest.labels for reader in self.readers.values()), ())

    def sample(self, entry: Entry) -> Sample:
        (sample,) = self.readers[entry.split].read(entry.shard, [entry.row])
        return sample

    def named(self, image: str) -> Entry:
        """The image of this id or file name; of data.val where both splits have it. QskdError when none or several fit."""
        by_id = [entry for entry in self.entries if image.isdecimal() and entry.image_id == int(image)]
        found = by_id or [entry for entry in self.entries if _alike(entry.file_name, image)]
        found = [entry for entry in found if entry.split == found[0].split]
        if len(found) == 1:
            return found[0]
        several = f"the name of {len(found)} images: " + ", ".join(map(str, found[:6]))
        some = ", ".join(f"{entry.image_id} ({entry.file_name})" for entry in self.entries[:3])
        there = f"an image id or file name of the recipe's data, such as {some}" if some else "an image file"
        raise QskdError(image, several if found else "neither a file nor an image of the recipe's data", there)

    def copy_of(self, path: Path) -> Entry | None:
        """The image whose file this is, byte for byte; None when there is none."""
        if not any(_alike(entry.file_name, path.absolute().as_posix()) for entry in self.entries):
            return None
        encoded = path.read_bytes()
        for entry in self.entries:
            if _alike(entry.file_name, path.absolute().as_posix()) and self.sample(entry).encoded == encoded:
                return entry
        log.warning("%s has the name of an image of the recipe's data, but is another picture", path)
        return None


def subject_of_sample(sample: Sample, name: str, category_index: Mapping[int, int], view: View) -> Subject:
    """A sample, decoded. category_index: the dataset's category id -> label."""
    labels = np.array([category_index[category] for category in sample.category_ids.tolist()], np.int64)
    image = np.asarray(decode_image(sample.encoded, name))
    return Subject(name, image, sample.boxes_xyxy, labels, sample.iscrowd, view)


def find_subject(
    image: str, config: Config, dataset: Dataset, annotations: CocoDataset | None, view_index: int | None
) -> Subject:
    """What the command line's IMAGE means.

    With `annotations` a file that they describe. Else a file: with the recipe's annotations if it is one of its images,
    byte for byte, otherwise with none. Else an id or file name of the recipe's data. view_index: a view of the recipe's;
    None: the whole image. Raises QskdError.
    """
    path = Path(image)
    if annotations is not None:
        sample = annotations.sample_of(path)
        index = {category.id: label for label, category in enumerate(annotations.categories)}
        subject = subject_of_sample(sample, f"{sample.file_name} (image {sample.image_id})", index, View.IDENTITY)
        image_id = sample.image_id
    else:
        entry = dataset.copy_of(path) if path.is_file() else dataset.named(image)
        if entry is None:
            if view_index is not None:
                raise QskdError(
                    "--view", f"{image} is no image of the recipe's data", "an image with an id, which draws its views"
                )
            return Subject(path.name, read_image(path))
        manifest, sample = dataset.readers[entry.split].manifest, dataset.sample(entry)
        label_index(manifest, sample.category_ids, str(entry))  # complains of unknown categories
        subject = subject_of_sample(sample, str(entry), manifest.category_index, View.IDENTITY)
        image_id = entry.image_id
    if view_index is None:
        return subject
    view = make_view(config.data.views, image_id, view_index)
    said = [f"view {view_index}", *(["mirrored"] if view.flip else []), *([] if view.is_whole else ["cropped"])]
    return replace(subject, name=f"{subject.name}: {', '.join(said)}", view=view)


def classes(dataset: Dataset, annotations: CocoDataset | None, others: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Class names, by label: the annotations', else the recipe's data's, else the first of `others` that has any."""
    if annotations is not None:
        return tuple(category.name for category in annotations.categories)
    return dataset.labels or tuple(next((labels for labels in others if labels), ()))
