"""Files of Python code that a user names on the command line: whoever names one runs it."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

_told: set[Path] = set()


def tell_code_is_run(option: str, path: Path) -> None:
    """Say in one line, once a file and process, that the code of a file from outside the package is about to be run.

    option: by which it was named, such as "--space".
    """
    path = path.resolve()
    if path not in _told:
        _told.add(path)
        log.warning("%s: the code in %s is run, with all your rights", option, path)
