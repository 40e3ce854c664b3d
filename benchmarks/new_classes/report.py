"""What came of it: a record a row and seed, and the table that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.evidence.cells import code_version
from benchmarks.evidence.report import Interval
from benchmarks.new_classes import task
from benchmarks.new_classes.rows import ROWS
from benchmarks.new_classes.task import Work, measure
from qskd.datasets.shapes import EASY, TWINS
from qskd.evaluation.forgetting import forgetting

RECORDS = Path(__file__).parent / "records"
_BEGIN, _END = "<!-- benchmarks.new_classes -->", "<!-- end of benchmarks.new_classes -->"


def record_file(row: str, work: Work) -> Path:
    return RECORDS / ("search" if work.split == "val" else "report") / f"{row}-seed{work.seed}.json"


def measured(row: str, work: Work, student: Path) -> str:
    """Evaluate, write the record, and say it in a line."""
    before = work.of_seed(f"before-{work.split}.json")
    if before.exists():
        was = task.Evaluation.from_json(before.read_text(), str(before))
    else:
        was = measure(work, work.old, dict.fromkeys(TWINS))
        before.write_text(was.to_json())
    told = forgetting(measure(work, student), was, EASY, work.old.name)
    assert told.forgotten is not None
    figures = {"old": told.old.ap, "new": told.new.ap, "all": told.all.ap, "before": told.before}
    record: dict[str, Any] = {
        "row": row,
        "title": ROWS[row].title,
        "seed": work.seed,
        "split": work.split,
        "AP": {name: round(float(value or 0), 5) for name, value in figures.items()},
        "forgotten": round(told.forgotten, 5),
        "train_seconds": round(task.seconds_of(student), 1),
        "settings": settings(),
        "code": code_version(),
    }
    path = record_file(row, work)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    each = "  ".join(f"{name} {100 * value:.1f}" for name, value in record["AP"].items())
    return f"AP {each}  forgotten {100 * told.forgotten:.1f}"


def settings() -> dict[str, Any]:
    """What all rows share."""
    names = ("IMAGES", "OLD_STEPS", "STEPS", "BALANCED_STEPS", "LEARNING_RATE", "BALANCED_LEARNING_RATE", "EXEMPLARS")
    return {name.lower(): getattr(task, name) for name in names}


def markdown() -> str:
    """The table; until there is a record of the test images, of those that settings were chosen by. Empty without records."""
    found = sorted((RECORDS / "report").glob("*.json"))
    said = "" if found else "First figures: the seed and the images (validation) that settings were looked at on.\n\n"
    records = [json.loads(path.read_text()) for path in found or sorted((RECORDS / "search").glob("*.json"))]
    lines = []
    for name, row in ROWS.items():
        own = [record for record in records if record["row"] == name]
        if own:
            cells = [Interval.of([record["AP"][group] for record in own]).show(100) for group in ("old", "new", "all")]
            lost = Interval.of([record["forgotten"] for record in own]).show(100)
            lines.append(f"| {row.title} | {' | '.join(cells)} | {lost} | {len(own)} |")
    if not lines:
        return ""
    before = {record["seed"]: record["AP"]["before"] for record in records}
    head = [
        "| | AP old | AP new | AP all | forgotten | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| the old detector | {Interval.of(list(before.values())).show(100)} | | | | {len(before)} |",
    ]
    return said + "\n".join([*head, *lines]) + "\n"


def publish(document: Path) -> str:
    """The table, into records/table.md and between the document's marks."""
    text = markdown()
    if text:
        (RECORDS / "table.md").write_text(text)
        document.write_text(between_marks(document.read_text(), text))
    return text


def between_marks(document: str, text: str) -> str:
    """ValueError without marks."""
    before, found, rest = document.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not (found and ended):
        raise ValueError(f"no {_BEGIN} ... {_END}")
    return f"{before}{_BEGIN}\n\n{text.strip()}\n\n{_END}{after}"
