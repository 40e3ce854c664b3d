"""Trials that fail one after the other end a sweep, not its trials. No Ray is started."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe

from pipelines.tuning import sweep
from pipelines.tuning.records import Records
from pipelines.tuning.search.request import SearchRequest, check_request
from pipelines.tuning.sweep import DONE, FAILURES, Sweep, is_done
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.errors import QskdError

DENIED = "on node-b: s3://bucket/shards/train: can't be reached: AWS Error ACCESS_DENIED"


class Told:
    """In MLflow's place: which trials ended, and how."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, str]] = []

    def begin(self, row: TrialRow, config: Config) -> str:
        return f"run-{row.number}"

    def end(self, row: TrialRow) -> None:
        self.ended.append((row.number, row.state))

    def _nothing(self, *_: Any) -> None: ...

    parameters = costs = report = leader = _nothing


class Play:
    """A sweep, and what its trials say."""

    def __init__(self, root: Path, trials: int = 30, algorithm: str = "random", slots: int = 9, *more: str) -> None:
        config = recipe(None, "training.epochs=9", f"output={root}", "name=s", *more, distillation={"method": "qskd"})
        self.search = check_request(SearchRequest(("loss_weights",), trials=trials, algorithm=algorithm), config)
        self.config, self.records, self.told = config, Records(config), Told()
        self.sweep = Sweep(
            *(config, self.search, self.records, self.told, ("a", "b"), lambda: slots, 1.0, (9, 1))  # type: ignore[arg-type]
        )

    def next(self) -> int:
        job = self.sweep.next_job()
        assert isinstance(job, Job), job
        return job.number

    def fail(self, number: int, reason: str = DENIED) -> None:
        self.sweep.heard(number, {"failed": reason}, False)
        self.sweep.ended(number)

    def evaluate(self, number: int, epochs: float = 9.0) -> None:
        report = {"epochs": epochs, "last": epochs >= 9, "metrics": {"AP": 0.3}, "seconds": 1.0, "rows": [], "step": 9}
        self.sweep.heard(number, report, False)
        if report["last"]:
            self.sweep.ended(number)

    def states_on_disk(self) -> list[str]:
        return [row.state for row in Records(self.config).in_order()]


def test_a_bad_node_beside_a_good_one_ends_the_sweep_and_burns_no_trial(tmp_path: Path) -> None:
    play = Play(tmp_path)
    good = play.next()  # trains for hours
    for _ in range(FAILURES):
        play.fail(play.next())
    assert play.sweep.next_job() == DONE
    assert play.sweep.has_given_up()
    play.sweep.ended(good)  # Tune stops it
    with pytest.raises(QskdError, match="ACCESS_DENIED") as told:
        play.sweep.settle()
    assert "5 trials in a row" in str(told.value)
    assert "same command" in told.value.remedy
    assert play.states_on_disk() == ["running"] * (1 + FAILURES)
    assert not play.told.ended  # their MLflow runs go on too
    assert not is_done(play.search, play.records, play.config.seed)
    before = {row.number: row.parameters for row in play.records.in_order()}
    again = Play(tmp_path)  # the same command, the node mended: the same trials, in their order
    assert not is_done(again.search, again.records, again.config.seed)
    assert [again.next() for _ in range(1 + FAILURES)] == list(range(1 + FAILURES))
    assert {row.number: row.parameters for row in again.records.in_order()} == before
    again.evaluate(3)
    assert again.states_on_disk()[3] == "finished"


def test_failures_among_evaluations_are_believed_and_the_sweep_goes_on(tmp_path: Path) -> None:
    play = Play(tmp_path)
    for epochs in (1.0, 9.0):
        failing = [play.next() for _ in range(FAILURES - 1)]
        for number in failing:
            play.fail(number)
        assert [play.records.rows[number].state for number in failing] == ["failed"] * 4  # what the search learns from
        assert [play.states_on_disk()[number] for number in failing] == [
            "running"
        ] * 4  # for a driver that is killed now
        play.evaluate(play.next(), epochs)
        assert [play.states_on_disk()[number] for number in failing] == ["failed"] * 4
    assert not play.sweep.has_given_up()
    assert [number for number, state in play.told.ended if state == "failed"] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert play.next() == 10


def test_the_last_failures_of_a_sweep_that_works_end_it(tmp_path: Path) -> None:
    play = Play(tmp_path, trials=3)
    play.evaluate(play.next())
    for _ in range(2):
        play.fail(play.next())
    assert play.sweep.next_job() == DONE
    assert not is_done(play.search, play.records, play.config.seed)
    play.sweep.settle()
    assert is_done(play.search, play.records, play.config.seed)
    assert play.states_on_disk() == ["finished", "failed", "failed"]
    assert play.told.ended == [(0, "finished"), (1, "failed"), (2, "failed")]


@pytest.mark.parametrize("algorithm", ["random", "pbt"])
def test_a_small_sweep_of_which_nothing_works_is_not_done(algorithm: str, tmp_path: Path) -> None:
    play = Play(tmp_path, trials=4, algorithm=algorithm)
    for _ in range(4):
        play.fail(play.next())
    with pytest.raises(QskdError, match="4 trials in a row"):
        play.sweep.settle()
    again = Play(tmp_path, trials=4, algorithm=algorithm)
    assert [again.next() for _ in range(4)] == [0, 1, 2, 3]


