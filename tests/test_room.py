"""The logical CPUs of a training on CPUs: workers never take what its readers need, and a lack of them is told."""

from __future__ import annotations

import logging

import pytest

from pipelines.cluster import check_room, reader_cpus, worker_resources
from pipelines.trainer import uses_gpu
from qskd.config import ComputeConfig, Config
from qskd.errors import QskdError

FIXED, ELASTIC = ComputeConfig(workers=4), ComputeConfig(workers=64, min_workers=2)


@pytest.mark.parametrize("cpus", [2, 3, 4, 8, 16, 64, 96, 192, 256])
def test_elastic_workers_leave_room_for_a_reader_on_every_node(cpus: int) -> None:
    each = worker_resources(ELASTIC, gpu=False)["CPU"]
    most = int(cpus // each)  # as Ray's policy counts them
    assert most >= 1
    assert cpus - most * each >= reader_cpus(ELASTIC, gpu=False)


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
    check_room(compute, gpu=True)
    with pytest.raises(QskdError, match=r"compute.workers: .* worker\(s\) and a reader, on CPUs"):
        check_room(compute, gpu=False)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    with caplog.at_level(logging.WARNING, "qskd"):
        check_room(compute, gpu=False)
    assert "the training waits until nodes join" in caplog.text


def test_elastic_training_takes_gpus_when_there_are_enough_for_the_fewest_workers() -> None:
    elastic, fixed = Config(compute=ELASTIC), Config(compute=FIXED)
    assert uses_gpu(elastic, {"GPU": 2.0})
    assert not uses_gpu(elastic, {"GPU": 1.0})
    assert not uses_gpu(fixed, {"GPU": 3.0})
