"""Any family from any: a few steps of QSKD on photographs of COCO, for each pair of teacher and student.

    python -m benchmarks.family_pairs                       # the table of docs/families.md
    python -m benchmarks.family_pairs --students detr --teachers rt_detr d_fine

Each teacher first learns the eight photographs (the overfit recipe, wider and at a higher resolution than the students); then
each student, from random weights, learns from it. Teacher and student differ in width, queries, layers and resolution. What
the method's two terms and the detection loss (the dense head's with it) come to, weighted, is shown as the mean of the
first and of the last three steps on the same eight images. It proves that the terms of every pair have gradients that lead
down, not that a pair is worth it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.overfit import FAMILIES, SAMPLE, make_config, make_shards
from pipelines.feed.stream import local_stream
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import make_plan
from qskd.config import FACTS, Config
from qskd.datasets.batch import train_batch
from qskd.detectors import FAMILIES as KNOWN
from qskd.detectors import save_detector
from qskd.errors import QskdError
from qskd.from_recipe import ground_truth, make_student, make_teacher
from qskd.training.step import Training

# The same for every family, whatever its own training has: pairs are compared with pairs.
ALIKE = ("student.dropout=0", "training.sampling_learning_rate_scale=1", "training.undecayed=nothing")
PAIRED = ("conditional_detr", "deformable_detr", "rt_detr", "d_fine", "deimv2", "lw_detr", "rf_detr")
TERMS = ("agfd", "lapd", "detection")
TEACHER = ("student.decoder_layers=2", "training.warmup_steps=20", "training.step_at=1")
STUDENT = (
    *("student.width=64", "student.heads=4", "student.ffn_width=64", "student.decoder_layers=3", "student.queries=30"),
    "student.resize.size=96",
    *(
        "distillation.method=qskd",
        "distillation.features.background=0.1",
        "training.warmup_steps=5",
        "training.step_at=1",
    ),
)


def levels(family: str) -> str:
    return f"student.feature_levels={2 if KNOWN[family].many_maps else 1}"


def curves(config: Config, kind: str, folder: Path | None = None) -> dict[str, list[float]]:
    """Train as the recipe says, without Ray; the weighted terms of each step. The detector is saved to `folder`."""
    stream = make_plan(ResolvedConfig(config), kind).stream
    labels = [name for _, name in ground_truth(config.data.train).categories]
    teacher = make_teacher(config, labels) if kind == "distill" else None
    training = Training(config, make_student(config, labels), teacher, stream.schedule.total_steps, torch.device("cpu"))
    found: dict[str, list[float]] = {name: [] for name in TERMS}
    weights = training.module.weights
    for share in local_stream(stream):
        if share.subset != "train":
            continue
        said = training.train_step(train_batch(share.arrays))
        parts = dict.fromkeys(TERMS, 0.0)
        for name, weight in weights.items():
            parts[name.split("_")[0] if name.startswith(("agfd", "lapd")) else "detection"] += weight * float(
                said[name]
            )
        for name, value in parts.items():
            found[name].append(value)
    training.check_finite()
    if folder is not None:
        with training.evaluation_weights() as detector:
            save_detector(detector, folder, config.student.resize)
    return found


def complaint(found: dict[str, list[float]]) -> str:
    """What did not fall, or is no number; empty when all is well."""
    return ", ".join(
        name
        for name, values in found.items()
        if not all(map(math.isfinite, values)) or not fmean(values[-3:]) < fmean(values[:3])
    )


def run(
    folder: Path, students: Sequence[str], teachers: Sequence[str], steps: tuple[int, int], given: argparse.Namespace
) -> int:
    """steps: of each teacher, of each student. Prints the table; the number of pairs in which something did not fall."""
    shards, failures = make_shards(given.annotations, given.images, folder, 8), 0
    for teacher in teachers:
        own = make_config(shards, teacher, steps[0], [*TEACHER, *ALIKE, levels(teacher)])
        said = curves(own, "train", folder / teacher)["detection"]
        print(
            f"{teacher} learned the images: detection loss {fmean(said[:3]):.2f} → {fmean(said[-3:]):.2f}", flush=True
        )
    print(f"\n| student | teacher | {' | '.join(TERMS)} |\n| --- | --- |{' ---: |' * len(TERMS)}")
    for student, teacher in itertools.product(students, teachers):
        size = ["student.resize.size=64"] if FACTS[student].vit == "lw_detr_vit" else []  # whole windows
        fields = [*STUDENT, *ALIKE, *size, levels(student), f"teacher.path={folder / teacher}"]
        own = make_config(shards, student, steps[1], fields)
        found = curves(own, "distill")
        cells = (f"{fmean(values[:3]):.2f} → {fmean(values[-3:]):.2f}" for values in found.values())
        failed = complaint(found)
        failures += bool(failed)
        print(
            f"| `{student}` | `{teacher}` | {' | '.join(cells)} |{f' DID NOT FALL: {failed}' if failed else ''}",
            flush=True,
        )
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; 1 when a term of some pair does not fall."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.family_pairs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--students", nargs="+", choices=FAMILIES, default=PAIRED)
    parser.add_argument("--teachers", nargs="+", choices=FAMILIES, default=PAIRED)
    parser.add_argument("--teacher-steps", type=int, default=80)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=Path, default=SAMPLE / "train2017", help="folder of pictures")
    parser.add_argument("--annotations", type=Path, default=SAMPLE / "annotations" / "instances_train2017.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qskd-pairs-") as scratch:
        try:
            steps = (given.teacher_steps, given.steps)
            return int(run(Path(scratch), given.students, given.teachers, steps, given) > 0)
        except QskdError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
