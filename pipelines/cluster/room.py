"""How much room the cluster has, and what workers, readers and actors ask of it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qskd.errors import QskdError

if TYPE_CHECKING:
    from qskd.config import ComputeConfig, Config
from pipelines.cluster.environment import in_a_job, joined
from pipelines.run.stopping import first_at_a_signal

log = logging.getLogger("qskd")
MOST_READERS = 8  # beside one GPU, where the recipe does not say


def may_be_preempted(config: Config) -> bool:
    """Whether a node of a training of this recipe may go away after a notice: on a cluster of others, and where the recipe
    says so by asking for elastic workers. A Ray that `start_ray` started here goes with this machine."""
    return joined() or config.compute.min_workers > 0


def node_resources() -> list[dict[str, float]]:
    """What each living node has, by Ray's names. On a machine that `start_ray` took alone, "CPU" is its real cores, of a container
    or of a batch system's job its share."""
    import ray

    from qskd.datasets.packing import cores

    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 and not joined():
        nodes[0]["CPU"] = min(nodes[0].get("CPU", 0.0), float(cores()))
    return nodes


def worker_resources(compute: ComputeConfig, gpu: bool) -> dict[str, float]:
    """Of a training worker. Elastic workers on CPUs ask for a little more than one, that they can't take all of a node: their
    number is made to fit what is there, and readers that find no room let all workers wait."""
    if gpu:
        return {"GPU": 1}
    return {"CPU": 1.001 if compute.min_workers else 1}


def readers_each(compute: ComputeConfig, gpu: bool, cpus: float) -> int:
    """Reader processes of each training worker, at most: Ray Data starts them while the worker waits. cpus: Ray's, that are not
    the workers'. Without a number in the recipe: one beside a CPU worker, which is slower than a reader."""
    if compute.loader_workers:
        return compute.loader_workers
    return max(1, min(MOST_READERS, int(cpus // compute.workers))) if gpu else 1


def reader_cpus(compute: ComputeConfig, gpu: bool, workers: int, cpus: float = math.inf) -> float:
    """Logical CPUs of a reader, so that one finds room for each of so many workers, which would wait for it for ever.

    On CPUs the readers of all workers share one; what is left of a node that is full of elastic workers is less than that.
    Beside GPUs each takes a whole one where there are as many (cpus).
    """
    if gpu:
        return 1.0 if cpus >= workers else max(0.01, math.floor(100 * cpus / workers) / 100)
    return (0.5 if compute.min_workers else 1.0) / workers


def check_room(compute: ComputeConfig, gpu: bool) -> None:
    """Complain when the cluster has less than a training waits for: an error where no more will come."""
    import ray

    workers = compute.min_workers or compute.workers
    if gpu:
        check_gpus(workers)
        return
    there = ray.cluster_resources().get("CPU", 0.0)
    wanted = workers * worker_resources(compute, gpu)["CPU"] + workers * reader_cpus(compute, gpu, workers)
    if there >= wanted:
        return
    found = f"{workers} worker(s) and a reader, on CPUs, are {wanted:g} of Ray's logical CPUs; there are {there:g}"
    if not joined():
        raise QskdError("compute.workers", found, "room for all of them", "set fewer compute.workers")
    log.warning("%s now: the training waits until nodes join", found)


def check_gpus(wanted: int) -> None:
    """Complain when Ray has fewer GPUs: what needs them would wait, for ever where no node will join."""
    import ray

    there = int(ray.cluster_resources().get("GPU", 0))
    if there >= wanted:
        return
    if not joined():
        raise QskdError("compute.device", f"cuda, {wanted} GPU(s) wanted, {there} here", "cpu, auto, or as many GPUs")
    log.warning("%d GPU(s) are wanted, and Ray has %d now: the work waits until nodes join", wanted, there)


def actors_that_fit(wanted: int, cpus_each: int) -> tuple[int, int]:
    """How many actors of the cache job to start, and the CPUs of each. They wait for tasks that decode: were all CPUs theirs,
    they would wait for ever."""
    import ray

    there = int(ray.cluster_resources().get("CPU", 0))
    if there == 0:  # a cluster that starts from nothing; tasks that wait make it grow
        return wanted, cpus_each
    if there == 1:
        log.warning("Ray has 1 logical CPU now, and the cache job needs 2: it waits until nodes join")
        return 1, 1
    cpus_each = min(cpus_each, there - 1)
    fits = (there - 1) // cpus_each
    if fits < wanted:
        log.warning("%d actors instead of %d: of %d logical CPUs one stays free for decoding", fits, wanted, there)
    return min(wanted, fits), cpus_each


class NodeRequest:
    """What an autoscaling cluster is told that could be used: so many times `one`. It grows as far as its own limits let it. A
    cluster grows by what waits for room, and a sweep lets nothing wait. Without a cluster that was joined this does nothing.

    Ray keeps a request, and the nodes for it, until the next one, whoever made it and whatever became of that: it is taken back.
    """

    def __init__(self, one: dict[str, float]) -> None:
        self.one = {name: amount for name, amount in one.items() if amount}
        self.asked, self.over = 0, False

    def __call__(self, count: int) -> None:
        if not self.over and count != self.asked and _request([self.one] * count):
            self.asked = count

    def take_back(self) -> None:
        """For good: what is heard of trials while they are ended asks for nothing more. May be done twice: a signal may have come
        in the middle of a request, which then arrived after this."""
        self.over = True
        _request([])


def _request(bundles: list[dict[str, float]]) -> bool:
    """Whether it arrived. A head that does not answer for a moment ends no sweep."""
    from ray.autoscaler.sdk import request_resources

    try:
        if joined():
            request_resources(bundles=bundles)
    except Exception as error:  # Ray has many kinds
        log.warning("the autoscaler could not be told what the sweep needs: %s", error)
        return False
    return True


def forget_request() -> None:
    """Take back what a program that was killed asked for."""
    _request([])


@contextlib.contextmanager
def ask_for_nodes(one: dict[str, float]) -> Iterator[NodeRequest]:
    """A request, taken back at the end; at a signal before anything else, for whoever sent it may not wait for the rest (`ray job
    stop` kills after seconds)."""
    request = NodeRequest(one)
    with first_at_a_signal(request.take_back):
        try:
            yield request
        finally:
            request.take_back()


def say_if_on_cpus(device: str) -> None:
    """`auto` takes the GPUs that are there, and a cluster that starts them from zero has none yet."""
    import ray

    if device == "auto" and in_a_job() and not ray.cluster_resources().get("GPU"):
        log.warning(
            "no GPU is in the cluster now: CPUs do the work. compute.device=cuda asks for GPUs, and waits until an "
            "autoscaler has brought them; compute.device=cpu silences this"
        )
