"""One trial of a sweep in this process, without Ray's Tune: which weights it goes on from, and which it leaves to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import config, make_work, work  # noqa: F401  (fixtures)

from pipelines.run.folder import Folder
from pipelines.tuning.trial import run
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.run import run_trial
from qskd.config import Config
from qskd.config.recipe import replace_fields, to_tree


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


def test_an_error_of_the_device_ends_its_process_and_any_other_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first nothing works on that GPU in this process, which would otherwise train the next trial."""
    said: list[dict[str, Any]] = []
    job = Job(0, to_tree(Config()))
    for error in (torch.OutOfMemoryError("no room"), ValueError("odd")):
        monkeypatch.setattr(run, "make_plan", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        run_trial(job, said.append)
    assert [each["failed"] for each in said] == ["OutOfMemoryError: no room", "ValueError: odd"]
    monkeypatch.setattr(run, "make_plan", lambda *_, **__: (_ for _ in ()).throw(torch.AcceleratorError("assert")))
    with pytest.raises(torch.AcceleratorError):
        run_trial(job, said.append)
    assert len(said) == 2
