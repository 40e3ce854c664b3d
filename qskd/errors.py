"""The one exception a user is meant to read: what was found, what was expected, what to do."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator


class QskdError(Exception):
    """A problem in the user's data, configuration or environment, told without a traceback by the command line.

    The message names where (file, id, field), what was found, what was expected and the remedy.
    """

    def __init__(self, where: str, found: str, expected: str = "", remedy: str = "") -> None:
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
def told_without_traceback() -> Iterator[None]:
    """For a program's outermost level: a QskdError becomes its message on standard error and exit code 1."""
    try:
        yield
    except QskdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
