"""Files in folders on any file system: opening a folder by URI, making a file appear whole, reading Parquet with care.

Folders may be local paths, URIs of pyarrow's file systems or, failing those, of fsspec's.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qskd.errors import QskdError, writing
from qskd.redaction import STORE_REMEDY, redacted, redacted_uri, secret_in
from qskd.storage import durable
from qskd.storage.models import local_model, model_place
from qskd.storage.scratch import scratch_folder
from qskd.storage.stores import is_local, join, patiently

__all__ = [
    "UNFINISHED",
    "ParquetFiles",
    "fetched",
    "is_local",
    "join",
    "open_folder",
    "publish",
    "publish_bytes",
    "read_bytes",
]
__all__ += ["remove", "sha256_of"]
UNFINISHED = ".writing-"  # what a name begins with until its file is whole
# Where a file appears only when its writer closes it: no name of its own is needed until then. A rename, which these stores
# do not have, would be a copy.
_APPEAR_WHOLE = ("s3", "gcs", "abfs")


_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_LONGEST_PATH = 4096  # bytes: Linux opens no longer one


def local_name(path: str) -> str:
    """The path as it is; QskdError for what would make a folder called `s3:`, or is too long for any file system."""
    if _ONE_SLASH.match(path):
        raise QskdError(redacted_uri(path), "neither a path nor a URI", "SCHEME://..., or a path", "write it with ://")
    if len(path.encode(errors="replace")) > _LONGEST_PATH:
        raise QskdError(
            f"{path[:60]}...", f"a path of {len(path)} characters", f"at most {_LONGEST_PATH}", "shorten it"
        )
    return path


def check_uri(uri: str) -> None:
    """QskdError where a URI has a secret in it; no store is asked."""
    if secret := secret_in(uri):
        found = f"{secret}, which recipes, MLflow and logs would all keep"
        raise QskdError(redacted_uri(uri), found, "a URI without", STORE_REMEDY)


@lru_cache(maxsize=64)
def open_folder(uri: str) -> tuple[pafs.FileSystem, str]:
    """Local path, or a URI of pyarrow's or else fsspec's -> (filesystem, path in it)."""
    if "\0" in uri or any("\ud800" <= letter <= "\udfff" for letter in uri):
        raise QskdError(uri, "a path with a NUL character, or one that is not UTF-8", "a path in UTF-8", "rename it")
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(local_name(uri)))
    check_uri(uri)
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        if uri.startswith(("s3://", "gs://", "abfs://")):  # a scheme that pyarrow knows: what is wrong is the rest
            raise QskdError(uri, f"can't be opened: {error}", "a URI of pyarrow's", "correct it") from None
    except OSError as error:
        raise QskdError(uri, f"can't be reached: {error}", "a reachable store", "check address and access") from None
    try:
        import fsspec  # type: ignore[import-untyped]

        filesystem, path = fsspec.core.url_to_fs(uri)
    except Exception as error:  # each of fsspec's file systems has exceptions of its own
        remedy = "check the scheme, or install the fsspec package that serves it"
        raise QskdError(uri, f"can't be opened: {error}", "a path or a file system URI", remedy) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def publish(spool: Path, filesystem: pafs.FileSystem, path: str) -> None:
    """Make the local file appear at `path`, whole, also after a power cut. On a local file system `spool` must be in the same
    one: a rename does not cross file systems."""
    if is_local(filesystem):
        with writing(path):
            durable.replace(spool, path)
        return
    size = spool.stat().st_size
    patiently(path, filesystem, lambda: _send(lambda: spool.open("rb"), size, filesystem, path))
    spool.unlink()


def publish_bytes(content: bytes, filesystem: pafs.FileSystem, path: str) -> None:
    """Make a small file appear at `path`, whole, in place of the one before, also after a power cut. Its folder is made if it
    isn't there."""
    folder = path.rpartition("/")[0]
    if is_local(filesystem):
        with writing(path):
            durable.make_folder(folder)
            spool = Path(folder, f"{UNFINISHED}{uuid.uuid4().hex}")
            try:
                spool.write_bytes(content)
                durable.replace(spool, path)
            finally:
                spool.unlink(missing_ok=True)
        return
    patiently(path, filesystem, lambda: filesystem.create_dir(folder, recursive=True))
    patiently(path, filesystem, lambda: _send(lambda: io.BytesIO(content), len(content), filesystem, path))


