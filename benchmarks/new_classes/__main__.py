"""How much of its old classes does a detector forget that learns new ones? A table of ways x seeds.

    python -m benchmarks.new_classes                     every row and seed that has no record yet, then the table
    python -m benchmarks.new_classes --seeds 0 --rows finetuning plain rule
    python -m benchmarks.new_classes table               only the table, from the committed records, into docs/new_classes.md

One process, one thread, no Ray. Records: benchmarks/new_classes/records.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.new_classes import report
from benchmarks.new_classes.rows import ROWS
from benchmarks.new_classes.task import Work, make_task
from qskd.errors import QskdError

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)  # on the test split; settings were chosen with 100 on the validation split


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.new_classes",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("action", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--work", type=Path, default=Path("runs/new_classes"), help="images, shards, detectors")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose settings by")
    parser.add_argument("--again", action="store_true", help="rows that have a record, too: trained again")
    given = parser.parse_args(arguments)
    try:
        for seed in given.seeds if given.action == "run" else ():
            work = Work(given.work.resolve(), seed, given.split)
            wanted = [name for name in given.rows if given.again or not report.record_file(name, work).exists()]
            if wanted:
                work.of_seed("").mkdir(parents=True, exist_ok=True)
                begun = time.perf_counter()
                make_task(work)
                print(f"seed {seed}: data and old detector ready after {time.perf_counter() - begun:.0f} s", flush=True)
            for name in wanted:
                begun = time.perf_counter()
                student = work.of_seed(f"student-{name}")
                if given.again or not student.exists():
                    ROWS[name].make(work, student)
                said = report.measured(name, work, student)
                print(f"seed {seed}  {name:<24} {said}  {time.perf_counter() - begun:.0f} s", flush=True)
        if given.split == "test":
            print(report.publish(ROOT / "docs" / "new_classes.md"))
    except QskdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
