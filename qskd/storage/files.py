"""Files on any file system: made whole or not at all, read, deleted."""

from __future__ import annotations

import hashlib
import io
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.fs as pafs

from qskd.errors import writing
from qskd.storage import durable
from qskd.storage.stores import is_local, patiently

UNFINISHED = ".writing-"  # what a name begins with until its file is whole
# Where a file appears only when its writer closes it: no name of its own is needed until then. A rename, which these stores
# do not have, would be a copy.
_APPEAR_WHOLE = ("s3", "gcs", "abfs")


def make_folder(filesystem: pafs.FileSystem, path: str, where: str) -> None:
    """A folder to write files to, and those above it, where the file system has such a thing. where: its name for messages.

    The stores on which files appear whole have only names with slashes in them. For a folder pyarrow would write an object, and
    one for each folder above: requests for nothing, and a role that may write below one folder alone is denied them.
    """
    if filesystem.type_name not in _APPEAR_WHOLE:
        patiently(where, filesystem, lambda: filesystem.create_dir(path, recursive=True))


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
    make_folder(filesystem, folder, path)
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
