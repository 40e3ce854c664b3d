"""The benchmarks of loading, detection loss and evaluation: they run, and what they compare is equal. No speed is
asserted: that is for a quiet machine and for the figures they print."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks import cache_codec, detection_loss, evaluation, launches, plain_loop, prepare, timing
from benchmarks.timing import Difference, Pass, Ratio, Report
from qskd.config import Config
from qskd.datasets import packing
from qskd.detectors import Detector
from qskd.training.step import Training

COMMANDS = {
    "detection_loss": ["--quick"],
    "evaluation": ["--quick"],
    # Two batches in this process. Ray takes half a minute to start, and more batches; test_pipelines streams through it.
    "loader": ["--no-ray", "--synthetic", "--images", "32", "--rounds", "1"],
    "pixels": ["--quick"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_quick_run_yields_finite_ratios_and_equal_values(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report: Report = importlib.import_module(f"benchmarks.{name}").main(COMMANDS[name])
    assert report.ratios
    assert all(math.isfinite(ratio.value) and ratio.value > 0 for ratio in report.ratios)
    assert any(ratio.goal for ratio in report.ratios)
    assert report.differences
    assert report.exit_code == 0
    printed = capsys.readouterr().out
    assert all(ratio.name in printed for ratio in report.ratios)
    assert "WRONG" not in printed


def test_prepare_s_rates_are_of_equal_shards_and_a_large_json_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "FEWEST", 16)
    monkeypatch.setattr(prepare, "cores", lambda: 2)
    report = prepare.main(["--images", "40", "--rounds", "1", "--annotations", "600"])
    assert all(math.isfinite(ratio.value) for ratio in report.ratios)
    assert "JSON of 600 annotations, 40 images" in capsys.readouterr().out


@pytest.mark.slow
def test_students_of_every_precision_are_taught_as_by_default_whitened_on_however_few_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What int8 costs shows along the directions of little variance, which whitening makes count as much as any."""
    whitened = []

    class Watched(Training):
        def __init__(self, config: Config, student: Detector, teacher: Any, *rest: Any) -> None:
            whitened.append(bool(teacher.directions))
            super().__init__(config, student, teacher, *rest)

    monkeypatch.setattr(cache_codec, "Training", Watched)
    report = cache_codec.measure(24, 1)
    assert whitened == [True] * 4
    assert all(math.isfinite(ratio.value) for ratio in report.ratios)


def test_operators_that_compute_are_counted_and_views_are_not() -> None:
    x = torch.ones(4)
    with launches.Operators() as operators:
        (x.view(2, 2).t() + 1).sum()
    assert operators.found == {"add": 1, "sum": 1}


def test_qskd_adds_no_more_operators_to_a_step_than_it_says() -> None:
    plain, taught = (launches.count("conditional_detr", kind, False, quick=True) for kind in ("plain", "qskd"))
    assert taught.launches - plain.launches < 450  # docs/performance.md; 532 when each part made its own geometry


@pytest.mark.slow
def test_plain_training_is_compared_with_a_loop_of_transformers() -> None:
    report = plain_loop.main(["--quick"])
    assert [ratio.goal for ratio in report.ratios] == [">= 1.15", ">= 1.15", ""]
    assert all(math.isfinite(ratio.value) and ratio.value > 0 for ratio in report.ratios)


def test_object_counts_are_spread_like_cocos() -> None:
    counts = detection_loss.object_counts(128)
    assert sum(counts) / 128 == pytest.approx(7.3, abs=0.2)
    assert max(counts) > 60
    assert 0 in counts
    truth, found = evaluation.make_problem(400)
    assert len(truth.object_image_ids) / 400 == pytest.approx(7.3, rel=0.15)
    assert len(found.scores) == 400 * 100


def test_the_sides_take_turns() -> None:
    calls: list[str] = []
    taken = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(values) for values in taken.values()] == [3, 3]


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio("", (0.4, 0.9, 0.5), at_most=0.5), "met"),
        (Ratio("", (0.4, 0.9, 0.6), at_most=0.5), "missed"),
        (Ratio("", (1.0,), at_least=0.95), "met"),
        (Ratio("", (0.9,), at_least=0.95), "missed"),
        (Ratio("", (0.9,)), ""),
    ],
)
def test_the_median_is_held_against_the_goal(ratio: Ratio, verdict: str) -> None:
    assert ratio.verdict == verdict


@pytest.mark.parametrize(("values", "code"), [([0.0, 1e-7], 0), ([1e-7, 2e-6], 1), ([math.nan], 1)])
def test_a_difference_is_an_error(values: Sequence[float], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("", differences=[Difference("", value, 1e-6) for value in values])
    assert report.exit_code == code
    report.print()
    assert ("WRONG" in capsys.readouterr().out) == bool(code)


def test_speed_leaves_out_the_start_and_a_percentile_is_one_of_the_values() -> None:
    assert Pass([5.0, 6.0, 8.0, 9.0], [], []).speed(batch=4, first=1) == pytest.approx(4 * 2 / 3)
    assert timing.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.percentile(list(range(1, 201)), 0.99) == 198


def test_a_stream_is_watched_to_its_end() -> None:
    seen = timing.watch(lambda: iter([1, 2, 3]), lambda value: value * 2)
    assert seen.results == [2, 4, 6]
    assert len(seen.arrivals) == len(seen.waits) == 3
    assert seen.arrivals == sorted(seen.arrivals)
