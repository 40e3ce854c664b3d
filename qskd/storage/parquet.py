"""Parquet files that a manifest describes, read with care."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qskd.errors import QskdError
from qskd.redaction import redacted
from qskd.storage.places import open_folder
from qskd.storage.spool import RowGroupSpool
from qskd.storage.stores import is_local, join, patiently


class ParquetFiles:
    """The Parquet files of a folder, each compared with what its manifest says of it when first opened.

    expected: (name, rows, bytes) of file number i. schema: the columns that each file must have, and their types; what is
    read of them holds no nulls. metadata: what each file must say of itself. check: of each table read, raises ValueError. spool:
    where row groups are kept for all processes of this machine. A damaged or missing file, or one of another set, is a QskdError
    that names it.
    """

    _MOST_OPEN = 32

    def __init__(
        self,
        uri: str,
        expected: Callable[[int], tuple[str, int, int]],
        schema: pa.Schema,
        remedy: str,
        metadata: Mapping[bytes, bytes] | None = None,
        check: Callable[[pa.Table], None] = lambda table: None,
        spool: RowGroupSpool | None = None,
    ) -> None:
        self.rows_read = 0  # of those asked of `read_rows`: that were not in the spool
        self._spool = spool
        self.uri, self._expected, self._schema, self._remedy = uri, expected, schema, remedy
        self._metadata, self._check = dict(metadata or {}), check
        self._filesystem, self._root = open_folder(uri)
        self._open: dict[int, pq.ParquetFile] = {}
        self._starts: dict[int, NDArray[np.int64]] = {}  # of open files

    def where(self, number: int) -> str:
        """The file's full name, for messages."""
        return redacted(join(self.uri, self._expected(number)[0]))

    def group_rows(self, number: int, row: int) -> range:
        """The rows stored together with `row`: reading one of them costs as much as reading all."""
        starts = self.group_starts(number)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return range(int(starts[group]), int(starts[group + 1]))

    def group_starts(self, number: int) -> NDArray[np.int64]:
        """The first row of each row group, and the number of rows: int64 [groups + 1]."""
        if number not in self._starts:  # each row that is asked for asks; a cache's file has hundreds of groups
            metadata = self.file(number).metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._starts[number] = np.cumsum([0, *sizes], dtype=np.int64)
        return self._starts[number]

    def read_rows(self, number: int, rows: Sequence[int], columns: Sequence[str]) -> tuple[pa.Table, list[int]]:
        """These columns of the row groups that hold `rows`, and where in the table each row is."""
        _, count, _ = self._expected(number)
        if any(not 0 <= row < count for row in rows):
            found, wanted = f"no row {max(rows, key=abs)}", f"rows 0 to {count - 1}"
            raise QskdError(self.where(number), found, wanted, self._remedy)
        starts = self.group_starts(number)
        groups = np.unique(np.searchsorted(starts, rows, side="right") - 1)
        table = self._groups(number, columns, groups.tolist(), starts, rows)
        held = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
        return table, np.searchsorted(held, rows).tolist()

    def _groups(
        self, number: int, columns: Sequence[str], groups: list[int], starts: NDArray[np.int64], rows: Sequence[int]
    ) -> pa.Table:
        # A group of one row is read once anyway.
        if self._spool is None or int(np.diff(starts).max()) == 1:
            self.rows_read += len(rows)
            return self.read_table(number, columns, groups)
        tables, content = [], f"{self.uri} {self._expected(number)} {self._metadata}"
        for group in groups:
            read = partial(self.read_table, number, columns, [group])
            table, read_now = self._spool.table(content, group, columns, read)
            if read_now:
                self.rows_read += int(
                    np.sum((starts[group] <= np.asarray(rows)) & (np.asarray(rows) < starts[group + 1]))
                )
            tables.append(table)
        return pa.concat_tables(tables)

    def read_table(self, number: int, columns: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
        """These columns of some row groups, or of the whole file, as Arrow."""

        def read() -> pa.Table:
            try:
                file = self.file(number)
                wanted = range(file.metadata.num_row_groups) if groups is None else groups
                table = file.read_row_groups(list(wanted), columns=list(columns))
            except OSError:
                self._open.pop(number, None)  # its buffers may hold the failure
                raise
            self._check_values(number, table)
            return table

        with self._damage_named(number):
            return patiently(self.where(number), self._filesystem, read)

    def file(self, number: int) -> pq.ParquetFile:
        opened = self._open.pop(number, None)
        if opened is None:
            opened = self._check_and_open(number)
            self._starts.pop(number, None)
            if len(self._open) >= self._MOST_OPEN:
                oldest = next(iter(self._open))
                self._starts.pop(oldest, None)
                self._open.pop(oldest).close()
        self._open[number] = opened  # last = most recently used
        return opened

    def _check_and_open(self, number: int) -> pq.ParquetFile:
        name, rows, size = self._expected(number)
        expected = f"{size} bytes, {rows} rows, as the manifest says"
        with self._damage_named(number):
            path = f"{self._root}/{name}"
            info = patiently(self.where(number), self._filesystem, lambda: self._filesystem.get_file_info(path))
            if info.type != pafs.FileType.File:
                raise QskdError(self.where(number), "no such file", expected, self._remedy)
            if info.size != size:
                raise QskdError(self.where(number), f"{info.size} bytes", expected, self._remedy)
            opened = patiently(self.where(number), self._filesystem, lambda: self._opened(path))
            self._check_schema(number, opened.schema_arrow)
            in_groups = sum(opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups))
            if not opened.metadata.num_rows == in_groups == rows:
                found = f"{opened.metadata.num_rows} rows, {in_groups} in its row groups"
                raise QskdError(self.where(number), found, expected, self._remedy)
            said = opened.metadata.metadata or {}
            for key, value in self._metadata.items():
                if said.get(key) != value:
                    theirs = said.get(key, b"nothing").decode(errors="replace")
                    raise QskdError(self.where(number), f"{key.decode()} {theirs}", value.decode(), self._remedy)
        return opened

    def _check_schema(self, number: int, found: pa.Schema) -> None:
        for field in self._schema:
            types = [column.type for column in found if column.name == field.name]
            if types != [field.type]:
                said = " and ".join(map(str, types)) or f"missing; there are {', '.join(found.names)}"
                raise QskdError(self.where(number), f"column {field.name} is {said}", f"{field.type}", self._remedy)

    def _check_values(self, number: int, table: pa.Table) -> None:
        """No nulls, and text that is text. Arrow counts nulls as it reads: asking costs next to nothing."""
        for name in table.column_names:
            nulls = sum(_nulls(chunk) for chunk in table.column(name).chunks)
            if nulls:
                where, found = self.where(number), f"column {name} has {nulls} null(s)"
                raise QskdError(where, found, "a value in every row", self._remedy)
            if pa.types.is_string(table.schema.field(name).type):
                table.column(name).validate(full=True)  # else bytes that are no UTF-8 fail where they are used
        self._check(table)

    def _opened(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(
            self._filesystem.open_input_file(path),
            page_checksum_verification=True,
            pre_buffer=not is_local(self._filesystem),  # a remote store: few large requests
        )

    @contextmanager
    def _damage_named(self, number: int) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
            problem = f"can't be read: {error}"
            raise QskdError(self.where(number), problem, "a whole Parquet file", self._remedy) from None


def _nulls(array: pa.Array) -> int:
    """In the array and, where it holds lists, in them."""
    inner = pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type)
    return int(array.null_count) + (_nulls(array.flatten()) if inner else 0)
