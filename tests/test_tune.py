"""Sweeps on a real Ray and a real MLflow store: killed, gone on with, stopped early, failed, populations."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_pipelines import SIZES

import pipelines.cluster
from pipelines import cache_teacher, tune
from pipelines.prepare import prepare
from pipelines.search_request import SearchRequest, check_request
from pipelines.storage import Folder
from pipelines.sweep import DONE
from pipelines.sweep_records import Records, trial_config
from pipelines.sweep_trials import TrialRow
from pipelines.trial_job import Job
from pipelines.tune_engine import run_tuner
from qskd.config import Config
from qskd.detectors import build_student, save_detector
from qskd.manifest import load_manifest
from qskd.recipe import flatten, load, replace_fields, to_tree, to_yaml
from qskd.shapes import ShapesConfig, make_shapes

pytestmark = pytest.mark.slow
RATES = """
FIELDS = ("training.learning_rate", "student.init")

def recipe_point(config):
    return {"kind": "mild"}

def suggest(trial, config):
    kind = trial.suggest_categorical("kind", ("mild", "gentle", "explosive", "absent"))
    if kind == "absent":
        return {"student.init": "/no/such/detector"}
    return {"training.learning_rate": {"mild": 1e-3, "gentle": 1e-4, "explosive": 1e30}[kind]}
"""
REASONS = {"explosive": "the loss is not finite", "absent": "/no/such/detector"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 48 + 12 images, a teacher of other sizes, and a space of which half fails."""
    root = tmp_path_factory.mktemp("tune")
    for name, images, first in (("train", 48, 0), ("val", 12, 1000)):
        annotations, folder = make_shapes(ShapesConfig(images=images, first_image=first), root / f"{name}-coco")
        prepare(annotations, folder, str(root / name), rows_per_shard=40, quiet=True)
    labels = load_manifest(str(root / "train")).labels
    teacher = load(None, [*SIZES, "student.queries=11", "student.width=64", "student.decoder_layers=3"]).student
    save_detector(build_student(teacher, labels[::-1], seed=7).eval(), root / "teacher", teacher.resize)
    (root / "rates.py").write_text(RATES)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    import ray

    pipelines.cluster.start_ray()
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def config(work: Path, name: str, *overrides: str) -> Config:
    fixed = [
        *(f"name={name}", f"output={work}/runs", f"data.train={work}/train", f"data.val={work}/val"),
        *(f"teacher.path={work}/teacher", f"teacher.cache.path={work}/cache"),
        *("teacher.cache.attention_giou_floor=-1", "teacher.cache.batch_size=48"),
        *(f"tracking.uri=sqlite:///{work}/mlflow.db", "training.epochs=3", "compute.device=cpu"),
    ]
    return load(None, [*SIZES, *fixed, *overrides])


def rows_of(config: Config) -> list[TrialRow]:
    return Records(config).in_order()


def outcome(row: TrialRow) -> tuple[Any, ...]:
    """What may not depend on how often the driver was killed."""
    return row.number, row.state, row.parameters, row.overrides, row.curve, row.metrics, row.parameters_m, row.reason


SEARCH = ("loss_weights", "query_groups", "student_architecture")
ONE_AT_A_TIME = ["--trials", "6", "--at-once", "1", "--at-most-parameters", "0.06"]
ASKED = tune.TuneRequest(SearchRequest(SEARCH, trials=6), at_most_parameters="0.06", at_once=1)


@pytest.fixture(scope="module")
def undisturbed(work: Path, cluster: str) -> tune.SweepResult:
    return tune.run(config(work, "undisturbed"), ASKED)


