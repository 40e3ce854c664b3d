"""What feeds a GPU: how fast one reader's core is against bare decoding, through Ray too, and what a step needs of each part.

python -m benchmarks.feed            # measure (a few minutes), then print the budget of a step on 1, 8 and 64 GPUs
python -m benchmarks.feed --no-ray   # what runs in this process alone

Sides, over the same photographs (COCO's sample where it is, else synthetic ones), shorter side 800 px, in images/s:
- decode: the encoded bytes, in memory, become RGB pictures, and nothing else;
- reader: what a reader process does (`pipelines.feed.readers.RangeReader`): read the shard, decode, put the pixels and the
  targets into one buffer; resizing is left to the device;
- streams: Ray, from shards to workers that do nothing, one stream and one reader for each;
- before: the same reader when it also resized, padded and packed, for comparison.

The budget puts the measured parts together: a step on N GPUs waits for the slowest of its readers, its coordinator (one a worker
now; one for all workers before), the host's launches and the device. The last two are not measured here: they are arguments.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa

from benchmarks import timing
from benchmarks.chaos.cluster import family, title
from benchmarks.loader import BATCH, SHARD, Data, Pictures, make_data
from benchmarks.scaling.probes import block_seconds
from benchmarks.timing import Ratio, Report
from pipelines.cluster.start import start_ray
from pipelines.feed.readers import RangeReader, Readers, open_stream
from pipelines.feed.stream import StreamConfig
from qskd.config import ResizeConfig
from qskd.datasets.views import decode_image

READER_GOAL, STREAM_GOAL, FLAT_GOAL = 0.8, 0.7, 0.67
GPUS = (1, 8, 64)
IMAGES_PER_GPU = 2  # of configs/coco_conditional_r18.yaml on eight


@dataclass(frozen=True)
class Parts:
    """Seconds of CPU: of a reader for an image, now and when it resized; of a coordinator for a block; images in a block."""

    reader_s: float
    resizing_reader_s: float
    block_s: float
    block_images: int


def speed(work: Callable[[], int]) -> float:
    """Images in a second of this thread's CPU time, so that other work on the machine counts little."""
    started = time.thread_time()
    return work() / (time.thread_time() - started)


def in_one_process(data: Data, stream: StreamConfig, rounds: int) -> dict[str, list[float]]:
    """Images a second of each side; they take turns, each from freshly opened shards."""
    ranges = pa.Table.from_pylist([dict(steps) for steps in stream.ranges(0, 1)])

    def decode() -> int:
        for sample in data.samples:
            decode_image(sample.encoded, sample.file_name).load()
        return len(data.samples)

    def reader(config: StreamConfig) -> int:
        read, images = RangeReader(config, 1, 0), 0
        for at in range(len(ranges)):
            for _ in read(ranges.slice(at, 1)):
                images += BATCH * (ranges["last"][at].as_py() - ranges["first"][at].as_py())
        return images

    found: dict[str, list[float]] = {"decode": [], "reader": [], "before": []}
    for _ in range(rounds):
        found["decode"].append(speed(decode))
        found["reader"].append(speed(lambda: reader(stream)))
        found["before"].append(speed(lambda: reader(replace(stream, finish=True))))
    return found


class Streamed(NamedTuple):
    """images_s: of all workers. cpu_ms: an image, by kind of process."""

    images_s: float
    cpu_ms: dict[str, float]


def streams_speed(stream: StreamConfig, workers: int) -> Streamed:
    """What so many workers receive, of streams of their own, from the first range that has come to all to the last of one."""
    arrivals: list[list[float]] = [[] for _ in range(workers)]
    config = replace(stream, schedule=replace(stream.schedule, batch_size=BATCH * workers, epochs=4 * workers))
    shares = [open_stream(config, 0, workers, rank, Readers(1, 1 / workers, apart=True)) for rank in range(workers)]
    first = 2 * config.range_length(workers)  # those that waited for their reader to start
    flows, ends = [threading.Event() for _ in range(workers)], threading.Event()

    def consume(rank: int) -> None:
        try:
            for at, _ in enumerate(shares[rank]):
                arrivals[rank].append(time.perf_counter())
                if at == first:
                    flows[rank].set()
        finally:  # of a stream that failed too
            ends.set()
            flows[rank].set()

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for each in flows:
        each.wait()
    begin, before = time.perf_counter(), cpu_seconds()
    ends.wait()
    end, after = time.perf_counter(), cpu_seconds()
    for thread in threads:
        thread.join()
    images = BATCH * sum(begin < at <= end for each in arrivals for at in each)
    spent = {kind: 1000 * (after[kind] - before.get(kind, 0.0)) / images for kind in after}
    return Streamed(images / (end - begin), spent)


def cpu_seconds() -> dict[str, float]:
    """Spent so far by this process and those of the Ray that it started, by what they are."""
    found: dict[str, float] = {}
    kinds = {"RangeReader": "readers", "SplitCoordinator": "coordinators"}
    for process in family(os.getpid()):
        try:
            name, times = title(process), process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        kind = next((kinds[word] for word in kinds if word in name), "Ray otherwise")
        kind = "workers" if process.pid == os.getpid() else kind
        found[kind] = found.get(kind, 0.0) + times.user + times.system
    return found


