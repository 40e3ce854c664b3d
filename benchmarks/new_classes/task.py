"""The task: a detector of the eight easy shapes, and labels of their twins on images that hold both.

Old and new images are drawn alike, with all sixteen shapes in them. The old ones have labels of the easy shapes, the new ones of
the twins; what is not labelled is there all the same, and an ordinary training takes it for background.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.demo.quickstart import BACKBONE, TEST, TRAIN, VAL
from pipelines.feed.stream import local_stream
from pipelines.inspection.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.datasets.shapes import EASY, TWINS, make_shapes
from qskd.detectors import save_detector
from qskd.evaluation.details import Evaluation
from qskd.from_recipe import make_student, teacher_for_training
from qskd.storage.ownership import EXTRA_FILE
from qskd.training.step import Training

RECIPE = Path(__file__).parent / "recipe.yaml"
IMAGES = 3000  # of the old classes, and as many of the new
OLD = TRAIN.model_copy(update={"images": IMAGES})
NEW = TRAIN.model_copy(update={"images": IMAGES, "first_image": IMAGES})
OLD_STEPS, STEPS, BALANCED_STEPS = 2400, 600, 120
LEARNING_RATE, BALANCED_LEARNING_RATE = 1e-3, 2e-4
EXEMPLARS = IMAGES // 10  # CL-DETR keeps a tenth

_FRESH = (  # a detector that begins with a backbone alone
    "student.backbone={embedding_size: 24, hidden_sizes: [24, 48], depths: [1, 1]}",
    f"student.backbone.init={BACKBONE}",
    "detection.dense_weight=1.0",
    "training.learning_rate=3.0e-3",
)


@dataclass(frozen=True)
class Work:
    """Where things are. split: "test" to report, "val" to choose settings by."""

    folder: Path
    seed: int
    split: str = "test"

    @property
    def old(self) -> Path:
        """The old detector, of this seed."""
        return self.folder / f"old-seed{self.seed}"

    def of_seed(self, name: str) -> Path:
        return self.folder / f"seed{self.seed}" / name


def make_task(work: Work) -> None:
    """Images, shards and the old detector; what is there is kept."""
    nothing: tuple[str, ...] = ()
    wanted = {"old": (OLD, EASY), "new": (NEW, TWINS), "val": (VAL, nothing), "test": (TEST, nothing)}
    for name, (shapes, classes) in wanted.items():
        if not (work.folder / name / "manifest.json").exists():
            annotations, images = make_shapes(shapes, work.folder / f"{name}-coco")
            if classes:
                annotations = _part(annotations, work.folder / f"{name}.json", classes)
            prepare(annotations, images, str(work.folder / name), quiet=True)
    # Of the old classes alone: the old detector's data has no others.
    for name, source in (("old-easy", "old"), ("old-val", "val")):
        if not (work.folder / name / "manifest.json").exists():
            coco, shards = work.folder / f"{source}-coco", work.folder / name
            prepare(coco / "annotations.json", coco / "images", str(shards), leave_out=TWINS, quiet=True)
    if not (work.folder / "joint" / "manifest.json").exists():
        for name in ("old", "new"):
            coco = work.folder / f"{name}-coco"
            prepare(coco / "annotations.json", coco / "images", str(work.folder / f"{name}-all"), quiet=True)
        parts = [str(work.folder / f"{name}-all") for name in ("old", "new")]
        prepare(Path(parts[0]), None, str(work.folder / "joint"), quiet=True, also=parts[1:])
    if not work.old.exists():
        train(work, work.folder / "old-easy", work.old, OLD_STEPS, [*_FRESH, f"data.val={work.folder}/old-val"])


def second_detector(work: Work) -> Path:
    """One of the twins alone, as the old one is of the easy shapes: of the new images, from the same backbone."""
    to = work.folder / f"twins-seed{work.seed}"
    for name, source in (("new-twins", "new"), ("twins-val", "val")):
        if not (work.folder / name / "manifest.json").exists():
            coco = work.folder / f"{source}-coco"
            shards = str(work.folder / name)
            prepare(coco / "annotations.json", coco / "images", shards, leave_out=EASY, quiet=True)
    if not to.exists():
        train(work, work.folder / "new-twins", to, OLD_STEPS, [*_FRESH, f"data.val={work.folder}/twins-val"])
    return to


def _part(annotations: Path, to: Path, classes: Sequence[str]) -> Path:
    """The JSON with objects of these classes alone. All categories stay listed: a student's head has a row for each."""
    tree: dict[str, Any] = json.loads(annotations.read_text())
    kept = {one["id"] for one in tree["categories"] if one["name"] in classes}
    tree["annotations"] = [one for one in tree["annotations"] if one["category_id"] in kept]
    to.write_text(json.dumps(tree))
    return to


def train(
    work: Work,
    shards: Path,
    to: Path,
    steps: int,
    more: Sequence[str] = (),
    kind: str = "train",
    spent_before: float = 0.0,
) -> None:
    """A training in this process; its student goes into a folder, with the seconds of its steps and of those before it."""
    torch.set_num_threads(1)
    fields = [f"data.train={shards}", f"data.val={work.folder}/val", f"seed={work.seed}", f"training.max_steps={steps}"]
    config = resolve(load(RECIPE, [*fields, *more]), kind)
    plan = make_plan(config, kind)
    labels = plan.train.labels
    teacher, student = teacher_for_training(config, labels, torch.device("cpu")), make_student(config, labels)
    training = Training(config, student, teacher, plan.stream.schedule.total_steps, torch.device("cpu"))
    begun = time.perf_counter()
    for share in local_stream(plan.stream):
        if share.subset == "train":
            training.train_step(train_batch(share.arrays))
        if training.step == steps:
            break
    spent = time.perf_counter() - begun
    training.check_finite()
    with training.evaluation_weights() as detector:
        save_detector(detector, to, config.student.resize, {"train_seconds": spent_before + spent})


def seconds_of(student: Path) -> float:
    """What its training took, whenever that was."""
    return float(json.loads((student / EXTRA_FILE).read_text())["train_seconds"])


def measure(work: Work, model: Path, class_map: Mapping[str, str | None] | None = None) -> Evaluation:
    """On the split's images, of all sixteen classes."""
    return evaluate(str(model), str(work.folder / work.split), class_map=class_map, workers=0, tell_nobody=False)
