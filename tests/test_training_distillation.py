"""Distillation end to end, on photographs where there are some: every term falls, hard negatives are aligned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES, LABELS, STUDENT, batch_of, make_training, random_teacher, recipe

from pipelines.feed.stream import StreamConfig, local_stream
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.datasets.coco import CocoDataset, read_coco
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.schedule import Schedule
from qskd.datasets.samples import Sample
from qskd.datasets.shards import write_shards
from qskd.teacher.online import OnlineTeacher
from qskd.training.step import Training

REAL = Path(__file__).parents[2] / "shared" / "coco-sample"


class FirstImages:
    """The first images of a dataset that have at most so many objects."""

    def __init__(self, dataset: CocoDataset, count: int, most_objects: int) -> None:
        self.source, self.source_sha256 = dataset.source, dataset.source_sha256
        self.categories, self.problems = dataset.categories, dataset.problems
        fitting = (sample for sample in dataset.samples() if 1 <= len(sample.category_ids) <= most_objects)
        self.chosen = list(itertools.islice(fitting, count))

    def __len__(self) -> int:
        return len(self.chosen)

    def samples(self) -> Iterator[Sample]:
        return iter(self.chosen)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not REAL.is_dir():
        pytest.skip(f"the COCO sample is not at {REAL}")
    folder = str(tmp_path_factory.mktemp("photographs"))
    dataset = read_coco(REAL / "annotations" / "instances_val2017.json", REAL / "val2017")
    write_shards(FirstImages(dataset, 8, 6), folder)
    return folder


def coco_slots(labels: tuple[str, ...]) -> list[str]:
    """91 slots as in COCO's heads, with the dataset's classes in another order and "N/A" between them."""
    slots = ["N/A"] * 91
    for index, label in enumerate(reversed(labels)):
        slots[index + 1 + index // 9] = label
    return slots


def photograph_batches(uri: str, epochs: int) -> list[TrainBatch]:
    """All eight photographs each step, for the teacher at another size."""
    schedule = Schedule(load_manifest(uri).shard_rows, (), 0, epochs, batch_size=8, window_images=8)
    stream = StreamConfig(uri, "", schedule, ViewConfig(), ResizeConfig(size=64), ResizeConfig(size=80))
    return [train_batch(share.arrays) for share in local_stream(stream)]


FAST = (
    *("training.learning_rate=2e-3", "training.backbone_learning_rate_scale=1.0", "training.clip_norm=1.0"),
    *("training.schedule=constant", "detection.dense_weight=1.0"),
)


def teach(teacher: OnlineTeacher, batches: list[TrainBatch], labels: tuple[str, ...]) -> None:
    """Train it on the photographs, in its own class order, so that it knows something."""
    config = recipe(None, *FAST, "distillation.method=none")
    teacher.detector.requires_grad_(True)
    training = Training(config, teacher.detector, None, len(batches), torch.device("cpu"))
    for batch in batches:
        targets = replace(batch.targets, labels=teacher.get_buffer("class_slots")[batch.targets.labels])
        training.train_step(replace(batch, images=batch.teacher_images, sizes=batch.teacher_sizes, targets=targets))
    training.check_finite()
    teacher.detector.eval().requires_grad_(False)


@pytest.mark.parametrize(("teacher_family", "student_family"), [("conditional", "refined"), ("refined", "conditional")])
def test_distillation_lowers_every_term(photographs: str, teacher_family: str, student_family: str) -> None:
    labels = load_manifest(photographs).labels
    slots = coco_slots(labels)
    assert slots.count("N/A") == 11
    teacher = random_teacher(teacher_family, labels, slots)
    assert teacher.detector.num_queries != STUDENT["queries"]
    assert teacher.facts.channels[0] != STUDENT["width"]
    assert teacher.get_buffer("class_slots").tolist() == [slots.index(label) for label in labels]
    batches = photograph_batches(photographs, 30)
    teach(teacher, batches, labels)
    training = make_training(recipe(FAMILIES[student_family], *FAST), teacher, len(batches), labels)
    rows = [training.train_step(batch) for batch in batches]
    training.check_finite()
    assert {"agfd", "lapd_class", "lapd_l1", "lapd_giou", "class_0", "l1", "dense_giou"} <= rows[0].keys()
    first, last = (
        {name: float(np.mean([row[name].item() for row in part])) for name in rows[0]} for part in (rows[:5], rows[-5:])
    )
    assert {name: (first[name], last[name]) for name in first if not 0 <= last[name] < first[name]} == {}


def test_a_teacher_s_hard_negatives_are_aligned_beyond_its_positives() -> None:
    counted = {}
    for name, boundaries in (("with", [-0.9]), ("without", [0.99])):
        selection = {"boundaries": boundaries, "band_weights": [0.0, 1.0]}
        config = recipe(None, distillation={"selection": selection})
        training = make_training(config, random_teacher())
        batch = batch_of(2, 1)
        record = training._ask_teacher(batch)
        terms = training.module.forward(batch.images, batch.sizes, batch.targets, record)
        counted[name] = terms["lapd_class"].count.item()
    assert counted["without"] == 3  # the positives alone
    assert counted["with"] > 6


def test_labels_of_the_student_are_the_dataset_s() -> None:
    assert make_training(recipe(), random_teacher()).student.labels == LABELS
