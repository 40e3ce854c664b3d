"""What the families' own recipes say of parameters: rates, weight decay, frozen stages, dropout. A run of before keeps its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import STUDENT, arrays, batch_of, make_training, own, recipe, silent_student
from torch import nn
from transformers import ResNetBackbone, ResNetConfig

from pipelines.run.folder import Folder
from pipelines.run.guards import BEGUN_BEFORE, as_begun, check_same_run
from qskd.config import FACTS, Config, StudentConfig
from qskd.config.recipe import replace_fields, to_tree
from qskd.datasets.batch import train_batch
from qskd.detectors import inherit, load_detector, save_detector
from qskd.errors import QskdError
from qskd.families.table import FAMILIES
from qskd.training.groups import parameter_groups
from qskd.training.step import Training

LABELS = ("cat", "dog")


def config_of(family: str, *overrides: str) -> Config:
    return recipe(own(family), *overrides)


def groups_of(config: Config) -> tuple[Any, list[dict[str, Any]]]:
    training = make_training(config)
    names = {id(parameter): name for name, parameter in training.module.named_parameters()}
    made = parameter_groups(training.module, config.training)
    return training, [{**group, "names": {names[id(each)] for each in group["params"]}} for group in made]


@pytest.mark.parametrize("family", FACTS)
def test_every_trained_parameter_is_in_one_group_and_the_first_learns_at_the_full_rate(family: str) -> None:
    training, groups = groups_of(config_of(family))
    listed = [id(each) for group in groups for each in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(each) for each in training.module.parameters() if each.requires_grad}
    assert groups[0]["scale"] == 1.0
    assert "weight_decay" not in groups[0]
    training.train_step(batch_of(2, 1))  # the optimizer takes them
    assert training.learning_rate == training.config.training.learning_rate


def test_deformable_detrs_offsets_and_reference_points_learn_at_a_tenth() -> None:
    config = config_of("deformable_detr", "training.backbone_learning_rate_scale=0.5")
    training, groups = groups_of(config)
    (slow,) = [group for group in groups if group["scale"] == 0.1]
    places = [name for name in slow["names"] if "sampling_offsets" in name or "reference_points" in name]
    assert (
        len(places) == len(slow["names"]) == 2 * (1 + 2 + 1)
    )  # weights and biases of an encoder layer, two decoder layers...
    assert [group["scale"] for group in groups] == [1.0, 0.5, 0.1]
    assert not any("weight_decay" in group for group in groups)
    training.train_step(batch_of(1))
    rates = {group["scale"]: group["lr"] for group in training.optimizer.param_groups}
    assert rates[0.1] == pytest.approx(0.1 * rates[1.0])
    _, all_alike = groups_of(config_of("deformable_detr", "training.sampling_learning_rate_scale=1.0"))
    assert [group["scale"] for group in all_alike] == [1.0, 0.1]  # of which the latter is the backbone's


def test_what_was_inherited_learns_at_a_rate_of_its_own_the_backbone_at_its_own() -> None:
    config = config_of("deformable_detr", "training.inherited_learning_rate_scale=0.25", "distillation.method=none")
    student = silent_student(config.student, LABELS, 1)
    inherit(student, silent_student(config.student, LABELS, 2), (0, 1))  # all of it
    training = Training(config, student, None, 10, torch.device("cpu"))
    scales = {id(each): group["scale"] for group in training.optimizer.param_groups for each in group["params"]}
    named = {name: scales[id(each)] for name, each in student.named_parameters() if each.requires_grad}
    for name, scale in named.items():
        own = 0.1 if "backbone" in name else 0.025 if "sampling_offsets" in name or "reference_points" in name else 0.25
        assert scale == pytest.approx(own), name
    training.train_step(batch_of(2, 1))
    assert training.learning_rate == config.training.learning_rate  # of the first group, though there is nothing in it
    _, alike = groups_of(config_of("deformable_detr", "training.inherited_learning_rate_scale=0.25"))
    assert {group["scale"] for group in alike} == {1.0, 0.1}  # without a teacher's layers it changes nothing


@pytest.mark.parametrize("kind", ["resnet", "rt_detr_resnet"])
def test_a_vits_decay_by_layer_leaves_a_network_of_stages_alone(kind: str) -> None:
    tree = {**own("rt_detr"), "backbone": {**STUDENT["backbone"], "type": kind}}
    _, groups = groups_of(recipe(tree, "training.backbone_layer_decay=0.5"))
    assert {group["scale"] for group in groups} == {1.0, 0.1}


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_norms_and_biases_have_no_decay_where_the_familys_recipe_has_none(family: str) -> None:
    training, groups = groups_of(config_of(family))
    free = set[str]().union(*(group["names"] for group in groups if group.get("weight_decay") == 0.0))
    expected = {
        name
        for name, parameter in training.module.named_parameters()
        if parameter.dim() <= 1 and parameter.requires_grad  # all that is one-dimensional is a norm's or a bias
    }
    if family == "rt_detr_v2":
        norms = {name for name, part in training.module.named_modules() if "Norm" in type(part).__name__}
        expected = {name for name in expected if name.rpartition(".")[0] in norms}
    assert free == expected
    assert len(expected) > 40
    _, decayed = groups_of(config_of(family, "training.undecayed=nothing"))
    assert not any("weight_decay" in group for group in decayed)


# --- frozen stages ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    sizes = {**STUDENT["backbone"], "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1]}
    torch.manual_seed(0)
    ResNetBackbone(ResNetConfig(**sizes, layer_type="basic")).save_pretrained(folder)
    return folder


def student_of(family: str, resnet: Path | None, **changes: Any) -> Any:
    backbone = {**STUDENT["backbone"], "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "init": str(resnet or "")}
    levels = 3 if FACTS[family].hybrid else 1
    tree = {**STUDENT, "family": family, "backbone": backbone, "feature_levels": levels, **changes}
    return silent_student(StudentConfig.model_validate(tree), LABELS, 0)


def frozen_parts(student: Any) -> set[str]:
    """Of "embedder" and the stages, those without a parameter that learns; of none a part may learn."""
    model = FAMILIES[student.family].trunk(student.model)
    parts = {"embedder": model.embedder, **{f"stage{i}": stage for i, stage in enumerate(model.encoder.stages, 1)}}
    found = set()
    for name, part in parts.items():
        learns = {each.requires_grad for each in part.parameters()}
        norms = {isinstance(each, nn.BatchNorm2d) for each in part.modules() if "Norm" in type(each).__name__}
        assert len(learns | norms) == 1, (name, learns, norms)  # statistics move where weights do
        found |= set() if True in learns else {name}
    return found


@pytest.mark.parametrize("family", [family for family, facts in FACTS.items() if not facts.vit])
def test_a_pretrained_backbone_keeps_its_stem_and_first_stage_where_the_familys_authors_keep_them(
    family: str, resnet: Path
) -> None:
    own = {"embedder", "stage1"} if FACTS[family].frozen_stages else set()
    assert frozen_parts(student_of(family, resnet)) == own
    assert frozen_parts(student_of(family, resnet, frozen_stages=0)) == set()
    assert frozen_parts(student_of(family, resnet, frozen_stages=2)) == {"embedder", "stage1", "stage2"}
    assert frozen_parts(student_of(family, None)) == set()  # random weights are not worth keeping
    assert frozen_parts(student_of(family, resnet, inherit=True)) == set()


def test_frozen_stages_stay_to_the_last_bit_and_the_rest_learns(resnet: Path) -> None:
    backbone = {**STUDENT["backbone"], "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "init": str(resnet)}
    training = make_training(recipe({"family": "conditional_detr", "backbone": backbone}, "detection.dense_weight=1.0"))
    before = {name: value.clone() for name, value in training.student.state_dict().items()}
    training.train_step(batch_of(2, 1))
    after = training.student.state_dict()
    changed = {name for name in before if "backbone" in name and not before[name].equal(after[name])}
    assert not [name for name in changed if ".model.embedder." in name or "stages.0." in name]
    assert [name for name in changed if "stages.1." in name and "running_mean" in name]
    assert [name for name in changed if "stages.2." in name and "convolution" in name]


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_norms_of_a_checkpoint_that_keeps_batch_norms_are_frozen_where_the_recipe_freezes_them(
    family: str, tmp_path: Path
) -> None:
    model = silent_student(config_of(family).student, LABELS, 0).model
    model.config.freeze_backbone_batch_norms = False
    source = FAMILIES[family].model_class(model.config)
    source.load_state_dict(model.state_dict())
    for name, value in source.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    source.save_pretrained(tmp_path / "source")
    FAMILIES[family].processor_class(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "source")
    for field, moves in (("frozen_stages", True), ("backbone_norm", False), ("train_backbone", False)):
        given = {"frozen_stages": 1, "backbone_norm": "frozen", "train_backbone": False}[field]
        training = make_training(
            recipe({"init": str(tmp_path / "source"), field: given}, "distillation.method=none"), labels=LABELS
        )
        before = {name: value.clone() for name, value in training.student.backbone.state_dict().items()}
        training.train_step(train_batch(arrays((2, 1), classes=2)))
        after = training.student.backbone.state_dict()
        norms = {name for name in before if "norm" in name and not before[name].equal(after[name])}
        assert not [name for name in norms if "stages.0." in name or "embedder." in name]
        assert bool(norms) is moves
    save_detector(training.student.eval(), tmp_path / "made", training.config.student.resize)
    pixels, mask = torch.rand(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        said, again = (each(pixels, mask).logits for each in (training.student, load_detector(tmp_path / "made")))
    torch.testing.assert_close(again, said, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "dropout"), [("detr", 0.1), ("dab-detr", 0.0), ("rt_detr", 0.0), ("deformable_detr", 0.1)]
)
def test_dropout_is_the_familys_own_unless_it_is_given(family: str, dropout: float) -> None:
    assert student_of(family, None, dropout=None).model.config.dropout == dropout
    assert student_of(family, None, dropout=0.3).model.config.dropout == 0.3


# --- runs of before ---------------------------------------------------------------------------------------------------
def written(config: Config, old: bool) -> Folder:
    """A run's folder with the record that today's qskd, or one of before these fields, leaves."""
    tree, folder = to_tree(config), Folder(config)
    if old:
        tree["student"]["dropout"] = 0.0
        tree["data"]["views"]["derived"] = "none"
        del tree["student"]["frozen_stages"], tree["training"]["sampling_learning_rate_scale"]
        del tree["training"]["undecayed"], tree["training"]["patience"], tree["training"]["result"]
    folder.write_record("config.yaml", yaml.safe_dump(tree))
    return folder


def test_a_run_of_before_goes_on_with_the_views_groups_layers_and_dropout_that_it_was_begun_with(
    tmp_path: Path, resnet: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = [f"output={tmp_path}", "student.dropout=null", f"student.backbone.init={resnet}"]
    backbone = {"hidden_sizes": [8, 16, 16], "depths": [1, 1, 1]}
    config = recipe({"family": "deformable_detr", "backbone": {**STUDENT["backbone"], **backbone}}, *own)
    folder = written(config, old=True)
    begun = as_begun(folder, config)
    assert begun.data.views.derived_taken == "none" != config.data.views.derived_taken
    assert "student.dropout 0.0, student.frozen_stages 0" in caplog.text
    check_same_run(folder, begun)
    assert frozen_parts(silent_student(begun.student, LABELS, 0)) == set()
    _, groups = groups_of(begun)
    assert [(group["scale"], "weight_decay" in group) for group in groups] == [(1.0, False), (0.1, False)]
    assert all("backbone" in name for name in groups[1]["names"])
    folder.write_record("config.yaml", json.dumps(to_tree(begun)))  # as the run that goes on records itself
    assert as_begun(folder, config) == begun
    for field, value in (("training.undecayed", "norms"), ("student.dropout", 0.1)):
        asked = replace_fields(config, {field: value}, "test")
        with pytest.raises(QskdError, match=f"{field} was .*, is "):
            check_same_run(folder, as_begun(folder, asked))


def test_a_checkpoint_of_other_frozen_stages_is_refused_with_the_fields_to_set(resnet: Path) -> None:
    backbone = {**STUDENT["backbone"], "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "init": str(resnet)}
    free, kept = (recipe({"backbone": backbone, "frozen_stages": stages}) for stages in (0, 1))
    training = make_training(free)
    training.train_step(batch_of(1))
    with pytest.raises(QskdError, match="embedder") as error:
        make_training(kept).load_state(training.state(), 1)
    assert "does not learn in this recipe" in str(error.value)
    assert "student.frozen_stages" in error.value.remedy


def test_a_run_of_today_leaves_to_the_family_what_its_recipe_leaves_to_it(tmp_path: Path) -> None:
    config = recipe({"family": "rt_detr", "feature_levels": 2}, f"output={tmp_path}", "student.dropout=null")
    folder = written(config, old=False)
    assert as_begun(folder, config) == config
    check_same_run(folder, config)
    before = {name: old for name, old in BEGUN_BEFORE.items() if "quantization" not in name}
    assert replace_fields(config, before, "test") != config


def test_a_run_of_few_bits_of_before_is_quantised_from_where_it_was(tmp_path: Path) -> None:
    config = recipe({"quantization": "w8a8"}, f"output={tmp_path}")
    assert config.student.quantization is not None
    assert config.student.quantization.rest_from is None
    folder, tree = Folder(config), to_tree(config)
    tree["student"]["quantization"]["rest_from"] = 0.0  # the default of then
    folder.write_record("config.yaml", yaml.safe_dump(tree))
    begun = as_begun(folder, config)
    assert begun == replace_fields(config, {"student.quantization.rest_from": 0.0}, "test")
    check_same_run(folder, begun)
