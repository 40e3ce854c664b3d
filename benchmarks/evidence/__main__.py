"""Does distillation help, and which part of it? A table of variants x seeds, at two budgets.

    python -m benchmarks.evidence                     every cell that has no record yet, then the tables and the figure
    python -m benchmarks.evidence --short             two seeds, three variants, the short budget: under 15 minutes
    python -m benchmarks.evidence table               only the tables and the figure, from the committed records
    python -m benchmarks.evidence clock               what equal time is in steps (run alone)
    python -m benchmarks.evidence diagnose            what is kept, where the mask lies, whose gradient drives the student

Two cores do two cells at a time, each with one thread. Records: benchmarks/evidence/records; MLflow: WORK/mlflow.db.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.evidence import cells, clock, diagnose, report
from benchmarks.evidence.cells import RECORDS, Cell
from benchmarks.evidence.plan import BUDGETS, REPORT_SEEDS, SEARCH_SEEDS, STUDENTS
from benchmarks.evidence.task import make_config, make_task
from benchmarks.evidence.teachers import teacher_path
from benchmarks.evidence.variants import VARIANTS
from qskd.errors import QskdError

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"students": ["inherit"], "variants": ["none", "lapd", "qskd"], "budgets": ["short"], "seeds": [0, 1]}


def wanted(given: argparse.Namespace) -> list[Cell]:
    """The cells the command line names; without names, those of the plan."""
    seeds = given.seeds or (SEARCH_SEEDS if given.split == "val" else REPORT_SEEDS)
    return [  # seed by seed: a run cut short leaves whole rows
        Cell(student, variant, budget, seed, given.split, tuple(given.set))
        for seed in seeds
        for budget in given.budgets or list(BUDGETS)
        for student in given.students or list(STUDENTS)
        for variant in given.variants or STUDENTS[student].rows.get(budget, ())
    ]


def variants_of(named: Sequence[Cell]) -> dict[str, set[str]]:
    """By student: not every student's teacher can give what another's variants ask for."""
    found: dict[str, set[str]] = {}
    for cell in named:
        found.setdefault(cell.student, set()).add(cell.variant)
    return found


def run_all(missing: Sequence[Cell], work: Path, processes: int) -> None:
    """Each cell in a process of its own; the first failure is told at the end, after all others had their chance."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def one(cell: Cell) -> tuple[Cell, int, str]:
        named = ["--students", cell.student, "--variants", cell.variant, "--budgets", cell.budget]
        named += ["--seeds", str(cell.seed), "--split", cell.split, *(f"--set={field}" for field in cell.extra)]
        command = [sys.executable, "-m", "benchmarks.evidence", "cell", "--work", str(work), *named]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return cell, done.returncode, done.stderr

    failed = []
    with ThreadPoolExecutor(processes) as pool:
        for number, future in enumerate(as_completed([pool.submit(one, cell) for cell in missing]), 1):
            cell, code, said = future.result()
            if code:
                failed.append(f"{cell.name}: {said.strip().splitlines()[-1] if said.strip() else f'exit {code}'}")
                print(f"{number}/{len(missing)}  {cell.name}: FAILED", flush=True)
                continue
            record = json.loads(cell.record.read_text())
            track(cell, record, work)
            print(
                f"{number}/{len(missing)}  {cell.name}: AP {record['metrics']['AP']:.3f}  AP50 {record['metrics']['AP50']:.3f}"
                f"  {record['train_seconds']:.0f} s",
                flush=True,
            )
    if failed:
        raise QskdError("evidence", f"{len(failed)} cells failed: {'; '.join(failed)}", "all to finish")


def track(cell: Cell, record: dict[str, Any], work: Path) -> None:
    """The record as an MLflow run."""
    from pipelines.tracking.tracker import Tracker

    tracker = Tracker.open(cell.config(work), "evidence")
    steps = [
        (int(point["step"]), {f"val/{k}": v for k, v in point.items() if k != "step"}) for point in record["curve"]
    ]
    tracker.metrics([*steps, (record["steps"], {f"final/{k}": v for k, v in record["metrics"].items()})])
    tracker.text("record.json", json.dumps(record, indent=1))
    tracker.finish()


def teacher_ap(work: Path, student: str) -> float:
    """A student's teacher's AP on the test split; measured once, kept with the records."""
    name = STUDENTS[student].teacher
    place = RECORDS / f"{name}.json"
    if not place.exists():
        from pipelines.inspection.evaluate import evaluate

        make_task(work, {student: ()})
        test = make_config(work, "test", STUDENTS[student]).data.val
        metrics = evaluate(str(teacher_path(work, name)), test, workers=0, threads=1).metrics
        RECORDS.mkdir(exist_ok=True)
        place.write_text(json.dumps({key: round(value, 5) for key, value in metrics.items()}, indent=1) + "\n")
    return float(json.loads(place.read_text())["AP"])


def write_table(work: Path) -> None:
    """records/table.md, a figure for each student, and the tables in docs/evidence.md and docs/quantization.md."""
    records = report.read_records()
    students = {name: student for name, student in STUDENTS.items() if report.budgets_of(records, name)}
    teachers = {student.teacher: teacher_ap(work, name) for name, student in students.items()}
    text = report.whole(records, teachers)
    (RECORDS / "table.md").write_text(text)
    for name, student in students.items():
        report.figure(records, name, teachers[student.teacher], RECORDS / f"{name}.png")
    for path, document in report.published(ROOT, records, teachers).items():
        path.write_text(document)
    if (RECORDS / "inherit.png").exists():
        shutil.copyfile(RECORDS / "inherit.png", ROOT / "docs/evidence.png")
    print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=("run", "table", "clock", "diagnose", "cell"), default="run")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="images, shards, cache, MLflow")
    parser.add_argument("--short", action="store_true", help="two seeds, three variants, the short budget")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose settings by")
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument(
        "--set", metavar="A.B=C", action="append", default=[], help="set a field in every cell (--split val)"
    )
    parser.add_argument("--again", action="store_true", help="run cells that have a record, too")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    work = given.work.resolve()
    if given.short:
        for name, value in SHORT.items():
            setattr(given, name, value)
    try:
        if given.action == "table":
            write_table(work)
            return 0
        if given.set and given.split == "test":
            found = f"{given.set[0]}, on the images that are reported on"
            raise QskdError("--set", found, "the recipe as it is there", "choose settings on others: --split val")
        if given.action == "clock":
            make_task(work, dict.fromkeys(STUDENTS, ()))
            clock.measure(work)
            return 0
        if given.action == "diagnose":
            for name in given.students or [diagnose.STUDENT]:
                make_task(work, {name: ()})
                diagnose.diagnose(work, name)
            return 0
        named = wanted(given)
        if given.action == "cell":
            make_task(work, variants_of(named))
            for cell in named:
                cells.run(cell, work)
            return 0
        missing = [cell for cell in named if given.again or cells.finished(cell, work) is None]
        print(f"{len(named)} cells, {len(named) - len(missing)} of them have a record", flush=True)
        if missing:
            make_task(work, variants_of(missing))
            run_all(missing, work, given.processes)
        if given.split == "test":
            write_table(work)
    except QskdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
