"""The teachers of the evidence: the package's own, of 30 queries and one map, and three that are made from it on the same images.

The package's has six queries an object, which leaves one hard negative; so it can't say whether hard negatives help. The second
goes on from its weights with 270 queries more, which begin spread over the image (`qskd.detectors.inherit`): as many as detectors
on COCO have. An RT-DETR of two maps, of which one can be left out, and a D-FINE, which says where a box's sides may lie, start
from the package's backbone and learn the rest. All are made when a cell first needs them (half an hour on one core) and are not
part of the package.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.demo.quickstart import TEACHER, TRAIN
from pipelines.feed.stream import local_stream
from pipelines.run.resolve import ResolvedConfig, resolve
from pipelines.training.plan import make_plan
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.detectors import save_detector
from qskd.from_recipe import make_student
from qskd.training.step import Training

OWN, MANY, MAPS, SIDES = "shapes_teacher", "teacher300", "teacher_maps", "teacher_sides"
RECIPE = Path(__file__).resolve().parents[2] / "configs/shapes_teacher.yaml"
STEPS = {MANY: 3000, MAPS: 4500, SIDES: 4500}
# What the recipe says otherwise than a family's own defaults.
FAMILY_DEFAULTS = (
    *("student.dropout=null", "student.frozen_stages=null"),
    *("training.undecayed=null", "training.sampling_learning_rate_scale=null"),
)
# Of the package's teacher's size, with fresh flips, which that one and the one of 300 queries were made before.
_OF_ITS_SIZE = (
    *("student.feature_levels=2", "student.encoder_layers=1", "data.views.derived=flip"),
    *FAMILY_DEFAULTS,
)
FIELDS = {
    MANY: ("student.queries=300", "training.learning_rate=1.0e-3"),
    MAPS: ("student.family=rt_detr", *_OF_ITS_SIZE),
    SIDES: ("student.family=d_fine", *_OF_ITS_SIZE),
}


def teacher_path(work: Path, name: str) -> Path:
    """Where a teacher's folder is, made already or not."""
    return TEACHER if name == OWN else work / name


def recipe(work: Path, name: str) -> ResolvedConfig:
    """Of a teacher that is made: the package's own recipe, begun from its weights where shapes fit, with other fields."""
    epochs = -(-STEPS[name] // (TRAIN.images // 16))
    fields = [
        f"data.train={work}/train",
        f"data.val={work}/val",
        f"teacher.path={TEACHER}",
        "student.inherit=true",
        f"training.epochs={epochs}",
        f"training.max_steps={STEPS[name]}",
        f"training.evaluate_every_epochs={epochs}",
        *FIELDS[name],
    ]
    return resolve(load(RECIPE, fields), "train")


def make_teacher_folder(work: Path, name: str) -> Path:
    """Train one of them, in this process with one thread; kept when it is there already."""
    folder = teacher_path(work, name)
    if folder.exists():
        return folder
    torch.set_num_threads(1)
    config = recipe(work, name)
    plan = make_plan(config, "train")
    student = make_student(config, plan.train.labels)
    training = Training(config, student, None, plan.stream.schedule.total_steps, torch.device("cpu"))
    loss: list[float] = []
    for share in local_stream(plan.stream):
        if share.subset != "train":
            continue
        loss.append(float(training.train_step(train_batch(share.arrays))["total"]))
        if training.step % 250 == 0:
            print(f"{name}: step {training.step}/{STEPS[name]}  loss {sum(loss) / len(loss):.3f}", flush=True)
            loss.clear()
    training.check_finite()
    with training.evaluation_weights() as detector:
        save_detector(detector, folder, config.student.resize)
    return folder
