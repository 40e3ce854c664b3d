"""One trial of a sweep in this process, without Ray's Tune: which weights it goes on from, and which it leaves to others."""

from __future__ import annotations

import pickle
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError
from sweeps import config, make_work, work  # noqa: F401  (fixtures)

from pipelines.run.folder import TRIAL, Folder
from pipelines.tuning.trial import run
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.run import run_trial
from qskd.config import Config
from qskd.config.recipe import replace_fields, to_tree
from qskd.datasets.manifest import load_manifest
from qskd.errors import QskdError
from qskd.storage.stores import PATIENCE, patiently


class Killed(BaseException):
    """What ends a process between two lines."""


def checkpoints(one: Config) -> list[int]:
    return sorted(int(path.name) for path in (Path(Folder(one).root) / "checkpoints").iterdir())


def train(one: Config, killed_after: int = 0, **fields: Any) -> list[float]:
    """Epochs of the evaluations that were sent, until the end or until so many were."""
    heard: list[float] = []

    def send(report: dict[str, Any]) -> None:
        assert "failed" not in report, report
        heard.append(report["epochs"])
        if killed_after and len(heard) == killed_after:
            raise Killed

    Folder(one).write(TRIAL, "{}")  # the driver's
    job = Job(int(one.name), to_tree(one), **fields)
    try:
        run_trial(Job.from_json(job.to_json()), send)
    except Killed:
        assert killed_after
    return heard


def test_a_member_killed_within_a_generation_still_holds_the_weights_it_began_with(work: Path) -> None:
    recipe = config(work, "member", f"output={work}/runs/population/trials", "teacher.cache.path=")
    donor, member, third = (replace_fields(recipe, {"name": f"{number:04d}"}, "test") for number in range(3))
    steps = 48 // recipe.training.batch_size
    assert train(donor, until=1.0) == train(member, until=1.0) == [1.0]
    taking_over = {"generation": 1, "until": 3.0, "donor": 0, "donor_step": steps, "seen": 1.0}
    assert train(member, killed_after=1, **taking_over) == [2.0]
    assert checkpoints(member) == [steps, 2 * steps]
    assert train(member, **taking_over | {"seen": 2.0}) == [3.0]
    # A third one may take over the member's weights as they were when this generation began: it is late, or was killed.
    assert checkpoints(member) == [steps, 3 * steps]
    assert train(third, until=1.0) == [1.0]
    assert train(third, **taking_over | {"donor": 1, "until": 2.0}) == [2.0]


def outcome(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], bool]:
    """What a trial that meets the error says, and whether it raises it, for Tune to try again."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(run, "make_plan", lambda *_, **__: (_ for _ in ()).throw(error))
    try:
        run_trial(Job(0, to_tree(Config())), said.append)
    except type(error):
        return said, True
    return said, False


def wrapped(error: OSError) -> QskdError:
    try:
        try:
            raise error
        except OSError as caught:
            raise QskdError("s3://bucket/train", f"can't be reached: {caught}") from None
    except QskdError as made:
        return made


def denied(way: str) -> QskdError:
    """A store's refusal as a QskdError, as it is and on the ways that errors take between processes."""
    error = wrapped(OSError("AWS Error ACCESS_DENIED"))
    if way == "pickled":
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]
    return QskdError.from_json(error.to_json()) if way == "json" else error


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("assert"),  # after it nothing works on that GPU in this process
        RuntimeError("No CUDA GPUs are available"),
        ImportError("no module named safetensors"),
        OSError(28, "No space left on device", "/tmp/qskd-0"),
        *(denied(way) for way in ("here", "pickled", "json")),
        WorkerGroupError("rank 1", {1: UserExceptionWithTraceback(OSError(28, "No space left"), "Traceback")}),
    ],
    ids=repr,
)
def test_a_fault_of_the_machine_is_raised_for_tune_to_try_again_and_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, raised = outcome(error, monkeypatch)
    assert raised
    (told,) = said
    assert str(error) in told["broken"]
    assert platform.node() in told["broken"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("odd"), QskdError("student.width", "7", "even")]
)
def test_a_trials_own_error_is_told_and_not_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    said, raised = outcome(error, monkeypatch)
    assert not raised
    (told,) = said
    assert str(error) in told["failed"]


def test_a_store_that_gives_up_or_refuses_is_a_fault_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise OSError("connection reset")

    monkeypatch.setenv(PATIENCE, "0")
    with pytest.raises(QskdError) as gave_up:
        patiently("s3://bucket/a", pafs.SubTreeFileSystem("/", pafs.LocalFileSystem()), failing)
    with pytest.raises(QskdError) as missing:
        load_manifest("/no/such/shards")
    assert outcome(gave_up.value, monkeypatch)[1]
    assert outcome(missing.value, monkeypatch)[1]


def test_a_trial_on_a_node_without_the_drivers_folder_leaves_nothing_there(work: Path) -> None:
    """What it would leave on that node's own disk is no part of the sweep. Another node may have the folder."""
    one = config(work, "'0007'", f"output={work}/elsewhere/trials", "teacher.cache.path=")
    said: list[dict[str, Any]] = []
    with pytest.raises(QskdError, match="the driver's folder is not there"):
        run_trial(Job(7, to_tree(one)), said.append)
    assert ["broken" in each for each in said] == [True]
    assert "a path on a disk that all nodes share" in said[0]["broken"]
    assert not (work / "elsewhere").exists()


def test_a_trial_whose_gpu_is_gone_does_not_begin_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def worker() -> Any:
        return SimpleNamespace(worker=SimpleNamespace(mode=ray.WORKER_MODE))

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", worker)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said: list[dict[str, Any]] = []
    with pytest.raises(OSError, match="CUDA finds none"):
        run_trial(Job(0, to_tree(Config())), said.append)
    assert "broken" in said[0]
