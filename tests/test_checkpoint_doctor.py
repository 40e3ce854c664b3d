"""`qskd doctor --model` says what can be done with a checkpoint, and what is missing."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from checkpoints import change, make
from rich.console import Console
from typer.testing import CliRunner

from pipelines.caching.plan import bytes_text
from pipelines.cli import app
from pipelines.health.checkpoint import checkpoint_doctor, model_checks
from qskd.config import FACTS
from qskd.detectors import load_detector, read_preprocessing
from qskd.structures import TeacherNeeds
from qskd.teacher.columns.table import encode
from qskd.teacher.online import OnlineTeacher

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["conditional_detr", "d_fine", "deimv2", "lw_detr", "rf_detr"])
def test_family_sizes_classes_and_bytes_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / "own")
    said = {check.name: check for check in model_checks(str(folder))}
    detector = load_detector(folder)
    assert FACTS[family].title in said["family"].found
    assert f"32 channels at stride {detector.memory_strides[0]}" in said["family"].found
    assert "2 decoder layers, 6 queries" in said["size"].found
    assert said["classes"].found == "3: cat, dog, owl"
    assert said["images"].found == "64 x 64"
    assert said["as a student"].found.startswith("yes, of any classes")
    assert (said["as a student"].status == "note") == bool(FACTS[family].missing)
    images = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    teacher = OnlineTeacher(detector, (0, 1, 2), read_preprocessing(folder))
    record = teacher(images, torch.tensor([[64, 64]]), TeacherNeeds(memory=True, attention=True))
    (row,) = encode(record, [1], "int8")
    attention = row.attention.nbytes + row.attention_queries.nbytes + row.attention_scale.nbytes
    assert f"a cached image takes {bytes_text(row.nbytes - attention)} in int8" in said["as a teacher"].found
    assert f"{bytes_text(attention / 6)} for each query" in said["as a teacher"].found
    several = len(detector.memory_channels) > 1
    assert ("the coarsest alone (teacher.levels: [1])" in said["as a teacher"].found) == several


def test_what_cannot_be_used_is_said_with_what_to_do(tmp_path: Path) -> None:
    folder = make("rt_detr", tmp_path / "own")
    change(folder, {"size": {"height": 60, "width": 60}}, "preprocessor_config.json")
    said = {check.name: check for check in model_checks(str(folder))}
    assert said["images"].status == said["as a teacher"].status == "problem"
    assert "60 x 60 pixels, expected height and width divisible by 8" in said["images"].found
    assert "resize" in said["images"].remedy
    change(folder, {"model_type": "owlvit"})
    (only,) = model_checks(str(folder))
    assert only.status == "problem"
    assert "'owlvit'" in only.found
    (gone,) = model_checks(str(tmp_path / "nowhere"))
    assert "no such folder" in gone.found
    hf.ResNetBackbone(hf.ResNetConfig(**{**tiny.STUDENT["backbone"], "layer_type": "basic"})).save_pretrained(
        tmp_path / "resnet"
    )
    (backbone,) = model_checks(str(tmp_path / "resnet"))
    assert backbone.status == "note"
    assert "student: {backbone: {type: resnet, init:" in backbone.remedy


def test_the_command_prints_it_and_its_exit_code_tells_of_problems(tmp_path: Path) -> None:
    folder = make("detr", tmp_path / "own")
    done = CliRunner().invoke(app, ["doctor", "--model", str(folder)])
    assert done.exit_code == 0, done.output
    assert re.search(r"as a teacher\s+runs; a cached", done.output)
    printed = io.StringIO()
    assert checkpoint_doctor(str(tmp_path / "nowhere"), Console(file=printed, width=200)) == 1
    assert "1 problem" in printed.getvalue()
