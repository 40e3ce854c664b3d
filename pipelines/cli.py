"""The `qskd` command: a list of doors. Each is also `python -m pipelines.NAME`. Nobody imports this file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from pipelines import (
    benchmark,
    cache_teacher,
    distill,
    doctor,
    evaluate,
    explain,
    export,
    label,
    predict,
    prepare,
    quickstart,
    select,
    shapes,
    train,
    tune,
)
from pipelines.command import new_app, run_app
from qskd import __version__

DOORS = {
    "distill": distill,
    "train": train,
    "cache": cache_teacher,
    "tune": tune,
    "prepare": prepare,
    "evaluate": evaluate,
    "predict": predict,
    "label": label,
    "select": select,
    "explain": explain,
    "doctor": doctor,
    "shapes": shapes,
    "quickstart": quickstart,
    "export": export,
    "benchmark": benchmark,
}


def _about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _app(verbs: Iterable[str]) -> typer.Typer:
    made = new_app(
        help="Compress DETR object detectors by query-selection knowledge distillation, on Ray.", no_args_is_help=True
    )
    for verb in verbs:
        made.command(verb)(DOORS[verb].command)
    made.callback(invoke_without_command=True)(_about)
    return made


app = _app(DOORS)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; a QskdError is told without a traceback, with exit code 1."""
    first = (sys.argv[1:] if arguments is None else arguments)[:1]
    known = bool(first) and first[0] in DOORS
    asked = _app(first) if known else app  # Typer reads the signatures of all verbs that it has: 30 ms of fifteen
    run_app(asked, "qskd", arguments)


if __name__ == "__main__":
    main()
