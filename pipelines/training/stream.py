"""Ray Data: shards -> batches on the worker that trains. One execution spans epochs: the whole of a short schedule.

The schedule is cut into ranges of consecutive steps. A reader process takes a range, reads the rows it needs and emits one row
for each worker: that worker's share of every step in it. Ray deals rows out in turn (`preserve_order`), every row says
whose it is, and the worker checks it: sample order depends on (seed, epoch, world size) and on nothing else.

Why ranges: a Ray Data block costs some 10 ms of driver time, and more with each worker (docs/scale.md), whatever its size. Those
of tens of steps make that vanish.

Why not one execution whatever the length: Ray makes all of its input before the first block flows, at about a millisecond
for each range of steps. COCO's fifty epochs are 120,000 ranges on eight workers. So an execution takes a stretch of them, and the
next begins when it ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa

from pipelines.cluster.start import quiet_ray_data
from pipelines.training.packing import Arrays, pack, unpack
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.loader import BatchLoader
from qskd.datasets.schedule import Batch, Schedule, Subset, evaluation_batches, split, training_batches
from qskd.errors import QskdError
from qskd.teacher.cache import TeacherCacheReader

RANGE_BYTES = 24 * 2**20  # decoded pixels in one block, about
MAX_RANGE = 64
LOADER_ROWS = "loader_rows"  # beside a batch's arrays: rows asked of the reader, and those it did not have in memory
REPORT = "this is a fault of qskd or of this Ray version: please report it with the versions `qskd doctor` prints"


class StepRange(TypedDict):
    """The batches `first` to before `last` of one epoch, of training or of its evaluation. A row on its way through Ray Data."""

    subset: Subset
    epoch: int
    first: int
    last: int


def keep_bytes_for(window_images: int, row_bytes: float) -> int:
    """Memory in which a reader can hold what it has read and not yet used of a shuffling window. The last of an epoch is up to
    twice as long. With less, rows that were read along with others are lost before their turn and read again, many times."""
    return max(2**30, 2 * int(window_images * (row_bytes + 3000)))


@dataclass(frozen=True)
class Share:
    """One worker's part of one global batch. The fields are those of `qskd.datasets.schedule.Batch`; arrays are the loader's."""

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

    def range_length(self, world_size: int, subset: Subset = "train") -> int:
        """Steps in a block, from the size of a decoded batch."""
        resizes = [resize for resize in (self.student_resize, self.teacher_resize) if resize is not None]
        # Not the most pixels allowed: that made blocks of a single step.
        pixels = sum(resize.usual_pixels for resize in resizes)
        size = self.schedule.batch_size if subset == "train" else self.schedule.evaluation_size
        share = -(-size // world_size)
        return max(1, min(MAX_RANGE, RANGE_BYTES // ((3 * pixels + self.teacher_row_bytes) * share)))

    def batch_count(self, subset: Subset, epoch: int) -> int:
        """Global batches in this epoch's training or evaluation."""
        size = self.schedule.evaluation_size
        return self.schedule.steps_in(epoch) if subset == "train" else -(-sum(self.schedule.val_shard_rows) // size)

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
        cache = TeacherCacheReader(self.teacher_cache, self.teacher_columns) if self.teacher_cache else None
        return BatchLoader(
            self.train_uri,
            self.val_uri,
            self.views,
            self.student_resize,
            self.teacher_resize,
            self.keep_bytes,
            cache,
        )

    def batches(self, steps: StepRange) -> Iterator[Batch]:
        """The global batches of a range."""
        if steps["subset"] == "train":
            part = training_batches(self.schedule, steps["epoch"], steps["first"])
        else:
            part = itertools.islice(evaluation_batches(self.schedule, steps["epoch"]), steps["first"], None)
        return itertools.islice(part, steps["last"] - steps["first"])


class RangeReader:
    """A reader process: ranges in, one packed row for each worker out."""

    def __init__(self, config: StreamConfig, world_size: int) -> None:
        self.config, self.world_size = config, world_size
        self.loader = config.loader()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for steps in table.to_pylist():
            shares: list[Arrays] = [{} for _ in range(self.world_size)]
            for batch in self.config.batches(steps):
                for rank, share in enumerate(shares):
                    asked, unheld = self.loader.rows_requested, self.loader.rows_not_in_memory
                    arrays = self.loader.load(batch.subset, split(batch.rows, self.world_size, rank))
                    arrays[LOADER_ROWS] = np.array(
                        [self.loader.rows_requested - asked, self.loader.rows_not_in_memory - unheld]
                    )
                    share.update({f"{batch.index}/{name}": array for name, array in arrays.items()})
            for rank, share in enumerate(shares):
                columns = {name: [value] for name, value in steps.items()} | {"rank": [rank]}
                yield pa.table({**columns, "payload": pa.array([pack(share)], type=pa.large_binary())})


class Readers(NamedTuple):
    """Reader processes of a stream, over the whole cluster: how many at most, and the logical CPUs of each."""

    processes: int = 1
    cpus: float = 1


def build_dataset(config: StreamConfig, ranges: Sequence[StepRange], world_size: int, readers: Readers) -> Any:
    """The Ray Dataset of some consecutive ranges: one row for each range and worker, in order."""
    import ray
    from ray.data import DataContext

    quiet_ray_data()
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # never merge rows into one block: a block is what a worker is dealt
    return ray.data.from_items(list(ranges), override_num_blocks=len(ranges)).map_batches(
        RangeReader,
        fn_constructor_args=(config, world_size),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=readers.processes),
        num_cpus=readers.cpus,
        zero_copy_batch=True,
    )


