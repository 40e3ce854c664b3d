"""The evidence: its statistics against scipy, its records against its plan, and one real cell from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from benchmarks import evidence
from benchmarks.evidence import __main__ as program
from benchmarks.evidence import backbone, cells, few_bits, interval, plan, report, task, teachers, variants
from benchmarks.evidence.cells import RECORDS, Cell, meaning, same
from benchmarks.evidence.interval import Interval
from qskd.detectors import load_detector

ROWS: dict[tuple[str, str, str], list[tuple[int, Path]]] = {}  # (student, variant, budget) -> its seeds' records
for _path in sorted((RECORDS / "report").glob("*.json")):
    _student, _variant, _budget, _seed = _path.stem.split("-")
    ROWS.setdefault((_student, _variant, _budget), []).append((int(_seed.removeprefix("seed")), _path))


def test_the_interval_is_students() -> None:
    values = [0.31, 0.35, 0.28, 0.4, 0.33]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    found = Interval.of(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert "±" not in Interval.of([0.3]).show()


def test_gaps_and_differences_are_paired_by_seed() -> None:
    base, mine = {0: 0.2, 1: 0.3, 2: 0.1}, {2: 0.3, 0: 0.3}
    assert interval.paired(mine, base) == pytest.approx([0.1, 0.2])
    assert report.shares(mine, base, 0.5) == pytest.approx([0.1 / 0.3, 0.2 / 0.4])
    assert report.shares(mine, base, min(base.values())) == []  # no gap that could be closed


def test_few_bits_are_compared_with_float_of_the_same_teaching() -> None:
    def row(name: str, *values: float) -> dict[tuple[str, str, str], dict[int, float]]:
        return {("inherit", name, "short"): dict(enumerate(values))}

    ap = row("none", 0.30, 0.30) | row("qskd", 0.34, 0.34)
    ap |= row("w4a4_none", 0.205, 0.215) | row("w4a4_qskd", 0.295, 0.305) | row("w2a2_after_qskd", 0.04)
    said = few_bits.tables(ap, ap, row("w2a2_after_qskd", 0.33), "inherit", "short").split("\n\n")
    lost, won = said[5].splitlines(), said[7].splitlines()
    assert lost[0] == "| | QSKD in float, then post-training | no teacher | QSKD |"
    assert lost[2].startswith("| w4a4-attn8 | | 9.0 ± ")
    assert "| 4.0 ± " in lost[2]  # of 0.34, not of 0.30
    assert lost[3] == "| w2a2-attn8 | 29.0 | | |"  # of what it was itself
    assert won[2] == "| w4a4-attn8 | | | 100 ± 0 % |"  # 0.09 of the 0.09 that were lost without a teacher
    assert few_bits.tables(row("none", 0.3), row("none", 0.3), {}, "inherit", "short") == ""


def test_the_goals_of_few_bits_stand_beside_what_came_out() -> None:
    ap = {
        ("inherit", name, "short"): dict(enumerate(values))
        for name, values in {
            "none": (0.30, 0.31),
            "qskd": (0.34, 0.34),
            "w8a8_qskd": (0.339, 0.338),
            "w4a4_none": (0.20, 0.21),
            "w4a4_qskd": (0.30, 0.31),
            "w4a4_alignment": (0.29,),
            "w4a4_qdetr": (0.28,),
        }.items()
    }
    rows = [line.split(" | ")[1:] for line in few_bits.goals(ap, "inherit", "short").splitlines()[2:]]
    assert rows[0] == ["w8a8", "QSKD", "0.2 ± 0.6 AP", "2", "yes, within chance |"]
    assert rows[1] == ["w4a4-attn8", "QSKD", "3.5 ± 6.4 AP", "2", "no, within chance |"]
    both, alone = "QSKD and Q-DETR, both", "QSKD and Q-DETR, alignment alone"
    assert rows[2:4] == [  # of QSKD in float
        ["w4a4-attn8", alone, "5.0 AP", "1", "no, within chance |"],
        ["w4a4-attn8", both, "6.0 AP", "1", "no, within chance |"],
    ]
    assert rows[4] == ["w4a4-attn8", "QSKD", "100 ± 0 %", "2", "yes |"]
    assert rows[-2:] == [  # than all queries, and than none
        ["w4a4-attn8", both, "-1.0 AP", "1", "no, within chance |"],
        ["w4a4-attn8", both, "-2.0 AP", "1", "no, within chance |"],
    ]
    assert few_bits.goals({}, "inherit", "short") == ""


@pytest.mark.parametrize("row", sorted(ROWS), ids="-".join)
def test_the_committed_records_of_a_row_are_of_the_recipe_as_it_is_today(row: tuple[str, str, str]) -> None:
    recipe = Cell(*row, seed=0).config(Path("anywhere"))  # once a row: seeds differ in nothing else
    for seed, path in ROWS[row]:
        record = json.loads(path.read_text())
        cell = Cell(*row, seed=seed)
        assert (cell.name, cell.record, record["extra"]) == (record["cell"], path, [])
        assert same(record["config"], recipe.model_copy(update={"seed": seed}))
        assert record["split"] == "test"
        assert record["steps"] == cell.steps


def test_the_documents_say_what_the_records_do() -> None:
    records = report.read_records()
    known = {
        student.teacher: json.loads((RECORDS / f"{student.teacher}.json").read_text())["AP"]
        for name, student in plan.STUDENTS.items()
        if any(record["cell"].startswith(f"{name}-") for record in records)
    }
    for path, document in report.published(program.ROOT, records, known).items():
        assert path.read_text() == document, f"{path.name}: run python -m benchmarks.evidence table"
    assert (RECORDS / "table.md").read_text() == report.whole(records, known)


def test_a_document_without_marks_is_not_written_into() -> None:
    with pytest.raises(ValueError, match="no <!-- benchmarks"):
        report.between_marks("text", "table")


def test_a_record_is_the_cells_whatever_fields_came_after_it(tmp_path: Path) -> None:
    config = Cell("scratch", "qskd", "short", 0).config(tmp_path)
    recorded = meaning(config)
    del recorded["training"]["max_steps"]
    assert not same(recorded, config)
    del recorded["distillation"]["warmup"]
    recorded["training"]["max_steps"] = config.training.max_steps
    assert same(recorded, config)
    assert not same(recorded | {"seed": 3}, config)


def test_every_variant_differs_from_the_default_or_says_why(tmp_path: Path) -> None:
    default = meaning(Cell("scratch", "qskd", "short", 0).config(tmp_path))
    for name in variants.VARIANTS:
        if name not in ("qskd", "none_equal_time"):
            assert meaning(Cell("scratch", name, "short", 0).config(tmp_path)) != default, name


def test_a_student_s_task_has_what_its_own_missing_cells_need_and_not_another_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A teacher of one map has no second one to be cached, as a row of another student asks."""
    made: list[dict[str, set[str]]] = []
    monkeypatch.setattr(program, "make_task", lambda work, wanted: made.append(wanted))
    monkeypatch.setattr(program, "run_all", lambda missing, work, processes: None)
    monkeypatch.setattr(program, "write_table", lambda work: None)
    named = ["--students", "inherit", "maps", "--budgets", "short"]
    assert program.main([*named, "--seeds", "999"]) == 0  # of which there are no records
    assert made == [{name: set(plan.STUDENTS[name].rows["short"]) for name in ("inherit", "maps")}]
    assert program.main([*named[:2], "--variants", "none", "--budgets", "short", "--seeds", "0"]) == 0
    assert len(made) == 1  # nothing is missing


