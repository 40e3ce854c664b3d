"""Images that are in shards already, all of a folder or those of a selection, of several such together: one dataset more.

What an exemplar set is joined with new images by. Categories are the union by name: the first source's keep their ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.classes import Side, known_classes
from qskd.datasets.findings.survey import content_of
from qskd.datasets.manifest import MANIFEST, check_labelled
from qskd.datasets.order.chosen import check_fits, is_selection, load_selection
from qskd.datasets.pictures.listed_dataset import OnError
from qskd.datasets.samples import SCHEMA, Category, Problem, Sample
from qskd.datasets.shards import ShardReader
from qskd.datasets.splits import united
from qskd.errors import QskdError

_EXPECTED = "a folder of labelled shards, or a selection of `qskd select`"


def is_gathered(source: Path) -> bool:
    """Whether a path is one that can be gathered: shards, or a selection of some."""
    if source.is_dir():
        return (source / MANIFEST).is_file() and any(source.glob("shard-*.parquet"))
    if not source.is_file():
        return False
    with source.open("rb") as file:
        return is_selection(file.read(200))


class GatheredShards:
    """The images of these sources, one source after the other, each in stored order, as `write_shards` takes them.

    An image keeps its id where that is free, else it gets one above all. A picture that an earlier source has too, byte for byte,
    stops, or is left out and recorded: it has one set of objects.
    """

    def __init__(self, sources: Sequence[str], on_error: OnError) -> None:
        self._parts = [_Part(source) for source in sources]
        self.read_shards = [part.reader.uri for part in self._parts]
        self.source = " + ".join(Path(source).name for source in sources)
        said = json.dumps([part.fingerprint for part in self._parts])
        self.source_sha256 = hashlib.sha256(said.encode()).hexdigest()
        self.categories: tuple[Category, ...] = ()
        self._ids: list[dict[int, int]] = []  # of each source, its category's id -> the union's
        for part in self._parts:
            theirs = part.reader.manifest.categories
            names, others = ([one.name for one in each] for each in (self.categories, theirs))
            slots = known_classes(names, others, {}, Side("dataset", part.source))
            self.categories, ids = united(self.categories, theirs, slots)
            self._ids.append(dict(zip((one.id for one in theirs), ids, strict=True)))
        self._on_error, self._problems = on_error, list[Problem]()

    @property
    def problems(self) -> list[Problem]:
        return self._problems

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def samples(self) -> Iterator[Sample]:
        return self._samples(list(SCHEMA.names))

    def outline(self) -> Iterator[Sample]:
        """Without pictures, so that none of them is known to be there twice."""
        return self._samples([name for name in SCHEMA.names if name != "encoded"])

    def _samples(self, columns: Sequence[str]) -> Iterator[Sample]:
        self._problems = []
        taken, seen, following = set[int](), dict[int, str](), 1 + max(part.largest_id for part in self._parts)
        for number, (part, ids) in enumerate(zip(self._parts, self._ids, strict=True)):
            own = dict[int, str]()  # within one source pictures may repeat, as they do in its shards
            for sample in part.samples(columns):
                where = f"{part.source}: image {sample.image_id} ({sample.file_name})"
                content = content_of(sample.encoded) if sample.encoded else 0
                if content and content in seen:
                    self._complain(where, f"the same picture as {seen[content]}, byte for byte")
                    continue
                own[content] = where
                image_id = sample.image_id
                if image_id in taken:
                    image_id, following = following, following + 1
                taken.add(image_id)
                categories = np.array([ids[one] for one in sample.category_ids.tolist()], np.int64)
                yield replace(sample, image_id=image_id, category_ids=categories)
            if number + 1 < len(self._parts):
                seen |= own

    def _complain(self, where: str, found: str) -> None:
        if self._on_error == "stop":
            remedy = (
                "label in one what it lacks (`qskd label --onto`), or `--on-error skip`, which leaves the later one out"
            )
            raise QskdError(where, found, "each picture once, with all its objects", remedy)
        self._problems.append({"where": where, "found": found, "dropped": "the later one, and its objects"})


def _chosen_from(shards: str, source: str) -> ShardReader:
    """What a selection is of; it has the path as `qskd select` was given it."""
    try:
        return ShardReader(shards)
    except QskdError as error:
        if "://" in shards or os.path.isabs(shards):
            raise
        remedy = f"run this where {shards} is that folder, as it was for `qskd select`; or choose again"
        raise QskdError(source, f"chosen from {shards}; {error.where}: {error.found}", error.expected, remedy) from None


class _Part:
    """One source."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._rows: set[tuple[int, int]] | None = None
        if not is_gathered(Path(source)) and "://" not in source:
            raise QskdError(source, "neither shards nor a selection of some", _EXPECTED, "prepare it first")
        if Path(source).is_file():
            selection = load_selection(source)
            self.reader = _chosen_from(selection.shards, source)
            manifest = self.reader.manifest
            if manifest.fingerprint != selection.fingerprint:
                said = f"chosen from {selection.shards}, whose fingerprint is another now"
                raise QskdError(source, said, "the shards that it was chosen from", "choose again: `qskd select`")
            check_fits(source, selection, manifest)
            self._rows = {(image.shard, image.row) for image in selection.images}
            self.fingerprint = selection.own_fingerprint
        else:
            self.reader = ShardReader(source)
            manifest = self.reader.manifest
            self.fingerprint = manifest.fingerprint
        check_labelled(source, manifest)

    def __len__(self) -> int:
        return self.reader.manifest.num_images if self._rows is None else len(self._rows)

    @property
    def largest_id(self) -> int:
        ids: list[NDArray[np.int64]] = [self.reader.dimensions(n)[0] for n in range(len(self.reader.manifest.shards))]
        return max((int(part.max()) for part in ids if len(part)), default=0)

    def samples(self, columns: Sequence[str]) -> Iterator[Sample]:
        for shard, count in enumerate(self.reader.manifest.shard_rows):
            rows = [row for row in range(count) if self._rows is None or (shard, row) in self._rows]
            for _, together in groupby(rows, lambda row, shard=shard: self.reader.group_rows(shard, row)):  # type: ignore[misc]
                yield from self.reader.read(shard, list(together), columns)
