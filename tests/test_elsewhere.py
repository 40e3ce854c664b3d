"""A cluster that was started elsewhere: its workers' working folder is not the driver's, and what the driver names is found all the
same; what they say of it comes back to whoever gave the command."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from tiny import recipe

from pipelines.demo.quickstart import TEACHER
from pipelines.inspection import evaluate as evaluation
from pipelines.labelling import job as labelling
from pipelines.prepare import prepare
from pipelines.run.folder import FAILURE, Folder
from pipelines.run.places import for_workers
from pipelines.training import driver, trainer, worker
from qskd.config import Config
from qskd.config.recipe import to_tree
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.errors import QskdError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a teacher, pictures and shards in it."""
    annotations, images = make_shapes(ShapesConfig(images=2), tmp_path / "coco")
    prepare(annotations, images, str(tmp_path / "shards"), quiet=True)
    shutil.copytree(TEACHER, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_for_workers_is_whole_and_names_uris_and_those_of_a_job_stay(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert for_workers("teacher") == str(here / "teacher")
    for name in ("PekingU/rtdetr_r50vd", "s3://bucket/shards", str(here / "shards")):
        assert for_workers(name) == name
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert for_workers("teacher") == "teacher"  # each node has a copy of the working folder, perhaps elsewhere


def test_an_evaluations_processes_and_a_labellings_get_whole_paths(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def on_cluster(job: Any, *_: Any) -> list[Any]:
        seen.append(job)
        return []

    monkeypatch.setattr(evaluation, "_on_cluster", on_cluster)
    evaluation.evaluate("teacher", "shards", workers=1)
    (job,) = seen
    assert (job.model, job.data) == (str(here / "teacher"), str(here / "shards"))
    plan = labelling.make_plan(labelling.Request("teacher", Path("coco/images"), Path("labels.json")))
    assert (plan.job.model, plan.job.root) == (str(here / "teacher"), str(here / "coco/images"))
    assert os.path.isabs(plan.job.parts)


def test_a_trainings_workers_are_told_the_drivers_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(trainer, "check_room", lambda *_: None)
    config = recipe(None, "output=runs", "name=it")
    made = trainer.make_trainer(config, None, Folder(config), [])  # type: ignore[arg-type]
    assert made.train_loop_config["config"]["output"] == str(here / "runs")


def test_a_worker_that_does_not_see_the_drivers_folder_leaves_no_word_where_the_driver_does_not_look(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word of its own would tell the worker that is begun again to give up in silence."""

    class Context:
        def get_world_rank(self) -> int:
            return 0

        get_world_size = get_world_rank

    monkeypatch.setattr("ray.train.get_context", Context)
    config = Config(name="it", output=str(here / "of the node"))
    with pytest.raises(QskdError, match="the driver's folder is not there"):
        worker.train_worker({"config": to_tree(config), "stream": None})
    assert not Folder(config).exists(FAILURE)


def test_what_a_worker_ended_with_is_the_users_error_and_not_rays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = QskdError("runs/it", "the driver's folder is not there", "a folder that all nodes see", "--set output=...")
    wrapped = UserExceptionWithTraceback(said, "Traceback ...")
    ended = pickle.loads(pickle.dumps(WorkerGroupError("of rank 1", {0: RuntimeError("lost"), 1: wrapped})))
    assert str(driver.told_by_a_worker(ended)) == str(said)
    assert driver.told_by_a_worker(WorkerGroupError("of rank 0", {0: RuntimeError("lost")})) is None
    assert driver.told_by_a_worker(ValueError("another")) is None
