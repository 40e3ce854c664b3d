"""The machine that things happen to: one cluster at a time, data, a store and a small disk made when they are first needed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.chaos.checks import is_of_a_dashboard
from benchmarks.chaos.cluster import Cluster, base_environment
from benchmarks.chaos.outage import BUCKET, KEYS, Proxy, SmallDisk, Store
from benchmarks.chaos.work import Places, copy_folder, make_data
from benchmarks.work_folder import claim, discard

NODES = 1
OWN = ("tmp", "logs", "out", "mlflow", "data", "token", "disk", "bytecode", "c[0-9]*-[0-9]*")  # all that it makes
STORE_PATIENCE_S = 10  # the default is 120: an outage "for good" would take the afternoon


class World:
    """All of it lies below `folder`, which should have a short name: Ray's sockets are in it. Data that is there is kept."""

    def __init__(self, folder: Path, dashboard: bool = False) -> None:
        self.folder, self.dashboard = folder, dashboard
        claim(folder)
        self.scratch, self.logs = folder / "tmp", folder / "logs"
        for each in (self.scratch, self.logs, folder / "out", folder / "mlflow"):
            shutil.rmtree(each, ignore_errors=True)
            each.mkdir(parents=True)
        token = folder / "token"
        token.write_text("a" * 64)
        self.proxy = Proxy()
        more = KEYS | {
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "QSKD_STORE_PATIENCE_S": str(STORE_PATIENCE_S),
        }
        os.environ.update(more)  # this process reads results from the store too
        self.environment = base_environment(self.scratch, token, more)
        self._clusters = 0
        self._cluster: Cluster | None = None
        self.lost: list[Cluster] = []
        self._store: Store | None = None
        self._disk: SmallDisk | None = None
        if not (folder / "data" / "teacher").exists():
            make_data(folder / "data")

    @property
    def cluster(self) -> Cluster:
        """A whole one: a damaged one is ended and another begun."""
        if self._cluster is not None and not self._cluster.whole:
            self.drop_cluster()
        if self._cluster is None:
            self._clusters += 1
            name = f"c{os.getpid()}-{self._clusters}"
            self._cluster = Cluster(self.folder / name, self.environment, NODES, dashboard=self.dashboard)
        return self._cluster

    def drop_cluster(self) -> None:
        if self._cluster is not None:
            self._cluster.end()
        self._cluster = None

    def lose_head(self) -> int:
        """The cluster's head goes; its nodes stay, until they find out or `bury` ends them."""
        cluster, self._cluster = self.cluster, None
        self.lost.append(cluster)
        return cluster.lose_head()

    def bury(self) -> None:
        while self.lost:
            self.lost.pop().end()

    @property
    def disk(self) -> SmallDisk:
        if self._disk is None:
            self._disk = SmallDisk(self.folder / "disk")
        return self._disk

    def places(self, fault: str) -> Places:
        """Where a run of this fault reads and writes."""
        teacher, tracking = str(self.folder / "data/teacher"), str(self.folder / "mlflow" / "mlflow.db")
        local = str(self.folder / "data")
        if fault == "store":
            uri = f"s3://{BUCKET}"
            if self._store is None:
                self._store = Store(self.proxy, self.logs / "store.log")
                for name in ("train", "val", "cache"):
                    copy_folder(self.folder / "data" / name, f"{uri}/data/{name}")
            return Places(f"{uri}/data", f"{uri}/out", teacher, tracking)
        if fault == "disk":
            return Places(local, str(self.disk.folder / "out"), teacher, tracking)
        return Places(local, str(self.folder / "out"), teacher, tracking)

    def tidy(self) -> None:
        """Make the little disk and the folders as they were."""
        if self._disk is not None:
            self._disk.free()
            shutil.rmtree(self._disk.folder / "out", ignore_errors=True)
        for path in (*self.scratch.iterdir(), *(self.folder / "out").iterdir()):
            if self.dashboard and is_of_a_dashboard(path):
                continue
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def end(self) -> None:
        self.drop_cluster()
        self.bury()
        if self._store is not None:
            self._store.end()
        if self._disk is not None:
            self._disk.end()
        self.proxy.cut()


@contextlib.contextmanager
def world(folder: Path, keep: bool = False, dashboard: bool = False) -> Iterator[World]:
    """keep: the folder, for a look at its logs."""
    made: World | None = None
    try:
        made = World(folder, dashboard)
        yield made
    finally:
        if made is not None:
            made.end()
        if not keep:
            discard(folder, OWN)
