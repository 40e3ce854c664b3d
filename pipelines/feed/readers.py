"""Ray Data: shards -> batches on the worker that trains. Every training worker has an execution of its own.

A reader process takes a range of steps (`pipelines.feed.stream`), reads the rows of one worker's shares, and emits them as
one row. Rows come in order (`preserve_order`), every row says which steps and whose they are, and the worker checks it: sample
order depends on (seed, epoch, world size) and on nothing else.

Why an execution for each worker: one that deals to all of them costs its coordinator the time of all their blocks, so that the
step of a large training would be as long as that. So no worker waits for another's blocks.

Why not one execution whatever the length: Ray makes all of its input before the first block flows, at about a millisecond
for each range of steps. COCO's fifty epochs are 120,000 ranges on eight workers. So an execution takes a stretch of them, and the
next begins when it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.cluster.start import quiet_ray_data
from pipelines.feed.packing import Packer, unpack
from pipelines.feed.stream import LOADER_ROWS, RANGE_BYTES, Share, StepRange, StreamConfig
from qskd.errors import QskdError

# Of the cluster's object store: what the streams of all workers may fill with batches not yet asked for.
STORE_SHARE = 0.4
REPORT = "this is a fault of qskd or of this Ray version: please report it with the versions `qskd doctor` prints"


class RangeReader:
    """A reader process: ranges in, one packed row of this worker's shares out for each."""

    def __init__(self, config: StreamConfig, world_size: int, rank: int) -> None:
        self.config, self.world_size, self.rank = config, world_size, rank
        self.loader = config.loader()
        self._memory = np.empty(RANGE_BYTES + RANGE_BYTES // 8, np.uint8)

    def _free_memory(self) -> NDArray[np.uint8]:
        """That of the last block, if nobody has it any more. The system gives out new memory of this size page by page, which took
        a quarter of a reader's time."""
        if sys.getrefcount(self._memory) > 2:  # besides this object's: the argument's own
            self._memory = np.empty_like(self._memory)
        return self._memory

    def _filled(self, steps: StepRange) -> Packer:
        """In a method of its own, that no name of an array outlives it: memory that anybody holds is not used again."""
        shares = Packer(self._free_memory())
        for batch in self.config.batches(steps):
            asked, unheld = self.loader.rows_requested, self.loader.rows_not_in_memory
            rows = self.config.rows_of(self.loader, batch, self.world_size, self.rank)
            arrays = self.loader.load(batch.subset, rows, shares.room)
            arrays[LOADER_ROWS] = np.array(
                [self.loader.rows_requested - asked, self.loader.rows_not_in_memory - unheld]
            )
            for name, array in arrays.items():
                shares.add(f"{batch.index}/{name}", array)
        self._memory = shares.memory  # it may have grown
        return shares

    def _block(self, steps: StepRange) -> pa.Table:
        columns = {name: [value] for name, value in steps.items()} | {"rank": [self.rank]}
        payload = self._filled(steps).packed()
        buffers = [None, pa.py_buffer(np.array([0, len(payload)], np.int64)), pa.py_buffer(payload)]  # not copied
        return pa.table({**columns, "payload": pa.Array.from_buffers(pa.large_binary(), 1, buffers)})

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for steps in table.to_pylist():
            yield self._block(steps)


class Readers(NamedTuple):
    """Reader processes of one worker's stream: how many at most, and the logical CPUs of each. apart: the execution's
    coordinator is a process of its own, that it does not take Python's lock from the one that trains."""

    processes: int = 1
    cpus: float = 1
    apart: bool = False


def build_dataset(
    config: StreamConfig, ranges: Sequence[StepRange], world_size: int, rank: int, readers: Readers
) -> Any:
    """The Ray Dataset of some consecutive ranges: one row of this worker's for each, in order."""
    import ray
    from ray.data import DataContext, ExecutionResources

    quiet_ray_data()
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # never merge rows into one block: a block is what a worker is dealt
    # Each execution takes the whole store for its own.
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=max(int(STORE_SHARE * store / world_size), 4 * RANGE_BYTES)
    )
    return ray.data.from_items(list(ranges), override_num_blocks=len(ranges)).map_batches(
        RangeReader,
        fn_constructor_args=(config, world_size, rank),
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
    """This worker's batches."""
    config = replace(config, share_rows=world_size * readers.processes > 1)
    for ranges in config.stretches(start_step, world_size):
        dataset = build_dataset(config, ranges, world_size, rank, readers)
        part = dataset.streaming_split(1, equal=False)[0] if readers.apart else dataset.iterator()
        yield from read_stream(part, config, ranges, rank)
