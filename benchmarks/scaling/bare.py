"""Training steps in a process of its own, on batches in memory, with neither Ray nor a second worker's gradients: what the
machine itself gives. Started by `benchmarks.scaling`; says "ready", waits for a line, prints each step's seconds as JSON.

python -m benchmarks.scaling.bare RECIPE SECONDS
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

WARM_UP = 5
BATCHES = 20


def step_times(recipe: str, seconds: float) -> list[float]:
    from pipelines.feed.stream import local_stream
    from pipelines.run.resolve import resolve
    from pipelines.training.plan import make_plan
    from qskd.config.recipe import load
    from qskd.datasets.batch import train_batch
    from qskd.from_recipe import make_student, teacher_for_training
    from qskd.training.step import Training

    torch.set_num_threads(1)
    plan = make_plan(resolve(load(recipe, []), "distill"), "distill")
    labels = plan.train.labels
    student, teacher = make_student(plan.config, labels), teacher_for_training(plan.config, labels, torch.device("cpu"))
    training = Training(plan.config, student, teacher, plan.stream.schedule.total_steps, torch.device("cpu"))
    shares = (share for share in local_stream(plan.stream) if share.subset == "train")
    batches = [train_batch(share.arrays) for share in itertools.islice(shares, BATCHES)]
    for batch in batches[:WARM_UP]:
        training.train_step(batch)
    print("ready", flush=True)
    sys.stdin.readline()
    taken: list[float] = []
    started = time.perf_counter()
    for batch in itertools.cycle(batches):
        before = time.perf_counter()
        training.train_step(batch)
        taken.append(time.perf_counter() - before)
        if before - started > seconds:
            return taken
    raise AssertionError


def side_by_side(recipe: Path, processes: int, seconds: float) -> list[float]:
    """All steps of so many processes that train at the same time, none with the other."""
    command = [sys.executable, "-m", "benchmarks.scaling.bare", str(recipe), str(seconds)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for process in running:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{' '.join(command)} failed")
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [value for process in running for value in json.loads(process.communicate()[0])]


def main(arguments: Sequence[str]) -> None:
    print(json.dumps(step_times(arguments[0], float(arguments[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])
