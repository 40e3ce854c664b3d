"""What QSKD adds to a training step when the teacher's outputs come from a cache, and where that time goes.

python -m benchmarks.step [--size quickstart|r18|both] [--quick]

Both sides train the same student from the same weights on the same batches: from the loader's arrays through forward,
losses, backward, clipping and update. One has a cached teacher, the other none. Reading and decoding of files is not in it.

The sizes are described in `benchmarks.step_cases`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import qskd.distillation.qskd.method
import qskd.losses.matching
import qskd.teacher.cached
import qskd.training.module
import qskd.training.step
from benchmarks.detection_loss import threads
from benchmarks.host_waits import HostWaits
from benchmarks.step_cases import QUICK, Arrays, Case, quickstart, r18
from benchmarks.timing import Ratio, Report, alternate, load_note, machine, milliseconds, print_table, ratios
from qskd.datasets.batch import train_batch
from qskd.detectors import Detector, to_pixels
from qskd.distillation.method import Lesson
from qskd.distillation.qskd.agfd import AttentionGuidedFeatureDistillation
from qskd.distillation.qskd.method import QSKD
from qskd.losses.dense_head import DenseHead
from qskd.losses.matching import assign
from qskd.teacher.columns.table import decode_batch
from qskd.training.step import Training

GOAL = 1.05
WARM_UP = 2  # steps: the first ones allocate
# Values that are read on a CPU and not on a GPU, by file and function.
CPU_ONLY = {  # asked on a CPU alone
    "qskd/losses/dense_head.py forward": "one_hot looks at its labels only there",
    "qskd/distillation/shared/maps.py resampler": "asks whether there is anything to do only there",
}

REMAIN = {
    "qskd/losses/matching.py finish": "the costs, which depend on all before them; the dense head is at work meanwhile",
    "qskd/training/step.py check_finite": "the step before: there long since",
}


@dataclass
class Side:
    """One step at a time over a case's batches. cpu_seconds: of each step, which others on the machine disturb less than
    the time of the clock."""

    training: Training
    batches: list[Arrays]
    cpu_seconds: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        started = time.process_time()
        self.training.train_step(train_batch(self.batches[len(self.cpu_seconds) % len(self.batches)]))
        self.cpu_seconds.append(time.process_time() - started)


def sides_of(case: Case) -> dict[str, Side]:
    return {kind: Side(case.training(kind), case.batches_of(kind)) for kind in ("qskd", "plain")}


def compare(case: Case, steps: int) -> list[Ratio]:
    """QSKD over plain, step by step: by the clock, with the goal, and by the CPU's time."""
    sides = sides_of(case)
    clock = alternate(sides, steps, WARM_UP)
    found = []
    for name, taken in (
        ("", clock),
        (" (CPU time)", {kind: side.cpu_seconds[WARM_UP:] for kind, side in sides.items()}),
    ):
        figures = f"{milliseconds(taken['qskd'])} to {milliseconds(taken['plain'])}"
        goal = None if name else GOAL
        found.append(Ratio(f"{case.name}{name}", ratios(taken["qskd"], taken["plain"]), figures, at_most=goal))
    return found


# ---- where the time goes

_PLACES: tuple[tuple[Any, str, str], ...] = (
    (sys.modules[__name__], "train_batch", "arrays to tensors"),
    (qskd.teacher.cached, "decode_batch", "decode the record"),
    (Detector, "forward", "student"),
    (qskd.training.module, "begin_assigning", "matching: its costs"),
    (qskd.losses.matching, "_solved", "matching"),
    (qskd.training.module, "detection_terms", "detection loss"),
    (DenseHead, "forward", "dense head"),
    (qskd.distillation.qskd.method, "select_both", "query selection (student and teacher)"),
    (qskd.distillation.qskd.method, "foreground_mask", "foreground mask"),
    (AttentionGuidedFeatureDistillation, "forward", "AGFD, with projector"),
    (qskd.distillation.qskd.method, "alignment_terms", "LAPD"),
    (QSKD, "forward", "QSKD otherwise"),
    (qskd.training.step, "combine_with_values", "sum of the terms"),
    (torch.Tensor, "backward", "backward"),
    (torch.nn.utils, "clip_grad_norm_", "clipping"),
    (torch.optim.AdamW, "step", "update"),
    (Training, "_update_average", "moving average"),
    (Training, "train_step", "all else"),
)


