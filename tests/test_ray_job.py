"""A cluster of two nodes on loopback, an object store, and a job sent to them from a folder with nothing but a recipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("moto", reason="moto (the S3 server of this test) is not installed: pip install -e '.[dev]'")

import psutil
from forked import server_name
from object_store import ENVIRONMENT, ObjectStore, object_store
from test_pipelines import SIZES

from benchmarks.chaos.cluster import free_ports
from pipelines.cluster.loopback import SWITCH
from pipelines.prepare import prepare
from pipelines.training import driver as distill
from qskd.config.recipe import load, to_yaml
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import build_student, save_detector

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


def end(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Stop the nodes, and whatever of theirs is left: known by the folder that is in their command lines, never by name."""
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 15
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            process.kill()


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        running.make_bucket("qskd-job")
        yield running


@pytest.fixture(scope="module")
def cluster(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without CPUs for work, and a node that has some. `.environment`, `.address`, `.metrics_port` of the node."""
    folder = Path("/tmp") / f"qskd-job-{os.getpid()}"  # short: sockets' names have a limit
    folder.mkdir()
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("a" * 64)
    environment = os.environ | ENVIRONMENT | {
        "AWS_ENDPOINT_URL": store.url, "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/quick'}",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",  # as on a cluster of others, whose nodes may go away
        "QSKD_FORK_SERVER": server_name(),  # the nodes keep it: they start the workers
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a node that is told to end would wait half a minute for its work
    }  # fmt: skip
    for name in ("RAY_ADDRESS", SWITCH):  # the other tests' own Ray, in this process, is of loopback alone
        environment.pop(name, None)
    gcs, dashboard, *ports = free_ports(9)
    head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--include-dashboard=true", "--num-cpus=0"]
    head += [f"--ray-client-server-port={ports[6]}"]
    node = [f"--address=127.0.0.1:{gcs}", "--num-cpus=6"]
    processes = []
    try:
        for options, (agent, grpc, metrics) in ((head, ports[:3]), (node, ports[3:6])):
            listen = [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
            command = [RAY, "start", "--block", "--disable-usage-stats", f"--metrics-export-port={metrics}"]
            log = folder / f"node{len(processes)}.log"
            processes.append(start_node([*command, *listen, *options], environment, log))
        yield SimpleNamespace(environment=environment, address=f"http://127.0.0.1:{dashboard}", metrics_port=ports[5])
    finally:
        end(processes, folder)
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def start_node(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Ray gives a node 30 s to start, which a busy machine may need more than: it is then started again, twice."""
    for _ in range(3):
        with log.open("wb") as said:
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None and "Ray runtime started" not in log.read_text():
            time.sleep(0.2)
        if process.poll() is None:
            return process
        if "timed out during startup" not in log.read_text():
            break
    raise AssertionError(log.read_text()[-3000:])


def submit(cluster: Any, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--address", cluster.address, "--working-dir", ".", "--log-style=record"]
    command += ["--runtime-env", str(ROOT / "runtime_env.yaml"), "--", *words]
    return subprocess.run(
        command, cwd=folder, env=cluster.environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_a_job_from_a_folder_with_a_recipe_caches_and_distils_on_an_object_store(
    cluster: Any,
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, cluster.environment[name])
    for name, images, first in (("train", 48, 0), ("val", 12, 1000)):
        annotations, folder = make_shapes(ShapesConfig(images=images, first_image=first), tmp_path / f"{name}-coco")
        prepare(annotations, folder, f"s3://qskd-job/{name}", rows_per_shard=24, quiet=True)
    teacher = load(None, [*SIZES, "student.queries=11", "student.decoder_layers=3"]).student
    labels = load_manifest("s3://qskd-job/train").labels
    job = tmp_path / "job"
    # The teacher is in the working folder, under a relative name: it goes to every worker with the job.
    save_detector(build_student(teacher, labels, seed=7).eval(), job / "teacher", teacher.resize)
    recipe = load(None, [
        *SIZES, "name=one", "output=s3://qskd-job/runs", "data.train=s3://qskd-job/train", "data.val=s3://qskd-job/val",
        "teacher.path=teacher", "teacher.cache.path=s3://qskd-job/cache", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        "training.epochs=1", "compute.workers=2",
    ])  # fmt: skip
    (job / "student.yaml").write_text(to_yaml(recipe))
    # Two jobs: Ray deletes a job's working folder when the first driver in it ends.
    cached = submit(cluster, job, "python", "-m", "pipelines.cache_teacher", "student.yaml")
    assert cached.returncode == 0, cached.stdout[-4000:] + cached.stderr[-4000:]
    done = submit(cluster, job, "python", "-m", "pipelines.distill", "student.yaml")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    objects = store.objects("qskd-job")
    result = json.loads(objects["runs/one/result.json"])
    assert result["student"] == "s3://qskd-job/runs/one/student"
    assert {"runs/one/student/config.json", "runs/one/student/model.safetensors"} <= set(objects)
    kept = [name for name in objects if name.startswith("cache/") and name.endswith(".parquet")]
    assert len(kept) == 3  # two shards, and the directions
    assert "cache/directions.view-000.parquet" in kept
    assert any(name.startswith("runs/one/train/checkpoint_") for name in objects)
    assert not [name for name in objects if ".writing-" in name or name.endswith(".part")]
    assert json.loads(objects["runs/one/history.json"])[-1]["training"]["loss/agfd"] > 0  # the cache's maps reached it
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
    (progress,) = [line for line in lines if line.get("step") == 3 and "AP" in line]
    assert (progress["run"], progress["run_id"]) == ("one", result["run_id"])
    # Sent again, from another copy of the folder, it is the same run: there is nothing left to do. No Ray is asked for that.
    shutil.copytree(job, tmp_path / "another")
    monkeypatch.chdir(tmp_path / "another")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert asdict(distill.run(load("student.yaml"), "distill")) == result
    assert "finished already" in caplog.text
