"""The one exception a user is meant to read: what was found, what was expected, what to do."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator

from qskd.redaction import redacted

FULL = (errno.ENOSPC, errno.EDQUOT)


class QskdError(Exception):
    """A problem in the user's data, configuration or environment, told without a traceback by the command line.

    The message names where (file, id, field), what was found, what was expected and the remedy. Users, passwords and other
    secrets of the URIs in them are taken out here, whoever made it.
    """

    def __init__(self, where: str, found: str, expected: str = "", remedy: str = "") -> None:
        where, found, expected, remedy = (redacted(str(text)) for text in (where, found, expected, remedy))
        self.where, self.found, self.expected, self.remedy = where, found, expected, remedy
        lines = [f"{where}: {found}"]
        if expected:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  what to do: {remedy}")
        super().__init__("\n".join(lines))

    def to_json(self) -> str:
        """For `from_json` in another process, where Ray would wrap the exception in its own."""
        return json.dumps([self.where, self.found, self.expected, self.remedy])

    @staticmethod
    def from_json(text: str) -> QskdError:
        return QskdError(*json.loads(text))

    def __reduce__(self) -> tuple[type[QskdError], tuple[str, str, str, str]]:
        # Exceptions cross process borders under Ray; the default would replay the joined message as `where`.
        return type(self), (self.where, self.found, self.expected, self.remedy)


@contextlib.contextmanager
def full_disk_named(path: str) -> Iterator[None]:
    """An OSError that says that a disk is full gets the name of the file: one of writing, unlike one of opening, has none."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), path) from error
        raise


@contextlib.contextmanager
def told_without_traceback() -> Iterator[None]:
    """For a program's outermost level: a QskdError becomes its message on standard error and exit code 1; a full disk too."""
    try:
        yield
    except QskdError as error:
        told = error
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = error.filename or "a folder for outputs or temporary files"
        remedy = "free some, or set TMPDIR or the output elsewhere; the same command goes on with a run that was begun"
        told = QskdError(str(where), os.strerror(error.errno), "room on the disk", remedy)
    else:
        return
    print(f"error: {told}", file=sys.stderr)
    sys.exit(1)
