"""How long a step of one variant takes against a step without teacher: what equal time means in steps.

Ratios of one run, sides in turn, loading included, in CPU seconds of this one-thread process, which other work on the
machine disturbs less than seconds of the clock; written to records/clock.json, which is committed:
`python -m benchmarks.evidence clock`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch

from benchmarks.evidence.cells import RECORDS, code_version
from benchmarks.evidence.plan import STUDENTS
from benchmarks.evidence.task import make_config
from benchmarks.evidence.variants import VARIANTS
from benchmarks.timing import Side
from pipelines.feed.stream import local_stream
from pipelines.training.plan import make_plan
from qskd.datasets.batch import train_batch
from qskd.from_recipe import make_student, teacher_for_training
from qskd.training.step import Training

TIMED = ("none", "qskd", "qskd_online")
STEPS, ROUNDS = 10, 12


def side(work: Path, student: str, variant: str) -> Side:
    """A training that goes on by `STEPS` steps each time it is called."""
    one = VARIANTS[variant]
    fields = (*one.overrides, "training.epochs=100")
    config = make_config(work, "val", STUDENTS[student], fields, one.kind)
    plan = make_plan(config, one.kind)
    teacher = teacher_for_training(config, plan.train.labels, torch.device("cpu"))
    training = Training(config, make_student(config, plan.train.labels), teacher, 100_000, torch.device("cpu"))
    shares = (share for share in local_stream(plan.stream) if share.subset == "train")

    def go_on() -> None:
        for share in islice(shares, STEPS):
            training.train_step(train_batch(share.arrays))

    return go_on


def cpu_seconds(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Of each side in each round, one round to warm up left out; every second round runs backwards."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            started = time.process_time()
            sides[name]()
            taken[name].append(time.process_time() - started)
    return {name: values[1:] for name, values in taken.items()}


def measure(work: Path) -> dict[str, dict[str, float]]:
    """Median over rounds of each variant's CPU seconds over those without teacher, by student."""
    torch.set_num_threads(1)
    ratios = {}
    for student in STUDENTS:
        taken = cpu_seconds({variant: side(work, student, variant) for variant in TIMED}, ROUNDS)
        rounds = {v: [a / b for a, b in zip(taken[v], taken["none"], strict=True)] for v in TIMED}
        ratios[student] = {v: round(statistics.median(rounds[v]), 3) for v in TIMED}
        ratios[student]["cpu_ms_without_teacher"] = round(1000 * statistics.median(taken["none"]) / STEPS, 1)
        print(student, ratios[student], flush=True)
    RECORDS.mkdir(exist_ok=True)
    said = {"ratios": ratios, "steps_a_round": STEPS, "rounds": ROUNDS, "code": code_version()}
    (RECORDS / "clock.json").write_text(json.dumps(said, indent=1) + "\n")
    return ratios
