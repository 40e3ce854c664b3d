"""Two workers on a real Ray: begun with a Ray of their own and stopped, gone on with in another, told that their node goes.

The workers' numbers are those of a training in this process, with two teachers and labels that these complete. A Ray that a
program starts listens on loopback alone, and leaves nothing behind.
"""

from __future__ import annotations

import json
import re
import signal
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from forked import processes_of_ray
from programs import begin, is_loopback, listeners
from taught_by_two import speak_up
from test_pipelines import SIZES, cluster, config, in_stretches, without_ray, work  # noqa: F401  (fixtures)
from tiny import shake

from pipelines.run.folder import Folder
from pipelines.run.history import read_history
from pipelines.training import driver as distill
from pipelines.training.checkpoint_list import last_report, mend_list
from qskd.config.recipe import load, to_yaml
from qskd.datasets.manifest import load_manifest
from qskd.detectors import build_student, save_detector

pytestmark = pytest.mark.slow
TWO_WORKERS = [
    "training.epochs=6",  # long enough to be stopped on the way
    "training.checkpoint_every_steps=1",
    "training.evaluate_every_epochs=6",
    # The statistics of a batch norm are each worker's own, by design.
    "student.backbone_norm=frozen",
]
COMPARED_STEPS = 12


@pytest.fixture(scope="module")
def taught(work: Path) -> list[str]:
    """A second teacher, of half the classes, which is sure of some of what it says, and labels that lack what it sees."""
    labels = load_manifest(str(work / "train")).labels[4:]
    fields = ["student.family=deformable_detr", "student.feature_levels=2", "student.queries=9"]
    student = load(None, [*SIZES, *fields]).student
    detector = build_student(student, labels, seed=9).eval()
    shake(detector, 9)
    speak_up(detector, 1.8)
    save_detector(detector, work / "second", student.resize)
    left = ", ".join(f"{name}: null" for name in labels)
    return [f"teacher.also.second.path={work}/second", f"teacher.class_map={{{left}}}", "data.completed=true"]


@pytest.fixture(scope="module")
def stopped(work: Path, taught: list[str]) -> SimpleNamespace:
    """A run of two workers, begun by a program with a Ray of its own, which SIGTERM ended. This file's Ray begins after it."""
    two = config(work, "two", *TWO_WORKERS, *taught, "compute.workers=2")
    recipe, home, folder = work / "two.yaml", work / "home", Folder(two)
    home.mkdir()
    recipe.write_text(to_yaml(two))
    process = begin(recipe, home)
    root, seen = psutil.Process(process.pid), set()
    deadline = time.monotonic() + 400  # a busy machine takes minutes to start
    while not read_history(folder) and process.poll() is None and time.monotonic() < deadline:
        seen |= listeners(root)
        time.sleep(0.5)
    seen |= listeners(root)
    family = processes_of_ray(root)
    process.send_signal(signal.SIGTERM)
    code = process.wait(100)
    mend_list(folder)  # it may have been ended within Ray's writing
    kept = last_report(folder)
    assert kept is not None
    out, err = ((work / name).read_text() for name in ("out", "err"))
    return SimpleNamespace(
        config=two, folder=folder, seen=seen, family=family, code=code, out=out, err=err, home=home,
        reached=read_history(folder)[-1]["step"], kept=kept[0]["step"], run_id=json.loads(folder.read("mlflow.json"))["run_id"],
    )  # fmt: skip


def test_a_local_training_listens_on_loopback_alone_and_sigterm_ends_it_in_order(
    work: Path, stopped: SimpleNamespace
) -> None:
    import mlflow

    assert stopped.code == 128 + signal.SIGTERM
    for part in ("gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent", "RayTrainWorker", "pipelines.distill"):
        assert any(part in title for title, _ in stopped.seen), part
    assert not {(title, address) for title, address in stopped.seen if not is_loopback(address)}
    assert stat.S_IMODE((stopped.home / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert stopped.out.count("stopped by SIGTERM") == 1
    for word in ("Traceback", "SIGTERM", "stack trace", "PC: @"):
        assert word not in stopped.err
    assert not psutil.wait_procs(stopped.family, timeout=20)[1]
    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    assert client.get_run(stopped.run_id).info.status == "KILLED"
    assert 0 < stopped.reached < 36
    said = re.search(r"^two: stopped at step (\d+) of 36, its last checkpoint", stopped.out, re.MULTILINE)
    assert said is not None
    assert 0 < int(said[1]) <= stopped.reached  # workers may make a step more until Ray has ended them


def test_two_workers_that_were_stopped_go_on_and_train_as_this_process_does_without_ray(
    work: Path,
    stopped: SimpleNamespace,
    cluster: str,
    taught: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    in_stretches(monkeypatch, 4)
    result = distill.run(stopped.config, "distill")
    assert (
        stopped.reached <= stopped.kept <= stopped.reached + 1
    )  # Ray may have taken a report that the run did not hear of
    assert f"two: goes on from step {stopped.kept} of 36\n" in capsys.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    assert result.run_id == stopped.run_id
    assert client.get_run(stopped.run_id).info.status == "FINISHED"
    together = read_history(stopped.folder)
    assert [entry["step"] for entry in together] == list(range(1, 37))
    alone = without_ray(config(work, "one", *TWO_WORKERS, *taught), COMPARED_STEPS)
    # Of a report that Ray took and the run did not hear of, as it was stopped, Ray keeps one worker's losses: they are left out.
    told = [(mine, theirs) for mine, theirs in zip(alone, together, strict=False) if "training" in theirs]
    assert len(told) >= COMPARED_STEPS - 1
    for mine, theirs in told:
        terms = [name for name in theirs["training"] if name.startswith("loss/")]
        assert len(terms) == 14
        assert terms == list(mine)
        # The gap is float rounding, which training amplifies step by step.
        tolerance = 1e-4 if theirs["step"] == 1 else 2e-2
        for name in terms:
            assert theirs["training"][name] == pytest.approx(mine[name], rel=tolerance, abs=1e-4), name


def drain_when_begun(folder: Folder) -> None:
    """Tell Ray, as a cloud's notice does, that its only node goes in ten minutes: when one epoch is done."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    while not read_history(folder):
        time.sleep(0.1)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(time.time() * 1000) + 600_000
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, _ = client.drain_node(ray.nodes()[0]["NodeID"], reason, "a test", deadline_ms)
    assert accepted


# The last of this file: the node it drains takes no work after.
def test_a_notice_makes_one_checkpoint_and_the_run_of_elastic_workers_goes_on(
    work: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")  # Ray Train gives both to its processes
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
    epochs, steps_an_epoch = 5, 24
    short_steps = ["training.batch_size=4", f"training.epochs={epochs}", f"training.evaluate_every_epochs={epochs}"]
    elastic = config(work, "elastic", *short_steps, "compute.workers=2", "compute.min_workers=1")
    folder = Folder(elastic)
    threading.Thread(target=drain_when_begun, args=(folder,), daemon=True).start()
    distill.run(elastic, "train")
    steps, ends = [entry["step"] for entry in read_history(folder)], list(range(24, 121, steps_an_epoch))
    assert [step for step in steps if step in ends] == ends
    between = [step for step in steps if step not in ends]
    # Asked every ten steps: a notice that comes just before an epoch's end finds its checkpoint made.
    assert len(between) == 1
    assert between[0] % 10 == 0
    assert between[0] > steps_an_epoch
