"""Ray Train's list of checkpoints: mended where it is half a list, and what it does not name is deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.run.folder import Folder
from pipelines.training.checkpoint_list import COPY, LIST, delete_unlisted, keep_list, last_report, mend_list
from qskd.config import Config


def test_checkpoints_that_no_list_names_are_deleted_and_all_others_stay(tmp_path: Path) -> None:
    folder = Folder(Config(output=str(tmp_path)))
    delete_unlisted(folder)  # nothing there, as before a first run
    names = [f"checkpoint_{number}" for number in range(5)]
    for name in names:
        folder.write(f"train/{name}/state.json", "{}")
    folder.write("train/notes.json", "{}")
    of = [{"checkpoint_dir_name": name} for name in names]
    whole = {"checkpoint_results": of[:1], "pending_training_results": of[1:2], "latest_checkpoint_result": of[2]}
    for unreadable in ("", json.dumps(whole)[:30]):
        folder.write(LIST, unreadable)
        delete_unlisted(folder)
        assert all(folder.exists(f"train/{name}/state.json") for name in names)
    folder.write(LIST, json.dumps(whole))
    delete_unlisted(folder)
    assert [folder.exists(f"train/{name}") for name in names] == [True, True, True, False, False]
    assert folder.exists("train/notes.json")


def test_half_a_list_of_checkpoints_becomes_its_copy_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Folder(Config(output=str(tmp_path)))
    mend_list(folder)  # there is none, as before a first run
    whole = json.dumps({"latest_checkpoint_result": {"metrics": {"step": 7}, "checkpoint_dir_name": "checkpoint_x"}})
    folder.write(LIST, whole)
    keep_list(folder)
    for broken in ("", whole[:20]):
        folder.write(LIST, broken)
        keep_list(folder)  # half a list is no copy
        mend_list(folder)
        assert folder.read(LIST) == whole
        assert last_report(folder) == ({"step": 7}, "train/checkpoint_x")
    folder.delete(COPY)
    folder.write(LIST, "")
    mend_list(folder)
    assert not folder.exists(LIST)
    assert last_report(folder) is None
    assert "the training begins anew" in caplog.text
