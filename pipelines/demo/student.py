"""One of the quickstart's two students, in a process of its own: python -m pipelines.demo.student FOLDER NAME [--restart]"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.cluster.noise import own_stderr
from pipelines.demo.quickstart import VERBS, recipe
from pipelines.reporting.board import show_elsewhere
from pipelines.run.stopping import ended_by_signals
from pipelines.training.driver import run
from qskd.errors import told_without_traceback


def main(folder: Path, name: str, restart: bool) -> None:
    own_stderr()
    show_elsewhere()
    with told_without_traceback(), ended_by_signals(quiet=True):
        run(recipe(folder, name), VERBS[name], restart)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "--restart" in sys.argv)
