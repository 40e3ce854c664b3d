"""Labelled shards and shards without labels as one training set: shards are numbered through all folders, the labelled first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qskd.config import DataConfig
from qskd.datasets.manifest import Manifest, check_labelled, load_manifest
from qskd.datasets.samples import Sample
from qskd.datasets.shards import ShardReader
from qskd.errors import QskdError
from qskd.storage.spool import RowGroupSpool


class JoinedShards:
    """Reads as `ShardReader` does. manifest: the first folder's, with the shards of all."""

    def __init__(self, uris: Sequence[str], spool: RowGroupSpool | None = None) -> None:
        self.readers = [ShardReader(uri, spool) for uri in uris]
        manifests = [reader.manifest for reader in self.readers]
        shards = tuple(shard for manifest in manifests for shard in manifest.shards)
        images = sum(manifest.num_images for manifest in manifests)
        self.manifest = replace(manifests[0], shards=shards, num_images=images)
        self._starts = np.cumsum([0, *(len(manifest.shards) for manifest in manifests)]).tolist()

    def _at(self, shard: int) -> tuple[ShardReader, int]:
        folder = int(np.searchsorted(self._starts, shard, side="right")) - 1
        return self.readers[folder], shard - self._starts[folder]

    @property
    def rows_read(self) -> int:
        return sum(reader.rows_read for reader in self.readers)

    def where(self, shard: int) -> str:
        reader, own = self._at(shard)
        return reader.where(own)

    def group_rows(self, shard: int, row: int) -> range:
        reader, own = self._at(shard)
        return reader.group_rows(own, row)

    def read(self, shard: int, rows: Sequence[int], columns: Sequence[str] | None = None) -> list[Sample]:
        reader, own = self._at(shard)
        return reader.read(own, rows, columns)

    def dimensions(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        reader, own = self._at(shard)
        return reader.dimensions(own)

    def read_table(self, shard: int, columns: Sequence[str], groups: Any = None) -> pa.Table:
        reader, own = self._at(shard)
        return reader.read_table(own, columns, groups)


def training_manifest(data: DataConfig) -> Manifest:
    """Of the labelled training images. Where there are none, of no images, with the classes of data.val: those that are found in
    an evaluation are those that are trained."""
    if data.train:
        manifest = load_manifest(data.train)
        check_labelled(data.train, manifest)
        return manifest
    val = load_manifest(data.val)
    check_labelled(data.val, val)
    nothing: dict[str, Any] = {"num_images": 0, "num_objects": 0, "num_crowds": 0, "shards": (), "problems": ()}
    nothing |= {"most_objects": None, "most_objects_in": None, "findings": (), "pictures": "", "picture_counts": None}
    return replace(val, **nothing)


def source_manifest(data: DataConfig) -> Manifest:
    """Of one folder, `data.train`, as the teacher is asked about it. Without labels it has the classes of data.val, which
    `qskd.teacher.identity.cache_sources` sets."""
    manifest = load_manifest(data.train)
    return manifest if manifest.labelled else replace(manifest, categories=load_manifest(data.val).categories)


def unlabeled_manifests(data: DataConfig) -> list[Manifest]:
    """Of each folder of `data.unlabeled`. QskdError for one whose images are labelled, or that is named twice."""
    found: dict[str, str] = {}
    manifests = []
    for uri in data.unlabeled:
        manifest = load_manifest(uri)
        if manifest.labelled:
            remedy = "name it in data.train; or prepare its pictures with `qskd prepare --unlabeled`"
            raise QskdError(
                f"data.unlabeled: {uri}", "labelled images, whose labels would be lost", "images without labels", remedy
            )
        if manifest.fingerprint in found:
            said = f"the same shards as {found[manifest.fingerprint]}"
            raise QskdError(f"data.unlabeled: {uri}", said, "each folder once", "take one out")
        found[manifest.fingerprint] = uri
        manifests.append(manifest)
    return manifests
