"""The logical CPUs of a training on CPUs: workers never take what its readers need, and a lack of them is told."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import server_name

from pipelines.cluster import start
from pipelines.cluster.devices import device_here, say_if_gpus_are_idle, uses_gpu
from pipelines.cluster.room import (
    ask_for_nodes,
    check_room,
    forget_request,
    node_resources,
    reader_cpus,
    worker_resources,
)
from pipelines.tuning.engine import trials_at_once
from qskd.config import ComputeConfig, Config
from qskd.errors import QskdError

FIXED, ELASTIC = ComputeConfig(workers=4), ComputeConfig(workers=64, min_workers=2)


@pytest.mark.parametrize("cpus", [2, 3, 4, 8, 16, 64, 96, 192, 256])
def test_elastic_workers_leave_room_for_a_reader_on_every_node(cpus: int) -> None:
    each = worker_resources(ELASTIC, gpu=False)["CPU"]
    most = int(cpus // each)  # as Ray's policy counts them
    assert most >= 1
    assert cpus - most * each >= most * reader_cpus(ELASTIC, gpu=False, workers=most)


def test_a_machine_has_the_cores_that_a_batch_system_or_a_container_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many trials as the whole machine has cores would not fit into a job's memory."""
    import os

    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 64.0}}])
    assert trials_at_once(Config(), node_resources()) == 1
    started: list[float] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **said: started.append(said["num_cpus"]))
    for name in ("keep_back_noise", "choose_loopback", "make_token"):
        monkeypatch.setattr(start, name, lambda: None)
    start.start_ray()
    assert started == [start.LOGICAL_CPUS_MIN]


def test_workers_with_gpus_ask_for_nothing_else() -> None:
    assert worker_resources(ELASTIC, gpu=True) == worker_resources(FIXED, gpu=True) == {"GPU": 1}


@pytest.mark.parametrize(("compute", "least"), [(FIXED, 5.0), (ELASTIC, 2.502)])
def test_too_few_cpus_are_an_error_on_this_machine_and_a_warning_on_a_cluster(
    compute: ComputeConfig, least: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    there = {"CPU": least}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    check_room(compute, gpu=False)
    there["CPU"] = least - 0.25
    with pytest.raises(QskdError, match=r"compute.workers: .* worker\(s\) and a reader, on CPUs"):
        check_room(compute, gpu=False)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    with caplog.at_level(logging.WARNING, "qskd"):
        check_room(compute, gpu=False)
    assert "the training waits until nodes join" in caplog.text


@pytest.mark.parametrize(("compute", "least"), [(FIXED, 4), (ELASTIC, 2)])
def test_too_few_gpus_are_an_error_on_this_machine_and_a_warning_on_a_cluster(
    compute: ComputeConfig, least: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    there = {"CPU": 1.0, "GPU": float(least)}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    check_room(compute, gpu=True)
    there["GPU"] -= 1
    with pytest.raises(QskdError, match=rf"compute.device: cuda, {least} GPU\(s\) wanted, {least - 1} here"):
        check_room(compute, gpu=True)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    with caplog.at_level(logging.WARNING, "qskd"):
        check_room(compute, gpu=True)
    assert "waits until nodes join" in caplog.text


def test_elastic_training_takes_gpus_when_there_are_enough_for_the_fewest_workers() -> None:
    elastic, fixed = Config(compute=ELASTIC), Config(compute=FIXED)
    assert uses_gpu(elastic, {"GPU": 2.0})
    assert not uses_gpu(elastic, {"GPU": 1.0})
    assert not uses_gpu(fixed, {"GPU": 3.0})


def test_a_few_gpus_for_more_workers_are_idle_loudly(caplog: pytest.LogCaptureFixture) -> None:
    for config, gpus, said in (
        (Config(compute=FIXED), 3.0, True),
        (Config(compute=FIXED), 0.0, False),
        (Config(compute=FIXED.model_copy(update={"device": "cpu"})), 3.0, False),
    ):
        caplog.clear()
        say_if_gpus_are_idle(config, {"GPU": gpus})
        assert ("3 GPU(s) for 4 workers: ALL OF THEM TRAIN ON CPUS" in caplog.text) == said


@pytest.mark.slow
def test_a_worker_takes_no_gpu_that_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    @ray.remote
    def device() -> str:
        # As on a machine with a GPU, for nobody hides it from a worker that asked for none.
        torch.cuda.is_available = lambda: True
        return str(device_here(Config()))

    monkeypatch.setenv("QSKD_FORK_SERVER", server_name())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    found = ray.get([device.options(num_gpus=gpus).remote() for gpus in (0, 1)])
    assert [str(device_here(Config())), *found] == ["cuda", "cpu", "cuda"]


# ---- what an autoscaler is asked for


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """The requests that Ray got, on a cluster that was joined."""
    import ray.autoscaler.sdk

    requests: list[list[dict[str, float]]] = []
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    return requests


def test_a_request_is_sent_when_it_changes_and_taken_back_for_good(asked: list[list[dict[str, float]]]) -> None:
    with ask_for_nodes({"CPU": 1, "GPU": 0}) as request:
        for count in (3, 3, 2, 2, 2):
            request(count)
        assert asked == [[{"CPU": 1}] * 3, [{"CPU": 1}] * 2]
    request(7)  # what a trial says while it is ended
    assert asked[2:] == [[]]
    forget_request()
    assert asked[3:] == [[]]


def test_a_request_that_a_head_did_not_take_is_sent_again(
    asked: list[list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray.autoscaler.sdk

    def silent(bundles: list[dict[str, float]]) -> None:
        raise RuntimeError("the head does not answer")

    with ask_for_nodes({"CPU": 1}) as request:
        with monkeypatch.context() as patch:
            patch.setattr(ray.autoscaler.sdk, "request_resources", silent)
            request(3)
        assert "the head does not answer" in caplog.text
        assert not asked
        request(3)
        assert asked == [[{"CPU": 1}] * 3]


def test_nothing_is_asked_of_a_ray_of_our_own(
    asked: list[list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    with ask_for_nodes({"CPU": 1}) as request:
        request(3)
    assert not asked


STOPPED = """
import os, time
os.environ["RAY_ADDRESS"] = "somewhere:6379"
import ray.autoscaler.sdk
from pipelines.cluster.room import ask_for_nodes
from pipelines.run.stopping import ended_by_signals
ray.autoscaler.sdk.request_resources = lambda bundles: print(len(bundles), flush=True)
with ended_by_signals(), ask_for_nodes({"CPU": 1}) as request:
    request(3)
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closing", flush=True)
        time.sleep(60)
"""


def test_sigterm_takes_the_request_back_before_anything_is_closed() -> None:
    """`ray job stop` kills three seconds after it, while Tune ends its trials."""
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen([sys.executable, "-c", STOPPED], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["3\n", "ready\n"]
    process.send_signal(signal.SIGTERM)
    assert [process.stdout.readline() for _ in range(2)] == ["0\n", "closing\n"]
    process.kill()
    process.communicate()
