"""Folders for temporary files that a killed process does not leave behind for ever."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PREFIX = "qskd-scratch-"


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """An empty folder below the one for temporary files, removed with the block.

    A process killed in the block can't remove it; the next one on the machine that wants a folder does. Who is still there
    holds a lock on his, which the system lets go with the process.
    """
    _remove_orphans(tempfile.gettempdir())
    with locked_folder(f"{PREFIX}{purpose}-") as folder:
        yield folder


@contextmanager
def locked_folder(prefix: str, parent: str | None = None) -> Iterator[Path]:
    """An empty folder of that beginning, removed with the block; of a process that was killed in it, `remove_orphan` knows."""
    folder, lock = _locked(prefix, parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


class SharedFolder:
    """A folder for temporary files that several processes of a user on this machine use at once, by its name: the last one to
    close it deletes it, unless it holds files of other names than 32 hexadecimal digits and an ending; and of processes that were
    all killed the next that wants a `scratch_folder` does.

    Where another user has put a thing of that name, or locks do not work, it is one of this process alone.
    """

    def __init__(self, name: str) -> None:
        _remove_orphans(tempfile.gettempdir())
        words = f"{os.getuid()} {name}".encode()
        suffix = hashlib.blake2b(words, digest_size=4).hexdigest()
        self.path = Path(tempfile.gettempdir()) / f"{PREFIX}rows-{suffix}"
        self._handle = self._opened() if self._make() else -1
        if self._handle < 0:
            self.path, self._handle = _locked(f"{PREFIX}rows-", None)
        self._closed = False
        atexit.register(self.close)

    def _make(self) -> bool:
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError:
            return False
        return True

    def _opened(self) -> int:
        """A handle that holds a lock shared with the other users of the folder; -1 where it can't be ours."""
        for _ in range(100):
            try:
                handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            except FileNotFoundError:  # the last of its users deleted it just now
                self._make()
                continue
            except OSError:
                return -1
            found = os.fstat(handle)
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
                os.close(handle)
                return -1
            try:
                fcntl.flock(handle, fcntl.LOCK_SH)
                if os.path.samestat(os.stat(self.path), found):
                    return handle
            except FileNotFoundError:
                pass
            except OSError:
                os.close(handle)
                return -1
            os.close(handle)  # it was deleted before it was locked
        return -1

    def close(self) -> None:
        """Leave it; the last of its users deletes it. Twice is once."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        ours = all(re.fullmatch(r"[0-9a-f]{32}\.[a-z0-9]+", name) for name in os.listdir(self._handle))
        if ours and _lock(self._handle, wait=False):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._handle)


def _locked(prefix: str, parent: str | None) -> tuple[Path, int]:
    while True:
        folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
        lock = os.open(folder, os.O_RDONLY)
        if _lock(lock, wait=True) and not os.path.exists(folder):
            os.close(lock)  # another process removed it before it was locked
            continue
        return Path(folder), lock


def _lock(handle: int, wait: bool) -> bool:
    """Whether the lock is ours; False too where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@cache  # once a process: a folder with many other files takes a while to list
def _remove_orphans(parent: str) -> None:
    for folder in Path(parent).glob(f"{PREFIX}*"):
        remove_orphan(folder, PREFIX)


def remove_orphan(folder: str | Path, prefix: str, names: Collection[str] | None = None) -> None:
    """Delete a `locked_folder` of this prefix unless its process lives, or it is another user's. names: all that its process
    puts there; a folder with anything else in it stays, and so does one that `mkdtemp` did not make."""
    if not re.fullmatch(rf"{re.escape(prefix)}([a-z-]+-)?[a-z0-9_]{{8}}", os.path.basename(folder)):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # gone meanwhile, or another user's
    try:
        found = os.fstat(handle)
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700 or not _lock(handle, wait=False):
            return
        if names is None or set(os.listdir(handle)) <= set(names):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
