"""The order of the data, as pure functions of (seed, epoch): which rows of which shards make which global batch.

Nothing here depends on the number of workers. Every worker computes the same global batches and takes its part of each,
so a run can stop at any step and go on with more or fewer workers and still see the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.order.chosen import ChosenRows
from qskd.errors import QskdError

Subset = Literal["train", "val"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One global batch.

    step: training steps finished before it: a training batch's global number; for a val batch, how far training was.
    epoch: the epoch it trains, or the one just finished that it evaluates.
    rows: int32 [n, 3] of (shard, row, view index).
    index, count: the batch's place in its epoch's training or evaluation, 0 <= index < count.
    """

    subset: Subset
    step: int
    epoch: int
    rows: NDArray[np.int32]
    index: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the epoch's training (or evaluation) ends with this batch."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class Schedule:
    """A whole run's data, in numbers; `*_shard_rows` are the images in each shard (`Manifest.shard_rows`)."""

    train_shard_rows: tuple[int, ...]
    val_shard_rows: tuple[int, ...]
    seed: int
    epochs: int
    batch_size: int
    window_images: int
    views: int = 1
    fresh_views: bool = False  # number `epoch`, derived from a view below `views`; else number epoch % views
    evaluation_batch_size: int = 0  # 0: as in training
    evaluate_every_epochs: int = 1
    max_steps: int = 0  # 0: no limit
    # Images without labels: their shards' numbers follow those of `train_shard_rows`. unlabeled_in_batch: of each global batch.
    unlabeled_shard_rows: tuple[int, ...] = ()
    unlabeled_in_batch: int = 0
    # Of either, where an epoch draws from a part of them (`data.selection`). None: from all.
    train_chosen: ChosenRows | None = None
    unlabeled_chosen: ChosenRows | None = None

    # Kept once they are known: a worker asks at each step, and there are thousands of shards to add up.

    @cached_property
    def val_images(self) -> int:
        return sum(self.val_shard_rows)

    @property
    def train_images(self) -> int:
        """Labelled images in an epoch."""
        return sum(self.train_shard_rows) if self.train_chosen is None else len(self.train_chosen)

    @property
    def unlabeled_images(self) -> int:
        """Images in a pass over those without labels."""
        return sum(self.unlabeled_shard_rows) if self.unlabeled_chosen is None else len(self.unlabeled_chosen)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch. QskdError when there is nothing to train on."""
        images, own = self.train_images, self.batch_size - self.unlabeled_in_batch
        if not own:  # an epoch is a pass over what there is
            images, own = self.unlabeled_images, self.unlabeled_in_batch
        if not images:
            raise QskdError("data.train", "no images", "at least one", "point data.train at a folder of `qskd prepare`")
        return max(1, images // own)

    @cached_property
    def unlabeled_steps(self) -> int:
        """Global batches in a pass over the images without labels, which begins anew whenever it ends."""
        return max(1, self.unlabeled_images // max(1, self.unlabeled_in_batch))

    @property
    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.epochs
        return min(steps, self.max_steps) if self.max_steps else steps

    @property
    def epochs_begun(self) -> int:
        """How many epochs there are, the last of which `max_steps` may cut short."""
        return -(-self.total_steps // self.steps_per_epoch)

    def steps_in(self, epoch: int) -> int:
        """Global batches of this epoch: all, or in the last as many as `max_steps` leaves."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)

    @property
    def evaluation_size(self) -> int:
        """Images in a batch of an evaluation, over all workers."""
        return self.evaluation_batch_size or self.batch_size

    def evaluates_after(self, epoch: int) -> bool:
        """Whether an evaluation follows this epoch; one always follows the last."""
        due = (epoch + 1) % self.evaluate_every_epochs == 0 or epoch == self.epochs_begun - 1
        return due and self.val_images > 0

    def batches_in(self, subset: Subset, epoch: int) -> int:
        """Global batches of this epoch's training, or of the evaluation after it."""
        size = self.evaluation_size
        return self.steps_in(epoch) if subset == "train" else -(-self.val_images // size)


def _permutation(length: int, *key: int | str) -> NDArray[np.int64]:
    """A seeded permutation of 0..length-1. Sorts the generator's raw bits, the only stream that NumPy promises to keep
    between releases (Generator.permutation may change)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    bits = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(length)
    return np.argsort(bits, kind="stable")


class EpochOrder:
    """An epoch's order, made window by window as it is asked for: a range of steps late in a billion images costs what one
    in a thousand does, beyond the shards' own permutation. Depends on the arguments only.

    Shards are permuted; neighbours are joined to windows of at least `window_images` rows (too few left at the end join
    the last window); rows are permuted inside their window. So few shards are in use at any time.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, epoch: int, window_images: int) -> None:
        self._shard_rows, self._seed, self._epoch = shard_rows, seed, epoch
        self._windows: list[list[int]] = [[]]
        sizes, left = [0], sum(shard_rows)
        for shard in _permutation(len(shard_rows), "shards", seed, epoch).tolist():
            if sizes[-1] >= window_images and left >= window_images:
                self._windows.append([])
                sizes.append(0)
            self._windows[-1].append(shard)
            sizes[-1] += shard_rows[shard]
            left -= shard_rows[shard]
        self._starts = np.cumsum([0, *sizes])
        self._latest: tuple[int, NDArray[np.int32]] = (-1, np.zeros((0, 2), np.int32))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _window(self, number: int) -> NDArray[np.int32]:
        made_for, rows = self._latest  # read and written whole: readers in several threads may share an order
        if made_for != number:  # ranges of steps come in order: the last window is the one that is asked for again
            rows = _all_rows(self._shard_rows, self._windows[number])
            rows = rows[_permutation(len(rows), "rows", self._seed, self._epoch, number)]
            self._latest = number, rows
        return rows

    def rows(self, first: int, stop: int) -> NDArray[np.int32]:
        """Places `first` to before `stop` of the order: int32 [n, 2] of (shard, row); fewer where the epoch ends."""
        parts, stop = [np.zeros((0, 2), np.int32)], min(stop, len(self))
        number = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < stop:
            begin, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            parts.append(self._window(number)[first - begin : end - begin])
            first, number = end, number + 1
        return np.concatenate(parts)


