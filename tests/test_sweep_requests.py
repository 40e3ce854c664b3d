"""What a sweep asks of an autoscaler: as many trials as may be at work, and no more. No Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_sweep_failures import Play

from pipelines.run.resolve import ResolvedConfig
from pipelines.tuning import driver, engine, sweep

BUNDLES = list[dict[str, float]]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[BUNDLES]:
    """Those that Ray got, on a cluster that was joined."""
    import ray
    import ray.autoscaler.sdk

    found: list[BUNDLES] = []
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: found.append(bundles))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    return found


def search(play: Play, tune: Callable[[], None], monkeypatch: pytest.MonkeyPatch, at_once: int = 0) -> None:
    """The driver's part, `tune` in Tune's place."""
    plan: Any = SimpleNamespace(stream=SimpleNamespace(schedule=SimpleNamespace(total_steps=9, steps_per_epoch=1)))
    monkeypatch.setattr(engine, "run_tuner", lambda *_: tune())
    driver._search(play.sweep, plan, at_once)


@pytest.mark.parametrize(
    ("at_once", "workers", "counts"), [(0, 1, [4, 3, 2, 1, 0, 0]), (2, 1, [2, 1, 0, 0]), (2, 3, [6, 3, 0, 0])]
)
def test_a_sweep_asks_for_the_trials_that_may_be_at_work_and_for_fewer_as_they_end(
    at_once: int,
    workers: int,
    counts: list[int],
    requests: list[BUNDLES],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = (f"compute.workers={workers}", "compute.device=cpu")
    play = Play(tmp_path, 6, "random", 2, *more)
    for _ in range(2):  # an earlier driver's
        play.evaluate(play.next())
    play = Play(tmp_path, 6, "random", 2, *more)

    def tune() -> None:
        numbers = [play.next(), play.next()]
        play.evaluate(numbers[0])
        numbers += [play.next()]
        play.fail(numbers[1])
        play.evaluate(numbers[2])
        last = play.next()
        assert play.sweep.next_job() == sweep.DONE  # Tune asks for no other
        play.evaluate(last)

    search(play, tune, monkeypatch, at_once)
    assert [len(bundles) for bundles in requests] == counts
    assert requests[0][0] == {"CPU": 1}


def test_a_space_that_has_no_more_to_offer_is_not_asked_room_for(
    requests: list[BUNDLES], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Play(tmp_path, trials=30)

    def tune() -> None:
        only = play.next()
        monkeypatch.setattr(sweep, "propose", lambda *_: None)
        assert play.sweep.next_job() is None
        assert play.sweep.next_job() is None
        play.evaluate(only)

    search(play, tune, monkeypatch)
    assert [len(bundles) for bundles in requests] == [30, 1, 0, 0]


def test_a_sweep_begins_by_taking_back_what_a_killed_one_asked_for(
    requests: list[BUNDLES], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.cluster import start

    monkeypatch.setattr(start, "start_ray", lambda: None)
    driver._make_cache(ResolvedConfig(Play(tmp_path).config), cached=False)
    assert requests == [[]]