HEAD = ["GPUs", "", "readers", "coordinator", "launches", "device", "step waits for", "step", "GPU at work"]


def budget(parts: Parts, given: argparse.Namespace) -> Iterator[list[str]]:
    """Rows: a step on so many GPUs, before and now."""
    for gpus in GPUS:
        for now in (False, True):
            readers = given.readers * gpus if now else 1  # `compute.loader_workers` was 1, over the whole cluster
            images, steps = IMAGES_PER_GPU * gpus, parts.block_images / IMAGES_PER_GPU
            times = {
                "readers": images * (parts.reader_s if now else parts.resizing_reader_s) / readers,
                "coordinator": parts.block_s / steps * (1 if now else gpus),
                "launches": given.launches_ms / 1000,
                "device": given.device_ms / 1000,
            }
            slowest = max(times, key=lambda name: times[name])
            yield [
                str(gpus) if not now else "",
                "now" if now else "before",
                *(f"{1000 * taken:.1f} ms" for taken in times.values()),
                slowest,
                f"{1000 * times[slowest]:.0f} ms",
                f"{times['device'] / times[slowest]:.0%}",
            ]


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=384, help="of one epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 2, 4], help="workers with a stream each")
    parser.add_argument("--blocks", type=int, default=300, help="blocks of a coordinator that are timed")
    parser.add_argument("--no-ray", action="store_true", help="only what runs in this process")
    parser.add_argument("--edge", type=int, default=800, help="pixels of the shorter side")
    parser.add_argument("--readers", type=int, default=4, help="of each GPU, in the budget")
    parser.add_argument("--device-ms", type=float, default=14.0, help="of a step, by operations: of no GPU seen")
    parser.add_argument(
        "--launches-ms", type=float, default=52.0, help="of a step: 3,500 kernels of 15 us, not measured"
    )
    given = parser.parse_args(arguments)
    report = Report("Feeding: images/s over bare decoding (higher is better)")
    with tempfile.TemporaryDirectory(prefix="qskd-feed-") as folder:
        data = make_data(pictures := Pictures(given.images, False), Path(folder))
        edge = ResizeConfig(mode="shortest_edge", size=given.edge)
        stream = replace(data.stream, student_resize=edge, finish=False)
        found = in_one_process(data, stream, given.rounds)
        bare = statistics.median(found["decode"])
        report.ratios = [
            timing.speeds_ratio("a reader's core / bare decoding", found["reader"], found["decode"], READER_GOAL),
            timing.speeds_ratio("the same when readers resized", found["before"], found["decode"]),
        ]
        block = 0.0
        if not given.no_ray:
            start_ray()
            for workers in given.streams:
                streamed = [streams_speed(stream, workers) for _ in range(given.rounds)]
                got = [each.images_s for each in streamed]
                parts_ms = {
                    kind: statistics.median(each.cpu_ms[kind] for each in streamed) for kind in streamed[0].cpu_ms
                }
                words = ", ".join(
                    f"{kind} {taken:.2f}" for kind, taken in sorted(parts_ms.items(), key=lambda one: -one[1])
                )
                most = 1000 * (os.cpu_count() or 1) / sum(parts_ms.values())
                report.figures.append(
                    (f"{workers} stream(s): CPU ms an image", f"{words}; all cores busy would give {most:.0f} images/s")
                )
                cores = min(workers, os.cpu_count() or 1)
                report.ratios.append(
                    Ratio(
                        f"{workers} stream(s) through Ray / bare decoding on {cores} core(s)",
                        tuple(each / (bare * cores) for each in got),
                        f"{statistics.median(got):.0f} / {bare * cores:.0f} images/s",
                        STREAM_GOAL,
                    )
                )
            small = replace(stream, student_resize=ResizeConfig(size=32), finish=True)  # next to nothing in a block
            blocks = {workers: block_seconds(small, workers, given.blocks) for workers in (1, 8, 64)}
            block = blocks[1]
            report.ratios.append(
                Ratio(
                    "a coordinator's time for a block: 1 worker / 64 workers",
                    (blocks[1] / blocks[64],),
                    ", ".join(f"{workers}: {1000 * taken:.1f} ms" for workers, taken in blocks.items()),
                    FLAT_GOAL,
                )
            )
        parts = Parts(
            1 / statistics.median(found["reader"]),
            1 / statistics.median(found["before"]),
            block,
            IMAGES_PER_GPU * stream.range_length(BATCH // IMAGES_PER_GPU),
        )
    report.facts = [
        timing.machine("ray", "pillow", "numpy", "pyarrow") + f", {timing.load_note()}",
        f"{given.images} images of {pictures.source}, shorter side {given.edge}; shards and windows of {SHARD}; batch {BATCH}",
    ]
    report.print()
    if not given.no_ray:
        print(
            "\nA step's budget: readers and coordinator as measured; launches and device as told, which nobody measured"
        )
        print(f"{IMAGES_PER_GPU} images a GPU; now {given.readers} readers a GPU, before one in all\n")
        timing.print_table(HEAD, list(budget(parts, given)))
    return report


if __name__ == "__main__":
    sys.exit(main().exit_code)
