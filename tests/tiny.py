"""Detectors, teachers and batches that are small enough for a training step in milliseconds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qskd.config import FACTS, Config, StudentConfig
from qskd.config.recipe import apply_overrides, build
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.datasets.classes import map_classes
from qskd.detectors import Detector, Preprocessing, build_student
from qskd.teacher.online import OnlineTeacher
from qskd.training.step import Training

LABELS = ("cat", "dog", "owl")
TEACHER_LABELS = ("N/A", "owl", "N/A", "cat", "fish", "dog", "N/A")  # another order, with slots that no one needs
SIZE = 64

STUDENT: dict[str, Any] = {
    "backbone": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    **{"width": 32, "encoder_layers": 1, "decoder_layers": 2, "heads": 4, "ffn_width": 32, "queries": 6},
    "resize": {"size": SIZE},
    "dropout": 0.0,  # not the family's: tests compare steps of one worker and of two, of training and of evaluation
}
TEACHER: dict[str, Any] = STUDENT | {"width": 64, "queries": 10, "decoder_layers": 3}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "conditional": {"family": "conditional_detr"},
    "deformable": {"family": "deformable_detr", "feature_levels": 2, "box_refinement": False},
    "refined": {"family": "deformable_detr", "feature_levels": 2, "box_refinement": True},
}
VIT: dict[str, Any] = {"hidden_sizes": [24], "depths": [1, 1]}


def own(family: str, levels: int = 1) -> dict[str, Any]:
    """The fields of a tiny student that its family decides; levels: of one that reads several maps and chooses no cells."""
    facts = FACTS[family]
    backbone = {"backbone": VIT} if facts.vit else {}
    maps = 1 if facts.size.get("feature_levels") == 1 else 2 if facts.hybrid else levels
    return {"family": family, "feature_levels": maps, **backbone}


# Random networks have few good boxes: keep nearly every query, so that all terms have something to say.
EASY_SELECTION = {"boundaries": [-0.9], "band_weights": [0.0, 1.0]}

FULL = ("detection.dense_weight=1.0", "training.ema_decay=0.9", "training.clip_norm=1.0", "student.dropout=0.1")


def recipe(student: Mapping[str, Any] | None = None, *overrides: str, **sections: Any) -> Config:
    """A configuration with a tiny student; `student` are changes to it, `overrides` read `a.b=c`."""
    tree = {"student": {**STUDENT, **(student or {})}, "distillation": {"selection": EASY_SELECTION}, **sections}
    return build(apply_overrides(tree, overrides))


def silent_student(config: StudentConfig, labels: Sequence[str], seed: int) -> Detector:
    """build_student without its warning that a frozen norm on a random backbone normalises nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return build_student(config, labels, seed)


def random_teacher(
    family: str = "refined", labels: Sequence[str] = LABELS, slots: Sequence[str] = TEACHER_LABELS, seed: int = 7
) -> OnlineTeacher:
    """A teacher with random weights: wider, with more queries and layers, its classes in another order. family: a key of
    FAMILIES, or a family's own name.

    Slots without a name of their own are named as the 91-slot heads of COCO name them.
    """
    config = StudentConfig.model_validate({**TEACHER, **(FAMILIES.get(family) or own(family))})
    names = [f"{name} {slot}" if name == "N/A" else name for slot, name in enumerate(slots)]
    detector = silent_student(config, names, seed)
    detector.model.config.id2label = dict(enumerate(slots))
    shake(detector, seed)
    return OnlineTeacher(detector, map_classes(labels, detector.labels, {}), Preprocessing(config.resize))


@torch.no_grad()
def shake(detector: Detector, seed: int) -> None:
    """Move all weights: a fresh detector's box heads are zero and all its scores alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in detector.named_parameters():
        if "backbone" not in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def arrays(counts: Sequence[int], seed: int = 0, classes: int = 3, teacher_size: int = 0) -> dict[str, np.ndarray]:
    """What the loader gives for images with `counts` objects: noise, with a bright rectangle where an object is."""
    rng = np.random.default_rng(seed)
    slots = max(counts, default=0)
    boxes, labels = np.zeros((len(counts), slots, 4), np.float32), np.zeros((len(counts), slots), np.int64)
    side = SIZE if len(counts) else 1
    images = rng.integers(0, 80, (len(counts), side, side, 3), np.uint8)
    for image, count in enumerate(counts):
        for j in range(count):
            centre, size = rng.uniform(0.3, 0.7, 2), rng.uniform(0.2, 0.5, 2)
            label = int(rng.integers(classes))
            boxes[image, j], labels[image, j] = [*centre, *size], label
            x0, y0, x1, y1 = (np.concatenate([centre - size / 2, centre + size / 2]) * SIZE).astype(int)
            images[image, y0:y1, x0:x1, label % 3] = 200
    batch = {
        "images": images,
        "sizes": np.full((len(counts), 2), side, np.int32),
        "boxes_cxcywh": boxes,
        "labels": labels,
        "counts": np.array(counts, np.int32),
        "image_ids": np.arange(len(counts), dtype=np.int64) + 100 * (seed + 1),
    }
    if teacher_size:
        batch["teacher_images"] = np.kron(images, np.ones((1, 2, 2, 1), np.uint8))[:, :teacher_size, :teacher_size]
        batch["teacher_sizes"] = np.full((len(counts), 2), min(teacher_size, 2 * side), np.int32)
    return batch


def batch_of(*counts: int, seed: int = 0) -> TrainBatch:
    return train_batch(arrays(counts, seed))


def make_training(
    config: Config, teacher: OnlineTeacher | None = None, total_steps: int = 10, labels: Sequence[str] = LABELS
) -> Training:
    student = silent_student(config.student, labels, config.seed)
    return Training(config, student, teacher, total_steps, torch.device("cpu"))


def trained_weights(training: Training) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in training.module.named_parameters() if value.requires_grad}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def full_training(total_steps: int = 5, **changes: Any) -> Training:
    """With everything that has state: batch norm, dropout, a dense head, a projector, a teacher, a moving average."""
    return make_training(recipe({**FAMILIES["refined"], **changes}, *FULL), random_teacher("conditional"), total_steps)
