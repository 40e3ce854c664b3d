"""The order of the data: depends on seed and epoch alone, and survives stops and other numbers of workers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from qskd.datasets.order import schedule
from qskd.datasets.order.schedule import (
    Batch,
    EpochOrder,
    Schedule,
    epoch_order,
    evaluation_batches,
    split,
    stream,
    training_batches,
)
from qskd.errors import QskdError

SHARDS = (10, 7, 13, 1, 10, 9)
SCHEDULE = Schedule(SHARDS, (5, 4), seed=3, epochs=4, batch_size=8, window_images=20, views=3, evaluate_every_epochs=2)


def pairs(rows: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows.tolist()]


def everything(batches: object) -> list[tuple[object, ...]]:
    assert hasattr(batches, "__iter__")
    return [(b.subset, b.step, b.epoch, b.index, b.count, pairs(b.rows)) for b in batches]


def test_an_epoch_visits_each_row_exactly_once() -> None:
    order = epoch_order(SHARDS, 0, 0, 20)
    assert order.dtype == np.int32
    assert sorted(pairs(order)) == [(s, r) for s, rows in enumerate(SHARDS) for r in range(rows)]


def test_the_order_depends_on_seed_and_on_epoch() -> None:
    first = pairs(epoch_order(SHARDS, 0, 0, 20))
    assert pairs(epoch_order(SHARDS, 0, 0, 20)) == first
    assert pairs(epoch_order(SHARDS, 1, 0, 20)) != first
    assert pairs(epoch_order(SHARDS, 0, 1, 20)) != first


@pytest.mark.parametrize("window", [1, 9, 20, 1000])
def test_any_part_of_an_order_is_that_part_of_the_whole(window: int) -> None:
    whole = epoch_order(SHARDS, 3, 1, window)
    order = EpochOrder(SHARDS, 3, 1, window)
    for first in range(len(whole) + 2):
        for stop in range(first, len(whole) + 3, 5):
            np.testing.assert_array_equal(order.rows(first, stop), whole[first:stop])
    np.testing.assert_array_equal(order.rows(0, 3), whole[:3])  # back at the start


def test_a_late_part_of_a_large_order_makes_no_rows_but_its_window_s(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    all_rows = schedule._all_rows

    def counted(shard_rows: Sequence[int], shards: Sequence[int]) -> np.ndarray:
        made.append(sum(shard_rows[shard] for shard in shards))
        return all_rows(shard_rows, shards)

    monkeypatch.setattr(schedule, "_all_rows", counted)
    large = Schedule((512,) * 20_000, (), 0, epochs=1, batch_size=16, window_images=4096)
    for first in (600_000, 600_001):  # of 640,000 batches; they share a window of 256
        batch = next(training_batches(large, 0, first))
        assert (batch.step, len(batch.rows)) == (first, 16)
    assert made == [4096]


def test_what_is_asked_at_each_step_does_not_grow_with_the_number_of_shards() -> None:
    """Neither an epoch's steps, nor an evaluation's late batches, once they were asked for."""

    class Counted(tuple[int, ...]):
        looked_at = 0

        def __iter__(self) -> Iterator[int]:
            Counted.looked_at += len(self)
            return super().__iter__()

    large = Schedule(Counted((512,) * 3320), Counted((512,) * 157), 0, epochs=9, batch_size=16, window_images=4096)
    evaluation = list(evaluation_batches(large, 0))
    asked = [large.batches_in(subset, 0) for subset in ("train", "val")]
    first = Counted.looked_at
    for step in range(0, 1000):
        assert [large.batches_in("train", step % 9), large.batches_in("val", 0)] == asked
        assert large.evaluates_after(step % 9)
    late = next(evaluation_batches(large, 0, len(evaluation) - 1))
    assert Counted.looked_at <= first + 157  # the order of stored rows may be looked up by them
    assert (late.index, late.is_last) == (asked[1] - 1, True)
    np.testing.assert_array_equal(late.rows, evaluation[-1].rows)


def test_the_order_is_the_same_in_another_process() -> None:
    code = f"from qskd.datasets.order.schedule import *; print(epoch_order({SHARDS}, 5, 2, 20).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(epoch_order(SHARDS, 5, 2, 20).tolist())


def test_shards_in_use_stay_together_in_windows() -> None:
    shard_rows = (10,) * 12
    order = epoch_order(shard_rows, 0, 0, 30)[:, 0]
    windows = [set(order[start : start + 30].tolist()) for start in range(0, 120, 30)]
    assert all(len(window) == 3 for window in windows)
    assert len(set.union(*windows)) == 12
    assert len(set(order[:10].tolist())) > 1  # and inside a window they mix


def test_windows_are_never_smaller_than_asked() -> None:
    order = epoch_order((10,) * 7, 0, 0, 30)[:, 0]  # 30 rows, then the other 40 together
    assert len(set(order[:30].tolist())) == 3
    assert not set(order[:30].tolist()) & set(order[30:].tolist())
    assert len(set(order[30:60].tolist())) == 4


def test_rows_are_shuffled_evenly() -> None:
    firsts = np.bincount([epoch_order((8,), seed, 0, 1)[0, 1] for seed in range(1600)], minlength=8)
    assert firsts.min() > 140  # 200 expected, standard deviation 13
    assert firsts.max() < 260


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 11])
def test_ranks_parts_joined_are_the_global_batch(world_size: int) -> None:
    for batch in stream(SCHEDULE):
        parts = [split(batch.rows, world_size, rank) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), batch.rows)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_a_stream_started_at_any_step_is_the_tail_of_the_whole() -> None:
    whole = everything(stream(SCHEDULE))
    for start in range(SCHEDULE.total_steps):
        position = next(i for i, batch in enumerate(whole) if batch[:2] == ("train", start))
        assert everything(stream(SCHEDULE, start)) == whole[position:]
    assert everything(stream(SCHEDULE, SCHEDULE.total_steps)) == []


def test_an_evaluation_that_was_cut_off_can_be_repeated() -> None:
    whole = everything(stream(SCHEDULE))
    per_epoch = SCHEDULE.steps_per_epoch
    after_second = next(i for i, batch in enumerate(whole) if batch[0] == "val")
    assert everything(stream(SCHEDULE, 2 * per_epoch, evaluated=False)) == whole[after_second:]
    assert everything(stream(SCHEDULE, SCHEDULE.total_steps, evaluated=False)) == whole[-2:]
    # after the first epoch none was due
    assert everything(stream(SCHEDULE, per_epoch, evaluated=False)) == everything(stream(SCHEDULE, per_epoch))


def test_the_stream_is_epochs_with_their_evaluations() -> None:
    kinds = [(batch.subset, batch.epoch) for batch in stream(SCHEDULE)]
    expected = [("train", 0)] * 6 + [("train", 1)] * 6 + [("val", 1)] * 2 + [("train", 2)] * 6 + [("train", 3)] * 6
    assert kinds == [*expected, ("val", 3), ("val", 3)]
    odd = replace(SCHEDULE, epochs=3)
    assert [batch.epoch for batch in stream(odd) if batch.subset == "val"] == [1, 1, 2, 2]  # the last always
    assert [batch.step for batch in stream(SCHEDULE) if batch.subset == "train"] == list(range(24))


@pytest.mark.parametrize("limit", [1, 6, 9, 23, 24, 1000])
def test_a_limit_of_steps_cuts_the_last_epoch_and_evaluates_after_it(limit: int) -> None:
    cut, whole = replace(SCHEDULE, max_steps=limit), everything(stream(SCHEDULE))
    found = everything(stream(cut))
    trained = [batch for batch in found if batch[0] == "train"]
    assert cut.total_steps == len(trained) == min(limit, 24)
    assert [(b[1], b[5]) for b in trained] == [(b[1], b[5]) for b in whole if b[0] == "train"][:limit]
    last = [batch for batch in stream(cut) if batch.epoch == cut.epochs_begun - 1]
    assert [b.is_last for b in last if b.subset == "train"] == [False] * (cut.steps_in(last[0].epoch) - 1) + [True]
    assert found[-1][:2] == ("val", min(limit, 24))
    assert last[-1].is_last
    for start in range(cut.total_steps):
        position = next(i for i, batch in enumerate(found) if batch[:2] == ("train", start))
        assert everything(stream(cut, start)) == found[position:]
    assert everything(stream(cut, cut.total_steps)) == []
    assert everything(stream(cut, cut.total_steps, evaluated=False)) == found[-2:]


def test_no_row_comes_twice_in_an_epoch_and_the_remainder_changes() -> None:
    left_out = []
    for epoch in range(4):
        rows = [pair for batch in training_batches(SCHEDULE, epoch) for pair in pairs(batch.rows[:, :2])]
        assert len(rows) == len(set(rows)) == 48
        left_out.append({(s, r) for s, n in enumerate(SHARDS) for r in range(n)} - set(rows))
    assert len({frozenset(rows) for rows in left_out}) > 1


def test_views_cycle_with_the_epochs() -> None:
    assert [set(b.rows[:, 2].tolist()) for e in range(4) for b in training_batches(SCHEDULE, e)][::6] == [
        {0},
        {1},
        {2},
        {0},
    ]


def test_evaluation_covers_each_row_once_in_order() -> None:
    batches = list(evaluation_batches(SCHEDULE, 0))
    rows = [row for batch in batches for row in pairs(batch.rows)]
    assert rows == [(s, r, 0) for s, n in enumerate((5, 4)) for r in range(n)]
    assert [len(batch.rows) for batch in batches] == [8, 1]
    assert [batch.is_last for batch in batches] == [False, True]


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    small = Schedule((2, 1), (), seed=0, epochs=2, batch_size=8, window_images=4)
    batches: list[Batch] = list(stream(small))
    assert [len(batch.rows) for batch in batches] == [3, 3]
    assert small.total_steps == 2


def test_no_training_data_is_an_error() -> None:
    with pytest.raises(QskdError, match=r"data\.train: no images"):
        next(stream(Schedule((), (3,), seed=0, epochs=1, batch_size=2, window_images=4)))


def test_a_position_outside_the_run_is_an_error() -> None:
    with pytest.raises(QskdError, match="step 25"):
        next(stream(SCHEDULE, 25))


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        split(np.zeros((4, 3)), 2, 2)
