"""The configuration refuses what it does not know, says where, and survives YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qskd.config import Config, StudentConfig
from qskd.config.recipe import apply_overrides, build, flatten, load, parse_override, to_tree, to_yaml
from qskd.distillation.qskd.settings import QuerySelectionConfig
from qskd.errors import QskdError

FULL: dict[str, Any] = {
    "name": "run-1.a",
    "seed": 7,
    "data": {"train": "shards/train", "views": {"count": 3, "crop_probability": 0.25}},
    "student": {
        **{"family": "deformable_detr", "width": 64, "heads": 4, "feature_levels": 3},
        "backbone": {"layer_type": "bottleneck", "hidden_sizes": [64, 128, 256], "depths": [1, 2, 1]},
        "resize": {"mode": "shortest_edge", "size": 480, "longest": 640},
    },
    "teacher": {"path": "some/teacher", "resize": {"size": 512}, "class_map": {"cat": "17", "dog": "Dog"}},
    "distillation": {
        "selection": {"boundaries": [0.1, 0.5, 0.7], "band_weights": [0.0, 0.2, 0.5, 1.0], "relative": True},
        "features": {"query_weight": "quality", "background": 0.1},
        "predictions": {"pairing": "hungarian", "teacher_layers": "same_index"},
    },
    "training": {"learning_rate": 3e-4, "schedule": "cosine", "ema_decay": 0.999},
    "compute": {"workers": 2, "precision": "bfloat16"},
}


def problem(tree: dict[str, Any]) -> str:
    with pytest.raises(QskdError) as caught:
        build(tree, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"sed": 1}, ["unknown field sed", "did you mean seed?", "fields there are: name, seed"]),
        ({"training": {"epoch": 3}}, ["unknown field training.epoch ", "did you mean epochs?", "clip_norm"]),
        ({"data": {"views": {"flip_propability": 0.1}}}, ["data.views.flip_propability", "flip_probability?"]),
        ({"teacher": {"resize": {"sise": 3}}}, ["teacher.resize.sise", "did you mean size?"]),
        ({"distillation": {"selection": {"boundary": [0.5]}}}, ["did you mean boundaries?"]),
    ],
)
def test_an_unknown_field_is_named_with_the_one_that_was_meant(tree: dict[str, Any], words: list[str]) -> None:
    text = problem(tree)
    for word in words:
        assert word in text


def test_an_unknown_field_like_no_other_gets_no_guess() -> None:
    text = problem({"training": {"zzz": 3}})
    assert "unknown field training.zzz\n" in text
    assert "did you mean" not in text
    assert "fields there are: epochs, max_steps, batch_size" in text


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"seed": "many"}, ["seed = 'many'", "integer"]),
        ({"seed": 1.5}, ["seed = 1.5"]),
        ({"training": {"learning_rate": -1.0}}, ["training.learning_rate = -1.0", "greater than 0"]),
        ({"training": {"schedule": "linear"}}, ["training.schedule = 'linear'", "'cosine', 'step' or 'constant'"]),
        ({"student": {"backbone": {"depths": [2, 0]}}}, ["student.backbone.depths.1 = 0"]),
        ({"student": 5}, ["student = 5"]),
        ({"tracking": None}, ["tracking = None", "give it a field, or leave tracking out"]),
        ({"teacher": {"class_map": None}}, ["class_map = None", "leave teacher.class_map out"]),
        ({"student": {"dropout": 1.5}}, ["student.dropout = 1.5"]),
        ({"name": "../up"}, ["name = '../up'"]),
        ({"training": {"epochs": 0}, "compute": {"workers": 0}}, ["training.epochs = 0", "compute.workers = 0"]),
        ({"teacher": {"class_map": {"cat": 17}}}, ["teacher.class_map.cat = 17"]),
        ({"training": {"ema_decay": True}}, ["training.ema_decay = True", "not true or false"]),
        ({"training": {"epochs": True}}, ["training.epochs = True", "not true or false"]),
        ({"detection": {"denoising_queries": True}}, ["detection.denoising_queries = True", "not true or false"]),
        ({"detection": {"fgl_weight": True}}, ["detection.fgl_weight = True", "not true or false"]),
        ({"training": {"backbone_layer_decay": False}}, ["training.backbone_layer_decay = False", "not true or false"]),
        ({"training": {"clip_norm": float("nan")}}, ["training.clip_norm = nan"]),
        ({"training": {"learning_rate": float("inf")}}, ["training.learning_rate = inf", "finite"]),
        ({"student": {"box_refinement": "maybe"}}, ["student.box_refinement = 'maybe'"]),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(tree: dict[str, Any], words: list[str]) -> None:
    text = problem(tree)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"boundaries": [0.7, 0.5], "band_weights": [0, 1, 1]}, "boundaries [0.7, 0.5] must ascend strictly"),
        ({"boundaries": [0.5, 0.5], "band_weights": [0, 1, 1]}, "must ascend strictly"),
        ({"boundaries": [0.5, 0.7], "band_weights": [0, 1]}, "2 boundaries make 3 bands, but band_weights has 2"),
        ({"boundaries": [1.5], "band_weights": [0, 1]}, "boundaries.0 = 1.5"),
        ({"boundaries": [-1.0], "band_weights": [0, 1]}, "boundaries.0 = -1.0"),
        ({"boundaries": [0.5], "band_weights": [0, -1]}, "band_weights.1 = -1"),
    ],
)
def test_impossible_groups_of_queries_are_refused(selection: dict[str, Any], words: str) -> None:
    assert words in problem({"distillation": {"selection": selection}})


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"width": 100, "heads": 8}, "width 100 is not divisible by heads 8"),
        ({"width": 6, "heads": 3}, "width 6 must be a multiple of 4"),
        ({"width": 48, "heads": 4, "family": "deformable_detr"}, "width 48 is not a multiple of 32"),
        ({"decoder_layers": 1, "family": "deformable_detr"}, "deformable_detr needs 2 decoder_layers or more"),
        ({"backbone": {"depths": [1, 1]}}, "hidden_sizes has 4 stages but depths has 2"),
        ({"family": "yolo"}, "student.family = 'yolo'"),
    ],
)
def test_a_student_that_cannot_be_built_is_refused(student: dict[str, Any], words: str) -> None:
    assert words in problem({"student": student})


def test_defaults_are_valid_and_a_recipe_changes_only_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("training: {epochs: 3}\n")
    changed, default = flatten(to_tree(load(tmp_path / "one.yaml"))), flatten(to_tree(Config()))
    assert {key: value for key, value in changed.items() if value != default[key]} == {"training.epochs": 3}
    assert load(None) == Config()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1e-4", 1e-4),
        ("a.b=1E5", 1e5),
        ("a.b=-2.5e-3", -2.5e-3),
        ("a.b=3", 3),
        ("a.b=0.5", 0.5),
        ("a.b=[0.5, 0.7]", [0.5, 0.7]),
        ("a.b=[]", []),
        ("a.b=true", True),
        ("a.b=false", False),
        ("a.b=null", None),
        ("a.b=adam", "adam"),
        ("a.b='3'", "3"),
        ("a.b='1e-4'", "1e-4"),
        ("a.b=1e", "1e"),
        ("a.b=infinity", "infinity"),
        ("a.b=", ""),
        ("a.b=s3://bucket/x?y=z", "s3://bucket/x?y=z"),
        ("a.b={cat: '17'}", {"cat": "17"}),
        (" a.b =1", 1),
    ],
)
def test_an_override_s_value_is_what_it_looks_like(text: str, value: Any) -> None:
    path, found = parse_override(text)
    assert path == ["a", "b"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["a.b", "", "=3", " =3"])
def test_an_override_without_a_field_or_a_value_is_refused(text: str) -> None:
    with pytest.raises(QskdError, match="--set"):
        parse_override(text)


def test_an_override_that_is_not_yaml_is_refused_as_one() -> None:
    with pytest.raises(QskdError, match=r"--set training.epochs=\[3"):
        load(None, ["training.epochs=[3"])


def test_overrides_win_over_the_recipe_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {epochs: 3, learning_rate: 0.1}\nseed: 1\n")
    config = load(path, ["training.epochs=4", "training.epochs=5", "student.queries=9", "training.clip_norm=1e-2"])
    assert (config.training.epochs, config.training.learning_rate, config.training.clip_norm) == (5, 0.1, 0.01)
    assert (config.seed, config.student.queries) == (1, 9)
    assert load(None, ["distillation.selection.boundaries=[-0.5]"]).distillation.selection.boundaries == (-0.5,)
    assert load(None, ["teacher.resize.size=100"]).teacher.resize is not None


def test_a_recipe_may_write_a_number_as_1e_4(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {learning_rate: 2e-4, weight_decay: 1.5E-3}\n")
    assert (load(path).training.learning_rate, load(path).training.weight_decay) == (2e-4, 1.5e-3)


def test_overrides_leave_the_tree_they_are_given_alone() -> None:
    tree = {"training": {"epochs": 3}}
    assert apply_overrides(tree, ["training.epochs=4"]) == {"training": {"epochs": 4}}
    assert tree == {"training": {"epochs": 3}}


def test_an_override_reaches_into_a_group_that_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: {resize: null}\nstudent: {quantization: null}\ntraining:\n")
    made = load(path, ["teacher.resize.size=640", "student.quantization.bits=w8a8", "training.epochs=3"])
    assert made.teacher.resize is not None
    assert made.teacher.resize.size == 640
    assert made.student.quantization is not None
    assert made.training.epochs == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=4", "did you mean epochs?"),
        ("seed.x=4", "seed is not a group of fields"),
        ("training=4", "training = 4"),
        ("training.epochs.x=4", "epochs is not a group"),
        ("training.epochs=four", "training.epochs = 'four'"),
    ],
)
def test_an_override_that_meets_no_field_is_refused(override: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\ntraining: {epochs: 3}\n")
    with pytest.raises(QskdError) as caught:
        load(path, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize("tree", [{}, FULL])
def test_a_configuration_survives_yaml_and_json(tree: dict[str, Any], tmp_path: Path) -> None:
    config = build(tree)
    assert build(to_tree(config)) == config
    assert build(json.loads(json.dumps(to_tree(config)))) == config
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "resolved.yaml") == config
    assert yaml.safe_load(to_yaml(config)) == to_tree(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "a list at the top"),
        ("just words", "a str at the top"),
        ("a: [1", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_recipe_that_is_no_mapping_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(QskdError) as caught:
        load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(QskdError, match=r"none\.yaml: no such recipe"):
        load(tmp_path / "none.yaml")


def test_a_folder_or_a_file_that_is_no_text_is_refused_as_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x80\x81")
    for path in (tmp_path, tmp_path / "weights.yaml"):
        with pytest.raises(QskdError) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load(tmp_path / "empty.yaml") == Config()


def test_a_configuration_cannot_be_changed() -> None:
    config = build(FULL)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.training.epochs = 3
    assert isinstance(config.distillation.selection.boundaries, tuple)


def test_a_recipe_s_width_and_heads_may_change_together() -> None:
    assert load(None, ["student.width=96", "student.heads=6"]).student == StudentConfig(width=96, heads=6)


@pytest.mark.parametrize(
    ("selection", "floor"),
    [
        ({}, 0.5),
        ({"boundaries": (0.3, 0.6), "band_weights": (0.0, 0.5, 1.0)}, 0.3),
        ({"boundaries": (0.3, 0.6), "band_weights": (0.0, 0.0, 1.0)}, 0.6),
        ({"boundaries": (0.3, 0.6), "band_weights": (0.0, 1.0, 0.0)}, 0.3),
        ({"boundaries": (0.3, 0.6), "band_weights": (0.1, 0.0, 0.0)}, -1.0),
        ({"boundaries": (0.3, 0.6), "band_weights": (0.0, 0.0, 0.0)}, 1.0),
        ({"relative": True}, -1.0),
        ({"boundaries": (), "band_weights": (1.0,)}, -1.0),
        ({"boundaries": (), "band_weights": (0.0,)}, 1.0),
        ({"boundaries": (-0.5,)}, -0.5),
    ],
)
def test_no_query_below_the_floor_can_be_kept(selection: dict[str, Any], floor: float) -> None:
    assert QuerySelectionConfig(**selection).floor == floor


def test_flatten_gives_every_leaf_its_path() -> None:
    tree = {"a": {"b": {"c": 1}, "d": [1, {"x": 2}]}, "e": {}, "f": None}
    assert flatten(tree) == {"a.b.c": 1, "a.d": [1, {"x": 2}], "e": {}, "f": None}
    assert flatten({}) == {}
    flat = flatten(to_tree(build(FULL)))
    overrides = [f"{path}={json.dumps(value)}" for path, value in flat.items()]
    assert load(None, overrides) == build(FULL)  # every leaf is an override, and together they are the whole


def test_an_elastic_range_of_workers_is_one() -> None:
    assert build({"compute": {"workers": 4, "min_workers": 4}}).compute.min_workers == 4
    with pytest.raises(QskdError, match="min_workers 5 is more than workers 4"):
        build({"compute": {"workers": 4, "min_workers": 5}})