class DrawnOrder(EpochOrder):
    """The same of some rows, each as often as it is there. places: int32 [n, 2] of (shard, row), in stored order."""

    def __init__(self, places: NDArray[np.int32], shards: int, seed: int, epoch: int, window_images: int) -> None:
        counts = np.bincount(places[:, 0], minlength=shards)
        super().__init__(counts.tolist(), seed, epoch, window_images)
        self._places, self._firsts = places, np.cumsum([0, *counts])

    def rows(self, first: int, stop: int) -> NDArray[np.int32]:
        found = super().rows(first, stop)
        return self._places[self._firsts[found[:, 0]] + found[:, 1]]


def _ordered(
    shard_rows: tuple[int, ...], seed: int, number: int, window_images: int, chosen: ChosenRows | None
) -> EpochOrder:
    if chosen is None:
        return EpochOrder(shard_rows, seed, number, window_images)
    return DrawnOrder(chosen.drawn(seed, number), chosen.shards, seed, number, window_images)


def epoch_order(shard_rows: Sequence[int], seed: int, epoch: int, window_images: int) -> NDArray[np.int32]:
    """All rows in an epoch's order: int32 [N, 2] of (shard, row)."""
    return EpochOrder(shard_rows, seed, epoch, window_images).rows(0, sum(shard_rows))


@lru_cache(maxsize=1)  # a reader is asked for an epoch's ranges of steps one after the other
def _order_of(
    shard_rows: tuple[int, ...], seed: int, epoch: int, window_images: int, chosen: ChosenRows | None
) -> EpochOrder:
    return _ordered(shard_rows, seed, epoch, window_images, chosen)


@lru_cache(maxsize=1)
def _unlabeled_order(
    shard_rows: tuple[int, ...], seed: int, number: int, window_images: int, chosen: ChosenRows | None
) -> EpochOrder:
    return _ordered(shard_rows, seed, number, window_images, chosen)


def _all_rows(shard_rows: Sequence[int], shards: Sequence[int]) -> NDArray[np.int32]:
    pairs = [np.stack([np.full(shard_rows[s], s), np.arange(shard_rows[s])], axis=1) for s in shards]
    return np.concatenate([np.zeros((0, 2), np.int64), *pairs]).astype(np.int32)


def _with_view(rows: NDArray[np.int32], view: int) -> NDArray[np.int32]:
    return np.concatenate([rows, np.full((len(rows), 1), view, np.int32)], axis=1)


