"""Which image is meant, and what is known to be in it: from a recipe's shards, from COCO JSON, or nothing at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines.inspection.predict import read_image
from qskd.config import Config
from qskd.datasets.coco import CocoDataset
from qskd.datasets.samples import Sample
from qskd.datasets.shards import ShardReader
from qskd.datasets.splits import labels_of_categories
from qskd.datasets.views import View, decode_image, make_view
from qskd.errors import QskdError
from qskd.pictures.explain import Subject

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
    """The images of a recipe's data.val, data.train and data.unlabeled, looked through in this order, by id and by name. A split
    that is not given, or can't be read (said in a warning), has none."""

    def __init__(self, config: Config) -> None:
        self.readers: dict[str, ShardReader] = {}
        self._entries: dict[str, list[Entry]] = {}
        uris = {"data.val": config.data.val, "data.train": config.data.train}
        uris |= {f"data.unlabeled[{number}]": uri for number, uri in enumerate(config.data.unlabeled)}
        for split, uri in uris.items():
            if uri:
                try:
                    self.readers[split] = ShardReader(uri)
                except QskdError as error:
                    log.warning("%s is left out: %s", split, error)

    def entries(self, split: str) -> list[Entry]:
        """All images of a split. Read when first asked for: a large dataset has many."""
        if split not in self._entries:
            reader, found = self.readers[split], list[Entry]()
            for shard in range(len(reader.manifest.shards)):
                table = reader.read_table(shard, ["image_id", "file_name"])
                pairs = zip(table.column("image_id").to_pylist(), table.column("file_name").to_pylist(), strict=True)
                found += [Entry(split, shard, row, *pair) for row, pair in enumerate(pairs)]
            self._entries[split] = found
        return self._entries[split]

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, which are data.train's where that is there: the student's. None without data."""
        named = [reader.manifest for reader in (self.readers.get("data.train"), *self.readers.values()) if reader]
        return next((manifest.labels for manifest in named if manifest.labelled), ())

    def label_of_category(self, entry: Entry) -> dict[int, int]:
        """The category ids of the image's split -> places in `labels`. Splits are joined by name; without labels there are none."""
        train, own = self.readers.get("data.train"), self.readers[entry.split].manifest
        return labels_of_categories(train.manifest, own) if train and own.labelled else own.category_index

    def sample(self, entry: Entry) -> Sample:
        (sample,) = self.readers[entry.split].read(entry.shard, [entry.row])
        return sample

    def named(self, image: str) -> Entry:
        """The image of this id or file name; of the first split that has it. QskdError when none or several fit."""
        found: list[Entry] = []
        for split in self.readers:
            entries = self.entries(split)
            found = [entry for entry in entries if image.isdecimal() and entry.image_id == int(image)]
            found = found or [entry for entry in entries if _alike(entry.file_name, image)]
            if found:
                break
        if len(found) == 1:
            return found[0]
        several = f"the name of {len(found)} images: " + ", ".join(map(str, found[:6]))
        first = [entry for split in list(self.readers)[:1] for entry in self.entries(split)[:3]]
        some = ", ".join(f"{entry.image_id} ({entry.file_name})" for entry in first)
        there = f"an image id or file name of the recipe's data, such as {some}" if some else "an image file"
        raise QskdError(image, several if found else "neither a file nor an image of the recipe's data", there)

    def copy_of(self, path: Path) -> Entry | None:
        """The image whose file this is, byte for byte; None when there is none."""
        namesakes, name = False, path.absolute().as_posix()
        for split in self.readers:
            for entry in self.entries(split):
                if _alike(entry.file_name, name):
                    namesakes = True
                    if self.sample(entry).encoded == path.read_bytes():
                        return entry
        if namesakes:
            log.warning("%s has the name of an image of the recipe's data, but is another picture", path)
        return None


def subject_of_sample(sample: Sample, name: str, category_index: Mapping[int, int], view: View) -> Subject:
    """A sample, decoded. category_index: the dataset's category id -> label."""
    labels = np.array([category_index[category] for category in sample.category_ids.tolist()], np.int64)
    image = np.asarray(decode_image(sample.encoded, name))
    if not sample.labelled:
        return Subject(name, image, view=view, unlabeled=True)
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
        index, sample = dataset.label_of_category(entry), dataset.sample(entry)
        if strange := sorted(set(sample.category_ids.tolist()) - index.keys()):
            raise QskdError(str(entry), f"category id {strange[0]}", f"one of {sorted(index)}")
        subject = subject_of_sample(sample, str(entry), index, View.IDENTITY)
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
