"""Parquet shards of samples.

One row per image; row groups are small so that a few rows can be read without the rest of the shard. A shard's name
carries the start of its checksum and the manifest is written last, so a manifest never speaks of a half-written shard
and the dataset it replaces stays whole until the new one is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from qskd.datasets.findings.finding import Finding, refuse
from qskd.datasets.findings.splits import packed_pictures
from qskd.datasets.findings.survey import Survey
from qskd.datasets.manifest import FORMAT, MANIFEST, REMEDY, Manifest, Shard, check_labelled, load_manifest
from qskd.datasets.packing import PartedSource, pack_by, pack_here, start_helpers
from qskd.datasets.pictures.facts import PictureCounter, look
from qskd.datasets.samples import (
    ARRAYS,
    SCHEMA,
    Category,
    Problem,
    Sample,
    check_lengths,
    first_problems,
    flat_column,
    kept_problems,
    to_samples,
)
from qskd.errors import QskdError, writing
from qskd.printable import one_line
from qskd.storage.files import UNFINISHED, make_folder, publish, read_bytes, remove, sha256_of
from qskd.storage.ownership import head_says
from qskd.storage.parquet import ParquetFiles
from qskd.storage.places import check_not_read, open_folder
from qskd.storage.scratch import locked_folder, remove_orphan, scratch_folder
from qskd.storage.spool import RowGroupSpool
from qskd.storage.stores import is_local, join, patiently

__all__ = ["MANIFEST", "Manifest", "SampleSource", "Shard", "ShardReader", "load_manifest"]
__all__ += ["findings_of", "outlined", "read_annotations", "verify", "write_shards"]


ROWS_PER_GROUP = 64


class SampleSource(Protocol):
    """What can be written as shards; `CocoDataset` is one. `problems` is read after `samples()` is exhausted.

    A source may also have `findings` (read then too): what looks wrong in it and samples can't show, see
    `qskd.datasets.findings`; `listed_objects`: how many annotations it lists, broken ones included; and `outline()`: its samples
    without pictures (`encoded` empty), from which most of what looks wrong is told before any picture is read. `labelled`: False
    where nobody has said what is in the images; it then has no categories. `read_shards`: shard folders that it reads, apart from
    which its own must be written.
    """

    source: str
    source_sha256: str
    categories: tuple[Category, ...]

    @property
    def problems(self) -> list[Problem]: ...
    def __len__(self) -> int: ...
    def samples(self) -> Iterator[Sample]: ...


def write_shards(
    dataset: SampleSource,
    destination: str,
    rows_per_shard: int = 512,
    rows_per_group: int = ROWS_PER_GROUP,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    strict: bool = False,
    accept: Sequence[str] = (),
    processes: int = 1,
) -> Manifest:
    """Write the samples as shards, then the manifest; returns it. processes: how many may work at this, where the source and its
    size allow it; the shards are the same. strict: QskdError when something looks wrong (see
    `qskd.datasets.findings`) that `accept` does not name; no manifest is then written.

    progress: called with (images looked at, images the source lists). Raises QskdError when `destination` is, contains or lies in
    shards that the source reads, holds shards of another source and `overwrite` is False, or a manifest.json that qskd did not
    write; shards of the same source are made again. Only shards that the old manifest names are deleted. Whatever fails on the
    way, what was there before stays whole.
    """
    destination = str(destination)
    filesystem, root = open_folder(destination)
    old_files = replaceable(dataset, destination, overwrite)
    if strict:
        refuse(outlined(dataset), dataset.source, accept)
    with writing(destination):
        make_folder(filesystem, root, destination)
    shards: list[Shard] = []
    fresh: set[str] = set()  # what was not there before: a failure deletes these alone
    survey = Survey()
    counter = PictureCounter()

    def grown() -> None:
        if progress:
            progress(survey.images, len(dataset))

    # Inside the destination when that is local: a rename does not cross file systems.
    with (
        writing(destination),
        _unfinished(filesystem, root) as folder,
        start_helpers(dataset, len(dataset), processes) or contextlib.nullcontext() as helpers,
    ):
        sizes = rows_per_shard, rows_per_group
        if helpers is None:
            packs = pack_here(survey.counted(counter.counted(dataset.samples())), folder, *sizes, grown)
        else:
            packs = pack_by(helpers, cast(PartedSource, dataset), folder, *sizes, (survey, counter), grown)
        try:
            for packed in packs:
                name = f"shard-{len(shards):05d}-{packed.sha256[:8]}.parquet"
                shards.append(Shard(name, packed.rows, packed.bytes, packed.sha256))
                if _absent(filesystem, destination, f"{root}/{name}"):
                    fresh.add(name)
                publish(packed.path, filesystem, f"{root}/{name}")
            _check_left(dataset, survey, destination)
            findings = findings_of(dataset, survey)
            if strict:
                refuse(findings, dataset.source, accept)
            manifest = Manifest(
                dataset.categories,
                survey.images,
                survey.objects,
                survey.crowds,
                tuple(shards),
                dataset.source,
                dataset.source_sha256,
                kept_problems(dataset.problems),
                survey.most_objects,
                survey.most_objects_in,
                findings,
                packed_pictures(*survey.hashes()),
                counter.counts,
                is_labelled(dataset),
            )
            spool = folder / "manifest"
            spool.write_text(manifest.to_json())
            publish(spool, filesystem, f"{root}/{MANIFEST}")
        except BaseException:
            remove(filesystem, root, fresh)
            raise
    remove(filesystem, root, old_files - {shard.file for shard in shards})
    return manifest


def _unfinished(filesystem: pafs.FileSystem, root: str) -> contextlib.AbstractContextManager[Path]:
    """A folder for what is not yet whole; what a `prepare` that was killed left of its own goes."""
    if not is_local(filesystem):
        return scratch_folder("shards")
    for left in Path(root).glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # no folder, or gone meanwhile
            names = [name for name in os.listdir(left) if re.fullmatch(r"shard(-\d+)?|manifest", name)]
            remove_orphan(left, UNFINISHED, names)
    return locked_folder(UNFINISHED, root)


def is_labelled(dataset: SampleSource) -> bool:
    """Whether somebody has said what is in its images."""
    return bool(getattr(dataset, "labelled", True))


def findings_of(dataset: SampleSource, survey: Survey) -> tuple[Finding, ...]:
    """What looks wrong: to the source itself, and in its samples, all of which the survey has seen."""
    return (*getattr(dataset, "findings", ()), *survey.findings(dataset.categories, is_labelled(dataset)))


def outlined(dataset: SampleSource) -> tuple[Finding, ...]:
    """What looks wrong as far as can be told without pictures: nothing yet, where the source has no `outline`. QskdError where
    nothing is left to write."""
    if not hasattr(dataset, "outline"):
        return ()
    survey = Survey()
    for sample in dataset.outline():
        survey.add(sample)
    _check_left(dataset, survey, dataset.source)
    return findings_of(dataset, survey)


def _check_left(dataset: SampleSource, survey: Survey, destination: str) -> None:
    """QskdError where all images were left out, or all annotations, with the first reasons: no manifest will tell them."""
    listed: int = getattr(dataset, "listed_objects", 0)
    if not survey.images:
        what = "usable image"
    elif listed and not survey.objects + survey.crowds and dataset.problems:
        what = f"usable annotation: all {listed} were left out"
    else:
        return
    problems = dataset.problems
    first = first_problems(problems)
    remedy = "correct these; what is skipped must not be everything" if problems else "give a list with images"
    raise QskdError(destination, f"{dataset.source} has no {what}{first}", "at least one", remedy)


def _absent(filesystem: pafs.FileSystem, uri: str, path: str) -> bool:
    info = patiently(uri, filesystem, lambda: filesystem.get_file_info(path))
    if info.type == pafs.FileType.NotFound and is_local(filesystem) and os.path.islink(path):
        raise QskdError(path, "a link to nothing", "a folder without it", "remove the link, or mount what it leads to")
    return bool(info.type == pafs.FileType.NotFound)


def replaceable(dataset: SampleSource, destination: str, overwrite: bool) -> set[str]:
    """The shard files of the dataset already there, if any; QskdError where `write_shards` would write nothing. Whatever an edited
    manifest names: only what is called as `write_shards` calls a shard of that checksum."""
    filesystem, root = open_folder(destination)
    check_not_read(destination, getattr(dataset, "read_shards", ()))
    with writing(destination):
        if _absent(filesystem, destination, f"{root}/{MANIFEST}"):
            return set()
        try:
            manifest = load_manifest(destination)
        except QskdError:
            where = join(destination, MANIFEST)
            if overwrite and head_says(read_bytes(filesystem, f"{root}/{MANIFEST}", where), FORMAT):
                return set()
            raise
    theirs, ours = manifest.source_sha256, dataset.source_sha256
    if theirs != ours and not overwrite:
        found = f"already holds shards of {manifest.source} (sha256 {theirs[:12]}...)"
        expected = f"an empty folder, or shards of the same source (sha256 {ours[:12]}...)"
        remedy = "choose another folder, or pass `--overwrite`, which deletes those shards and their manifest.json, nothing else"
        raise QskdError(destination, found, expected, remedy)
    named = ((shard.file, shard.sha256[:8]) for shard in manifest.shards)
    return {file for file, checksum in named if re.fullmatch(rf"shard-\d{{5,}}-{re.escape(checksum)}\.parquet", file)}


class ShardReader:
    """Reads samples by (shard, row). Each shard is compared with the manifest when first opened."""

    def __init__(self, uri: str, spool: RowGroupSpool | None = None) -> None:
        self.uri = str(uri)
        self.manifest = load_manifest(self.uri)
        self._files = ParquetFiles(self.uri, self._expected, SCHEMA, REMEDY, check=check_lengths, spool=spool)

    def _expected(self, shard: int) -> tuple[str, int, int]:
        entry = self.manifest.shards[shard]
        return entry.file, entry.rows, entry.bytes

    @property
    def rows_read(self) -> int:
        """Of all rows asked of `read`: those that no process of this machine had read."""
        return self._files.rows_read

    def where(self, shard: int) -> str:
        """The shard file's full name, for messages."""
        return self._files.where(shard)

    def group_rows(self, shard: int, row: int) -> range:
        """The rows stored together with `row`: reading one of them costs as much as reading all."""
        return self._files.group_rows(shard, row)

    def read(self, shard: int, rows: Sequence[int], columns: Sequence[str] | None = None) -> list[Sample]:
        """The samples of these rows, in their order; QskdError if the shard is damaged. With `columns`, only those are
        read and other fields are empty (image_id -1, size 0): without "encoded" no image bytes are read."""
        names = list(SCHEMA.names if columns is None else columns)
        if unknown := set(names) - set(SCHEMA.names):
            raise QskdError(self.where(shard), f"no columns {sorted(unknown)}", f"some of {SCHEMA.names}")
        samples = to_samples(*self._files.read_rows(shard, rows, names)) if len(rows) else []
        if not self.manifest.labelled:
            samples = [replace(sample, labelled=False) for sample in samples]
        if self.manifest.picture_counts is None and "encoded" in names:
            for sample in samples:
                self._check_seen_alike(shard, sample)
        return samples

    def _check_seen_alike(self, shard: int, sample: Sample) -> None:
        """QskdError for a picture that qskd saw otherwise when these shards were written: its boxes may be another picture's."""
        picture = look(sample.encoded)
        if picture.turned or picture.deep:
            where = f"{self.where(shard)}: image {sample.image_id} ({one_line(sample.file_name)})"
            kind = "is turned by EXIF" if picture.turned else "has more than 8 bits a channel"
            found = f"the picture {kind}, and the shards are of an earlier qskd, which saw such pictures otherwise"
            raise QskdError(where, found, "shards of this qskd", "make them anew: the same `qskd prepare` command")

    def dimensions(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of all its rows: image ids [n] and (height, width) [n, 2] of the upright pictures. No image bytes are read."""
        table = self.read_table(shard, ["image_id", "width", "height"])
        ids, width, height = (table.column(name).to_numpy() for name in ("image_id", "width", "height"))
        return ids, np.stack([height, width], axis=1).astype(np.int64)

    def read_table(self, shard: int, columns: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
        """These columns of some row groups, or of the whole shard, as Arrow."""
        return self._files.read_table(shard, columns, groups)


def read_annotations(uri: str) -> dict[str, NDArray[Any]]:
    """The whole ground truth, without reading any image bytes.

    image_ids int64 [I], widths and heights int32 [I] (pixels); for each of O objects, crowds included: object_image_ids
    int64 [O], boxes_xyxy float32 [O, 4] (absolute pixels), category_ids int64 [O], area float32 [O], iscrowd bool [O].
    QskdError where nobody has labelled them.
    """
    reader = ShardReader(uri)
    check_labelled(uri, reader.manifest)
    parts: dict[str, list[NDArray[Any]]] = {}
    for shard in range(len(reader.manifest.shards)):
        table = reader.read_table(shard, [name for name in SCHEMA.names if name not in ("encoded", "file_name")])
        columns = {name: flat_column(table, name)[1] for name in ARRAYS}
        image_ids = table.column("image_id").to_numpy()
        columns |= {
            "image_ids": image_ids,
            "object_image_ids": np.repeat(image_ids, np.diff(flat_column(table, "area")[0])),
        }
        columns |= {"widths": table.column("width").to_numpy(), "heights": table.column("height").to_numpy()}
        for name, values in columns.items():
            parts.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _checksum(filesystem: pafs.FileSystem, path: str) -> str:
    return sha256_of(filesystem.open_input_stream(path))


def verify(uri: str) -> Manifest:
    """Recompute every shard's checksum; QskdError naming all that differ, else the manifest."""
    manifest = load_manifest(uri)
    filesystem, root = open_folder(str(uri))
    damaged = []
    for shard in manifest.shards:
        try:
            found = patiently(join(uri, shard.file), filesystem, partial(_checksum, filesystem, f"{root}/{shard.file}"))
        except OSError as error:
            found = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
        if found != shard.sha256:
            damaged.append(f"{shard.file} is {found}, expected {shard.sha256}")
    if damaged:
        raise QskdError(str(uri), "; ".join(damaged), f"the checksums in {MANIFEST}", REMEDY)
    return manifest
