"""The scaling model: its terms against simulations and limits; the readers of a run's metrics against hand-made rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.measure import Record, as_tree, weighted_mean
from benchmarks.scaling.model import WORKERS, Costs, all_reduce_seconds, efficiencies, slowest_of, step, with_step
from qskd.errors import QskdError

SAMPLE = tuple(np.random.default_rng(0).gamma(20, 0.005, 300).tolist())  # mean 0.1 s
COSTS = Costs(
    compute_s=SAMPLE,
    crowded_s=SAMPLE,
    overhead_s=0.002,
    gradient_bytes=1e6,
    latency_s=1e-4,
    bytes_per_s=1e9,
    images=16,
    loader_image_s=0.001,
    readers=1.0,
    block_s=0.03,
    run_steps=20,
    cpus=math.inf,
    report_s=0.2,
    report_worker_s=0.01,
    report_steps=100,
)


@pytest.mark.parametrize("workers", [1, 2, 3, 16, 64])
def test_the_slowest_is_what_a_simulation_of_all_workers_gives(workers: int) -> None:
    sample = SAMPLE[:40]
    drawn = np.random.default_rng(1).choice(sample, (40_000, workers)).max(1)
    assert slowest_of(sample, workers) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / math.sqrt(len(drawn)))


def test_the_slowest_of_one_is_the_mean_of_many_the_largest_and_of_alikes_the_same() -> None:
    assert slowest_of(SAMPLE, 1) == pytest.approx(np.mean(SAMPLE))
    assert slowest_of(SAMPLE, 100_000) == pytest.approx(max(SAMPLE))
    assert slowest_of([0.3] * 7, 64) == pytest.approx(0.3)


def test_one_worker_s_step_is_the_measured_one_and_its_share_of_a_report() -> None:
    made = step(COSTS, 1)
    assert made.seconds == pytest.approx(np.mean(SAMPLE) + 0.002 + 0.2 / 100)
    assert made.limit == "workers"


@pytest.mark.parametrize(
    "changes",
    [{}, {"block_s": 0.3}, {"readers": 0.01}, {"cpus": 1.0}, {"bytes_per_s": 1e6}, {"report_worker_s": 1.0}],
)
def test_more_workers_never_make_a_step_shorter(changes: dict[str, float]) -> None:
    costs = replace(COSTS, **changes)
    taken = [step(costs, workers).seconds for workers in range(1, 70)]
    assert taken == sorted(taken)
    found = efficiencies(costs)
    assert tuple(found) == WORKERS
    assert found[1] == 1.0
    assert all(0 < value <= 1 for value in found.values())


def test_a_ring_moves_twice_the_bytes_whatever_the_workers_and_its_messages_grow_with_them() -> None:
    free = replace(COSTS, latency_s=0.0)
    assert all_reduce_seconds(COSTS, 1) == 0.0
    assert all_reduce_seconds(free, 2) == pytest.approx(1e6 / 1e9)
    assert all_reduce_seconds(free, 10**6) == pytest.approx(2 * 1e6 / 1e9, rel=1e-5)
    only = replace(COSTS, gradient_bytes=0.0)
    assert all_reduce_seconds(only, 9) == pytest.approx(8 * all_reduce_seconds(only, 2))


def test_each_limit_is_named_when_it_binds() -> None:
    assert step(replace(COSTS, readers=0.1), 4).limit == "readers"
    assert step(replace(COSTS, readers=0.1), 4).readers_s == pytest.approx(16 * 0.001 / 0.1)
    slow = replace(COSTS, block_s=4.0)
    assert (step(slow, 64).limit, step(slow, 64).coordinator_s) == ("coordinator", pytest.approx(4.0 / 20))
    assert step(slow, 1).coordinator_s == step(slow, 64).coordinator_s  # each worker has one
    full = step(replace(COSTS, cpus=1.0), 1)
    assert (full.limit, full.cpus_s) == ("CPUs", pytest.approx(np.mean(SAMPLE) + 0.002 + 0.016 + 0.0015))


def test_workers_that_crowd_a_machine_are_slower_than_one_alone() -> None:
    crowded = replace(COSTS, crowded_s=tuple(1.2 * value for value in SAMPLE))
    assert step(crowded, 1) == step(COSTS, 1)
    assert step(crowded, 2).worker_s > step(COSTS, 2).worker_s + 0.019


def test_another_step_keeps_the_spread_of_the_measured_one() -> None:
    other = with_step(COSTS, 0.5)
    assert slowest_of(other.compute_s, 1) == pytest.approx(0.5)
    assert slowest_of(other.compute_s, 64) / 0.5 == pytest.approx(slowest_of(SAMPLE, 64) / slowest_of(SAMPLE, 1))


def test_rows_count_by_their_steps_and_the_start_is_left_out() -> None:
    series = [(20, 9.0), (40, 9.0), (60, 1.0), (75, 3.0)]  # 20 steps at 1.0, 15 at 3.0
    assert weighted_mean(series, 40) == pytest.approx((20 * 1.0 + 15 * 3.0) / 35)
    with pytest.raises(ValueError, match="no row"):
        weighted_mean(series, 70)


def test_a_page_without_marks_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.scaling.measure.measure", lambda *_: pytest.fail("measured"))
    (page := tmp_path / "page.md").write_text(f"{scaling.BEGIN}\nold\n")
    for path in (page, tmp_path / "none.md"):
        with pytest.raises(QskdError, match=r"no <!-- benchmarks\.scaling -->"):
            scaling.main(["--write", str(path)])
    with pytest.raises(QskdError, match="its folder is not there"):
        scaling.main(["--record", str(tmp_path / "none/record.json")])


def test_a_record_read_again_prints_and_writes_the_same_and_keeps_what_is_around(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes = {"report_s": 0.2, "notice_s": 0.004, "gradient_bytes": 8e5}
    reduced = {"small_s": 4e-4, "gradients_s": 2e-3, "large_s": 0.05, "large_bytes": 3.2e7}
    record = Record(
        ["a machine"],
        {"1": [0.1, 0.11], "2": [0.12, 0.12]},
        {"1": [0.001, 0.001], "2": [0.002, 0.002]},
        {"1": [0.1, 0.1], "2": [0.105, 0.105]},
        {"1": list(SAMPLE), "2": list(SAMPLE)},
        {"1": probes, "2": probes | reduced | {"report_s": 0.25}},
        {"1": 0.02, "8": 0.02, "64": 0.02},
        0.002,
        0.0003,
        64,
    )
    source, document = tmp_path / "record.json", tmp_path / "page.md"
    source.write_text(json.dumps(as_tree(record)))
    document.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    report = scaling.main(["--from", str(source), "--write", str(document)])
    assert report is not None
    assert report.ratio("efficiency of two workers: step of one / of two").value == pytest.approx(0.875, abs=1e-3)
    assert report.ratio("ours: efficiency / machine's limit").value == pytest.approx(0.875 / (0.1 / 0.105), abs=1e-3)
    written = document.read_text()
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith(f"{scaling.END}\nafter\n")
    assert "| 64 |" in written
    again = written
    scaling.main(["--from", str(source), "--write", str(document)])
    assert document.read_text() == again

    capsys.readouterr()
    given = [
        "--step-ms",
        "200",
        "--gradient-mb",
        "123",
        "--bandwidth-gbit",
        "10",
        "--latency-us",
        "50",
        "--cpus",
        "inf",
    ]
    scaling.main(["--from", str(source), *given])
    last = capsys.readouterr().out.splitlines()[-1].split()
    reduced_ms = 1000 * (2 * 2 * 63 * 50e-6 + 2 * 63 / 64 * 123e6 / 1.25e9)
    assert f"{reduced_ms:.3g}" in last
