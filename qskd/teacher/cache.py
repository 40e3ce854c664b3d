"""The cache of teacher outputs: rows of arrays <-> Parquet files, one file for each image shard and view.

A row is what a teacher said of one view of one image, and stands at the same place in its file as the image does in its
shard. Arrays are stored as raw bytes: sizes that are the same everywhere are in the manifest, the memory's own in the row.
Free of torch, so that the processes that read it start fast; `qskd.teacher.columns.table` makes rows of tensors and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qskd.datasets.manifest import MANIFEST
from qskd.errors import QskdError, writing
from qskd.storage.files import UNFINISHED, make_folder, publish
from qskd.storage.parquet import ParquetFiles
from qskd.storage.places import open_folder
from qskd.storage.scratch import locked_folder, scratch_folder
from qskd.storage.spool import RowGroupSpool
from qskd.storage.stores import is_local, join, patiently
from qskd.teacher.columns.attended import ATTENDED, CELLS, packed
from qskd.teacher.columns.table import (
    ALWAYS,
    COMPRESSION,
    PRECISIONS,
    TeacherRow,
    collate,
    mirrored,
    row_from,
    schema_of,
    stored,
)
from qskd.teacher.manifest import FILE_REMEDY, REMEDY, file_name, load_cache_manifest

ROW_GROUP_BYTES = 256 * 1024  # rows are asked for in random order: what is read with a row should be little
FINGERPRINT_KEY = b"qskd.fingerprint"
SPOOL = "spool"  # a file that is not yet whole, in a locked folder of its own


def write_rows(
    uri: str,
    name: str,
    rows: Iterable[TeacherRow],
    fingerprint: str,
    optional: Sequence[str] = (),
    attended_of: Sequence[int] = (),
) -> tuple[int, int]:
    """Write one file of a cache; it appears whole or not at all. Returns its (rows, bytes). optional: columns kept besides.
    attended_of: the widths of the memory maps, where they are kept in attended cells alone.

    The same rows give the same bytes.
    """
    filesystem, root = open_folder(uri)
    with writing(uri):
        make_folder(filesystem, root, uri)
    count = 0
    names = stored(optional)
    schema = schema_of(names).with_metadata({FINGERPRINT_KEY: fingerprint.encode()})
    # Locked: another job's end deletes what killed ones left unfinished.
    with locked_folder(UNFINISHED, root) if is_local(filesystem) else scratch_folder("rows") as folder:
        spool = folder / SPOOL
        with pq.ParquetWriter(
            spool,
            schema,
            compression={name: COMPRESSION[name] for name in schema.names},
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        ) as writer:
            for group in _groups(packed(row, attended_of) for row in rows) if attended_of else _groups(rows):
                columns: dict[str, Any] = {"image_id": [row.image_id for row in group]}
                columns |= {
                    field: [np.ascontiguousarray(getattr(row, field)).tobytes() for row in group] for field in names
                }
                writer.write_table(pa.table(columns, schema=schema), row_group_size=len(group))
                count += len(group)
        size = spool.stat().st_size
        publish(spool, filesystem, f"{root}/{name}")
    return count, size


def _groups(rows: Iterable[TeacherRow]) -> Iterator[list[TeacherRow]]:
    group: list[TeacherRow] = []
    held = 0
    for row in rows:
        if group and held + row.nbytes > ROW_GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(row)
        held += row.nbytes
    if group:
        yield group


def finished_file(uri: str, name: str, rows: int, fingerprint: str) -> int | None:
    """The bytes of a cache's file that is there and whole, with so many rows and this fingerprint; otherwise None.

    A store that fails is an error: all would be computed again if its silence were taken for absence.
    """
    filesystem, root = open_folder(uri)
    path, where = f"{root}/{name}", join(uri, name)
    info = patiently(where, filesystem, lambda: filesystem.get_file_info(path))
    if info.type != pafs.FileType.File or (metadata := _footer(uri, name)) is None:
        return None
    known = metadata.metadata or {}
    whole = _bytes_told(metadata) == info.size and metadata.num_rows == rows
    return int(info.size) if whole and known.get(FINGERPRINT_KEY) == fingerprint.encode() else None


def _bytes_told(metadata: pq.FileMetaData) -> int:
    """How long a file of `write_rows` is by its own footer, which is there and readable too where bytes in its middle are not:
    the columns' data, the footer, its length, and the format's four letters."""
    columns = (
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    )
    ends = (each.data_page_offset + each.total_compressed_size for each in columns)
    return max(ends, default=4) + int(metadata.serialized_size) + 8


def carries_fingerprint(uri: str, name: str) -> bool:
    """Whether a file is of a cache, of whichever: only `write_rows` writes this into a Parquet file's footer."""
    metadata = _footer(uri, name)
    return metadata is not None and FINGERPRINT_KEY in (metadata.metadata or {})


