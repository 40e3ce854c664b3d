"""Runs, sweeps, checkpoints, and folders that may not be the same: a stranger's file in their way stays, byte for byte."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from strangers import NOTES, config, refused, strangers, tree
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.run.files import files_in
from pipelines.run.folder import MARK, Folder
from pipelines.run.guards import alone_on
from pipelines.run.ownership import check_ours, claim, delete_run, foreign
from pipelines.run.places import check_places
from pipelines.training import driver as distill
from pipelines.training.checkpoint_list import LIST, delete_unlisted
from pipelines.tuning import driver as tune
from pipelines.tuning.search.request import SearchRequest
from pipelines.tuning.trial.checkpoints import _keep
from qskd.config import Config
from qskd.config.recipe import replace_fields, to_yaml
from qskd.errors import QskdError

# --- runs and sweeps --------------------------------------------------------------------------------------------------
VERBS: dict[str, Callable[[Config, bool], Any]] = {
    "distill": lambda config, restart: distill.run(config, "distill", restart),
    "train": lambda config, restart: distill.run(config, "train", restart),
    "tune": lambda config, restart: tune.run(config, tune.TuneRequest(SearchRequest(("loss_weights",))), restart),
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_a_strangers_folder_is_neither_deleted_nor_written_to(verb: str, restart: bool, here: Path) -> None:
    strangers(here / "Documents")
    at = config(here, f"output={here}", "name=Documents")
    error = refused(lambda: VERBS[verb](at, restart), "a folder that qskd did not make, with .*letter.txt", here)
    assert str(here / "Documents") in str(error)


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_refuses_what_the_run_would(verb: str, here: Path) -> None:
    strangers(here / "runs" / "run")
    (here / "recipe.yaml").write_text(to_yaml(config(here)))
    before = tree(here)
    space = ["--space", "loss_weights"] if verb == "tune" else []
    result = CliRunner().invoke(app, [verb, str(here / "recipe.yaml"), "--dry-run", *space])
    assert isinstance(result.exception, QskdError)
    assert "qskd did not make" in str(result.exception)
    assert tree(here) == before


SWEEP = ("sweep.json", "refused.json", "best.yaml", "report/index.html", "report/history.png", "trials/0007/trial.json",
         "trials/0007/checkpoints/000000003/student/model.safetensors")  # fmt: skip
RUN = ("config.yaml", "data.json", "history.json", "mlflow.json", "result.json", "failure.json", "inheritance.txt",
       "checkpoints.json", "student/config.json", LIST, "train/.validate_storage_marker",
       "train/checkpoint_2026-01-01_00-00-00.000000/state.safetensors")  # fmt: skip


def made(folder: Folder, *more: str) -> None:
    claim(folder, "train", "run")
    for name in (*RUN, *SWEEP, *more):
        folder.write(name, NOTES.decode())


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "student/notes.txt", "student/model.onnx", "train/notes.txt", "train/checkpoint_1/notes.txt", ".git/HEAD",
     "trials/notes.txt", "trials/mine/config.yaml", "trials/0007/notes.txt", "report/thesis.pdf", "another/config.yaml"],
)  # fmt: skip
def test_a_run_with_a_strangers_file_in_it_is_not_deleted(name: str, tmp_path: Path) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    made(folder, name)
    error = refused(lambda: delete_run(folder), re.escape(name), tmp_path)
    assert "move them away" in error.remedy
    refused(lambda: check_ours(folder, restart=True), re.escape(name), tmp_path)
    check_ours(folder)  # the run itself may go on


def test_a_run_of_ours_is_deleted_to_its_last_file_and_links_are_not_followed(tmp_path: Path) -> None:
    folder, outside = Folder(Config(name="run", output=str(tmp_path))), tmp_path / "outside"
    theirs = strangers(outside)
    (outside / "history.json").write_bytes(NOTES)
    theirs["history.json"] = NOTES
    made(folder)
    assert foreign(files_in(folder)) == []
    for link in ("student/README.md", "trials/0008"):  # names that a run writes, but not as links
        (tmp_path / "run" / link).symlink_to(outside, target_is_directory=True)
        refused(lambda: delete_run(folder), link, tmp_path)
        (tmp_path / "run" / link).unlink()
    delete_run(folder)
    assert not (tmp_path / "run").exists()
    delete_run(folder)  # nothing is there
    assert tree(outside) == theirs


def test_what_comes_while_a_run_is_deleted_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    made(folder)
    delete = Folder.delete

    def deleting(self: Folder, name: str) -> None:
        if name == MARK:
            (tmp_path / "run/student/late.txt").write_bytes(NOTES)
        delete(self, name)

    monkeypatch.setattr(Folder, "delete", deleting)
    delete_run(folder)
    assert tree(tmp_path) == {"run/student/late.txt": NOTES}


def test_a_run_of_before_there_were_marks_is_known_by_its_records(tmp_path: Path) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    folder.write("config.yaml", to_yaml(Config(name="run")))
    refused(lambda: check_ours(folder), "did not make", tmp_path)  # a recipe alone may lie anywhere
    folder.write("data.json", json.dumps({"data.train": "a", "data.val": "b"}))
    check_ours(folder, restart=True)
    folder.write("config.yaml", "cut in the mid")
    refused(lambda: check_ours(folder), "did not make", tmp_path)
    folder.write("mlflow.json", json.dumps({"uri": "sqlite:///x", "run_id": "1"}))
    check_ours(folder)
    delete_run(folder)
    assert not (tmp_path / "run").exists()


def test_the_lock_beside_a_run_empties_no_file(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").write_bytes(NOTES)
    with alone_on(Folder(Config(name="run", output=str(tmp_path)))):
        pass
    assert (tmp_path / ".run.lock").read_bytes() == NOTES


def test_uploads_replace_only_files_of_their_names(tmp_path: Path) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    made(folder, "student/notes.txt")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text("new")
    before = tree(tmp_path / "run")
    folder.upload(tmp_path / "new", "student")
    assert tree(tmp_path / "run") == before | {"student/config.json": b"new"}


# --- checkpoints ------------------------------------------------------------------------------------------------------
def test_pruning_deletes_checkpoints_and_nothing_that_lies_among_them(tmp_path: Path, caplog: Any) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    strange = ("train/notes.txt", "train/checkpoint_notes", "train/checkpoint_1/notes.txt", "checkpoints/best/state.json",
               "checkpoints/notes.txt", "checkpoints/000000001/thesis.tex")  # fmt: skip
    ours = ("train/checkpoint_1/state.json", "train/checkpoint_2/state.json", "checkpoints/000000001/state.json",
            "checkpoints/000000002/student/config.json", "checkpoints/000000003/state.json")  # fmt: skip
    for name in (*strange, *ours):
        folder.write(name, NOTES.decode())
    empty = {"checkpoint_results": [], "pending_training_results": [], "latest_checkpoint_result": None}
    folder.write(LIST, json.dumps(empty))
    delete_unlisted(folder)
    _keep(folder, {3})
    left = set(tree(tmp_path / "run")) - {LIST}
    assert left == {*strange, "checkpoints/000000003/state.json"}
    assert all((tmp_path / "run" / name).read_bytes() == NOTES for name in strange)
    assert "notes.txt" in caplog.text
    assert "thesis.tex" in caplog.text


# --- places that are the same -----------------------------------------------------------------------------------------
READ = ["data.train", "data.val", "teacher.path", "teacher.cache.path", "student.init", "student.backbone.init"]


@pytest.mark.parametrize("how", ["is", "contains", "lies in", "link"])
@pytest.mark.parametrize("field", READ)
def test_a_run_in_what_it_reads_is_refused_by_name(field: str, how: str, here: Path) -> None:
    (here / "place").mkdir()
    (here / "link").symlink_to(here / "place")
    (here / "place/inner").mkdir()
    where = {"is": "place", "contains": "place/inner", "lies in": "place", "link": "link"}[how]
    output, name = (here / "place", "new") if how == "lies in" else (here, "place")
    at = config(here, f"output={output}", f"name={name}", f"{field}={here / where}")
    said = rf"output/name: .* {'is' if how == 'link' else how} {re.escape(field)}"
    refused(lambda: check_places(at, "distill"), said, here)
    if field.startswith("data"):
        for verb in VERBS.values():
            refused(lambda verb=verb: verb(at, True), said, here)  # type: ignore[misc]


def test_a_run_that_is_the_working_or_the_home_folder_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "project/work").mkdir(parents=True)
    monkeypatch.chdir(here / "project/work")
    monkeypatch.setenv("HOME", str(here / "home/me"))
    (here / "home/me").mkdir(parents=True)
    for place, said in {
        "project/work": "is the working folder",
        "project": "contains the working folder",
        "home/me": "is the home folder",
        "home": "contains the home folder",
    }.items():
        output, name = os.path.split(here / place)
        refused(lambda at=config(here, f"output={output}", f"name={name}"): check_places(at, "train"), said, here)  # type: ignore[misc]
    check_places(config(here, "output=runs"), "train")  # below the working folder, as ever
    check_places(config(here, f"output={here}/home/me"), "train")


def test_places_of_uris_are_compared_by_their_names() -> None:
    def at(**paths: str) -> Config:
        fields = {
            "output": "s3://b/runs?region=x",
            "name": "run",
            "data.train": "s3://b/train",
            "data.val": "s3://b/val",
        }
        return replace_fields(
            Config(), fields | {name.replace("__", "."): path for name, path in paths.items()}, "test"
        )

    check_places(at(), "train")
    check_places(at(data__train="s3://other/runs/run", data__val="s3://b/runs/run-2"), "train")
    for path, said in {
        "s3://b/runs/run/": "is data.train",
        "s3://b/runs/./run/train?scheme=http": "contains data.train",
        "s3://b/runs": "lies in data.train",
    }.items():
        with pytest.raises(QskdError, match=said):
            check_places(at(data__train=path), "train")
