"""Files of a run that are cut in the middle: the run goes on to the weights of an undisturbed one, or the file is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import load_file, save_file
from sweeps import config, make_work, work  # noqa: F401  (fixtures)

from pipelines.inspection.explain import read_source
from pipelines.run.folder import FAILURE, SWEEP, TRIAL, Folder, raise_failure
from pipelines.run.guards import DATA, check_same_data, check_same_run
from pipelines.run.history import read_history
from pipelines.run.ownership import claim
from pipelines.run.tracked import RUN, open_for
from pipelines.training import driver as distill
from pipelines.training.checkpoint_list import LIST, last_report, mend_list
from pipelines.tuning.records import REFUSED, Records, Refusal
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.row import TrialRow
from pipelines.tuning.trial.run import run_trial
from qskd.config import Config
from qskd.config.recipe import load, to_tree, to_yaml
from qskd.detectors.checkpoint import replacing
from qskd.errors import QskdError
from qskd.storage.files import publish, publish_bytes


def cut(path: str | Path) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


# --- a trial of a sweep, which trains in this process ---------------------------------------------------------------------
class Killed(BaseException):
    """What ends a process between two lines."""


def trial(work: Path, root: Path) -> Config:
    every = "training.checkpoint_every_steps=1"
    return config(work, "'0001'", f"output={root}", "teacher.cache.path=", every)


def train(one: Config, killed_after: int = 0) -> list[str]:
    """The failures that were sent."""
    heard: list[dict[str, Any]] = []

    def send(report: dict[str, Any]) -> None:
        heard.append(report)
        if killed_after and len(heard) == killed_after:
            raise Killed

    Folder(one).write(TRIAL, "{}")  # the driver's
    try:
        run_trial(Job(1, to_tree(one)), send)
    except Killed:
        assert killed_after
    return [report["failed"] for report in heard if "failed" in report]


@dataclass(frozen=True)
class Trained:
    killed: Path
    state: dict[str, torch.Tensor]
    history: list[tuple[int, dict[str, float]]]


def outcome(one: Config) -> tuple[dict[str, torch.Tensor], list[tuple[int, dict[str, float]]]]:
    folder = Folder(one)
    (last,) = Path(folder.root, "checkpoints").iterdir()
    return load_file(last / "state.safetensors"), [(e["step"], e["evaluation"]) for e in read_history(folder)]


@pytest.fixture(scope="module")
def trained(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    assert not train(trial(work, whole))
    train(trial(work, killed), killed_after=2)
    return Trained(killed, *outcome(trial(work, whole)))


@pytest.mark.parametrize(
    "name",
    [
        "state.safetensors",
        "state.json",
        "student/model.safetensors",
        "student/config.json",
        "../../history.json",
        "../../checkpoint.json",
    ],
)
def test_a_trial_with_a_cut_file_goes_on_to_the_weights_of_an_undisturbed_one(
    name: str, work: Path, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained.killed, tmp_path, dirs_exist_ok=True)
    one = trial(work, tmp_path)
    checkpoints = Path(Folder(one).root, "checkpoints")
    last = max(checkpoints.iterdir())
    cut(last / name)
    assert not train(one)
    state, history = outcome(one)
    assert history == trained.history
    assert [name for name, tensor in trained.state.items() if not torch.equal(tensor, state[name])] == []
    assert os.path.normpath(last / name) in caplog.text
    assert "DAMAGED" in caplog.text


def test_a_trial_without_a_whole_checkpoint_names_the_files_and_deletes_nothing(
    work: Path, trained: Trained, tmp_path: Path
) -> None:
    shutil.copytree(trained.killed, tmp_path, dirs_exist_ok=True)
    one = trial(work, tmp_path)
    found = sorted(Path(Folder(one).root, "checkpoints").iterdir())
    assert len(found) == 2
    cut(found[0] / "state.json")
    (found[1] / "state.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    (said,) = train(one)
    assert f"{found[0] / 'state.json'} has " in said
    assert f"{found[1] / 'state.safetensors'} is missing" in said
    assert "nothing was deleted" in said
    assert sorted(tmp_path.rglob("*")) == before


# --- Ray Train's list -----------------------------------------------------------------------------------------------------
def listed(folder: Folder, count: int) -> list[str]:
    """So many checkpoints and Ray's list of them."""
    names = [f"checkpoint_{number}" for number in range(count)]
    for number, name in enumerate(names):
        path = Path(folder.root, "train", name)
        path.mkdir(parents=True)
        save_file({"a": torch.arange(100.0)}, path / "state.safetensors")
        (path / "state.json").write_text(json.dumps({"step": number, "metrics": {}}))
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {"step": n}} for n, name in enumerate(names)]
    rest: dict[str, Any] = {
        "ray_version": "2",
        "current_report_index": count,
        "pending_training_results": [results[-1]],
    }
    tree = {
        **rest,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(count)),
        "latest_checkpoint_result": results[-1],
        "pending_validation_specs": [True],
    }
    folder.write(LIST, json.dumps(tree))
    return names


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "empty", "missing", "folder missing"])
def test_ray_goes_on_from_the_last_whole_checkpoint(
    file: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(Config(output=str(tmp_path)))
    names = listed(folder, 2)
    mend_list(folder)
    assert last_report(folder) == ({"step": 1}, f"train/{names[1]}")
    path = Path(folder.root, "train", names[1], file)
    if how == "folder missing":
        shutil.rmtree(path.parent)
    elif how == "missing":
        path.unlink()
    else:
        cut(path) if how == "cut" else path.write_bytes(b"")
    mend_list(folder)
    assert last_report(folder) == ({"step": 0}, f"train/{names[0]}")
    assert str(path) in caplog.text
    found = json.loads(folder.read(LIST))
    assert [len(found[name]) for name in ("checkpoint_results", "checkpoint_report_indices")] == [1, 1]
    assert found["pending_training_results"] == found["pending_validation_specs"] == []


def test_without_a_whole_checkpoint_the_files_and_the_choices_are_named_and_nothing_is_deleted(
    work: Path, tmp_path: Path
) -> None:
    one = config(work, "nothing-whole", f"output={tmp_path}")
    folder = Folder(one)
    for name in listed(folder, 2):
        cut(f"{folder.root}/train/{name}/state.safetensors")
    claim(folder, "train", one.name)
    before = folder.read(LIST)
    with pytest.raises(QskdError) as told:  # before Ray is started
        distill.run(one, "train")
    for name in ("checkpoint_0", "checkpoint_1"):
        assert f"{folder.root}/train/{name}/state.safetensors has " in told.value.found
        assert folder.exists(f"train/{name}/state.json")
    assert f"deletes all of {folder.path}" in told.value.remedy
    assert folder.read(LIST) == before


# --- records --------------------------------------------------------------------------------------------------------------
def recipe(root: Path) -> Config:
    return load(
        None, [f"output={root}/runs", "name=it", f"tracking.uri=sqlite:///{root}/a.db", "tracking.experiment=e"]
    )


def use_records(one: Config) -> Any:
    records = Records(one)
    facts = records.settle({"algorithm": "tpe", "trials": 3})
    return records.rows, records.refused, facts


RECORDS: dict[str, tuple[Callable[[Config], Any], Callable[[Config], Any]]] = {
    # name: (what writes it, what reads it on the same command's second try)
    "config.yaml": (
        lambda one: Folder(one).write_record("config.yaml", to_yaml(one)),
        lambda one: (check_same_run(Folder(one), one), read_source(Folder(one).path).config),
    ),
    DATA: (
        lambda one: check_same_data(Folder(one), {"data.train": "abc", "data.val": "def"}),
        lambda one: check_same_data(Folder(one), {"data.train": "abc", "data.val": "def"}),
    ),
    "history.json": (
        lambda one: Folder(one).write_record("history.json", json.dumps([{"step": 1, "evaluation": {}}])),
        lambda one: read_history(Folder(one)),
    ),
    "result.json": (
        lambda one: Folder(one).write_record(
            "result.json", json.dumps(distill.RunResult("a", "b", {"AP": 0.5}, "c", 1.0).__dict__)
        ),
        lambda one: distill.read_result(Folder(one)),
    ),
    SWEEP: (use_records, use_records),
    "trials/0000/trial.json": (lambda one: (use_records(one), Records(one).put(TrialRow(0))), use_records),
    REFUSED: (lambda one: (use_records(one), Records(one).refuse(Refusal(0, {}, 0.5, "large"))), use_records),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_cut_record_is_read_from_its_copy_and_named_and_without_one_the_file_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = recipe(tmp_path)
    write, read = RECORDS[name]
    write(one)
    folder = Folder(one)
    expected = read(one)
    assert "DAMAGED" not in caplog.text
    path = Path(folder.root, name)
    whole = path.read_bytes()
    for length in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1}):
        caplog.clear()
        path.write_bytes(whole[:length])
        assert read(one) == expected
        assert f"{path} IS DAMAGED" in caplog.text
    (copy,) = Path(folder.root).rglob(f"copies/{path.name}")
    for damage in (b"", b"\xff\xfe\x00", b"[" * 100_000):
        copy.write_bytes(damage)
        path.write_bytes(damage)
        with pytest.raises(QskdError) as told:
            read(one)
        assert told.value.where == str(path)
        assert str(copy) in told.value.found
        assert "nothing was changed or deleted" in told.value.remedy
        assert path.read_bytes() == damage