def _footer(uri: str, name: str) -> pq.FileMetaData | None:
    """None of a file that is no whole Parquet file."""
    filesystem, root = open_folder(uri)

    def footer() -> pq.FileMetaData:
        with filesystem.open_input_file(f"{root}/{name}") as stream:
            return pq.read_metadata(stream)

    try:
        return patiently(join(uri, name), filesystem, footer)
    except (pa.ArrowException, OSError):
        return None


class TeacherCacheReader:
    """Reads rows by (shard, view, row), and of each row only the columns asked for; the others are empty arrays."""

    remedy = FILE_REMEDY

    def __init__(
        self, uri: str, columns: Sequence[str] = ("image_id", *ALWAYS), spool: RowGroupSpool | None = None
    ) -> None:
        manifest = load_cache_manifest(uri)
        if manifest is None:
            raise QskdError(
                uri, "no cache of teacher outputs", "a folder that `qskd cache` made", "run `qskd cache RECIPE`"
            )
        self.uri, self.manifest, self.columns = uri, manifest, tuple(columns)
        self._precision = str(manifest.identity.get("teacher.cache.precision"))
        if self._precision not in PRECISIONS:
            raise QskdError(
                join(uri, MANIFEST), f"precision {self._precision}", f"one of {', '.join(PRECISIONS)}", REMEDY
            )
        self.attended = manifest.identity.get(CELLS) == ATTENDED
        fixed = {FINGERPRINT_KEY: manifest.fingerprint.encode()}
        expected = schema_of(tuple(dict.fromkeys((*ALWAYS, *self.columns[1:]))))
        self._files = ParquetFiles(uri, self._expected, expected, FILE_REMEDY, fixed, spool=spool)

    def _number(self, shard: int, view: int) -> int:
        if view not in self.manifest.views:
            raise QskdError(
                self.uri, f"no view {view}", f"one of {sorted(self.manifest.views)}", "run `qskd cache RECIPE`"
            )
        return view * len(self.manifest.shards) + shard

    def _expected(self, number: int) -> tuple[str, int, int]:
        view, shard = divmod(number, len(self.manifest.shards))
        return file_name(self.manifest.shards[shard], view), *self.manifest.views[view][shard]

    def where(self, shard: int, view: int) -> str:
        """The file's full name, for messages."""
        return self._files.where(self._number(shard, view))

    @property
    def rows_read(self) -> int:
        """Of all rows asked of `read`: those that no process of this machine had read."""
        return self._files.rows_read

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return self.manifest.num_bytes

    def mirrored(self, row: TeacherRow) -> TeacherRow:
        """The row of the same view mirrored left and right, in the columns that this reader reads."""
        return mirrored(row, self.manifest.sizes, self.columns)

    def collate(self, rows: Sequence[TeacherRow]) -> dict[str, NDArray[Any]]:
        """Rows -> one batch, with the columns that this reader reads."""
        return collate(rows, self.manifest.sizes, self.columns)

    def group_rows(self, shard: int, view: int, row: int) -> range:
        """The rows stored together with `row`."""
        return self._files.group_rows(self._number(shard, view), row)

    def read(self, shard: int, view: int, rows: Sequence[int]) -> list[TeacherRow]:
        """These rows, in their order; QskdError if the file is damaged or another cache's."""
        if not len(rows):
            return []
        number = self._number(shard, view)
        table, places = self._files.read_rows(number, rows, self.columns)
        columns = {name: table.column(name).combine_chunks() for name in self.columns}
        ids = columns.pop("image_id").to_numpy()
        try:
            return [
                row_from(
                    int(ids[place]),
                    {name: column[place].as_buffer() for name, column in columns.items()},
                    self.manifest.sizes,
                    self._precision,
                    self.attended,
                )
                for place in places
            ]
        except ValueError as error:  # a buffer that can't have the shape it should
            raise QskdError(
                self._files.where(number), f"a damaged row: {error}", "arrays of the manifest's sizes", FILE_REMEDY
            ) from None