def training_batches(schedule: Schedule, epoch: int, first: int = 0) -> Iterator[Batch]:
    """An epoch's global batches from number `first` on. Rows that fill no batch are left out (others every epoch); with
    fewer rows than a batch holds, all of them are the one batch. The view index is epoch % views, or with `fresh_views` epoch; of
    images without labels, that of the pass over them."""
    count, size = schedule.steps_in(epoch), schedule.batch_size
    if first >= count:
        return
    size -= schedule.unlabeled_in_batch
    shards, window = schedule.train_shard_rows, schedule.window_images
    order = _order_of(shards, schedule.seed, epoch, window, schedule.train_chosen)
    for index in range(first, count):
        step = epoch * schedule.steps_per_epoch + index
        rows = _with_view(order.rows(index * size, (index + 1) * size), _view(schedule, epoch))
        if schedule.unlabeled_in_batch:
            rows = _mixed(rows, _unlabeled_rows(schedule, step))
        yield Batch("train", step, epoch, rows, index, count)


def _view(schedule: Schedule, passes: int) -> int:
    return passes if schedule.fresh_views else passes % schedule.views


def _unlabeled_rows(schedule: Schedule, step: int) -> NDArray[np.int32]:
    """Those of a global step: a function of it alone, for their passes are not the epochs."""
    number, index = divmod(step, schedule.unlabeled_steps)
    size, shards = schedule.unlabeled_in_batch, schedule.unlabeled_shard_rows
    order = _unlabeled_order(shards, schedule.seed, number, schedule.window_images, schedule.unlabeled_chosen)
    rows = _with_view(order.rows(index * size, (index + 1) * size), _view(schedule, number))
    rows[:, 0] += len(schedule.train_shard_rows)
    return rows


def _mixed(first: NDArray[np.int32], second: NDArray[np.int32]) -> NDArray[np.int32]:
    """Both, spread evenly over the batch, so that each worker and each micro-batch has some of either."""
    places = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in (first, second)]
    return np.concatenate([first, second])[np.argsort(np.concatenate(places), kind="stable")]


@lru_cache(maxsize=1)  # one evaluation's ranges of steps follow one another, and its epochs
def _stored_order(shard_rows: tuple[int, ...]) -> NDArray[np.int32]:
    return _with_view(_all_rows(shard_rows, range(len(shard_rows))), 0)


def evaluation_batches(schedule: Schedule, epoch: int, first: int = 0) -> Iterator[Batch]:
    """Every val row once, in stored order, after `epoch`, from batch number `first` on; the last batch may be small. The view index
    is 0."""
    size = schedule.evaluation_size
    rows, count = _stored_order(schedule.val_shard_rows), schedule.batches_in("val", epoch)
    done = epoch * schedule.steps_per_epoch + schedule.steps_in(epoch)
    for index in range(first, count):
        part = rows[index * size : (index + 1) * size]
        yield Batch("val", done, epoch, part, index, count)


def stream(schedule: Schedule, start_step: int = 0, evaluated: bool = True) -> Iterator[Batch]:
    """The whole run from training step `start_step` on: an epoch's training batches, its evaluation, the next epoch...

    evaluated: when `start_step` is the first step of an epoch, whether the evaluation of the epoch before is done
    already (it is, for a checkpoint written with that evaluation's results); False begins with it.
    """
    per_epoch = schedule.steps_per_epoch
    if not 0 <= start_step <= schedule.total_steps:
        found, expected = f"step {start_step}", f"0 to {schedule.total_steps}"
        raise QskdError("the run's position", found, expected, "was the data or batch_size changed since? start afresh")
    first_epoch, first = divmod(start_step, per_epoch)
    if start_step == schedule.total_steps:  # an epoch cut short ends here too
        first_epoch, first = schedule.epochs_begun, 0
    if not evaluated and not first and first_epoch and schedule.evaluates_after(first_epoch - 1):
        yield from evaluation_batches(schedule, first_epoch - 1)
    for epoch in range(first_epoch, schedule.epochs_begun):
        yield from training_batches(schedule, epoch, first if epoch == first_epoch else 0)
        if schedule.evaluates_after(epoch):
            yield from evaluation_batches(schedule, epoch)


def split(rows: NDArray[Any], world_size: int, rank: int) -> NDArray[Any]:
    """This rank's contiguous part of a global batch. The parts of all ranks, joined, are the batch; their sizes differ
    by at most 1, so some are empty when there are fewer rows than ranks."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]
