"""The caches of several shard folders, read as one: shards are numbered through all of them, as the images' are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qskd.errors import QskdError
from qskd.storage.spool import RowGroupSpool
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import TeacherRow
from qskd.teacher.manifest import BASIS, REMEDY


class JoinedCaches:
    """Reads as `TeacherCacheReader` does. QskdError where two are not of the same sizes: one batch has rows of both."""

    remedy = TeacherCacheReader.remedy

    def __init__(self, uris: Sequence[str], columns: Sequence[str], spool: RowGroupSpool | None = None) -> None:
        self.readers = [TeacherCacheReader(uri, columns, spool) for uri in uris]
        first = self.readers[0]
        for reader in self.readers[1:]:
            if reader.manifest.sizes != first.manifest.sizes:
                raise QskdError(
                    reader.uri, str(reader.manifest.sizes), f"{first.manifest.sizes}, as {first.uri} has", REMEDY
                )
            if reader.manifest.identity.get(BASIS) != first.manifest.identity.get(BASIS):
                raise QskdError(reader.uri, "memory in another basis", f"that of {first.uri}", REMEDY)
        self._starts = np.cumsum([0, *(len(reader.manifest.shards) for reader in self.readers)]).tolist()

    def _at(self, shard: int) -> tuple[TeacherCacheReader, int]:
        folder = int(np.searchsorted(self._starts, shard, side="right")) - 1
        return self.readers[folder], shard - self._starts[folder]

    @property
    def rows_read(self) -> int:
        return sum(reader.rows_read for reader in self.readers)

    @property
    def num_bytes(self) -> int:
        return sum(reader.num_bytes for reader in self.readers)

    def where(self, shard: int, view: int) -> str:
        reader, own = self._at(shard)
        return reader.where(own, view)

    def group_rows(self, shard: int, view: int, row: int) -> range:
        reader, own = self._at(shard)
        return reader.group_rows(own, view, row)

    def read(self, shard: int, view: int, rows: Sequence[int]) -> list[TeacherRow]:
        reader, own = self._at(shard)
        return reader.read(own, view, rows)

    def mirrored(self, row: TeacherRow) -> TeacherRow:
        return self.readers[0].mirrored(row)

    def collate(self, rows: Sequence[TeacherRow]) -> dict[str, NDArray[Any]]:
        return self.readers[0].collate(rows)