def test_every_epoch_reaches_asha_and_the_first_trial_is_the_recipe(undisturbed: tune.SweepResult) -> None:
    rows = undisturbed.rows
    assert len(rows) == 6
    assert rows[0].overrides == {}
    assert {row.state for row in rows} == {"finished", "stopped"}
    for row in rows:
        assert [epochs for epochs, _ in row.curve] == list(range(1, len(row.curve) + 1))
        assert len(row.curve) == 3 if row.state == "finished" else len(row.curve) < 3
        # ASHA's rung at one epoch: below the best third of those before it.
        before = sorted((other.curve[0][1] for other in rows[: row.number]), reverse=True)
        if row.state == "stopped" and len(row.curve) == 1:
            assert row.curve[0][1] < before[max(0, len(before) // 3 - 1)]
        assert row.parameters_m is not None
        assert row.parameters_m <= 0.06
        assert row.latency_ms is not None
        assert row.latency_ms > 0


def test_a_sweep_in_mlflow_is_a_parent_with_children_and_a_registered_model(
    work: Path, undisturbed: tune.SweepResult
) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    parent = client.get_run(undisturbed.run_id)
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{undisturbed.run_id}'", max_results=100
    )
    by_number = {int(run.data.tags["qskd.trial"]): run for run in children}
    assert len(children) == 6
    assert sorted(by_number) == list(range(6))
    for row in undisturbed.rows:
        run = by_number[row.number]
        assert (run.info.run_id, run.info.status) == (row.run_id, "FINISHED")
        assert run.data.tags["qskd.state"] == row.state
        logged = [metric.value for metric in client.get_metric_history(row.run_id, "val/AP")]
        assert logged == pytest.approx([ap for _, ap in row.curve])
        assert run.data.params["student.queries"] == str(row.overrides.get("student.queries", 8))
        assert client.get_metric_history(row.run_id, "loss/total")
    listed = {each.path for each in client.list_artifacts(undisturbed.run_id)}
    assert listed >= {"best.yaml", "config.yaml", "report"}
    best = undisturbed.best
    assert best is not None
    version = client.get_model_version_by_alias("undisturbed", "best")
    assert (version.run_id, str(version.version)) == (best.run_id, undisturbed.version)
    student = Path(mlflow.artifacts.download_artifacts(version.source))
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {each.name for each in student.iterdir()}


def test_the_best_recipe_is_one_that_distill_takes(work: Path, undisturbed: tune.SweepResult) -> None:
    from pipelines.distill import make_plan

    found = load(undisturbed.best_recipe)
    best = undisturbed.best
    assert best is not None
    assert found.name == "undisturbed-best"
    flat = flatten(to_tree(found))
    assert {name: flat[name] for name in best.overrides} == best.overrides
    make_plan(found, "distill")


def test_the_same_command_again_trains_nothing(work: Path, undisturbed: tune.SweepResult) -> None:
    again = tune.run(config(work, "undisturbed"), ASKED)
    assert again.rows == undisturbed.rows
    assert again.version == undisturbed.version


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s  # a busy machine takes minutes to start
    while not ready() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert ready()


def start(recipe: Path, spaces: Sequence[str], options: Sequence[str], cluster: str) -> subprocess.Popen[str]:
    named = [part for space in spaces for part in ("--space", space)]
    command = [sys.executable, "-m", "pipelines.tune", str(recipe), *named, *options]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killing_the_driver_twice_and_ctrl_c_change_nothing(
    work: Path, cluster: str, undisturbed: tune.SweepResult
) -> None:
    killed = config(work, "killed")
    recipe = work / "killed.yaml"
    recipe.write_text(to_yaml(killed))

    def heard() -> int:
        return sum(len(row.curve) for row in rows_of(killed))

    reached = [0]
    for how in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
        process = start(recipe, SEARCH, ONE_AT_A_TIME, cluster)
        wait_for(lambda: heard() > reached[-1], process)
        os.killpg(process.pid, how) if how == signal.SIGKILL else process.send_signal(how)
        out, _ = process.communicate(timeout=120)
        reached.append(heard())
        if how == signal.SIGINT:
            assert process.returncode == tune.INTERRUPTED
            assert "the same command goes on with it" in out
            assert "killed.yaml --space loss_weights" in out
    total = sum(len(row.curve) for row in undisturbed.rows)
    assert reached[-1] < total
    result = tune.run(killed, ASKED)
    assert [outcome(row) for row in result.rows] == [outcome(row) for row in undisturbed.rows]
    for row in result.rows:
        one, other = (
            load_file(f"{work}/runs/{name}/trials/{row.number:04d}/student/model.safetensors")
            for name in ("undisturbed", "killed")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    experiment = client.get_run(result.run_id).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{result.run_id}'", max_results=100)
    assert sorted(int(run.data.tags["qskd.trial"]) for run in children) == list(range(6))
    for row in result.rows:
        steps = [metric.step for metric in client.get_metric_history(row.run_id, "val/AP")]
        assert steps == [3 * round(epochs) for epochs, _ in row.curve]
        assert client.get_run(row.run_id).info.status == "FINISHED"


def test_trials_that_cannot_be_trained_fail_with_their_reason_and_the_sweep_goes_on(work: Path, cluster: str) -> None:
    import mlflow

    search = SearchRequest((str(work / "rates.py"),), trials=7, algorithm="random", asha=False)
    result = tune.run(config(work, "failing", "seed=4"), tune.TuneRequest(search, trial_epochs=1, at_once=2))
    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    kinds = {row.number: row.parameters["rates.kind"] for row in result.rows}
    assert set(kinds.values()) == {"mild", "gentle", "explosive", "absent"}
    for row in result.rows:
        reason = REASONS.get(kinds[row.number], "")
        run = client.get_run(row.run_id)
        if reason:
            assert row.state == "failed"
            assert reason in row.reason
            assert run.info.status == "FAILED"
            assert reason in run.data.tags["qskd.reason"]
        else:
            assert (row.state, len(row.curve), run.info.status) == ("finished", 1, "FINISHED")
    assert result.best is not None


def test_a_trial_whose_process_dies_goes_on_from_its_checkpoint(work: Path, cluster: str) -> None:
    asked = tune.TuneRequest(SearchRequest(("loss_weights",), trials=1), at_once=1)
    lost = config(work, "lost")
    victims: list[int] = []

    def kill_one() -> None:
        while not (rows_of(lost) and rows_of(lost)[0].curve):
            time.sleep(0.02)
        for process in psutil.process_iter(["cmdline"]):
            if any("ImplicitFunc" in part for part in process.info["cmdline"] or []):
                victims.append(process.pid)
                process.kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    result = tune.run(lost, asked)
    killer.join(5)
    assert victims
    assert result.rows[0].state == "finished"
    assert [epochs for epochs, _ in result.rows[0].curve] == [1, 2, 3]


def test_a_population_moves_its_weights_and_its_worst_go_on_from_its_best(
    work: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tune.TuneRequest(SearchRequest(("loss_weights",), trials=4, algorithm="pbt"), at_once=2)
    result = tune.run(config(work, "population"), asked)
    assert [row.state for row in result.rows] == ["finished"] * 4
    assert [[epochs for epochs, _ in row.curve] for row in result.rows] == [[1, 2, 3]] * 4
    printed = capsys.readouterr().out
    assert printed.count("takes over the weights of trial") == 2  # one of four, at each of two generations

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    moved = [
        row
        for row in result.rows
        if len({metric.value for metric in client.get_metric_history(row.run_id, "search/loss_weights.agfd")}) > 1
    ]
    assert moved
    first = Folder(config(work, "population"))
    assert json.loads(first.read("sweep.json"))["asked"]["algorithm"] == "pbt"


TRIAL_PROCESSES = ("ImplicitFunc", "TrainController", "RayTrainWorker")


def trial_processes() -> list[psutil.Process]:
    """This test's own processes of Ray that belong to a trial."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(name in word for word in process.cmdline() for name in TRIAL_PROCESSES):
                found.append(process)
    return found


class StopAtOnce:
    """A conductor of trials that ASHA stops at their first evaluation, one after the other. Notes which processes each had
    when it was stopped. The sweep ends when `released` says so of the last one's, or else when patience does."""

    def __init__(self, jobs: list[Job], released: Callable[[list[psutil.Process]], bool], patience_s: float) -> None:
        self.jobs, self.released, self.patience_s = jobs, released, patience_s
        self.stopped: list[list[psutil.Process]] = []
        self.begun, self.stopped_at, self.in_time = 0, 0.0, False

    def next_job(self) -> Any:
        if self.begun > len(self.stopped):
            return DONE if self._late() else None
        if self.begun < len(self.jobs):
            self.begun += 1
            return self.jobs[self.begun - 1]
        self.in_time = self.released(self.stopped[-1])
        return DONE if self.in_time or self._late() else None

    def _late(self) -> bool:
        return bool(self.stopped) and time.monotonic() - self.stopped_at > self.patience_s

    def heard(self, number: int, report: dict[str, Any], stop: bool) -> None:
        assert "failed" not in report, report
        if stop:
            self.stopped.append(trial_processes())
            self.stopped_at = time.monotonic()

    def ended(self, number: int) -> None:
        pass

    def lost(self, number: int) -> None:
        raise AssertionError(f"trial {number} lost its process")


def stop_at_once(config: Config, conductor: StopAtOnce, folder: Path) -> None:
    search = check_request(SearchRequest(("loss_weights",), asha=True, grace_epochs=1), config)
    run_tuner(conductor, config, search, 200, [TrialRow(99, "finished", curve=((1.0, 1.0),))], str(folder))


def test_a_stopped_trials_process_and_cpus_go_to_the_next(work: Path, cluster: str, tmp_path: Path) -> None:
    import ray

    long = config(work, "stopped", "training.epochs=200")
    cache_teacher.run(long, quiet=True)
    # A trial holds all CPUs there are: the second can only start with those of the first.
    all_cpus = replace_fields(long, {"compute.threads_per_worker": int(ray.cluster_resources()["CPU"])}, "test")
    jobs = [Job(number, to_tree(trial_config(long, number))) for number in range(2)]
    conductor = StopAtOnce(jobs, lambda _: True, patience_s=240)
    stop_at_once(all_cpus, conductor, tmp_path)
    (one,), (other,) = conductor.stopped
    assert one == other


def test_a_stopped_trial_of_two_workers_leaves_no_process_and_holds_no_cpu(
    work: Path, cluster: str, tmp_path: Path
) -> None:
    import ray

    there = ray.cluster_resources()["CPU"]

    def released(processes: list[psutil.Process]) -> bool:
        free = ray.available_resources().get("CPU", 0.0)  # Tune keeps a hundredth while it waits for the next trial
        return not any(each.is_running() for each in processes) and free > there - 0.5

    long = config(work, "stopped-2", "training.epochs=200", "compute.workers=2")
    cache_teacher.run(long, quiet=True)
    # It takes a second, and a busy machine more; what is not ended on purpose is there when the sweep ends.
    conductor = StopAtOnce([Job(0, to_tree(trial_config(long, 0)))], released, patience_s=120)
    stop_at_once(long, conductor, tmp_path)
    assert len(conductor.stopped[0]) >= 4, conductor.stopped  # the trial, its controller, two workers
    assert conductor.in_time


def test_one_cache_serves_all_trials(work: Path, undisturbed: tune.SweepResult) -> None:
    done = cache_teacher.run(config(work, "undisturbed"), quiet=True)
    assert (done.images, done.total) == (0, 48)
    sizes = {row.overrides.get("student.resize.size", 64) for row in undisturbed.rows}
    assert len(sizes) > 1
