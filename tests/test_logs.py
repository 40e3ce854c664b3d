"""A JSON line says who speaks; a worker's rows hold speed, waiting, memory hits and memory; text stays as it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.reporting import meter
from pipelines.reporting.meter import GAUGES, Meter
from pipelines.reporting.progress import mean_rows
from pipelines.run import logs
from pipelines.run.logs import say, start_logs


@pytest.fixture
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A call makes loggers what a fresh process has (pytest has put its own there); afterwards they are as they were."""
    root, ours = logging.getLogger(), logging.getLogger("qskd")
    kept = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in (root, ours)]
    monkeypatch.setattr(logs, "_speaker", {})

    def fresh() -> None:
        root.handlers, ours.handlers = [], []

    yield fresh
    for logger, handlers, level, propagate in kept:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_json_line_says_who_speaks_and_keeps_numbers_apart(
    own_logging: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_logging()
    monkeypatch.setenv("QSKD_LOG", "json")
    start_logs(run="one")
    start_logs(run_id="f00", rank=1, world_size=2)  # what becomes known later is added; no line comes twice
    say("step 3 of 7", step=3, loss=0.5)
    logging.getLogger("qskd").warning("a store: %s", "slow")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("another").exception("it failed")
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    for line in (first, second, third):
        assert {name: line[name] for name in ("run", "run_id", "rank", "world_size")} == {
            "run": "one", "run_id": "f00", "rank": 1, "world_size": 2,
        }  # fmt: skip
        assert line["time"].endswith("+00:00")
    assert (first["message"], first["step"], first["loss"], first["level"]) == ("step 3 of 7", 3, 0.5, "INFO")
    assert second["message"] == "a store: slow"
    assert "ValueError: broken" in third["traceback"]


def test_a_line_with_a_loss_that_broke_is_json_all_the_same(
    own_logging: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_json(word: str) -> None:
        raise ValueError(word)

    own_logging()
    monkeypatch.setenv("QSKD_LOG", "json")
    start_logs(run="one")
    say("step 3", loss=float("nan"), rest=float("-inf"), step=3)
    line = json.loads(capsys.readouterr().err, parse_constant=no_json)
    assert (line["loss"], line["rest"], line["step"]) == ("nan", "-inf", 3)


def test_without_the_option_a_line_of_progress_is_plain_text(
    own_logging: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_logging()
    monkeypatch.delenv("QSKD_LOG", raising=False)
    start_logs(run="one")
    say("step 3 of 7", step=3)
    say("not this", quiet=True)
    logging.getLogger("qskd").warning("slow")
    said = capsys.readouterr()
    assert said.out == "step 3 of 7\n"
    assert said.err == "WARNING slow\n"


def test_a_workers_row_holds_speed_waiting_hits_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    shown: list[dict[str, float]] = []
    gauges: Any = SimpleNamespace(show=shown.append)
    measured = Meter(gauges)
    for step in range(1, 5):
        now[0] += 0.5
        loader_rows = np.array([8, 2]) if step < 4 else None
        measured.add(step, {"total": torch.tensor(float(step))}, 16, 0.1, loader_rows)
    ((step, row),) = measured.flush()
    assert step == 4
    assert row["loss/total"] == 2.5
    expected = {
        "images_per_s": 32.0,
        "loader_wait_share": 0.2,
        "step_s": 0.5,
        "loader_wait_s": 0.1,
        "loader_hit_share": 0.75,
    }
    for name, value in expected.items():
        assert row[f"speed/{name}"] == pytest.approx(value), name
    assert 10 < row["memory/peak_rss_mib"] < 1e5
    assert shown == [row]
    assert measured.flush() == []
    assert {entry for entry, _ in GAUGES.values()} - {"memory/peak_gpu_mib"} <= set(row)


def test_workers_memory_is_the_largest_and_their_speed_the_mean() -> None:
    workers = [
        [(2, {"loss/total": 1.0, "memory/peak_rss_mib": 100.0})],
        [(2, {"loss/total": 3.0, "memory/peak_rss_mib": 700.0})],
    ]
    assert mean_rows(workers) == [(2, {"loss/total": 2.0, "memory/peak_rss_mib": 700.0})]
