"""A student that starts from a detector is given the pixels which that one's weights know; plain transformers is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from PIL import Image
from torch import Tensor

from pipelines.run.resolve import resolve
from qskd.config import Config, ResizeConfig
from qskd.datasets.batch import train_batch
from qskd.detectors import IMAGENET_MEAN, IMAGENET_STD, build_student, read_preprocessing, save_detector
from qskd.from_recipe import start_student
from qskd.training.step import Training

HYBRID: dict[str, Any] = {"family": "rt_detr", "feature_levels": 2, "queries": 20}
OTHER_MEAN, OTHER_STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An RT-DETR as it is published: its processor does not normalise, and its images are squares of a size of its own."""
    folder = tmp_path_factory.mktemp("source")
    detector = build_student(tiny.recipe(HYBRID).student, tiny.LABELS, 1)
    tiny.shake(detector, 1)
    detector.model.save_pretrained(folder)
    size = {"height": 128, "width": 128}
    hf.RTDetrImageProcessorPil(size=size, do_normalize=False).save_pretrained(folder)
    return str(folder)


def pixels_of_a_step(config: Config, training: Training, arrays: dict[str, np.ndarray]) -> Tensor:
    """What the student is given in a training step."""
    seen: list[Tensor] = []
    hook = training.student.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    training.train_step(train_batch(arrays))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("how", ["init", "inherit"])
def test_training_and_saving_give_the_student_its_checkpoints_pixels(source: str, how: str, tmp_path: Path) -> None:
    config = tiny.recipe(HYBRID | ({"init": source} if how == "init" else {"inherit": True}), f"teacher.path={source}")
    student, _ = start_student(config, tiny.LABELS)
    training = Training(config, student, None, 5, torch.device("cpu"))
    arrays = tiny.arrays((2, 1))
    processor = hf.AutoImageProcessor.from_pretrained(source, use_fast=False)
    expected = processor([Image.fromarray(image) for image in arrays["images"]], do_resize=False, return_tensors="pt")
    torch.testing.assert_close(pixels_of_a_step(config, training, arrays), expected["pixel_values"])
    save_detector(student, tmp_path / "saved", config.student.resize)
    saved = read_preprocessing(tmp_path / "saved")
    assert (saved.mean, saved.std, saved.resize.size) == ((0.0,) * 3, (1.0,) * 3, tiny.SIZE)
    assert student.preprocessing(config.student.resize) == saved


def test_whose_backbone_it_is_decides(source: str) -> None:
    """The other layers read the backbone's map, not pixels."""
    narrow = {"backbone": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}}
    config = tiny.recipe(HYBRID | narrow | {"inherit": True}, f"teacher.path={source}")
    student, said = start_student(config, tiny.LABELS)
    assert "parts of" in said
    assert (student.mean, student.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_of_a_teacher_of_another_family_the_backbones_pixels_are_taken(tmp_path: Path) -> None:
    teacher = tiny.random_teacher("conditional", slots=tiny.LABELS).detector
    save_detector(teacher, tmp_path, ResizeConfig(size=tiny.SIZE), mean=OTHER_MEAN, std=OTHER_STD)
    config = tiny.recipe({"family": "detr", "inherit": True}, f"teacher.path={tmp_path}")
    student, _ = start_student(config, tiny.LABELS)
    assert (student.mean, student.std) == (OTHER_MEAN, OTHER_STD)


def test_the_size_is_the_checkpoints_unless_the_recipe_says_another(source: str) -> None:
    own = Config.model_validate({"student": {"init": source}})
    assert resolve(own, "train").student.resize == ResizeConfig(mode="square", size=128)
    given = Config.model_validate({"student": {"init": source, "resize": {"size": 96}}})
    assert resolve(given, "train").student.resize.size == 96
    assert resolve(Config(), "train").student.resize == ResizeConfig()
