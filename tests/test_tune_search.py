"""What a sweep does next is a function of its seed and its rows, and of nothing else; ASHA forgets nothing. No Ray is started."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_sweep_failures import Told
from tiny import recipe, silent_student

from pipelines.run.folder import Folder
from pipelines.run.guards import alone_on, check_same_data
from pipelines.training import driver as distill
from pipelines.tuning import sweep
from pipelines.tuning.driver import TuneRequest, parameters_limit
from pipelines.tuning.engine import SweepScheduler, make_asha, trial_resources, trials_at_once, tunes_handlers
from pipelines.tuning.finish import best_recipe, write_recipes
from pipelines.tuning.records import Records, Refusal, check_no_training, trial_config
from pipelines.tuning.search.population import Population
from pipelines.tuning.search.propose import Proposal, succession
from pipelines.tuning.search.propose import propose as propose_or_end
from pipelines.tuning.search.request import Search, SearchRequest, check_request
from pipelines.tuning.sweep import is_done
from pipelines.tuning.trial.costs import costs, parameters_m, recipe_latency_ms
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import load, replace_fields
from qskd.detectors.cost import parameters
from qskd.errors import QskdError

LABELS = ("a", "b", "c")


def propose(*given: Any, **named: Any) -> Proposal:
    found = propose_or_end(*given, **named)
    assert found is not None
    return found


def search_of(*spaces: str, config: Config | None = None, **changes: Any) -> Search:
    spaces = spaces or ("loss_weights", "query_selection", "student_architecture")
    return check_request(SearchRequest(spaces, **{"trials": 12, **changes}), config or nine_epochs())


def nine_epochs(*overrides: str) -> Config:
    return recipe(None, "training.epochs=9", *overrides, distillation={"method": "qskd"})


def filled(search: Search, count: int, seed: int = 0, known: int = 0) -> list[TrialRow]:
    """`count` trials as if run one after another: AP is best for narrow students; every third is stopped."""
    rows: list[TrialRow] = []
    for number in range(count):
        found = propose(search, seed, number, rows)
        ap = 0.5 - abs(found.overrides.get("student.width", 32) - 16) / 100 + 0.001 * number
        state = "stopped" if number % 3 == 2 else "finished"
        curve = tuple((float(epoch), ap * epoch / 9) for epoch in range(1, 4 if state == "stopped" else 10))
        rows.append(
            TrialRow(number, state, found.parameters, found.overrides, curve, {"AP": ap}, 5.0 + number, 0.1)  # type: ignore[arg-type]
        )
    return rows


# ---- proposals


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_a_proposal_depends_on_seed_number_and_rows_alone(algorithm: str) -> None:
    search = search_of(algorithm=algorithm)
    rows = filled(search, 8)
    first = propose(search, 0, 8, rows)
    for noise in range(2):  # what a driver that has lived longer would have drawn
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        torch.manual_seed(noise)
        assert propose(search, 0, 8, rows) == first
    assert propose(search, 1, 8, rows) != first
    assert propose(search, 0, 9, rows) != first
    assert propose(search, 0, 8, rows, attempt=1) != first


@pytest.mark.parametrize("algorithm", ["tpe", "random", "pbt"])
def test_the_first_trial_is_the_recipe(algorithm: str) -> None:
    spaces = ("loss_weights",) if algorithm == "pbt" else ()
    search = search_of(*spaces, algorithm=algorithm)
    found = propose(search, 5, 0)
    assert found.overrides == {}
    assert found.parameters == search.space.recipe_point


def test_tpe_learns_from_finished_stopped_failed_running_and_refused_trials() -> None:
    search = search_of()
    rows = filled(search, 8)
    best = max((row for row in rows if row.state == "finished"), key=lambda row: row.best_ap).number
    other = next(row.number for row in rows if row.state == "finished" and row.number != best)
    known = propose(search, 0, 8, rows)

    def with_row(number: int, **changes: Any) -> list[TrialRow]:
        return [replace(row, **changes) if row.number == number else row for row in rows]

    for changed in (
        with_row(other, curve=((9.0, 0.9),)),
        with_row(best, state="failed", curve=(), reason="x"),
        with_row(best, state="running", curve=()),
    ):
        assert propose(search, 0, 8, changed) != known
    stopped = [replace(row, state="stopped", curve=row.curve[:3]) for row in rows]
    better = [
        replace(row, curve=tuple((epoch, 0.9) for epoch, _ in row.curve)) if row.number == other else row
        for row in stopped
    ]
    assert propose(search, 0, 8, stopped) != propose(search, 0, 8, better)
    refused = [Refusal(8, propose(search, 0, 8, rows).parameters, 0.5, "too large")]
    assert propose(search, 0, 8, rows, refused) != known


def test_tpe_moves_towards_what_was_good_and_away_from_what_was_refused() -> None:
    """Twelve trials say that narrow students are good: proposals become narrower than random ones. And the other way where
    all that are narrow were refused."""
    search = search_of("student_architecture", trials=30)
    rows = []
    for number in range(12):
        found = propose(search, 0, number, [])
        width = found.overrides.get("student.width", 32)
        rows.append(
            TrialRow(number, "finished", found.parameters, found.overrides, ((9.0, 1 - width / 100),), {"AP": 0.1})
        )

    def mean_width(algorithm: Search, rows: list[TrialRow], refused: list[Refusal]) -> float:
        proposals = [propose(algorithm, seed, 20, rows, refused) for seed in range(24)]
        return float(np.mean([found.overrides.get("student.width", 32) for found in proposals]))

    random_ones = mean_width(search_of("student_architecture", trials=30, algorithm="random"), [], [])
    assert mean_width(search, rows, []) < random_ones - 3
    narrow = [row for row in rows if row.overrides.get("student.width", 32) < 32]
    refused = [Refusal(row.number, row.parameters, 1.0, "") for row in narrow]
    wide = [row for row in rows if row not in narrow]
    assert mean_width(search, wide, refused) > mean_width(search, rows, []) + 3


def test_two_objectives_are_searched_too_and_a_failed_trial_is_no_obstacle() -> None:
    search = search_of("student_architecture", objectives=("AP", "latency_ms"))
    rows = filled(search, 8)
    rows[3] = replace(rows[3], state="failed", curve=(), latency_ms=None)
    assert propose(search, 0, 8, rows).overrides
    assert propose(search, 0, 8, rows) != propose(
        search, 0, 8, [replace(row, latency_ms=1 / row.number if row.number else 9.0) for row in rows]
    )


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_no_trial_is_made_twice_and_a_space_that_is_tried_whole_ends_the_search(algorithm: str, tmp_path: Path) -> None:
    """Six students: by stride and by number of maps. What another trial's proposal is does not depend on how it ended."""
    space = tmp_path / "few.py"
    space.write_text(
        "FIELDS = ('training.batch_size', 'seed')\n"
        "def recipe_point(config):\n    return {'batch': 8, 'seed': 0}\n"
        "def suggest(trial, config):\n"
        "    batch = trial.suggest_categorical('batch', (8, 16, 32))\n"
        "    return {'training.batch_size': batch, 'seed': trial.suggest_categorical('seed', (0, 1))}\n"
    )
    search = search_of(str(space), algorithm=algorithm, trials=20, config=nine_epochs("training.batch_size=8"))
    rows = filled(search, 6)
    assert len({str(sorted(row.overrides.items())) for row in rows}) == 6
    assert propose_or_end(search, 0, 6, rows) is None
    assert propose(search, 0, 6, rows[:5]).overrides == rows[5].overrides
    failed = [replace(row, state="failed", curve=(), reason="x") for row in rows]
    assert propose_or_end(search, 0, 6, failed) is None  # it would fail again
    assert propose(search, 0, 3, rows).overrides in [
        row.overrides for row in rows[3:]
    ]  # of later ones it knows nothing
    config = search.space.config({}).model_copy(update={"output": str(tmp_path), "name": "sweep"})
    records = Records(config)
    for row in rows:
        records.put(row)
    assert is_done(search, records, 0)
    records.put(replace(rows[2], state="running"))
    assert not is_done(search, records, 0)