@contextmanager
def stopwatch(taken: dict[str, float]) -> Iterator[None]:
    """Adds to `taken` the CPU seconds spent in each of _PLACES, without those in places inside it."""
    inside = [0.0]

    def timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - started
                taken[label] += whole - inside.pop()
                inside[-1] += whole

        return call

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _PLACES]
    for owner, name, label in _PLACES:
        setattr(owner, name, timed(getattr(owner, name), label))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def profile(case: Case, steps: int) -> list[list[str]]:
    """Milliseconds of CPU a step in each place, plain and with QSKD, and the difference over the plain step: a table's lines."""
    sides = sides_of(case)
    seen: dict[str, list[dict[str, float]]] = {kind: [] for kind in sides}

    def watched(kind: str) -> Callable[[], None]:
        def run() -> None:
            taken = dict.fromkeys((label for *_, label in _PLACES), 0.0)
            with stopwatch(taken):
                sides[kind]()
            seen[kind].append(taken)

        return run

    alternate({kind: watched(kind) for kind in sides}, steps, WARM_UP)
    rows = {
        label: {kind: 1000 * statistics.median(taken[label] for taken in seen[kind][WARM_UP:]) for kind in seen}
        for *_, label in _PLACES
    }
    rows["in all"] = {kind: sum(row[kind] for row in rows.values()) for kind in seen}
    plain = rows["in all"]["plain"]
    more = {label: row["qskd"] - row["plain"] for label, row in rows.items()}
    return [
        [label, f"{row['plain']:.2f}", f"{row['qskd']:.2f}", f"{more[label]:+.2f}", f"{more[label] / plain:+.1%}"]
        for label, row in rows.items()
    ]


def backward_split(case: Case, rounds: int) -> list[list[str]]:
    """Milliseconds of the backward pass of QSKD's terms alone, down to the student's outputs."""
    training = case.training("qskd")
    method, batch = training.module.method, train_batch(case.batches[0])
    assert method is not None
    teacher = decode_batch(batch.cached)
    pixels, mask = to_pixels(batch.images, batch.sizes, training.student.mean, training.student.std)
    with torch.no_grad():
        output = training.student(pixels, mask, with_attention=False)
    said = [(output.logits, output.boxes_cxcywh), (teacher.logits, teacher.boxes_cxcywh)]
    assignments = assign(said, batch.targets, case.config.detection)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_()

    taken: dict[str, list[float]] = {"agfd": [], "lapd": []}
    for _ in range(rounds + 1):
        student = replace(
            output,
            logits=leaf(output.logits),
            boxes_cxcywh=leaf(output.boxes_cxcywh),
            memory=tuple(map(leaf, output.memory)),
        )
        terms = method(Lesson(student, teacher, batch.targets, assignments[0], assignments[1]))
        for part in taken:
            parts = [term.total * method.weights[name] for name, term in terms.items() if name.startswith(part)]
            total = torch.stack(parts).sum()
            started = time.process_time()
            total.backward()
            taken[part].append(time.process_time() - started)
    return [[f"backward of {part.upper()}", milliseconds(times[1:])] for part, times in taken.items()]


def host_waits(case: Case, kind: str) -> Counter[tuple[str, str]]:
    """The waits of one step, by (what, where): a step with another before it, for its finite check to look at."""
    training, batches = case.training(kind), case.batches_of(kind)
    for group in training.optimizer.param_groups:  # as on a GPU; the foreach form reads its counters, on the host
        group |= {"foreach": False, "fused": True}
    training.train_step(train_batch(batches[0]))
    batch = train_batch(batches[-1])
    with HostWaits() as waits:
        training.train_step(batch)
    return waits.found


def waits_table(case: Case) -> list[list[str]]:
    found = {kind: host_waits(case, kind) for kind in ("plain", "qskd")}
    lines = []
    for what, where in dict.fromkeys([*found["plain"], *found["qskd"]]):
        file, function = where.split(":")[0], where.split()[-1]
        counts = [str(found[kind][what, where]) for kind in found]
        place = f"{file} {function}"
        lines.append(
            [what, where, *counts, f"on a CPU alone: {CPU_ONLY[place]}" if place in CPU_ONLY else REMAIN.get(place, "")]
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=["quickstart", "r18", "both"], default="both")
    parser.add_argument("--steps", type=int, default=0, help="of each side, in turn (quickstart: 120, r18: 16)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--r18-batch", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="tiny batches, two steps, less of a student: seconds")
    given = parser.parse_args(arguments)
    makers: Mapping[str, Callable[[], Case]] = {
        "quickstart": lambda: quickstart(4, 1) if given.quick else quickstart(16, 8),
        "r18": lambda: r18(1, 1, 64, QUICK) if given.quick else r18(given.r18_batch, 2),
    }
    report = Report("A training step with a cached teacher (QSKD) over the same without (time; lower is better)")
    report.facts = [machine("transformers", "numpy") + f", {load_note()}, {given.threads} thread(s) used"]
    tables: list[tuple[list[str], list[list[str]]]] = []
    with threads(given.threads):
        for name, make in makers.items():
            if given.size not in (name, "both"):
                continue
            case, steps = make(), 2 if given.quick else given.steps or {"quickstart": 120, "r18": 16}[name]
            report.facts += case.facts
            report.ratios += compare(case, steps)
            head = [f"{name}: ms of CPU a step", "plain", "QSKD", "more", "of the plain step"]
            tables.append((head, profile(case, steps)))
            tables.append(([f"{name}: alone", "median"], backward_split(case, steps)))
            head = [f"{name}: waits of a step on a GPU", "where", "plain", "QSKD", "why"]
            tables.append((head, waits_table(case)))
    report.print()
    for table in tables:
        print_table(*table)
    return report


if __name__ == "__main__":
    sys.exit(main().exit_code)