def _send(opened: Callable[[], BinaryIO], size: int, filesystem: pafs.FileSystem, path: str) -> None:
    folder, _, name = path.rpartition("/")
    target = path if filesystem.type_name in _APPEAR_WHOLE else f"{folder}/{UNFINISHED}{name}"
    with opened() as source, filesystem.open_output_stream(target) as sink:
        shutil.copyfileobj(source, sink, 1 << 22)
    # pyarrow closes a stream, and with that finishes an upload, even when writing to it failed half-way.
    arrived = filesystem.get_file_info(target).size
    if arrived != size:
        filesystem.delete_file(target)
        raise OSError(f"{arrived} of {size} bytes arrived")
    if target != path:
        filesystem.move(target, path)


def read_bytes(filesystem: pafs.FileSystem, path: str, where: str = "", most: int | None = None) -> bytes:
    """A small file's content, of which no more than `most` bytes are read; OSError when there is none."""

    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read(most))

    return patiently(where or path, filesystem, read)


def remove(filesystem: pafs.FileSystem, root: str, names: set[str]) -> None:
    """Delete these files of a folder; one that is gone already does no harm, nor one left over that no manifest names."""
    for name in names:
        try:
            filesystem.delete_file(f"{root}/{name}")
        except OSError:
            continue


def sha256_of(stream: Any) -> str:
    """Of a file opened for reading, which is closed."""
    digest = hashlib.sha256()
    with stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def fetched(uri: str) -> Iterator[str]:
    """A local copy of a model's folder, for what reads only local ones, until the block ends; of a run's folder its student's.
    A local folder is not copied, and a Hub name is given back as it is."""
    if "://" not in uri:
        yield os.path.expanduser(local_model(uri))
        return
    filesystem, root = open_folder(uri)
    with scratch_folder("fetched") as local:
        try:
            place = model_place(filesystem, root, uri)
            patiently(uri, filesystem, lambda: pafs.copy_files(place, local, source_filesystem=filesystem))
        except (OSError, pa.ArrowException) as error:
            raise QskdError(redacted(uri), f"can't be read: {error}", "a folder with files in it") from None
        try:
            yield str(local)
        except QskdError as error:  # it names the copy, which the user never saw
            words = (error.where, error.found, error.expected, error.remedy)
            raise QskdError(*(word.replace(str(local), redacted(uri)) for word in words)) from None


class ParquetFiles:
    """The Parquet files of a folder, each compared with what its manifest says of it when first opened.

    expected: (name, rows, bytes) of file number i. schema: the columns that each file must have, and their types; what is
    read of them holds no nulls. metadata: what each file must say of itself. check: of each table read, raises ValueError. A
    damaged or missing file, or one of another set, is a QskdError that names it.
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
    ) -> None:
        self.uri, self._expected, self._schema, self._remedy = uri, expected, schema, remedy
        self._metadata, self._check = dict(metadata or {}), check
        self._filesystem, self._root = open_folder(uri)
        self._open: dict[int, pq.ParquetFile] = {}

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
        metadata = self.file(number).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return np.cumsum([0, *sizes], dtype=np.int64)

    def read_rows(self, number: int, rows: Sequence[int], columns: Sequence[str]) -> tuple[pa.Table, list[int]]:
        """These columns of the row groups that hold `rows`, and where in the table each row is."""
        _, count, _ = self._expected(number)
        if any(not 0 <= row < count for row in rows):
            found, wanted = f"no row {max(rows, key=abs)}", f"rows 0 to {count - 1}"
            raise QskdError(self.where(number), found, wanted, self._remedy)
        starts = self.group_starts(number)
        groups = np.unique(np.searchsorted(starts, rows, side="right") - 1)
        table = self.read_table(number, columns, groups.tolist())
        held = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
        return table, np.searchsorted(held, rows).tolist()

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
            if len(self._open) >= self._MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
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