def test_members_of_a_population_may_begin_alike(tmp_path: Path) -> None:
    space = tmp_path / "one.py"
    space.write_text(
        "FIELDS = ('distillation.features.weight',)\nMAY_CHANGE_WHILE_TRAINING = True\n"
        "def recipe_point(config):\n    return {'weight': 50.0}\n"
        "def suggest(trial, config):\n    return {FIELDS[0]: trial.suggest_categorical('weight', (50.0,))}\n"
    )
    search = search_of(str(space), algorithm="pbt")
    rows = filled(search, 3)
    assert {str(row.overrides) for row in rows} == {"{}"}


# ---- early stopping


class Heard:
    """A conductor that notes what the scheduler decided."""

    def __init__(self) -> None:
        self.stops: dict[tuple[int, float], bool] = {}

    def heard(self, number: int, report: dict[str, Any], stop: bool) -> None:
        self.stops[number, report["epochs"]] = stop


def decide(scheduler: SweepScheduler, heard: Heard, number: int, epochs: float, ap: float) -> bool:
    import json
    from types import SimpleNamespace

    report = {"epochs": epochs, "metrics": {"AP": ap}, "last": epochs >= 9}
    scheduler.on_trial_result(None, SimpleNamespace(config={"number": number}), {"report": json.dumps(report)})
    return heard.stops[number, epochs]