def test_each_teacher_is_made_again_as_the_one_of_its_records_was(tmp_path: Path) -> None:
    """The one of 300 queries, as the package's own, is from before fresh flips were the default."""
    flips = {name: teachers.recipe(tmp_path, name).data.views.derived_taken for name in teachers.STEPS}
    assert flips == {teachers.MANY: "none", teachers.MAPS: "flip", teachers.SIDES: "flip"}


def test_a_backbone_is_made_where_there_is_no_work_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "IMAGES", backbone.IMAGES.model_copy(update={"images": 16}))
    assert backbone.main([str(tmp_path / "made"), "--work", str(tmp_path / "work"), "--epochs", "1"]) == 0
    assert (tmp_path / "made/model.safetensors").is_file()


def test_a_field_that_is_set_never_joins_the_rows_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--students", "inherit", "--set", "training.learning_rate=1.0"]) == 1
    assert "--split val" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("student", sorted(plan.STUDENTS))
def test_every_planned_row_is_a_recipe(student: str) -> None:
    """A field of one method in a student's own fields would refuse its rows of another."""
    for variant in sorted({name for rows in plan.STUDENTS[student].rows.values() for name in rows}):
        if not variants.VARIANTS[variant].time_of:  # `clock` knows one student
            Cell(student, variant, "short", 0).config(Path("anywhere"))


