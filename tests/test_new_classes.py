"""The benchmark of new classes: its records against its plan and its document, and a small run of some rows from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.new_classes import __main__ as program
from benchmarks.new_classes import report, rows, task
from benchmarks.new_classes.rows import ROWS
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import EASY, TWINS


def test_committed_records_are_of_the_settings_of_today() -> None:
    paths = sorted(report.RECORDS.glob("*/*.json"))
    assert len(paths) >= len(ROWS)
    for path in paths:
        record = json.loads(path.read_text())
        assert path.stem == f"{record['row']}-seed{record['seed']}"
        assert record["title"] == ROWS[record["row"]].title
        assert record["settings"] == report.settings()
        assert record["split"] == {"report": "test", "search": "val"}[path.parent.name]
        assert record["forgotten"] == pytest.approx(record["AP"]["before"] - record["AP"]["old"], abs=2e-5)


def test_the_document_says_what_the_records_do() -> None:
    document = program.ROOT / "docs" / "new_classes.md"
    if text := report.markdown():
        assert document.read_text() == report.between_marks(document.read_text(), text), (
            "run python -m benchmarks.new_classes table"
        )
    with pytest.raises(ValueError, match="no <!-- benchmarks"):
        report.between_marks("nothing", "a table")


def test_rows_run_from_images_to_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OLD", "NEW", "VAL", "TEST"):
        few = getattr(task, name).model_copy(update={"images": 20})
        monkeypatch.setattr(task, name, few)
    for module, name, value in (
        *((task, "OLD_STEPS", 2), (rows, "STEPS", 2), (rows, "BALANCED_STEPS", 2), (rows, "EXEMPLARS", 4)),
        (report, "RECORDS", tmp_path / "records"),
    ):
        monkeypatch.setattr(module, name, value)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/new_classes.md").write_text(f"{report._BEGIN}\n{report._END}\n")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    named = ["finetuning", "two_teachers_alone", "balanced", "joint"]
    words = ["--work", str(tmp_path / "work"), "--seeds", "0", "--rows", *named]
    assert program.main(words) == 0
    assert capsys.readouterr().out.count("forgotten") == 5
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "records/report").glob("*.json")}
    assert set(records) == {f"{name}-seed0" for name in named}
    assert "| fine-tuning alone |" in (tmp_path / "docs/new_classes.md").read_text()
    assert program.main(words) == 0  # nothing is done again
    assert capsys.readouterr().out.count("seed 0") == 0
    assert all(record["train_seconds"] > 0 for record in records.values())
    made = (tmp_path / "work/seed0/student-joint/qskd.json").stat().st_ino
    record = tmp_path / "records/report/joint-seed0.json"
    record.unlink()  # as when a run is stopped between a training and its record
    last = [*words[: -len(named)], "joint"]
    assert program.main(last) == 0
    assert json.loads(record.read_text())["train_seconds"] == records["joint-seed0"]["train_seconds"]
    assert (tmp_path / "work/seed0/student-joint/qskd.json").stat().st_ino == made
    assert program.main([*last, "--again"]) == 0  # trained again, not only measured
    assert (tmp_path / "work/seed0/student-joint/qskd.json").stat().st_ino != made

    work = tmp_path / "work"
    assert load_manifest(str(work / "old-easy")).labels == EASY
    assert load_manifest(str(work / "new")).labels == EASY + TWINS
    assert load_manifest(str(work / "new-twins")).labels == TWINS
    assert load_manifest(str(work / "joint")).num_images == 40
    assert load_manifest(str(work / "seed0/balanced")).num_images == 8
