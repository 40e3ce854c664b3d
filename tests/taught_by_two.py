"""Two teachers, of cats and dogs and of owls, and trainings with them that workers are compared by: asked in every step, and from
one cache that all workers read."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from test_loader import Pictures
from tiny import FAMILIES, make_training, random_teacher, recipe
from torch import Tensor

from benchmarks.local_cache import make_cache
from qskd.config import Config
from qskd.datasets.batch import train_batch
from qskd.datasets.classes import NOBODY
from qskd.datasets.loader import BatchLoader
from qskd.datasets.order.schedule import split
from qskd.datasets.shards import write_shards
from qskd.detectors import Detector
from qskd.distillation.method import teacher_needs
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import columns_for
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.several.together import TeachersTogether

# Rows of each global batch, by number of objects n % 4; the third batch leaves the first of two workers nothing.
CACHED_ROWS = ((1, 2, 4, 7), (0, 4, 3), (6,), (5, 1, 8, 11), (9, 10))
ROWS_PER_SHARD = 6


@torch.no_grad()
def speak_up(detector: Detector, by: float) -> None:
    """Scores that are far apart, and higher."""
    for name, parameter in detector.named_parameters():
        if "class" in name and name.endswith("bias"):
            parameter.add_(by)
        elif "class" in name:
            parameter.mul_(5.0)


@functools.cache
def two_teachers() -> TeachersTogether:
    """Of one map and of two. The first is half sure of all it says, the second sure of some."""
    members = []
    for family, slots, seed, louder in (
        ("conditional", (3, 5, NOBODY), 3, 1.0),
        ("refined", (NOBODY, NOBODY, 1), 4, 2.4),
    ):
        one = random_teacher(family, seed=seed)
        speak_up(one.detector, louder)
        members.append(OnlineTeacher(one.detector, slots, one.preprocessing))
    return TeachersTogether(members)


def cached_config(folder: Path | str) -> Config:
    """With crops that are derived: some of a teacher's queries are gone from an image, now and then all."""
    views = {"derived": "flip_and_crop", "crop_probability": 0.7, "crop_min_scale": 0.2, "seed": 3}
    cache = {"path": f"{folder}/cache", "attention_giou_floor": -0.9, "batch_size": 4}
    student = {**FAMILIES["refined"], "backbone_norm": "frozen"}
    return recipe(student, data={"train": f"{folder}/shards", "views": views}, teacher={"cache": cache})


def make_cache_of_two(folder: Path) -> None:
    write_shards(Pictures(12), f"{folder}/shards", rows_per_shard=ROWS_PER_SHARD)
    teacher = two_teachers()
    make_cache(cached_config(folder), teacher, teacher.resize)


def from_cache_of_two(folder: Path | str, world_size: int, rank: int) -> dict[str, Tensor]:
    """Every step's terms as "step.TERM", and the state after the first and the last."""
    config = cached_config(folder)
    reader = TeacherCacheReader(config.teacher.cache.path, columns_for(teacher_needs(config.distillation)))
    loader = BatchLoader(config.data.train, "", config.data.views, config.student.resize, teacher_cache=reader)
    teacher = CachedTeacher(reader.manifest.sizes, min_visible=config.data.views.min_visible)
    training = make_training(config, teacher, len(CACHED_ROWS))
    found: dict[str, Tensor] = {}
    for step, numbers in enumerate(CACHED_ROWS):
        rows = np.array([(*divmod(number, ROWS_PER_SHARD), step) for number in numbers], np.int32)
        values = training.train_step(train_batch(loader.load("train", split(rows, world_size, rank))))
        found |= {f"{step}.{term}": value.reshape(1).clone() for term, value in values.items()}
        if step == 0:
            found |= {f"first/{key}": value for key, value in training.state().items()}
    return found | {f"last/{key}": value for key, value in training.state().items()}