def test_a_scheduler_made_from_rows_decides_as_one_that_heard_all() -> None:
    search = search_of("loss_weights", trials=12)
    rng = np.random.default_rng(3)
    order = [(number, float(epoch)) for epoch in range(1, 10) for number in range(12)]
    aps = {key: float(rng.random()) for key in order}
    heard = Heard()
    always = SweepScheduler(heard, make_asha(search, 9), [])  # type: ignore[arg-type]
    rows = {number: TrialRow(number, "running") for number in range(12)}
    stopped: set[int] = set()
    compared = 0
    for number, epochs in order:
        if number in stopped:
            continue
        fresh_heard = Heard()
        fresh = SweepScheduler(fresh_heard, make_asha(search, 9), list(rows.values()))  # type: ignore[arg-type]
        verdict = decide(always, heard, number, epochs, aps[number, epochs])
        assert decide(fresh, fresh_heard, number, epochs, aps[number, epochs]) == verdict
        compared += 1
        rows[number] = replace(rows[number], curve=(*rows[number].curve, (epochs, aps[number, epochs])))
        if verdict:
            stopped.add(number)
    assert compared > 24
    assert 6 <= len(stopped) <= 11


def test_without_asha_and_at_its_last_epoch_no_trial_is_stopped() -> None:
    heard = Heard()
    plain = SweepScheduler(heard, make_asha(search_of("loss_weights", asha=False), 9), [])  # type: ignore[arg-type]
    assert not any(decide(plain, heard, number, 1.0, 1 / (number + 1)) for number in range(6))
    asha = SweepScheduler(heard, make_asha(search_of("loss_weights"), 9), [])  # type: ignore[arg-type]
    assert not any(decide(asha, heard, number, 9.0, 1 / (number + 1)) for number in range(6))


def test_asha_played_again_stops_what_comes_after_better_ones() -> None:
    from benchmarks.sweep import play

    search = search_of("loss_weights", trials=9)
    rows = [
        TrialRow(number, "finished", curve=tuple((float(epoch), 0.1 * number + 0.01 * epoch) for epoch in range(1, 10)))
        for number in range(9)
    ]

    def played(order: Sequence[int]) -> list[int]:
        kept = play(rows, order, lambda: SweepScheduler(None, make_asha(search, 9), []))  # type: ignore[arg-type]
        assert all(row.curve == rows[row.number].curve[: len(row.curve)] for row in kept)
        return [len(row.curve) for row in kept]

    assert played(range(9)) == [9] * 9
    assert played(range(8, -1, -1)) == [9] + [1] * 8


def test_the_bare_loop_has_trials_do_what_tunes_do_and_counts_none_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import sweep as benchmark

    jobs: list[Any] = []

    def trial(job: Any, send: Any) -> None:
        jobs.append(job)
        send({"costs": {}} if job.number < 2 else {"failed": "no room"})

    monkeypatch.setattr(benchmark, "run_trial", trial)
    monkeypatch.setattr(benchmark, "load_cache_manifest", lambda path: SimpleNamespace(fingerprint=f"of {path}"))
    config = load(None, ["name=bare", f"output={tmp_path}", "teacher.cache.path=cache"])
    assert benchmark.bare_loop(config, 2) >= 0
    assert {job.known_cache for job in jobs} == {"of cache"}
    with pytest.raises(SystemExit, match="1 trials failed: no room"):
        benchmark.bare_loop(config, 3)


