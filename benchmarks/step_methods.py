"""What a distillation method adds to a training step of the quickstart's student, from the cache: CPU seconds, all sides in turn.

python -m benchmarks.step_methods [METHOD ...] [--steps 60] [--quick]

A method is a name, or NAME:FIELD=VALUE for a setting of its own: kd-detr:general_points=30.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.detection_loss import threads
from benchmarks.step import WARM_UP, Side
from benchmarks.step_cases import Case, quickstart
from benchmarks.timing import Ratio, Report, alternate, load_note, machine, milliseconds, ratios
from qskd.config import Config
from qskd.config.distillation import settings_class
from qskd.detectors import build_student
from qskd.distillation.method import teacher_needs
from qskd.from_recipe import make_teacher
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.memory.directions import flat_directions
from qskd.training.step import Training

METHODS = ("mimic", "crosskd", "crosskd:teacher_forcing=false", "kd-detr:general_points=30", "kd-detr")


def taught_by(config: Config, method: str) -> Config:
    """The recipe with another method, at its defaults but for what is said."""
    name, *fields = method.split(":")
    settings = settings_class(name).model_validate({"method": name} | dict(field.split("=", 1) for field in fields))
    return config.model_copy(update={"distillation": settings})


def side(case: Case, method: str) -> Side:
    if method in ("plain", "qskd"):
        return Side(case.training(method), case.batches_of(method))
    config = taught_by(case.config, method)
    needs, teacher = teacher_needs(config.distillation), make_teacher(config, case.labels)
    assert needs is not None
    assert teacher is not None
    cached = CachedTeacher(case.sizes, flat_directions(case.sizes.channels), teacher.decoder if needs.decoder else None)
    student = build_student(config.student, case.labels, seed=0)
    return Side(Training(config, student, cached, 1000, torch.device("cpu")), case.batches_of("qskd"))


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_methods", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=60, help="of each side, in turn")
    parser.add_argument("--quick", action="store_true", help="two steps of a tiny batch")
    given = parser.parse_args(arguments)
    with threads(1):
        case = quickstart(4, 1) if given.quick else quickstart(16, 8)
        sides = {name: side(case, name) for name in ("plain", "qskd", *given.methods)}
        alternate(sides, 2 if given.quick else given.steps, WARM_UP)
    report = Report("A training step with a method over the plain step and over QSKD's (CPU time; lower is better)")
    report.facts = [machine("transformers", "numpy") + f", {load_note()}, 1 thread used", *case.facts]
    taken = {name: each.cpu_seconds[WARM_UP:] for name, each in sides.items()}
    for name in ("qskd", *given.methods):
        for base in ("plain", "qskd") if name != "qskd" else ("plain",):
            figures = f"{milliseconds(taken[name])} to {milliseconds(taken[base])}"
            report.ratios.append(Ratio(f"{name} over {base}", ratios(taken[name], taken[base]), figures))
    report.print()
    return report


if __name__ == "__main__":
    sys.exit(main().exit_code)
