"""The `qskd` command: a list of doors. Each is also `python -m pipelines.NAME`. Nobody imports this file."""

from __future__ import annotations

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

app = new_app(
    help="Compress DETR object detectors by query-selection knowledge distillation, on Ray.", no_args_is_help=True
)
for verb, door in DOORS.items():
    app.command(verb)(door.command)


@app.callback(invoke_without_command=True)
def _about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; a QskdError is told without a traceback, with exit code 1."""
    run_app(app, "qskd", arguments)


if __name__ == "__main__":
    main()
