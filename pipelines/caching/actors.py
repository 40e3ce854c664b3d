"""What runs on the cluster while a teacher's outputs are cached: the teacher in an actor, decoding in tasks around it."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.loader import BatchLoader
from qskd.errors import QskdError

CHUNK_BYTES = 16 * 2**20  # decoded pixels that one task brings, about
Arrays = dict[str, np.ndarray]
Source = tuple[
    str, ViewConfig, ResizeConfig, bool
]  # shard folder, view policy, the teacher's size, finished by the reader


@lru_cache(maxsize=2)
def _loader(source: Source) -> BatchLoader:
    # A quarter of a gigabyte of encoded rows: the row groups that one shard's windows come from.
    uri, views, resize, finish = source
    return BatchLoader(uri, "", views, resize, keep_bytes=2**28, finish=finish)


def decode(source: Source, batches: Sequence[np.ndarray]) -> list[Arrays]:
    """Batches of (shard, row, view) -> the loader's arrays at the teacher's size. Free of torch: starts fast."""
    loader = _loader(source)
    return [loader.load("train", rows) for rows in batches]


def chunks(batches: Sequence[np.ndarray], resize: ResizeConfig) -> list[list[np.ndarray]]:
    """Consecutive batches joined up to a task's worth of pixels; the teacher waits for a unit's first task, so that none
    is more than an eighth of the unit."""
    most = min(CHUNK_BYTES // (3 * resize.usual_pixels), sum(map(len, batches)) // 8)
    joined: list[list[np.ndarray]] = []
    for batch in batches:
        if not joined or sum(map(len, joined[-1])) + len(batch) > most:
            joined.append([])
        joined[-1].append(batch)
    return joined


def not_shared(path: str) -> QskdError:
    """What an actor says whose node does not have the cache's folder as the driver began it."""
    return QskdError(
        path,
        f"on {socket.gethostname()} the cache that the driver has begun is not there",
        "a folder that all nodes see",
        "--set teacher.cache.path=s3://BUCKET/cache, or a path on a disk that all nodes share",
    )


def other_weights(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The checksums in which the teacher here is not the cache's."""
    return [name for name, value in found.items() if name.endswith("sha256") and known.get(name) != value]


def other_teacher(path: str, differing: Sequence[str]) -> QskdError:
    """What an actor says on whose node another teacher has the recipe's name: of an older image, or fetched at another time."""
    return QskdError(
        path,
        f"on {socket.gethostname()} it is another teacher than the driver's: {', '.join(differing)}",
        "the same files on all nodes",
        "put the teacher where all nodes read it: --set teacher.path=s3://BUCKET/teacher",
    )


class TeacherActor:
    """Holds the teacher. A unit (one shard, one view) goes in, its file is written, a line about it comes out.

    Decoding is done by tasks of its own, anywhere in the cluster where a CPU is free, some ahead of the teacher; so one
    driver need not see every batch, and pixels take the shortest way.
    """

    def __init__(self, config: dict[str, Any], fingerprint: str, batch_size: int) -> None:
        import uuid

        import ray
        import torch

        from pipelines.cluster.devices import device_here
        from pipelines.cluster.room import readers_each
        from pipelines.reporting.pulse import Pulse
        from pipelines.run.logs import start_logs
        from qskd.config.recipe import build
        from qskd.datasets.shards import ShardReader
        from qskd.datasets.unlabeled.joined import source_manifest
        from qskd.from_recipe import make_teacher
        from qskd.teacher.identity import cache_identity, teacher_preprocessing
        from qskd.teacher.making import CacheMaker
        from qskd.teacher.manifest import load_cache_manifest
        from qskd.teacher.memory.basis import cached_basis

        self.config, self.fingerprint, self.batch_size = build(config), fingerprint, batch_size
        self.pulse, self.images = Pulse(self.config.teacher.cache.path, uuid.uuid4().hex), 0
        start_logs(run=self.config.name)
        if self.config.compute.threads_per_worker:
            torch.set_num_threads(self.config.compute.threads_per_worker)
        self.reader = ShardReader(self.config.data.train)
        data = source_manifest(self.config.data)
        teacher = make_teacher(self.config, data.labels)
        assert teacher is not None
        device = device_here(self.config)
        path = self.config.teacher.cache.path
        manifest = load_cache_manifest(path)
        self.elsewhere = ""
        if manifest is None or manifest.fingerprint != fingerprint:
            self.elsewhere = not_shared(path).to_json()
        elif differing := other_weights(cache_identity(self.config, data), manifest.identity):
            self.elsewhere = other_teacher(self.config.teacher.path, differing).to_json()
        self.maker = CacheMaker(self.config, teacher, device, cached_basis(path, manifest) if manifest else ())
        self.source: Source = (
            self.config.data.train,
            self.config.data.views,
            teacher_preprocessing(self.config).resize,
            device.type != "cuda",
        )
        cpus = ray.cluster_resources().get("CPU", 1.0)
        self.tasks_ahead = readers_each(self.config.compute, device.type == "cuda", cpus)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        from qskd.teacher.cache import finished_file, write_rows
        from qskd.teacher.making import row_batches
        from qskd.teacher.manifest import file_name, shard_names

        path, names = self.config.teacher.cache.path, shard_names(self.reader.manifest)
        for unit in table.to_pylist():
            shard, view, started = unit["shard"], unit["view"], time.perf_counter()
            name = file_name(names[shard], view)
            rows, computed = self.reader.manifest.shard_rows[shard], 0
            self.waited_s = 0.0
            # A task that Ray runs again, because an actor died after it, finds its file.
            size = finished_file(path, name, rows, self.fingerprint)
            failure = self.elsewhere
            if size is None and not failure:
                windows = row_batches(self.reader, shard, view, self.config.data.views, self.source[2], self.batch_size)
                try:
                    self._check_device()
                    decoded = self._decoded([batch for window in windows for batch in window])
                    made, optional = self.maker.in_order(windows, decoded), self.config.teacher.cache.columns
                    kept = self.maker.attended_of
                    rows, size = write_rows(path, name, made, self.fingerprint, optional, kept)
                    computed = rows
                except QskdError as error:  # trying again would not help: to the driver, which says it
                    failure = error.to_json()
            columns = {"shard": shard, "view": view, "rows": rows, "bytes": size or 0, "computed": computed}
            seconds = time.perf_counter() - started
            columns |= {"seconds": seconds, "waited_seconds": self.waited_s, "failure": failure}
            yield pa.table({name: [value] for name, value in columns.items()})

    def _check_device(self) -> None:
        """QskdError where this is not the kind of device that the cache's identity names (`pipelines.caching.driver`)."""
        asked, found = self.config.compute.device, self.maker.device.type
        if asked != found:
            raise QskdError(
                "the teacher's process",
                f"computes on {found}",
                f"on {asked}, as Ray has reserved it",
                "install a build of torch that can use this node's GPUs, or set compute.device=cpu",
            )

    def _decoded(self, batches: Sequence[np.ndarray]) -> Iterator[Arrays]:
        import ray

        task = ray.remote(num_cpus=1, max_retries=3)(decode)
        waiting = deque(chunks(batches, self.source[2]))
        ahead: deque[Any] = deque()
        while waiting or ahead:
            while waiting and len(ahead) <= self.tasks_ahead:
                ahead.append(task.remote(self.source, waiting.popleft()))
            asked = time.perf_counter()
            ready = ray.get(ahead.popleft())
            self.waited_s += time.perf_counter() - asked
            for arrays in ready:
                yield arrays
                self.images += len(arrays["image_ids"])
                self.pulse.tell(images=self.images)