def test_a_cut_mlflow_file_is_read_from_its_copy_and_without_one_a_new_run_is_begun_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = recipe(tmp_path)
    folder = Folder(one)
    first = open_for(folder, one, "train").run_id
    path = Path(folder.root, RUN)
    cut(path)
    assert open_for(folder, one, "train").run_id == first
    assert f"{path} IS DAMAGED" in caplog.text
    cut(path)
    cut(Path(folder.root, "copies", RUN))
    assert open_for(folder, one, "train").run_id != first
    assert "A NEW MLFLOW RUN IS BEGUN" in caplog.text
    assert str(path) in caplog.text


def test_a_cut_word_of_a_worker_is_named(tmp_path: Path) -> None:
    folder = Folder(recipe(tmp_path))
    folder.write(FAILURE, QskdError("a", "b").to_json()[:8])
    with pytest.raises(QskdError, match=FAILURE):
        raise_failure(folder)


# --- durability -----------------------------------------------------------------------------------------------------------
def test_bytes_are_on_the_disk_before_a_name_points_to_them_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(handle: int) -> None:
        fsync(handle)
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))

    def moved(source: Any, target: Any, how: Callable[[Any, Any], None] = replace) -> None:
        how(source, target)
        done.append(("move", str(target)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    monkeypatch.setattr(os, "rename", lambda source, target: moved(source, target, rename))
    local = pafs.LocalFileSystem()
    publish_bytes(b"x", local, str(tmp_path / "new" / "a"))
    names = [(what, Path(path).parent if what == "move" else Path(path)) for what, path in done]
    assert names[0] == ("sync", tmp_path)  # the new folder's own name
    assert names[1][1].parent == tmp_path / "new"  # the spool
    assert names[2:] == [("move", tmp_path / "new"), ("sync", tmp_path / "new")]
    done.clear()
    (tmp_path / "spool").write_bytes(b"y")
    publish(tmp_path / "spool", local, str(tmp_path / "b"))
    assert done == [("sync", str(tmp_path / "spool")), ("move", str(tmp_path / "b")), ("sync", str(tmp_path))]
    done.clear()
    with replacing(tmp_path / "folder") as fresh:
        (fresh / "config.json").write_text("{}")
    at = done.index(("move", str(tmp_path / "folder")))
    assert ("sync", f"{fresh}/config.json") in done[:at]
    assert done[at + 1] == ("sync", str(tmp_path))
