"""What datasets cost and what grows with them: the arithmetic, and that each part of the programs runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import dataset_costs, limits
from benchmarks.dataset_costs import PerImage, bill
from pipelines.feed.stream import keep_bytes_for

ONE = PerImage(shard_bytes=100.0, cache_bytes=250.0, teacher_gflops=170.0, student_gflops=80.0)


def test_the_teacher_is_paid_once_a_view_with_the_cache_and_every_epoch_without() -> None:
    made = bill(1000, views=4, epochs=50, one=ONE, teacher_s=0.2, train_s=0.5)
    assert made.shard_bytes == 1000 * 100
    assert made.cache_bytes == 1000 * 4 * 250
    assert made.cache_s == pytest.approx(1000 * 4 * 0.2)
    assert made.cached_s == pytest.approx(1000 * (50 * 0.5 + 4 * 0.2))
    assert made.online_s == pytest.approx(1000 * 50 * (0.5 + 0.2))


def test_at_one_epoch_a_cache_saves_no_time_and_no_view_beyond_it_is_made() -> None:
    made = bill(1000, views=4, epochs=1, one=ONE, teacher_s=0.2, train_s=0.5)
    assert made.cached_s == pytest.approx(made.online_s)
    assert made.cache_bytes == 1000 * 250


def test_one_image_is_measured_and_hours_follow_from_a_speed_or_from_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "one.json"
    one = dataset_costs.main(["--quick", "--record", str(record)])
    assert one.teacher_gflops > 0
    assert one.train_gflops == pytest.approx(3 * one.student_gflops)
    assert one.cache_bytes > dataset_costs.ATTENDED * dataset_costs.ATTENTION_BYTES
    assert PerImage(**json.loads(record.read_text())) == one
    without = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("COCO"))
    assert len(without.split()) == 9  # no speed was given: no hours

    times = ["--from", str(record), "--student-ms", "9", "--teacher-ms", "6", "--dollars", "2"]
    dataset_costs.main(times)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("COCO"))
    hours = 118_287 * (50 * 0.009 + 4 * 0.006) / 3600
    assert f"{hours:.3g}" in line.split()
    assert f"{2 * hours:.0f}" in line.split()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tflops 20 --student-ms 9", "belong together"),
        ("--teacher-ms 6", "belong together"),
        ("--dollars 2", "--tflops"),
    ],
)
def test_a_time_or_a_price_that_would_count_for_nothing_is_refused(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        dataset_costs.main(["--quick", *words.split()])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "part",
    [
        "manifest",
        "cache_manifest",
        "order",
        "each_step",
        "cache_job",
        "row_groups",
        "whole_order",
        "first_stretch",
        "evaluation",
    ],
)
def test_each_part_that_grows_is_measured(part: str) -> None:
    said = limits.PARTS[part](50 if part == "row_groups" else 2000)
    assert any(unit in said for unit in (" s", " ms", " us"))


def test_a_window_is_read_once_by_the_readers_of_a_machine_in_the_memory_a_run_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(limits.SETS, "COCO train", 20_000)
    alone, four = limits.reading(1), limits.reading(4)
    assert alone.startswith("1.0; with a cache 1.0 ")
    assert four.startswith("1.0; with a cache 1.0 ")
    assert keep_bytes_for(4096, 418_000) > 2 * 4096 * 418_000
    assert keep_bytes_for(16, 1000) == 2**30
