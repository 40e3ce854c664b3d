"""The teachers of the evidence: the package's own, of 30 queries, and one of 300, as many as detectors on COCO have.

The package's has six queries an object, which leaves one hard negative; so it can't say whether hard negatives help. The other
goes on from its weights with 270 queries more, which begin spread over the image (`qskd.detectors.inherit`), on the same images.
It is made when a cell first needs it (half an hour on one core) and is not part of the package.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.demo.quickstart import TEACHER
from pipelines.feed.stream import local_stream
from pipelines.run.resolve import ResolvedConfig, resolve
from pipelines.training.plan import make_plan
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.detectors import save_detector
from qskd.from_recipe import make_student
from qskd.training.step import Training

OWN, MANY = "shapes_teacher", "teacher300"
RECIPE = Path(__file__).resolve().parents[2] / "configs/shapes_teacher.yaml"
STEPS = 3000


def teacher_path(work: Path, name: str) -> Path:
    """Where a teacher's folder is, made already or not."""
    return TEACHER if name == OWN else work / name


def recipe(work: Path) -> ResolvedConfig:
    """Of the second teacher: the first one's own recipe, begun from its weights, with ten times the queries."""
    fields = [
        f"data.train={work}/train",
        f"data.val={work}/val",
        f"teacher.path={TEACHER}",
        "student.inherit=true",
        "student.queries=300",
        "training.epochs=8",
        f"training.max_steps={STEPS}",
        "training.evaluate_every_epochs=8",
        "training.learning_rate=1.0e-3",
    ]
    return resolve(load(RECIPE, fields), "train")


def make_many(work: Path) -> Path:
    """Train the second teacher, in this process with one thread; kept when it is there already."""
    folder = teacher_path(work, MANY)
    if folder.exists():
        return folder
    torch.set_num_threads(1)
    config = recipe(work)
    plan = make_plan(config, "train")
    student = make_student(config, plan.train.labels)
    training = Training(config, student, None, plan.stream.schedule.total_steps, torch.device("cpu"))
    loss: list[float] = []
    for share in local_stream(plan.stream):
        if share.subset != "train":
            continue
        loss.append(float(training.train_step(train_batch(share.arrays))["total"]))
        if training.step % 250 == 0:
            print(f"{MANY}: step {training.step}/{STEPS}  loss {sum(loss) / len(loss):.3f}", flush=True)
            loss.clear()
    training.check_finite()
    with training.evaluation_weights() as detector:
        save_detector(detector, folder, config.student.resize)
    return folder
