"""The one file of the library that reaches the programs, by name and when it is asked: `qskd.train` and the other verbs, and
the `qskd` command. Programs import the library, never the other way round."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from qskd.errors import QskdError

BESIDE = ("pipelines", "search_spaces")  # what an installation has at the top, beside this package


def check_ours(name: str) -> None:
    """QskdError where a package of this name that is not qskd's would be imported: another project's, or one that an
    installation has written over."""
    here = Path(__file__).resolve().parents[1]
    try:
        module = importlib.import_module(name)
        found = getattr(module, "__file__", None) or str(next(iter(getattr(module, "__path__", [])), "a built-in"))
    except ImportError as error:
        raise QskdError(name, f"can't be imported: {error}", f"{here / name}, of qskd", "install qskd again") from error
    if Path(found).resolve().parent != here / name or not getattr(module, "OF_QSKD", False):
        raise QskdError(
            name,
            f"{found} is imported under this name, which is not qskd's",
            f"{here / name}, of qskd",
            "start elsewhere, rename that package, or give qskd an environment of its own (docs/python.md)",
        )


def verb(name: str) -> Any:
    """The function of a verb."""
    for package in BESIDE:
        check_ours(package)
    return getattr(importlib.import_module("pipelines.api"), name)


def main() -> None:
    """The `qskd` command."""
    from qskd.errors import told_without_traceback

    with told_without_traceback():
        for package in BESIDE:
            check_ours(package)
    importlib.import_module("pipelines.cli").main()