def read_stream(iterator: Any, config: StreamConfig, ranges: Sequence[StepRange], rank: int) -> Iterator[Share]:
    """What a worker sees of these ranges, each checked to be the next one and this worker's."""
    rows = iter(iterator.iter_batches(batch_size=None, prefetch_batches=1, batch_format="pyarrow"))
    for steps in ranges:
        table = next(rows, None)
        found = "the end" if table is None else table.drop_columns("payload").to_pylist()
        if found != [{**steps, "rank": rank}] or table is None:
            raise QskdError(
                "data stream",
                str(found),
                str([{**steps, "rank": rank}]),
                REPORT,
            )
        chunk = table["payload"].chunk(0)
        start, stop = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + 2]
        arrays = unpack(np.frombuffer(chunk.buffers()[2], np.uint8)[start:stop])
        for index in range(steps["first"], steps["last"]):
            prefix = f"{index}/"
            own = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
            yield Share(
                steps["subset"], steps["epoch"], index, config.batch_count(steps["subset"], steps["epoch"]), own
            )
    if next(rows, None) is not None:  # asking also lets the execution end, and its readers go
        raise QskdError("data stream", "more than its ranges of steps", f"{len(ranges)} of them", REPORT)


def open_stream(config: StreamConfig, start_step: int, world_size: int, rank: int, readers: Readers) -> Iterator[Share]:
    """This worker's batches. With several workers rank 0 starts each execution and hands the others their parts."""
    for ranges in config.stretches(start_step, world_size):
        if world_size == 1:
            part = build_dataset(config, ranges, world_size, readers).iterator()
        else:
            import torch.distributed as dist

            parts: list[Any] = [None]
            if rank == 0:
                dataset = build_dataset(config, ranges, world_size, readers)
                parts = [dataset.streaming_split(world_size, equal=False)]
            dist.broadcast_object_list(parts, src=0)
            part = parts[0][rank]
        yield from read_stream(part, config, ranges, rank)


def local_stream(config: StreamConfig, start_step: int = 0, world_size: int = 1, rank: int = 0) -> Iterator[Share]:
    """The same batches without Ray, in this process: for tests, and to measure what Ray costs."""
    loader = config.loader()
    for steps in config.ranges(start_step, world_size):
        for batch in config.batches(steps):
            arrays = loader.load(batch.subset, split(batch.rows, world_size, rank))
            yield Share(batch.subset, batch.epoch, batch.index, batch.count, arrays)
