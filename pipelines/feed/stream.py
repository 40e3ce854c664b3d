"""What a worker trains on, in which order: the schedule cut into ranges of steps, and this worker's share of each batch.

Free of Ray and of torch: `pipelines.feed.readers` carries these ranges through Ray Data.

Why ranges: a Ray Data block costs some 10 ms of its coordinator's time, whatever its size. Those of tens of steps make that vanish.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from pipelines.feed.memory import FEWEST_BYTES
from pipelines.feed.packing import Arrays
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.loader import BatchLoader
from qskd.datasets.order.schedule import Batch, Schedule, Subset, evaluation_batches, split, training_batches
from qskd.datasets.pictures.cuts import SHIP_BYTES
from qskd.storage.spool import RowGroupSpool
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.joined import JoinedCaches

RANGE_BYTES = 48 * 2**20  # decoded pixels in one block, about
MAX_RANGE = 64
LOADER_ROWS = "loader_rows"  # beside a batch's arrays: rows asked of the reader, and those it did not have in memory


class StepRange(TypedDict):
    """The batches `first` to before `last` of one epoch, of training or of its evaluation. A row on its way through Ray Data."""

    subset: Subset
    epoch: int
    first: int
    last: int


def keep_bytes_for(window_images: int, row_bytes: float) -> int:
    """Memory in which a reader can hold what it has read and not yet used of a shuffling window. The last of an epoch is up to
    twice as long. With less, rows that were read along with others are lost before their turn and read again, many times."""
    return max(FEWEST_BYTES, 2 * int(window_images * (row_bytes + 3000)))


@dataclass(frozen=True)
class Share:
    """One worker's part of one global batch. Fields as in `qskd.datasets.order.schedule.Batch`; arrays are the loader's."""

    subset: Subset
    epoch: int
    index: int
    count: int
    arrays: Arrays

    @property
    def is_last(self) -> bool:
        """Whether the epoch's training (or evaluation) ends with this batch."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class StreamConfig:
    """What a reader process needs to know; small, and free of torch."""

    train_uri: str
    val_uri: str
    schedule: Schedule
    views: ViewConfig
    student_resize: ResizeConfig
    teacher_resize: ResizeConfig | None  # None: the teacher sees the student's pixels, or there is none
    keep_bytes: int = 2**30
    teacher_cache: str = ""  # folder of the teacher's outputs; empty: none
    teacher_columns: tuple[str, ...] = ()
    teacher_row_bytes: int = 0  # of one image's columns, about
    stretch_ranges: int = 4096  # ranges in one execution of Ray Data
    share_rows: bool = False  # with the other readers of a machine: each row group is read from its store once
    by_aspect: bool = False  # see `rows_of`
    finish: bool = True  # readers resize; else the device does that the batches go to, a GPU
    unlabeled_uris: tuple[str, ...] = ()  # shard folders without labels; see `Schedule`
    unlabeled_caches: tuple[str, ...] = ()  # the folder of the teacher's outputs of each; none without `teacher_cache`

    def range_length(self, world_size: int, subset: Subset = "train") -> int:
        """Steps in a block, from the size of a decoded batch."""
        resizes = [resize for resize in (self.student_resize, self.teacher_resize) if resize is not None]
        # Not the most pixels allowed: that made blocks of a single step.
        picture = 3 * sum(resize.usual_pixels for resize in resizes) if self.finish else SHIP_BYTES
        size = self.schedule.batch_size if subset == "train" else self.schedule.evaluation_size
        share = -(-size // world_size)
        return max(1, min(MAX_RANGE, RANGE_BYTES // ((picture + self.teacher_row_bytes) * share)))

    def batch_count(self, subset: Subset, epoch: int) -> int:
        """Global batches in this epoch's training or evaluation."""
        return self.schedule.batches_in(subset, epoch)

    def ranges(self, start_step: int, world_size: int) -> Iterator[StepRange]:
        """The schedule from a training step on, cut into ranges; none crosses from training to evaluation or back."""
        schedule = self.schedule
        if start_step == schedule.total_steps:
            return
        first_epoch, first = divmod(start_step, schedule.steps_per_epoch)
        for epoch in range(first_epoch, schedule.epochs_begun):
            parts: list[tuple[Subset, int]] = [("train", first if epoch == first_epoch else 0)]
            if schedule.evaluates_after(epoch):
                parts.append(("val", 0))
            for subset, begin in parts:
                count, length = self.batch_count(subset, epoch), self.range_length(world_size, subset)
                for at in range(begin, count, length):
                    yield {"subset": subset, "epoch": epoch, "first": at, "last": min(at + length, count)}

    def stretches(self, start_step: int, world_size: int) -> Iterator[list[StepRange]]:
        """The ranges, as many together as one execution takes."""
        ranges = self.ranges(start_step, world_size)
        while stretch := list(itertools.islice(ranges, self.stretch_ranges)):
            yield stretch

    def loader(self) -> BatchLoader:
        spool = RowGroupSpool(self.train_uri or self.val_uri, self.keep_bytes) if self.share_rows else None
        cache: TeacherCacheReader | JoinedCaches | None = None
        if self.unlabeled_caches:
            labelled = [self.teacher_cache] if self.train_uri else []
            cache = JoinedCaches([*labelled, *self.unlabeled_caches], self.teacher_columns, spool)
        elif self.teacher_cache:
            cache = TeacherCacheReader(self.teacher_cache, self.teacher_columns, spool)
        return BatchLoader(
            self.train_uri,
            self.val_uri,
            self.views,
            self.student_resize,
            self.teacher_resize,
            self.keep_bytes,
            cache,
            self.finish,
            spool,
            self.unlabeled_uris,
        )

    def rows_of(self, loader: BatchLoader, batch: Batch, world_size: int, rank: int) -> NDArray[np.int32]:
        """A worker's share of a batch. by_aspect: the batch is first sorted by its pictures' aspect ratio, so that those of one
        worker (and of one micro-batch) are alike and little of what it computes is padding. The batch stays what it is."""
        rows = batch.rows
        if self.by_aspect and batch.subset == "train":
            height, width = loader.sizes("train", rows).T
            rows = rows[np.argsort(height / width, kind="stable")]
        return split(rows, world_size, rank)

    def batches(self, steps: StepRange) -> Iterator[Batch]:
        """The global batches of a range."""
        if steps["subset"] == "train":
            part = training_batches(self.schedule, steps["epoch"], steps["first"])
        else:
            part = evaluation_batches(self.schedule, steps["epoch"], steps["first"])
        return itertools.islice(part, steps["last"] - steps["first"])


def local_stream(config: StreamConfig, start_step: int = 0, world_size: int = 1, rank: int = 0) -> Iterator[Share]:
    """The same batches without Ray, in this process: for tests, and to measure what Ray costs."""
    loader = config.loader()
    for steps in config.ranges(start_step, world_size):
        for batch in config.batches(steps):
            arrays = loader.load(batch.subset, config.rows_of(loader, batch, world_size, rank))
            yield Share(batch.subset, batch.epoch, batch.index, batch.count, arrays)
