"""The rows of the table: what is done with an old detector and labels of new classes. Each begins with its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.new_classes.task import (
    BALANCED_LEARNING_RATE,
    BALANCED_STEPS,
    EXEMPLARS,
    LEARNING_RATE,
    STEPS,
    Work,
    second_detector,
    seconds_of,
    train,
)
from pipelines.labelling.job import Request
from pipelines.labelling.job import run as label
from pipelines.prepare import prepare
from pipelines.selecting.job import Request as Asked
from pipelines.selecting.job import run as select
from qskd.datasets.order.chosen import load_selection
from qskd.datasets.shapes import TWINS

# Of plain distillation (the teacher's every prediction, background too, is a target: global pairs, all alike) and of QSKD.
_NOTHING_OF_TWINS = "teacher.class_map={" + ", ".join(f"{name}: null" for name in TWINS) + "}"
_PLAIN = (
    "distillation.features.weight=0",
    "distillation.predictions.pairing=global",
    "distillation.predictions.pair_weight=uniform",
)


@dataclass(frozen=True)
class Row:
    """make: (the work, where the student goes)."""

    title: str
    make: Callable[[Work, Path], None]


def _begin(work: Work, *more: str) -> list[str]:
    return [f"student.init={work.old}", f"training.learning_rate={LEARNING_RATE}", *more]


def _taught(work: Work, *more: str) -> list[str]:
    """Not whitened, as the first seeds were."""
    fields = ("distillation.decay=0", "distillation.features.whitening=0")
    return _begin(work, f"teacher.path={work.old}", _NOTHING_OF_TWINS, *fields, *more)


def _labelled(work: Work, name: str, source: str, model: Path, threshold: float | None, like: str = "old-val") -> Path:
    """Shards of the images of source.json, the model's labels joined to what is there."""
    shards, out = work.of_seed(name), work.of_seed(f"{name}.json")
    if not (shards / "manifest.json").exists():
        shards.mkdir(parents=True, exist_ok=True)
        coco, onto = work.folder / f"{source}-coco/images", work.folder / f"{source}.json"
        known = str(work.folder / like) if threshold is None else ""
        label(Request(str(model), coco, out, known, threshold, workers=0, onto=onto), quiet=True)
        prepare(out, coco, str(shards), quiet=True, overwrite=True)
    return shards


def joined(work: Work) -> Path:
    """The new images, with the old detector's labels by CL-DETR's rule, each class's threshold that of its best F1."""
    return _labelled(work, "joined", "new", work.old, None)


def _chosen(work: Work, shards: Path, name: str) -> Path:
    """A tenth of them, by their classes' distribution."""
    out = work.of_seed(f"{name}.json")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        select(Asked(str(shards), out, EXEMPLARS, "classes"), quiet=True)
    return out


def _gathered(work: Work, name: str, *sources: Path) -> Path:
    shards = work.of_seed(name)
    if not (shards / "manifest.json").exists():
        prepare(sources[0], None, str(shards), quiet=True, also=[str(each) for each in sources[1:]])
    return shards


def finetuning(work: Work, to: Path) -> None:
    train(work, work.folder / "new", to, STEPS, _begin(work))


def plain(work: Work, to: Path) -> None:
    train(work, work.folder / "new", to, STEPS, _taught(work, *_PLAIN), "distill")


def plain_strong(work: Work, to: Path) -> None:
    fields = (*_PLAIN, "distillation.predictions.weight=3.0")
    train(work, work.folder / "new", to, STEPS, _taught(work, *fields), "distill")


def rule_and_plain(work: Work, to: Path) -> None:
    train(work, joined(work), to, STEPS, _taught(work, *_PLAIN), "distill")


def qskd(work: Work, to: Path) -> None:
    train(work, work.folder / "new", to, STEPS, _taught(work), "distill")


def rule(work: Work, to: Path) -> None:
    train(work, joined(work), to, STEPS, _begin(work))


def rule_without_thresholds(work: Work, to: Path) -> None:
    train(work, _labelled(work, "ten", "new", work.old, 0.0), to, STEPS, _begin(work))


def rule_and_qskd(work: Work, to: Path) -> None:
    train(work, joined(work), to, STEPS, _taught(work), "distill")


def completed(work: Work, to: Path) -> None:
    train(work, work.folder / "new", to, STEPS, _taught(work, "data.completed=true"), "distill")