# ---- population


def population_rows(search: Search, aps: list[float], epochs: float) -> dict[int, TrialRow]:
    found = [propose(search, 0, number) for number in range(len(aps))]
    return {
        number: TrialRow(number, "running", found[number].parameters, found[number].overrides, ((epochs, ap),))
        for number, ap in enumerate(aps)
    }


def test_the_worst_take_over_the_best_and_move_each_parameter_within_its_range() -> None:
    search = search_of("loss_weights", trials=8, algorithm="pbt")
    rows = population_rows(search, [0.1, 0.8, 0.3, 0.9, 0.4, 0.5, 0.05, 0.6], 1.0)
    for number in rows:
        found = succession(search, 0, number, 1, rows)
        assert succession(search, 0, number, 1, rows) == found
        if number not in (0, 6):
            assert (found.donor, found.parameters) == (None, rows[number].parameters)
            continue
        assert found.donor in (1, 3)
        theirs = rows[found.donor].parameters
        assert found.parameters != theirs
        for name, value in found.parameters.items():
            assert search.space.ranges[name].kind == "categorical" or search.space.ranges[name].low <= value
        search.space.config(found.overrides)  # a valid recipe
    assert succession(search, 0, 0, 1, rows) != succession(search, 0, 0, 2, rows)


def test_a_member_that_takes_over_another_choice_answers_what_comes_with_it(tmp_path: Path) -> None:
    """Choices may be numbers, and may bring questions of their own, which the donor was not asked."""
    (tmp_path / "own.py").write_text(
        "FIELDS = ('training.ema_decay', 'training.learning_rate')\nMAY_CHANGE_WHILE_TRAINING = True\n"
        "def recipe_point(config):\n    return {'scale': 1, 'average': False}\n"
        "def suggest(trial, config):\n"
        "    rate = config.training.learning_rate * trial.suggest_categorical('scale', (1, 2, 4))\n"
        "    found = {'training.learning_rate': rate, 'training.ema_decay': 0.0}\n"
        "    if trial.suggest_categorical('average', (False, True)):\n"
        "        found['training.ema_decay'] = trial.suggest_float('decay', 0.9, 0.999)\n"
        "    return found\n"
    )
    search = search_of(str(tmp_path / "own.py"), trials=8, algorithm="pbt")
    rows = population_rows(search, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 1.0)
    averaged = set()
    for generation in range(1, 40):
        for number in (0, 1):
            found = succession(search, 0, number, generation, rows)
            assert found.parameters["own.scale"] in (1, 2, 4)
            assert ("own.decay" in found.parameters) == found.parameters["own.average"]
            assert found.overrides == search.space.overrides(found.parameters)
            averaged.add(found.parameters["own.average"])
    assert averaged == {False, True}


def test_a_generation_begins_when_all_have_ended_the_one_before() -> None:
    search = search_of("loss_weights", trials=4, algorithm="pbt")
    population = Population(search, nine_epochs(), total_steps=90, steps_per_epoch=10)
    assert population.interval == 1
    rows = population_rows(search, [0.1, 0.2, 0.3, 0.4], 1.0)
    rows[2] = replace(rows[2], curve=())
    step = population.next_step(rows, set(), 0)
    assert step is not None
    assert (step.number, step.generation, step.until, step.succession) == (2, 0, 1.0, None)
    assert population.next_step(rows, {2}, 0) is None
    rows[2] = replace(rows[2], curve=((1.0, 0.3),))
    begun = population.next_step(rows, set(), 0)
    assert begun is not None
    assert (begun.number, begun.generation, begun.until, begun.donor_step) == (0, 1, 2.0, 10)
    assert begun.succession is not None
    assert begun.succession.donor == 3
    # The best has gone on, or failed since: the worst still takes over from where it stood.
    for since in ({"curve": ((1.0, 0.4), (2.0, 0.01))}, {"state": "failed", "reason": "x"}):
        assert population.next_step({**rows, 3: replace(rows[3], **since)}, {1, 2}, 0) == begun
    done = {number: replace(row, state="finished") for number, row in rows.items()}
    assert population.next_step(done, set(), 0) is None


