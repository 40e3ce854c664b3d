"""Files on any file system: made whole or not at all, read, deleted."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from qskd.errors import writing
from qskd.storage import durable
from qskd.storage.scratch import locked_folder, remove_orphan
from qskd.storage.stores import is_local, join, patiently

UNFINISHED = ".writing-"  # what a name begins with until its file is whole
# Where a file appears only when its writer closes it: no name of its own is needed until then. A rename, which these stores
# do not have, would be a copy.
_APPEAR_WHOLE = ("s3", "gcs", "abfs")
_BLOCK = 1 << 22  # bytes written at once


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
    _copy(spool, filesystem, path, path)
    spool.unlink()


def _copy(source: Path, filesystem: pafs.FileSystem, path: str, where: str) -> None:
    size = source.stat().st_size
    patiently(where, filesystem, lambda: _send(lambda: source.open("rb"), size, filesystem, path))


def publish_copies(source: Path, filesystem: pafs.FileSystem, path: str, where: str) -> None:
    """Make copies of all files below a local folder appear below `path`, each whole, in place of those of the same names.

    On a local file system none takes its place before all are on the disk: one that gets full leaves what was there.
    """
    names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
    if is_local(filesystem):
        with writing(where):
            _copy_all(source, names, Path(path))
        return
    for name in names:
        target = f"{path}/{name}"
        make_folder(filesystem, target.rpartition("/")[0], where)
        _copy(source / name, filesystem, target, join(where, name))


def _copy_all(source: Path, names: list[str], target: Path) -> None:
    durable.make_folder(target)
    unfinished = [str(number) for number in range(len(names))]
    for left in target.glob(f"{UNFINISHED}*"):  # by a process that was killed
        remove_orphan(left, UNFINISHED, unfinished)
    with locked_folder(UNFINISHED, str(target)) as folder:
        for name, number in zip(names, unfinished, strict=True):
            durable.make_folder((target / name).parent)
            with (source / name).open("rb") as read, (folder / number).open("wb") as written:
                shutil.copyfileobj(read, written, _BLOCK)
            durable.sync_file(folder / number)
        for name, number in zip(names, unfinished, strict=True):
            os.replace(folder / number, target / name)
        for above in {(target / name).parent for name in names}:
            durable.sync_folder(above)


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
    """Whole, or what was there before stays.

    In a thread of its own: an interrupt comes to the main thread alone, where it could drop a stream that has just been opened,
    and so complete an upload of nothing. It makes the thread give up, and is raised when that has.
    """
    given_up = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(_upload, opened, size, filesystem, path, given_up)
        try:
            upload.result()
        except BaseException:
            given_up.set()
            raise


def _upload(
    opened: Callable[[], BinaryIO], size: int, filesystem: pafs.FileSystem, path: str, given_up: threading.Event
) -> None:
    folder, _, name = path.rpartition("/")
    target = path if filesystem.type_name in _APPEAR_WHOLE else f"{folder}/{UNFINISHED}{name}"
    with opened() as source:
        sink = filesystem.open_output_stream(target)
        sent = 0
        while sent < size:
            try:
                if given_up.is_set():
                    raise InterruptedError(f"given up after {sent} of {size} bytes")
                if not (block := source.read(min(_BLOCK, size - sent))):
                    raise OSError(f"{sent} of {size} bytes were there to be sent")
            except BaseException:
                _abandon(sink, filesystem, target)
                raise
            try:
                sink.write(block)
            except BaseException:
                # Closing such a stream fails too, and completes nothing; where it does not, the file is cut.
                with contextlib.suppress(Exception):
                    sink.close()
                    filesystem.delete_file(target)
                raise
            sent += len(block)
        sink.close()
    arrived = filesystem.get_file_info(target).size
    if arrived != size:
        filesystem.delete_file(target)
        raise OSError(f"{arrived} of {size} bytes arrived")
    if target != path:
        filesystem.move(target, path)


def _abandon(sink: pa.NativeFile, filesystem: pafs.FileSystem, target: str) -> None:
    """Leave a file unfinished whose source broke off. pyarrow can't abort an upload: to close its stream completes it with what
    arrived, and so does to drop it, and one still open as the program ends waits for ever. So it is kept for good, out of
    Python's reach."""
    if filesystem.type_name in _APPEAR_WHOLE:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
        return
    with contextlib.suppress(Exception):  # what broke off is raised
        sink.close()
        filesystem.delete_file(target)


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
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
