"""Arguments and options that several verbs of the `qskd` command have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qskd.errors import QskdError
from qskd.redaction import redacted


def local_path(given: str) -> Path:
    """A path of the command line's. QskdError when it is a URI, of which a Path would make `s3:/bucket`."""
    if "://" in given:
        remedy = "copy it there, or from there, for example with `aws s3 sync`"
        raise QskdError(redacted(given), "a URI", "a path on a local disk", remedy)
    return Path(given)


# Text, not a Path, which would make `s3:/bucket` of a URI.
Recipe = Annotated[
    str | None,
    typer.Argument(help="YAML recipe, a path or a URI; without one, the defaults. See configs/.", show_default=False),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set a field of the recipe; may be repeated.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what would happen (train and distill: the resolved recipe, too); do nothing."
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Delete what OUTPUT/NAME holds and begin afresh.")]
Model = Annotated[str, typer.Argument(help="Hub name, folder or URI of a detector.")]