def test_a_population_loses_no_member_to_a_bad_node(tmp_path: Path) -> None:
    """Two have failed for good, and all that remain fail in a later generation."""
    play = Play(tmp_path, trials=4, algorithm="pbt")
    numbers = [play.next() for _ in range(4)]
    play.fail(0, "the loss is not finite")
    for number in numbers[1:]:
        play.evaluate(number, 1.0)
        play.sweep.ended(number)
    assert play.states_on_disk() == ["failed", "running", "running", "running"]
    assert sorted(play.next() for _ in range(3)) == [1, 2, 3]
    for number in (1, 2, 3):
        play.fail(number)
    assert play.sweep.has_given_up()
    assert play.states_on_disk() == ["failed", "running", "running", "running"]
    again = Play(tmp_path, trials=4, algorithm="pbt")
    assert sorted(again.next() for _ in range(3)) == [1, 2, 3]
    assert all(job.generation == 1 for job in again.sweep.live.values())


def test_a_trial_that_its_machines_failed_says_what_they_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play = Play(tmp_path)
    first, second = play.next(), play.next()
    for _ in range(4):
        play.sweep.heard(first, {"broken": DENIED}, False)
    play.sweep.lost(first)
    play.sweep.lost(second)
    assert capsys.readouterr().out.count("a fault of its machine: on node-b") == 4
    rows = play.records.rows
    assert rows[first].reason == f"{DENIED}\n  tried 4 times"
    assert "its process died 4 times" in rows[second].reason
    assert not play.sweep.has_given_up()


def test_tries_without_a_limit_are_counted_over_all_trials(tmp_path: Path) -> None:
    play = Play(tmp_path, 30, "random", 9, "compute.max_failures=-1")
    good, bad = play.next(), play.next()
    for _ in range(FAILURES - 1):
        play.sweep.heard(bad, {"broken": DENIED}, False)
    play.evaluate(good, 1.0)
    for _ in range(FAILURES):
        assert not play.sweep.has_given_up()
        play.sweep.heard(bad, {"broken": DENIED}, False)
    with pytest.raises(QskdError, match="5 tries in a row"):
        play.sweep.settle()
    assert play.states_on_disk() == ["running", "running"]


def test_a_few_failures_among_many_trials_that_have_not_come_to_an_evaluation_do_not_end_the_sweep(
    tmp_path: Path,
) -> None:
    """A hundred begin at once, and some are too large: given up for, they would be the first to fail when it goes on."""
    play = Play(tmp_path, trials=200, slots=100)
    numbers = [play.next() for _ in range(100)]
    for number in numbers[:12]:
        play.fail(number, "OutOfMemoryError: CUDA out of memory")
        numbers.append(play.next())
    assert not play.sweep.has_given_up()
    play.evaluate(numbers[50], 1.0)
    assert play.states_on_disk()[:13] == ["failed"] * 12 + ["running"]
    for number in numbers[12:50]:  # a node that all draw
        play.fail(number)
    assert not play.sweep.has_given_up()
    for number in numbers[51:101]:
        play.fail(number)
    assert play.sweep.has_given_up()


def test_a_deleted_trials_folder_costs_no_other_trial_its_record(tmp_path: Path) -> None:
    play = Play(tmp_path, trials=8)
    for _ in range(6):
        play.evaluate(play.next())
    shutil.rmtree(tmp_path / "s" / "trials" / "0003")
    again = Play(tmp_path, trials=8)
    left = {row.number: row for row in again.records.in_order()}
    assert sorted(left) == [0, 1, 2, 4, 5]
    assert [again.next() for _ in range(3)] == [6, 7, 8]
    assert {number: again.records.rows[number] for number in left} == left
    assert again.sweep.next_job() == DONE


def test_a_limit_that_nothing_fits_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tune asks for another trial ten times a second while the last ones train."""
    sizes = iter([1.0])
    monkeypatch.setattr(sweep, "parameters_m", lambda config, labels: next(sizes, 2.0))
    play = Play(tmp_path)
    play.sweep.limit_m = 1.0
    first = play.next()
    assert [play.sweep.next_job() for _ in range(3)] == [None] * 3
    assert "were refused" not in capsys.readouterr().out
    play.evaluate(first)
    assert play.sweep.next_job() == DONE
    assert "2 M parameters, more than 1 M. The sweep ends with 1 trials" in capsys.readouterr().out


def test_a_bad_node_among_many_good_ones_burns_no_trial(tmp_path: Path) -> None:
    """It fails one trial after the other, and between any two of them some trial of another node is evaluated."""
    play = Play(tmp_path, trials=30, slots=6)
    good = [play.next() for _ in range(5)]
    lost: list[int] = []
    while not play.sweep.has_given_up():
        lost.append(play.next())
        for _ in range(4):
            play.sweep.heard(lost[-1], {"broken": DENIED}, False)
        play.sweep.lost(lost[-1])
        play.evaluate(good[0], 0.1 * len(lost))
    assert len(lost) == 5
    assert play.states_on_disk() == ["running"] * 10
    with pytest.raises(QskdError, match="5 trials failed, 5 by faults of their machines"):
        play.sweep.settle()
    few = Play(tmp_path / "few", trials=2)
    good, bad = [few.next()], few.next()
    few.sweep.heard(bad, {"broken": DENIED}, False)
    few.sweep.lost(bad)
    few.evaluate(good[0])
    few.sweep.settle()  # of a sweep that is at its end it is one trial that failed
    assert few.states_on_disk() == ["finished", "failed"]
