"""An elastic training on a cluster that grows and shrinks under it.

    python -m benchmarks.elastic     13 minutes on two cores

A head without CPUs for work and a node, raylets of their own on loopback, as in `benchmarks.chaos`. The training
(`compute.min_workers`) begins with what that node has. When it runs, a second node joins, and Ray starts the workers again, more
of them; when those have done some epochs, that node is killed, and Ray goes on with fewer. Beside it, the same training on the
first node alone, undisturbed. Printed: how many workers there were when, and what of steps, losses and AP differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.cluster import Cluster, base_environment, title
from benchmarks.chaos.work import Driver, Places, make_data, recipe
from benchmarks.timing import machine
from benchmarks.work_folder import claim, discard
from pipelines.run.folder import Folder
from pipelines.run.history import read_history
from qskd.config import Config
from qskd.config.recipe import replace_fields

OWN = (
    "tmp",
    "token",
    "data",
    "c",
    "out",
    "elastic",
    "alone",
    "mlflow.db*",
    "mlartifacts",
    "bytecode",
)  # all that it makes
CPUS_OF_A_NODE = 3  # two workers and a reader
FIELDS = {
    "compute.min_workers": 1, "compute.workers": 4, "training.epochs": 600, "training.checkpoint_every_steps": 4,
    "training.evaluate_every_epochs": 600, "teacher.cache.path": "",
}  # fmt: skip
EPOCHS_BETWEEN, PATIENCE_S = 20, 300.0


def count_workers(cluster: Cluster) -> int:
    """Training workers that live."""
    return sum(title(process).startswith("ray::RayTrainWorker") for process in cluster.workers())


def steps_done(config: Config) -> int:
    return max((entry["step"] for entry in read_history(Folder(config))), default=0)


class Run:
    """A training, and what is seen of it."""

    def __init__(self, config: Config, cluster: Cluster, folder: Path) -> None:
        folder.mkdir()
        self.config, self.cluster = config, cluster
        self.driver = Driver("distill", config, cluster, folder, 0)
        self.began = time.monotonic()

    def wait(self, what: str, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            if not self.driver.running or time.monotonic() > deadline:
                raise SystemExit(f"{what}: not seen in {PATIENCE_S:.0f} s, or the run ended:\n{self.driver.said()}")
            time.sleep(0.2)
        print(
            f"{time.monotonic() - self.began:6.0f} s  step {steps_done(self.config):5d}  "
            f"{count_workers(self.cluster)} workers: {what}",
            flush=True,
        )

    def some_epochs(self, what: str) -> None:
        begun = steps_done(self.config)
        self.wait(what, lambda: steps_done(self.config) >= begun + 4 * EPOCHS_BETWEEN)

    def end(self) -> list[dict[str, Any]]:
        """Its history."""
        if self.driver.wait(2 * PATIENCE_S) != 0:
            raise SystemExit(f"the run did not end well:\n{self.driver.said()}")
        print(f"{time.monotonic() - self.began:6.0f} s  ended", flush=True)
        return read_history(Folder(self.config))


def disturb(run: Run) -> None:
    cluster = run.cluster
    run.wait("it runs on one node", lambda: steps_done(run.config) > 0)
    before = count_workers(cluster)
    cluster.join()
    run.wait("a second node joined, and the training takes it", lambda: count_workers(cluster) > before)
    run.some_epochs("it goes on")
    more = count_workers(cluster)
    cluster.take_away(cluster.nodes[-1])
    run.wait("the second node is killed", lambda: count_workers(cluster) < more)
    run.some_epochs("it goes on")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(f"/tmp/qskd-elastic-{os.getpid()}"), help="a short name")
    work = parser.parse_args(arguments).work
    claim(work)
    scratch = work / "tmp"
    scratch.mkdir(exist_ok=True)
    (work / "token").write_text("a" * 64)
    make_data(work / "data")
    cluster = Cluster(work / "c", base_environment(scratch, work / "token", {}), nodes=1, node_cpus=CPUS_OF_A_NODE)
    try:
        places = Places(str(work / "data"), str(work / "out"), str(work / "data/teacher"), str(work / "mlflow.db"))
        configs = {
            name: replace_fields(recipe("distill", name, places), FIELDS, "elastic") for name in ("elastic", "alone")
        }
        run = Run(configs["elastic"], cluster, work / "elastic")
        disturb(run)
        elastic = run.end()
        alone = Run(configs["alone"], cluster, work / "alone").end()
    finally:
        cluster.end()
        discard(work, OWN)
    print("\n" + machine("ray"))
    every_epoch = [[entry["step"] for entry in history if entry["step"] % 4 == 0] for history in (elastic, alone)]
    print(f"the same epochs reported, none twice: {every_epoch[0] == every_epoch[1] == sorted(set(every_epoch[0]))}")
    losses = [
        [entry["training"]["loss/total"] for entry in history if "training" in entry] for history in (elastic, alone)
    ]
    first = max(abs(a - b) / b for a, b in list(zip(*losses, strict=False))[:20])
    print(f"loss of the first twenty reports, largest relative difference: {first:.1e}")
    print(f"last loss: {losses[0][-1]:.4f} elastic, {losses[1][-1]:.4f} alone")
    aps = [history[-1]["evaluation"]["AP"] for history in (elastic, alone)]
    print(f"AP: {aps[0]:.4f} elastic, {aps[1]:.4f} alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
