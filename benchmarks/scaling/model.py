"""How long a step takes on W workers, from what was measured on one and two: a model, its assumptions beside each term.

    step(W) = max( E[slowest of W] + own overhead + all-reduce(W),   a worker's own time
                   the readers' time for a global batch,
                   the coordinator's time for the blocks of a step,
                   the CPU time that all of these need, over the CPUs there are )
              + a report's time / steps between reports

Weak scaling: each worker's batch stays as it is, the global batch grows. Efficiency is step(1) / step(W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Costs:
    """What the model is fed with. Times in seconds.

    compute_s: a sample of single steps on data in memory, one worker having a core (or accelerator) to itself: the reason
        for a slowest worker is drawn from it, worker by worker and step by step, independently. A machine that is slow for
        a minute, or one that is always slower, is not in it.
    crowded_s: the same with as many workers on the machine as it has cores; all machines of a run are taken to be full
        when there are two workers or more. Accelerators that share nothing: equal to compute_s.
    overhead_s: what a step of the pipeline takes beyond compute_s on one worker.
    gradient_bytes: reduced in each step. latency_s, bytes_per_s: of a message between two workers. The ring
        algorithm: 2(W-1) messages of 1/W of the bytes each, one after the other; a step has a second, small all-reduce (the
        terms' counts). Nothing of it is hidden behind the backward pass, which DistributedDataParallel does for models of
        several buckets (25 MB): too pessimistic for those. One network speed between any two workers.
    images: of one worker's batch. loader_image_s: a reader's time for one. readers: for each worker.
    block_s: a coordinator's time for one block of Ray Data, which holds a worker's part of run_steps steps. Each worker's
        stream has a coordinator of its own.
    cpus: for each worker, shared by its step (on a CPU), its readers and its coordinator; infinite where an
        accelerator does the step and the host has cores enough.
    report_s, report_worker_s: a report with a checkpoint on one worker, and what each further one adds.
    report_steps: steps between reports. Evaluation is not in the model: it is spread over the workers but for its end on
        rank 0 (docs/scale.md).
    """

    compute_s: tuple[float, ...]
    crowded_s: tuple[float, ...]
    overhead_s: float
    gradient_bytes: float
    latency_s: float
    bytes_per_s: float
    images: int
    loader_image_s: float
    readers: float
    block_s: float
    run_steps: int
    cpus: float
    report_s: float
    report_worker_s: float
    report_steps: float


def slowest_of(sample: Sequence[float], workers: int) -> float:
    """The expected largest of `workers` independent draws from the sample: exact, from its order statistics."""
    ordered = np.sort(np.asarray(sample, np.float64))
    below = np.arange(len(ordered) + 1) / len(ordered)
    return float(ordered @ np.diff(below**workers))


def all_reduce_seconds(costs: Costs, workers: int) -> float:
    """Of the gradients and of the counts, by rings."""
    if workers == 1:
        return 0.0
    messages, share = 2 * (workers - 1), 2 * (workers - 1) / workers
    return 2 * messages * costs.latency_s + share * costs.gradient_bytes / costs.bytes_per_s


@dataclass(frozen=True)
class Step:
    """One step on so many workers, in seconds: the four times of which the longest counts, and the share of a report."""

    worker_s: float
    readers_s: float
    coordinator_s: float
    cpus_s: float
    report_s: float

    @property
    def seconds(self) -> float:
        return max(self.worker_s, self.readers_s, self.coordinator_s, self.cpus_s) + self.report_s

    @property
    def limit(self) -> str:
        """What the step waits for."""
        times = {
            "workers": self.worker_s,
            "readers": self.readers_s,
            "coordinator": self.coordinator_s,
            "CPUs": self.cpus_s,
        }
        return max(times, key=lambda name: times[name])


def step(costs: Costs, workers: int, cpus: float | None = None) -> Step:
    """A step on `workers` workers. cpus: for each of them, where it is not as `costs` has it."""
    sample = costs.compute_s if workers == 1 else costs.crowded_s
    cpus = costs.cpus if cpus is None else cpus
    own = slowest_of(sample, workers) + costs.overhead_s + all_reduce_seconds(costs, workers)
    loading, block = costs.images * costs.loader_image_s, costs.block_s / costs.run_steps
    needed = loading + block + (0.0 if math.isinf(cpus) else float(np.mean(sample)) + costs.overhead_s)
    report = (costs.report_s + (workers - 1) * costs.report_worker_s) / costs.report_steps
    return Step(own, loading / costs.readers, block, needed / cpus, report)


def efficiencies(costs: Costs, workers: Sequence[int] = WORKERS, cpus_alone: float | None = None) -> dict[int, float]:
    """step(1) / step(W). cpus_alone: the CPUs that a single worker has, where it shares the machine with no other."""
    alone = step(costs, 1, cpus_alone).seconds
    return {count: 1.0 if count == 1 else alone / step(costs, count).seconds for count in workers}


def with_step(costs: Costs, seconds: float) -> Costs:
    """The costs with steps of this mean, which spread about it as those that were measured alone, and without contention."""
    scale = seconds / float(np.mean(costs.compute_s))
    sample = tuple(scale * value for value in costs.compute_s)
    return replace(costs, compute_s=sample, crowded_s=sample)
