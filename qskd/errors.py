"""The one exception a user is meant to read: what was found, what was expected, what to do."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from qskd.printable import printable
from qskd.redaction import redacted

FULL = (errno.ENOSPC, errno.EDQUOT)
# What the system says of a path that can't be written, or is none: no fault of the program's, and trying again won't help.
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTEMPTY, errno.EXDEV, errno.ENXIO, errno.ENODEV, errno.EFBIG),
)


def of_machine(error: BaseException | None) -> bool:
    """Whether an error is of the machine, or of a store as seen from it, and not of the work: on another machine, or later, the
    same may succeed."""
    return isinstance(error, (OSError, ImportError)) or bool(getattr(error, "of_machine", False))


class QskdError(Exception):
    """A problem in the user's data, configuration or environment, told without a traceback by the command line.

    The message names where (file, id, field), what was found, what was expected and the remedy. Parts often hold names out of
    others' files: each is made `printable`. Users, passwords and other secrets of the URIs in them are taken out here, whoever
    made it. of_machine: as the function says, of the error that was being handled when this one was made of it.
    """

    def __init__(self, where: str, found: str, expected: str = "", remedy: str = "") -> None:
        where, found, expected, remedy = (printable(redacted(str(part))) for part in (where, found, expected, remedy))
        self.where, self.found, self.expected, self.remedy = where, found, expected, remedy
        self.of_machine = of_machine(sys.exc_info()[1])
        lines = [f"{where}: {found}"]
        if expected:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  what to do: {remedy}")
        super().__init__("\n".join(lines))

    def to_json(self) -> str:
        """For `from_json` in another process, where Ray would wrap the exception in its own."""
        return json.dumps([self.where, self.found, self.expected, self.remedy, self.of_machine])

    @staticmethod
    def from_json(text: str) -> QskdError:
        *parts, of_machine = json.loads(text)
        if not isinstance(of_machine, bool):  # of an earlier version: four texts
            parts, of_machine = [*parts, of_machine], False
        error = QskdError(*parts)
        error.of_machine = of_machine
        return error

    def __reduce__(self) -> tuple[type[QskdError], tuple[str, str, str, str], dict[str, bool]]:
        # Exceptions cross process borders under Ray; the default would replay the joined message as `where`.
        return type(self), (self.where, self.found, self.expected, self.remedy), {"of_machine": self.of_machine}


@contextlib.contextmanager
def full_disk_named(path: str) -> Iterator[None]:
    """An OSError that says that a disk is full, or a path impossible, gets the name of the file: one of writing, unlike one of
    opening, has none, nor has any of pyarrow's."""
    try:
        yield
    except OSError as error:
        named = error.errno in FULL or (error.errno in REFUSED and not isinstance(error, FileNotFoundError))
        if named and error.errno and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), path) from error
        raise


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """A system that refuses to write below `path` (read-only, a file in the way, a name too long) ends in a QskdError naming it.

    A full disk stays an OSError: who writes may want to clear away what is half there.
    """
    try:
        with full_disk_named(str(path)):
            yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise refused(error, str(path)) from None


def check_writable(folder: Path) -> None:
    """QskdError where no file could be made in a folder, which need not be there yet: for before the work, not after it."""
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise refused(OSError(errno.ENOTDIR, "", str(place)), str(folder))
    if not os.access(place, os.W_OK | os.X_OK):
        raise refused(OSError(errno.EACCES, "", str(place)), str(folder))


def refused(error: OSError, path: str = "") -> QskdError:
    """What the system said of a path, as the user's error."""
    where = error.filename if isinstance(error.filename, str) else path
    reason = os.strerror(error.errno) if error.errno else str(error)
    return QskdError(
        path or where or "a file",
        f"can't be written: {reason}" + (f" ({where})" if where and where != path else ""),
        "a place where files can be made",
        "name another one, or change its rights",
    )


@contextlib.contextmanager
def told_without_traceback() -> Iterator[None]:
    """For a program's outermost level: a QskdError becomes its message on standard error and exit code 1; so does what the
    system says of a path: no room on its disk, no right to it, no such name."""
    try:
        yield
    except QskdError as error:
        told = error
    except OSError as error:
        if error.errno in REFUSED and error.filename is not None:
            where, reason = os.fsdecode(error.filename), os.strerror(error.errno)
            told = QskdError(where, reason, "a path that can be used so", "correct it, or change its rights")
        elif error.errno in FULL:
            where = error.filename or "a folder for outputs or temporary files"
            remedy = (
                "free some, or set TMPDIR or the output elsewhere; the same command goes on with a run that was begun"
            )
            told = QskdError(str(where), os.strerror(error.errno), "room on the disk", remedy)
        else:
            raise
    else:
        return
    print(f"error: {told}", file=sys.stderr)
    sys.exit(1)
