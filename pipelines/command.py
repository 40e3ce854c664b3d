"""What every door needs: the options that several verbs share, and how a verb is run. Imports nothing heavy."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cluster.noise import own_stderr
from pipelines.run.logs import start_logs
from pipelines.run.stopping import ended_by_signals
from qskd.errors import QskdError, told_without_traceback
from qskd.redaction import redacted_uri


def local_path(given: str | os.PathLike[str]) -> Path:
    """A path of the command line's, or an option's default. QskdError when it is a URI, of which a Path would make `s3:/bucket`."""
    given = os.fspath(given)
    if "://" in given:
        remedy = "copy it there, or from there, for example with `aws s3 sync`"
        raise QskdError(redacted_uri(given), "a URI", "a path on a local disk", remedy)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", given):
        raise QskdError(
            redacted_uri(given), "neither a path nor a URI", "a path on a local disk", "leave the scheme away"
        )
    return Path(given).expanduser() if given.split("/")[0] == "~" else Path(given)


def _add_methods(folders: list[str] | None) -> list[str] | None:
    if folders:
        from qskd.distillation.find import add_folder

        for folder in reversed(folders):  # each is put before the others
            add_folder(folder)
    return folders


# Text, not a Path, which would make `s3:/bucket` of a URI.
Recipe = Annotated[
    str | None,
    typer.Argument(help="YAML recipe, a path or a URI; without one, the defaults. See configs/.", show_default=False),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set a field of the recipe; may be repeated.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--methods",
        metavar="FOLDER",
        callback=_add_methods,
        help="Folder with distillation methods of your own, .py files whose code is run (docs/methods.md); repeatable.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what would happen; do nothing."),
]
AllFields = Annotated[
    bool,
    typer.Option(
        "--all-fields", help="With --dry-run: print every field of the recipe, not only what is not the default."
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Delete what OUTPUT/NAME holds and begin afresh; without it a run goes on.")
]
Model = Annotated[str, typer.Argument(help="Hub name, folder or URI of a detector, or of a run.")]
Classes = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="A,B,C",
        help="What a detector that is asked in words (Grounding DINO) is to look for.",
        show_default=False,
    ),
]
Size = Annotated[
    int | None,
    typer.Option("--size", min=1, max=8192, help="Side of square images, in pixels; otherwise the checkpoint's own."),
]


def new_app(**about: Any) -> typer.Typer:
    """An empty command line, as `qskd` and each `python -m pipelines.VERB` have it."""
    return typer.Typer(
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **about,
    )


def run(command: Callable[..., None], verb: str, arguments: list[str] | None = None) -> None:
    """`python -m pipelines.VERB ...` is `qskd VERB ...`."""
    app = new_app()
    app.command(verb)(command)
    run_app(app, f"qskd {verb}", arguments)


def run_app(app: typer.Typer, name: str, arguments: list[str] | None = None) -> None:
    """Run a command line; a QskdError is told without a traceback, with exit code 1."""
    own_stderr()
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be UTF-8, and printing it must not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    start_logs()
    with told_without_traceback(), ended_by_signals():
        app(arguments, prog_name=name)


def check_all_fields(*, all_fields: bool, dry_run: bool) -> None:
    """QskdError for --all-fields where it would have no effect."""
    if all_fields and not dry_run:
        raise QskdError("--all-fields", "has no effect without --dry-run", "both, or neither", "add --dry-run")


def names_in(given: str | None) -> tuple[str, ...]:
    """What `--classes cat,dog` names."""
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def one_of(option: str, value: str, *known: str) -> Any:
    """The value, if it is one of these; QskdError otherwise."""
    if value not in known:
        raise QskdError(option, value, " or ".join(known))
    return value
