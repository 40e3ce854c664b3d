"""Distil a small detector on built-in data beside its baseline, and compare (`qskd quickstart`).

python -m pipelines.quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import DryRun, Restart, local_path, run


def command(
    folder: Annotated[
        Path, typer.Option(parser=local_path, metavar="PATH", help="Where data, runs and mlflow.db go.")
    ] = Path("runs/quickstart"),
    dry_run: DryRun = False,
    restart: Restart = False,
) -> None:
    """Distil a small detector on built-in data beside its baseline, and compare: two to four minutes on two cores."""
    from pipelines.demo import quickstart as program

    program.quickstart(folder, dry_run, restart)


if __name__ == "__main__":
    run(command, "quickstart")