# ---- records


def sweep_config(tmp_path: Path, *overrides: str) -> Config:
    return nine_epochs(f"output={tmp_path}", "name=sweep", *overrides)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    records = Records(sweep_config(tmp_path))
    rows = filled(search_of(), 3)
    for row in reversed(rows):
        records.put(row)
    records.refuse(Refusal(3, {"a.b": 1}, 0.25, "too large"))
    again = Records(sweep_config(tmp_path))
    assert again.in_order() == rows
    assert again.refused == records.refused
    assert again.change(1, state="failed").state == "failed"
    assert Records(sweep_config(tmp_path)).rows[1].state == "failed"


@pytest.mark.parametrize("limit_m", [None, 5.0])
def test_a_trial_that_cannot_be_built_fails_and_the_next_is_begun(
    limit_m: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit on parameters a student is built before it is a trial."""

    def measured(config: Config, labels: Sequence[str]) -> float:
        if len(told.ended) < 2 and records.rows:
            raise QskdError("student.backbone.init", "a Hub that does not answer", "weights")
        return 1.0

    def of_overrides(overrides: dict[str, Any]) -> Config:
        if limit_m is None and len(records.rows) in (2, 3) and len(told.ended) < 2:
            raise QskdError("student", "a combination that is none", "a student")
        return space(overrides)

    monkeypatch.setattr(sweep, "parameters_m", measured)
    config, search, told = sweep_config(tmp_path), search_of(trials=6), Told()
    records, space = Records(config), search.space.config
    monkeypatch.setattr(type(search.space), "config", lambda _, overrides: of_overrides(overrides))
    made = sweep.Sweep(config, search, records, told, LABELS, lambda: 9, 1.0, (9, 1), limit_m)  # type: ignore[arg-type]
    jobs = [made.next_job() for _ in range(4)]
    assert [job.number for job in jobs if isinstance(job, Job)] == [0, 3, 4, 5]
    assert told.ended == [(1, "failed"), (2, "failed")]
    assert made.next_job() in (None, sweep.DONE)


def test_another_request_or_a_training_of_the_name_is_refused(tmp_path: Path) -> None:
    records = Records(sweep_config(tmp_path))
    asked = TuneRequest(SearchRequest(("loss_weights",))).settled(["loss_weights"])
    assert records.settle(asked) == {}
    records.note(recipe_latency_ms=3.0)
    more = TuneRequest(SearchRequest(("loss_weights",), trials=40)).settled(["loss_weights"])
    assert records.settle(more) == {"recipe_latency_ms": 3.0}
    with pytest.raises(QskdError, match="algorithm was 'tpe', is 'random'"):
        records.settle(TuneRequest(SearchRequest(("loss_weights",), algorithm="random")).settled(["loss_weights"]))
    mine = Records(sweep_config(tmp_path, "name=mine"))  # each job has a copy of the working folder
    mine.settle(TuneRequest(SearchRequest(("own.py",))).settled(["loss_weights", "/tmp/ray/_ray_pkg_1/own.py"]))
    mine.settle(TuneRequest(SearchRequest(("own.py",))).settled(["loss_weights", "/tmp/ray/_ray_pkg_2/own.py"]))
    with pytest.raises(QskdError, match="spaces was"):
        mine.settle(TuneRequest(SearchRequest(("own.py",))).settled(["loss_weights", "/tmp/ray/_ray_pkg_2/other.py"]))
    population = Records(sweep_config(tmp_path, "name=population"))
    population.settle(
        TuneRequest(SearchRequest(("loss_weights",), trials=4, algorithm="pbt")).settled(["loss_weights"])
    )
    larger = SearchRequest(("loss_weights",), trials=8, algorithm="pbt")
    with pytest.raises(QskdError, match="trials was 4, is 8"):
        population.settle(TuneRequest(larger).settled(["loss_weights"]))
    training = Records(sweep_config(tmp_path, "name=training"))
    training.folder.write("result.json", "{}")
    with pytest.raises(QskdError, match="holds a training"):
        training.settle(asked)
    with pytest.raises(QskdError, match="holds a training"):
        check_no_training(training.folder)
    check_no_training(records.folder)
    for restart in (False, True):
        with pytest.raises(QskdError, match="holds a sweep"):
            distill.run(sweep_config(tmp_path), "distill", restart)
    assert records.folder.exists("sweep.json")


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    folder = Folder(sweep_config(tmp_path))
    for _ in range(2):
        check_same_data(folder, {"data.train": "a", "data.val": "b"})
    with pytest.raises(QskdError, match=r"begun on other data: data.val changed since"):
        check_same_data(folder, {"data.train": "a", "data.val": "c"})


def test_one_program_at_a_time_works_on_a_folder(tmp_path: Path) -> None:
    folder = Folder(sweep_config(tmp_path))
    with alone_on(folder), pytest.raises(QskdError, match="another program works on it"), alone_on(folder):
        raise AssertionError
    with alone_on(folder):
        assert not folder.exists()


def test_a_trials_folder_is_below_the_sweeps_whatever_the_uri_says_of_its_store() -> None:
    uri = "s3://bucket/runs?scheme=http&region=us-east-1"
    trial = trial_config(nine_epochs(f"output={uri}", "name=sweep"), 7)
    assert trial.output == "s3://bucket/runs/sweep/trials?scheme=http&region=us-east-1"
    assert Folder(trial).root == "bucket/runs/sweep/trials/0007"


def test_the_best_recipe_has_its_settings_at_the_full_length(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, "training.epochs=30")
    row = TrialRow(4, "stopped", overrides={"student.queries": 12, "distillation.warmup": 0.2}, curve=((2.0, 0.4),))
    (tmp_path / "best.yaml").write_text(best_recipe(config, row))
    found = load(tmp_path / "best.yaml")
    assert found == replace_fields(
        config, {"student.queries": 12, "distillation.warmup": 0.2, "name": "sweep-best"}, "test"
    )


def test_every_trial_with_an_ap_leaves_a_recipe_of_its_own_and_its_folder_is_refused(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, "training.epochs=30")
    records = Records(replace_fields(config, {"training.epochs": 3}, "test"))  # trials are shorter
    narrow = {"student.queries": 12}
    records.put(TrialRow(0, "finished", curve=((3.0, 0.4),)))
    records.put(TrialRow(7, "stopped", overrides=narrow, curve=((1.0, 0.3),)))
    records.put(TrialRow(8, "failed", reason="broken"))
    of_a_trial = replace_fields(trial_config(config, 7), narrow, "test")  # as its MLflow run has it
    for name in ("before", "after"):
        for run in (lambda: distill.run(of_a_trial, "distill", restart=True), lambda: distill.run(of_a_trial, "train")):
            with pytest.raises(QskdError, match=r"trials/0007: holds a trial of a sweep") as told:
                run()
            assert ("trials/0007/recipe.yaml" in told.value.remedy) == (name == "after")
        with pytest.raises(QskdError, match="holds a trial"):
            check_no_training(Folder(of_a_trial))
        write_recipes(config, records)
    found = load(tmp_path / "sweep/trials/0007/recipe.yaml")
    assert found == replace_fields(config, {**narrow, "name": "sweep-trial-0007"}, "test")
    assert Folder(found).root == str(tmp_path / "sweep-trial-0007")
    assert load(tmp_path / "sweep/trials/0000/recipe.yaml").name == "sweep-trial-0000"
    assert not (tmp_path / "sweep/trials/0008/recipe.yaml").exists()


def test_what_others_put_among_the_trials_is_not_taken_for_one(tmp_path: Path) -> None:
    config = sweep_config(tmp_path)
    row = Records(config).put(TrialRow(0, "finished", curve=((1.0, 0.4),)))
    for name in ("mine", ".mine.lock"):
        (tmp_path / "sweep" / "trials" / name).mkdir()
    assert Records(config).in_order() == [row]


def test_a_job_survives_its_way() -> None:
    job = Job(3, {"a": {"b": [1, 2.5, None]}}, 2.0, None, 1.5, 2, 3.0, 1, 40)
    assert Job.from_json(job.to_json()) == job


# ---- what fits where, and costs


@pytest.mark.parametrize(
    ("compute", "nodes", "fits"),
    [
        ("{}", [{"CPU": 2.0}], 2),
        ("{threads_per_worker: 2}", [{"CPU": 3.0}, {"CPU": 4.0}], 3),
        ("{}", [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], 2),
        ("{device: cpu}", [{"CPU": 8.0, "GPU": 2.0}], 8),
        ("{workers: 4}", [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}], 2),
        ("{workers: 2, loader_workers: 1}", [{"CPU": 7.0}], 2),
        ("{workers: 4}", [{"CPU": 2.0}], 1),
        ("{}", [], 1),
    ],
)
def test_as_many_trials_run_as_fit(compute: str, nodes: list[dict[str, float]], fits: int) -> None:
    assert trials_at_once(load(None, [f"compute={compute}"]), nodes) == fits


def test_a_trial_holds_what_it_trains_on() -> None:
    assert trial_resources(load(None, ["compute.threads_per_worker=3"]), gpu=False) == {"CPU": 3}
    assert trial_resources(load(None, []), gpu=True) == {"CPU": 1, "GPU": 1}
    assert trial_resources(load(None, ["compute.workers=2"]), gpu=True) == {"CPU": 0.01}


def test_costs_are_of_the_student_and_measured_beside_the_recipes() -> None:
    config, device = nine_epochs(), torch.device("cpu")
    larger = replace_fields(config, {"student.encoder_layers": 12, "student.decoder_layers": 8}, "test")
    recipe_ms = recipe_latency_ms(config, LABELS, device)
    found = costs(larger, LABELS, device, config, recipe_ms)
    student = silent_student(larger.student, LABELS, larger.seed)
    assert found["parameters_m"] == pytest.approx(parameters(student) / 1e6)
    assert parameters_m(larger, LABELS) == found["parameters_m"]
    own = costs(config, LABELS, device, config, recipe_ms)
    assert found["latency_ms"] > 1.3 * own["latency_ms"]
    assert found["gflops"] > own["gflops"] > 0


def test_bits_change_what_a_student_weighs_and_nothing_else_that_it_costs() -> None:
    config, device = nine_epochs(), torch.device("cpu")
    found = {
        bits: costs(replace_fields(config, {"student.quantization": bits}, "test"), LABELS, device, config, 5.0)
        for bits in (None, "w8a8", "w2a2-attn8")
    }
    assert len({(each["parameters_m"], each["gflops"]) for each in found.values()}) == 1
    assert found[None]["size_mb"] > found["w8a8"]["size_mb"] > found["w2a2-attn8"]["size_mb"] > 0


def test_the_limit_on_parameters_is_a_number_or_the_recipes_own(caplog: pytest.LogCaptureFixture) -> None:
    config, space = nine_epochs(), search_of().space
    own = parameters_m(config, LABELS)
    assert parameters_limit("", config, LABELS, space) is None
    assert parameters_limit("recipe", config, LABELS, space) == own
    assert parameters_limit("5", config, LABELS, space) == 5.0
    for wrong in ("few", "0.0001"):
        with pytest.raises(QskdError, match="--at-most-parameters"):
            parameters_limit(wrong, config, LABELS, space)
    assert parameters_limit("recipe", config, LABELS, search_of("loss_weights").space) is None
    assert "has no effect" in caplog.text


def test_a_signal_that_tune_took_is_noticed_and_the_handlers_before_it_come_back() -> None:
    from ray.tune.tune import _setup_signal_catching

    numbers = (signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(each) for each in numbers]
    with tunes_handlers() as was_signalled:
        _setup_signal_catching()
        assert not was_signalled()
    assert [signal.getsignal(each) for each in numbers] == before
    for number in numbers:
        with tunes_handlers() as was_signalled:
            taken = _setup_signal_catching()
            signal.raise_signal(number)  # to this thread: another one might take it once the handlers are back
            assert was_signalled()
            assert taken.is_set()
        assert [signal.getsignal(each) for each in numbers] == before
