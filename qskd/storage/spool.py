"""Row groups of Parquet files, read from their store once for all processes of a machine.

Rows are asked for in random order, and a row group is the least that can be read: sixteen readers would each read nearly all of a
shuffling window. So the first that needs a group leaves it as an Arrow file in a folder of this machine, which all of them map
into memory. The oldest files go when there are too many bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from qskd.storage.recent import Recent
from qskd.storage.scratch import SharedFolder

_TIDY_EVERY = 16  # files written by this process


class RowGroupSpool:
    """The folder, as one process uses it; all that use it have the same name. limit_bytes: of its files, about; and of what this
    process holds of them, deleted ones too, whose room on the disk is free only when nobody maps them."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self._folder, self._limit, self._written = SharedFolder(name), limit_bytes, 0
        self._mapped = Recent(limit_bytes)

    def table(
        self, file: str, group: int, columns: Sequence[str], read: Callable[[], pa.Table]
    ) -> tuple[pa.Table, bool]:
        """These columns of a row group, and whether they had to be read. file: names its content, wherever it is stored."""
        words = "\0".join((file, str(group), *columns))
        key = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
        table = self._mapped.get((key,))
        read_now = False
        if table is None:
            path = self._folder.path / f"{key}.arrow"
            table = _mapped(path)
            if table is None:
                with _locked(path.with_suffix(".lock")):
                    table = _mapped(path)  # another process has read it meanwhile
                    if table is None:
                        table, read_now = read(), True
                        self._keep(path, table)
                        mapped = _mapped(path)  # the file's pages are every reader's, and the system may drop them
                        table = table if mapped is None else mapped
            self._mapped.put((key,), table, table.nbytes)
        return table, read_now

    def _keep(self, path: Path, table: pa.Table) -> None:
        """A full disk only costs reading again."""
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
        self._written += 1
        if self._written % _TIDY_EVERY == 0:
            self._tidy()

    def _tidy(self) -> None:
        """Delete the oldest files beyond the limit. Who has mapped one keeps it."""
        found, entries = [], list[os.DirEntry[str]]()
        with contextlib.suppress(FileNotFoundError):
            entries = list(os.scandir(self._folder.path))
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(".arrow"):
                    seen = entry.stat()
                    found.append((seen.st_mtime_ns, seen.st_size, Path(entry.path)))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= self._limit:
                break
            path.unlink(missing_ok=True)
            held -= size

    def close(self) -> None:
        """Leave the folder; the last one deletes it."""
        self._mapped = Recent(0)
        self._folder.close()


def _mapped(path: Path) -> pa.Table | None:
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:  # the folder was cleared away, or its disk takes no more files: each process reads for itself
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
