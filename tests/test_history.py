"""A run's record of its reports: rows survive the process that made them until a sweep's driver has heard of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.run.folder import Folder
from pipelines.run.history import Rows, add_report, add_trial_report, best_ap, read_history, rows_until
from pipelines.training.checkpoint_list import LIST
from pipelines.tuning.trial.reports import catch_up
from qskd.config.recipe import load


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(load(None, [f"output={tmp_path}", "name=it"]))


def row(step: int) -> Rows:
    return [(step, {"loss/total": float(step)})]


def steps(rows: Any) -> list[int]:
    return [step for step, _ in rows]


def trial(folder: Folder, step: int) -> None:
    """A row every 2 steps, a report every 4, an evaluation every 8."""
    add_trial_report(folder, step, 1, {"AP": step / 100} if step % 8 == 0 else {}, row(step - 2) + row(step))


def test_an_evaluation_takes_along_all_rows_since_the_one_before(folder: Folder) -> None:
    for step in range(4, 25, 4):
        trial(folder, step)
        if step % 8 == 0:
            assert steps(rows_until(read_history(folder), step)) == [step - 6, step - 4, step - 2, step]


def test_rows_of_the_last_evaluation_and_later_ones_are_kept_and_older_ones_are_not(folder: Folder) -> None:
    for step in range(4, 29, 4):
        trial(folder, step)
    history = read_history(folder)
    assert steps(rows_until(history, 24)) == [18, 20, 22, 24]
    assert steps(rows_until(history, 32)) == [26, 28]
    assert steps(rows_until(history, 16)) == []


def test_what_was_done_after_the_checkpoint_is_replaced_when_it_is_done_again(folder: Folder) -> None:
    for step in (4, 8, 12, 16, 12, 16):
        trial(folder, step)
    assert [entry["step"] for entry in read_history(folder)] == [4, 8, 12, 16]
    assert steps(rows_until(read_history(folder), 16)) == [10, 12, 14, 16]
    add_report(folder, 8, 1, {}, row(8))
    assert [entry["step"] for entry in read_history(folder)] == [4, 8]


def test_the_best_ap_is_of_earlier_evaluations_only(folder: Folder) -> None:
    assert best_ap(read_history(folder), 100) == -1.0
    for step in (8, 16, 24):
        trial(folder, step)
    assert best_ap(read_history(folder), 24) == 0.16
    assert best_ap(read_history(folder), 8) == -1.0


def test_a_report_that_only_ray_heard_of_is_noted_with_its_student(folder: Folder) -> None:
    catch_up(folder)  # nothing there yet
    assert not read_history(folder)
    trial(folder, 8)
    folder.write("student/model.safetensors", "of step 8")
    folder.write("train/checkpoint_2/student/model.safetensors", "of step 16")
    said = {"step": 16, "epoch": 1, "evaluation": {"AP": 0.5}, "rows": row(16)}
    listed = {"latest_checkpoint_result": {"metrics": said, "checkpoint_dir_name": "checkpoint_2"}}
    folder.write(LIST, json.dumps(listed))
    for _ in range(2):  # the second finds it noted
        catch_up(folder)
        assert [(entry["step"], entry["evaluation"]) for entry in read_history(folder)] == [
            (8, {"AP": 0.08}),
            (16, {"AP": 0.5}),
        ]
        assert folder.read("student/model.safetensors") == "of step 16"


def test_a_worse_report_that_only_ray_heard_of_leaves_the_student(folder: Folder) -> None:
    trial(folder, 8)
    folder.write("student/model.safetensors", "of step 8")
    folder.write("train/checkpoint_2/student/model.safetensors", "of step 16")
    said = {"step": 16, "epoch": 1, "evaluation": {"AP": 0.01}, "rows": row(16)}
    folder.write(
        LIST, json.dumps({"latest_checkpoint_result": {"metrics": said, "checkpoint_dir_name": "checkpoint_2"}})
    )
    catch_up(folder)
    assert read_history(folder)[-1]["step"] == 16
    assert folder.read("student/model.safetensors") == "of step 8"