def test_a_cell_runs_is_recorded_tracked_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"train": 16, "val": 8, "test": 8}  # an epoch is one step
    small = {name: shapes.model_copy(update={"images": sizes[name]}) for name, shapes in task.SPLITS.items()}
    monkeypatch.setattr(task, "SPLITS", small)
    monkeypatch.setitem(plan.BUDGETS, "short", 3)
    for module in (evidence.cells, evidence.report, program):
        monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    marks = "before <!-- benchmarks.evidence --> old <!-- end of benchmarks.evidence --> after"
    (tmp_path / "docs").mkdir()
    documents = [tmp_path / "docs" / name for name in ("evidence.md", "quantization.md")]
    for document in documents:
        document.write_text(marks)
    monkeypatch.setattr(program, "ROOT", tmp_path)
    for name in (teachers.MANY, teachers.MAPS, teachers.SIDES):
        monkeypatch.setitem(teachers.STEPS, name, 1)
    monkeypatch.setattr(backbone, "IMAGES", backbone.IMAGES.model_copy(update={"images": 16}))
    work = tmp_path / "work"
    task.make_task(work, dict.fromkeys(("scratch", "many", "near"), ()))
    found = {}
    for variant in ("none", "qskd", "global"):
        cell = Cell("scratch", variant, "short", 7)
        found[variant] = cells.run(cell, work)
        assert cells.finished(cell, work) == json.loads(cell.record.read_text())
        assert found[variant]["steps"] == 3
        assert found[variant]["curve"][-1]["step"] == 3
        assert {"matched_kl", "matched_iou", "memory_cosine"} <= found[variant]["curve"][-1].keys()
    assert "agfd" in found["qskd"]["losses_of_last_epoch"]
    assert "agfd" not in found["none"]["losses_of_last_epoch"]
    many = cells.run(Cell("many", "qskd", "short", 7), work)
    assert many["config"]["teacher"]["path"] == teachers.MANY
    assert many["config"]["student"]["queries"] == 100
    assert load_detector(work / teachers.MANY).model.config.num_queries == 300
    near = cells.run(Cell("near", "none", "short", 7), work)
    assert near["config"]["student"]["backbone"]["init"] == plan.STUDENTS["near"].backbone
    assert near["config"]["student"]["backbone"]["hidden_sizes"] == [48, 96]
    few = replace(variants.VARIANTS["qskd_flips_unlabeled6"], unlabeled=16)
    monkeypatch.setitem(variants.VARIANTS, "qskd_flips_unlabeled6", few)
    task.make_task(work, {"scratch": ("qskd_flips_unlabeled6",)})
    unlabelled = cells.run(Cell("scratch", "qskd_flips_unlabeled6", "short", 7), work)
    assert unlabelled["config"]["data"]["unlabeled"] == ["unlabeled16"]
    monkeypatch.setattr(task, "SELECTED", 4)
    chosen = cells.run(Cell("scratch", "qskd_flips_whitened_uncertainty", "short", 7), work)
    assert chosen["config"]["data"]["selection"] == ["scratch-uncertainty4"]
    assert len(json.loads((work / "selected/scratch-uncertainty4-seed7.json").read_text())["images"]) == 4
    task.make_task(work, {"scratch": ("w4a4_qdetr",)})
    for variant in ("w4a4_after_none", "w2a2_after_none", "w4a4_qdetr"):
        cell = Cell("scratch", variant, "short", 7)
        found[variant] = cells.run(cell, work)
        assert cells.finished(cell, work) == json.loads(cell.record.read_text())
        assert found[variant]["config"]["student"]["quantization"]["bits"] == f"{variant[:4]}-attn8"
    assert (
        found["w4a4_after_none"]["float_metrics"] == found["none"]["metrics"]
    )  # the same training, quantised after it
    assert len(list((work / "students").iterdir())) == 1  # trained once for all bits
    assert "qdetr" in found["w4a4_qdetr"]["losses_of_last_epoch"]
    told = ("told_onnx", "told_json")
    task.make_task(work, {"scratch": told})
    for variant in told:
        found[variant] = cells.run(Cell("scratch", variant, "short", 7), work)
        assert "lapd_class" in found[variant]["losses_of_last_epoch"]
        assert found[variant]["losses_of_last_epoch"].get("agfd", 0) == 0
        assert found[variant]["config"]["teacher"]["path"].startswith(("model.onnx", "detections.json"))
    task.make_task(work, {"maps": ("qskd_flips_coarse",)})
    coarse = cells.run(Cell("maps", "qskd_flips_coarse", "short", 7), work)
    assert coarse["config"]["teacher"] == coarse["config"]["teacher"] | {"path": teachers.MAPS, "levels": [1]}
    task.make_task(work, {"sides": ("qskd_ld",)})
    sides = cells.run(Cell("sides", "qskd_ld", "short", 7), work)
    assert {"localization_ld_main", "localization_ld_region", "agfd"} <= sides["losses_of_last_epoch"].keys()
    assert {"AP75", "AP90"} <= sides["metrics"].keys()
    changed = Cell("scratch", "none", "short", 7, extra=("training.learning_rate=1.0",))
    assert cells.finished(changed, work) is None
    program.track(Cell("scratch", "qskd", "short", 7), found["qskd"], work)
    named = ["--work", str(work), "--students", "scratch", "--variants", "none", "qskd", "--budgets", "short"]
    assert program.main([*named, "--seeds", "7"]) == 0
    told = capsys.readouterr().out
    assert "2 of them have a record" in told
    assert "| QSKD, not whitened | 0.0 (1) |" in told
    for document, row in zip(documents, ("| QSKD, not whitened | 0.0 (1) |", "| w4a4-attn8 | "), strict=True):
        assert "before" in document.read_text()
        assert row in document.read_text()
    assert (tmp_path / "records" / "scratch.png").stat().st_size > 10_000