def completed_plain(work: Work, to: Path) -> None:
    train(work, work.folder / "new", to, STEPS, _taught(work, "data.completed=true", *_PLAIN), "distill")


def completed_lapd(work: Work, to: Path) -> None:
    fields = ("data.completed=true", "data.unlabeled_score=0.3", "distillation.features.weight=0")
    train(work, work.folder / "new", to, STEPS, _taught(work, *fields), "distill")


def _two_teachers(work: Work, *more: str) -> list[str]:
    """The old detector and one of the twins, each for its own classes."""
    second = f"teacher.also.twins.path={second_detector(work)}"
    return _begin(work, f"teacher.path={work.old}", second, "distillation.decay=0", *_PLAIN, *more)


def two_teachers(work: Work, to: Path) -> None:
    train(work, work.folder / "new", to, STEPS, _two_teachers(work, "data.completed=true"), "distill")


def two_teachers_alone(work: Work, to: Path) -> None:
    """On the new images without their labels."""
    shards = work.folder / "new-unlabeled"
    if not (shards / "manifest.json").exists():
        prepare(work.folder / "new-coco/images", None, str(shards), quiet=True, unlabeled=True)
    fields = _two_teachers(work, "data.train=", f"data.unlabeled=[{shards}]")
    train(work, work.folder / "new", to, STEPS, fields, "distill")


def exemplars(work: Work, to: Path) -> None:
    """The new images and a tenth of the old, which have labels of the old classes alone."""
    old = _chosen(work, work.folder / "old", "old-exemplars")
    train(work, _gathered(work, "with-exemplars", joined(work), old), to, STEPS, _begin(work))


def balanced(work: Work, to: Path) -> None:
    """From the row before: a tenth of the old images and a tenth of the new, on which both kinds of classes are labelled."""
    before = work.of_seed("student-exemplars")
    if not before.exists():
        exemplars(work, before)
    shards = work.of_seed("balanced")
    if not (shards / "manifest.json").exists():
        ids = {one.image_id for one in load_selection(str(work.of_seed("old-exemplars.json"))).images}
        tree = json.loads((work.folder / "old.json").read_text())
        for name, key in (("images", "id"), ("annotations", "image_id")):
            tree[name] = [one for one in tree[name] if one[key] in ids]
        (few := work.of_seed("few.json")).write_text(json.dumps(tree))
        images, out = work.folder / "old-coco/images", work.of_seed("completed.json")
        label(Request(str(before), images, out, threshold=0.5, workers=0, onto=few), quiet=True)
        prepare(out, images, str(work.of_seed("completed")), quiet=True, overwrite=True)
        new = _chosen(work, joined(work), "new-exemplars")
        _gathered(work, "balanced", work.of_seed("completed"), new)
    more = [f"student.init={before}", f"training.learning_rate={BALANCED_LEARNING_RATE}"]
    train(work, shards, to, BALANCED_STEPS, more, spent_before=seconds_of(before))


def joint(work: Work, to: Path) -> None:
    """All labels of all images: what nobody with new labels alone can have."""
    train(work, work.folder / "joint", to, STEPS, _begin(work))


ROWS = {
    "finetuning": Row("fine-tuning alone", finetuning),
    "plain": Row("plain distillation: the old detector's every prediction", plain),
    "plain_strong": Row("the same, three times the weight", plain_strong),
    "qskd": Row("QSKD, without its labels", qskd),
    "rule": Row("detector distillation: CL-DETR's rule, thresholds by F1", rule),
    "rule_without_thresholds": Row("the same, without thresholds (the paper's)", rule_without_thresholds),
    "rule_and_plain": Row("CL-DETR's rule, and plain distillation", rule_and_plain),
    "rule_and_qskd": Row("CL-DETR's rule, and QSKD", rule_and_qskd),
    "completed": Row("QSKD, labels completed in each step", completed),
    "completed_plain": Row("plain distillation, labels completed in each step", completed_plain),
    "completed_lapd": Row("QSKD's predictions alone, labels completed from a score of 0.3", completed_lapd),
    "two_teachers": Row("two teachers, the second of the twins: plain distillation, labels completed", two_teachers),
    "two_teachers_alone": Row("two teachers, on images without any label", two_teachers_alone),
    "exemplars": Row("CL-DETR's rule, and a tenth of the old images", exemplars),
    "balanced": Row("the same, then balanced fine-tuning", balanced),
    "joint": Row("joint training: all labels of old and new images", joint),
}
