"""`student.size`: what it sets, what goes before it, and that all sizes of all families can be built and searched."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from benchmarks.student_sizes import cell
from qskd.config import FACTS, BackboneConfig, ResizeConfig, StudentConfig
from qskd.config.recipe import build, load, to_tree
from qskd.config.student_sizes import SIZES, sizes_of
from qskd.detectors import FAMILIES, describe_student
from qskd.detectors.student import _unlearned
from qskd.errors import QskdError
from search_spaces import SearchSpace

torch.set_num_threads(1)


@pytest.mark.parametrize(("size", "family"), itertools.product(["nano", "large"], FAMILIES))
def test_the_ends_of_the_dial_are_built_with_what_they_say_in_every_family(size: str, family: str) -> None:
    config = StudentConfig.model_validate({"size": size, "family": family})
    with torch.device("meta"):
        made = _unlearned(config, ["a", "b"]).config
    found = FAMILIES[family].sizes(made)
    assert found == {name: getattr(config, name) for name in found}
    backbone, wanted = made.backbone_config, sizes_of(size, family)["backbone"]
    if FACTS[family].vit:
        assert (backbone.hidden_size, backbone.num_hidden_layers) == (wanted["hidden_sizes"][0], sum(wanted["depths"]))
    else:
        assert list(backbone.depths) == wanted["depths"]


def test_unset_is_as_if_there_were_no_dial() -> None:
    assert StudentConfig(size="") == StudentConfig()
    assert StudentConfig().width == 256


def test_a_given_field_goes_before_the_dial_down_to_parts_of_a_group() -> None:
    config = load(None, ["student.size=nano", "student.width=96", "student.backbone.depths=[2,1,1,1]"]).student
    assert (config.width, config.backbone.depths) == (96, (2, 1, 1, 1))
    assert (config.heads, config.backbone.hidden_sizes, config.resize.size) == (4, (32, 64, 128, 256), 320)
    built = StudentConfig(size="nano", backbone=BackboneConfig(depths=(2, 1, 1, 1)), resize=ResizeConfig(size=256))
    assert (built.backbone, built.resize.size, built.width) == (config.backbone, 256, 64)


def test_what_is_stored_is_what_was_resolved(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("student: {family: d_fine, size: micro, queries: 50}\n")
    config = load(recipe)
    assert (config.student.size, config.student.queries, config.student.feature_levels) == ("", 50, 3)
    assert build(to_tree(config)) == config


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"size": "tiny"}, "'nano', 'micro'"),
        ({"size": "nano", "init": "somewhere"}, "has that checkpoint's sizes"),
        (to_tree(load(None))["student"] | {"size": "small"}, "sets nothing"),
    ],
)
def test_a_dial_without_effect_is_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        StudentConfig.model_validate(given)
    with pytest.raises(QskdError, match=complaint):
        build({"student": given})


@pytest.mark.parametrize(
    ("size", "family"), itertools.product(SIZES, ["detr", "deformable_detr", "d_fine", "deimv2", "lw_detr"])
)
def test_the_architecture_space_searches_about_every_size(size: str, family: str) -> None:
    space = SearchSpace(["student_architecture"], build({"student": {"size": size, "family": family}}))
    sampled = {space.config(overrides).student.model_dump_json() for overrides in space.samples(30, seed=0)}
    assert len(sampled) > 20  # all of them valid


@pytest.mark.parametrize("family", ["conditional_detr", "d_fine", "lw_detr"])
def test_the_table_in_the_documentation_is_the_programs(family: str) -> None:
    table = (Path(__file__).parents[1] / "docs" / "students.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith(f"| `{family}`"))
    assert row.split("|")[2].strip() == cell("nano", family)


def test_the_dry_run_says_the_sizes_and_what_they_come_to() -> None:
    said = describe_student(load(None, ["student.size=nano", "student.queries=30"]).student, 3)
    assert "resnet of 1-1-1-1 basic layers of 32-64-128-256 channels, width 64, 1 + 2 layers" in said
    assert "30 queries, images 320 x 320" in said
    assert re.search(r"\n  1\.\d\d M parameters, 1\.\d\d GFLOPs an image", said)
    for bits, told in (("w8a8", "from 50% of the training on"), ("{bits: w8a8, rest_from: 7}", "from step 7 on")):
        fields = ["student.family=detr", f"student.quantization={bits}"]
        assert f", w8a8 (all but its backbone {told}; not evaluated before)" in describe_student(
            load(None, fields).student, 3
        )
    fields = ["student.family=detr", "student.inherit=true", "student.quantization=w8a8"]
    assert ", w8a8, images" in describe_student(load(None, fields).student, 3)
    unreachable = describe_student(StudentConfig(init="./nowhere"), 3)
    assert "not known: ./nowhere: no such folder" in unreachable
