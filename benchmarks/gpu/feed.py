"""(c) Images/s that one worker receives from 1, 4, 8 and 16 readers, through Ray, at 800 px. Imports Ray."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.loader import Pictures, make_data
from benchmarks.timing import watch
from pipelines.cluster.start import start_ray
from pipelines.feed.packing import Arrays
from pipelines.feed.readers import Readers, open_stream
from pipelines.feed.stream import LOADER_ROWS, StreamConfig
from qskd.config import ResizeConfig
from qskd.datasets.batch import train_batch


def speeds(device: torch.device, readers: Sequence[int], images: int, edge: int) -> Iterator[tuple[int, float, float]]:
    """(readers, images/s, seconds to the first batch). The worker copies each batch to the device and does nothing else."""

    def consume(arrays: Arrays) -> None:
        train_batch({name: array for name, array in arrays.items() if name != LOADER_ROWS}, device)

    with tempfile.TemporaryDirectory(prefix="qskd-gpu-feed-") as folder:
        data = make_data(Pictures(images, synthetic=True), Path(folder))
        stream = replace(data.stream, student_resize=ResizeConfig(mode="shortest_edge", size=edge))
        start_ray()
        for count in (n for n in readers if n <= max(1, (os.cpu_count() or 1) - 1)):
            seen = watch(partial(_arrays, stream, count), consume)
            length = stream.range_length(1)
            first = min(count * length, len(seen.arrivals) // 2)
            yield count, seen.speed(stream.schedule.batch_size, first), seen.arrivals[0]


def _arrays(stream: StreamConfig, readers: int) -> Iterator[Arrays]:
    return (share.arrays for share in open_stream(stream, 0, world_size=1, rank=0, readers=Readers(readers)))
