"""LW-DETR's own: groups of queries and their loss as in transformers, learning rates by layer, the published sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from reference import transformers_labels
from test_families import lw_detr_config, whole_batch
from torch import Tensor, nn

from qskd.checkpoints.clean_config import detector_config
from qskd.config import BackboneConfig, DetectionLossConfig, StudentConfig
from qskd.detectors import Detector, Preprocessing, inherit, load_detector
from qskd.detectors.student import _unlearned
from qskd.errors import QskdError
from qskd.families.table import FAMILIES
from qskd.losses.detection_loss import combine, detection_terms, detection_weights
from qskd.losses.matching import assign
from qskd.training.distiller import Distiller
from qskd.training.query_groups import ChosenGroups, query_groups_of
from qskd.training.step import Training

torch.set_num_threads(1)
OWN = tiny.own("lw_detr")
LW_DETR: Any = FAMILIES["lw_detr"]


def grouped(groups: int = 3) -> Any:
    """transformers' own model with groups, every parameter random, without statistics of a batch in the way."""
    torch.manual_seed(0)
    model = hf.LwDetrForObjectDetection(lw_detr_config(group_detr=groups, auxiliary_loss=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def ours_of(theirs: Any) -> tuple[Detector, ChosenGroups]:
    """The same weights: a student of one group, and the others as training has them."""
    model, parts = copy.deepcopy(theirs), LW_DETR.group_parts(theirs)
    LW_DETR.drop_unused(model)
    student = Detector(model)
    count = len(parts.lists[0])
    groups = query_groups_of(DetectionLossConfig(query_groups=count), student)
    assert isinstance(groups, ChosenGroups)
    with torch.no_grad():
        groups.others.copy_(theirs.model.query_feat.weight[9:])
        groups.places.copy_(parts.places.weight[9:])
        for mine, other in zip(groups.heads, parts.lists, strict=True):
            for one, source in zip(mine, list(other)[1:], strict=True):
                one.load_state_dict(source.state_dict())
    return student, groups


def test_the_loss_of_all_groups_is_transformers_values_and_gradients() -> None:
    theirs = grouped()
    student, groups = ours_of(theirs)
    pixels, mask = whole_batch()
    targets = tiny.batch_of(2, 1).targets
    expected = theirs(pixels, pixel_mask=mask, labels=transformers_labels(targets)).loss
    config = DetectionLossConfig()
    with groups.asked(student):
        output, others = groups.parted(student(pixels, mask, with_attention=False))
    assert output.early_logits is not None
    assert output.early_boxes_cxcywh is not None
    logits = torch.cat([output.early_logits, output.logits])
    boxes = torch.cat([output.early_boxes_cxcywh, output.boxes_cxcywh])
    kind = student.classification
    first, rest = assign([(logits, boxes), others], targets, config, [kind, kind])
    terms = detection_terms(logits, boxes, targets, first, config, kind, early=1)
    own = combine(terms, detection_weights(3, config, early=1))
    mean = combine(groups.terms(others, targets, rest, kind), groups.weights)
    total = (own + 2 * mean) / 3  # transformers' mean over groups, the student's own one of three
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    total.backward()
    expected.backward()
    wanted = dict(theirs.named_parameters())
    for name, mine in student.model.named_parameters():
        grad: Tensor = wanted[name].grad
        torch.testing.assert_close(mine.grad, grad[: len(mine)], rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(groups.others.grad, wanted["model.query_feat.weight"].grad[9:], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        groups.places.grad, wanted["model.reference_point_embed.weight"].grad[9:], rtol=1e-3, atol=1e-5
    )
    for one, part in zip(groups.heads, LW_DETR.group_parts(theirs).lists, strict=True):
        for mine, source in zip(one.parameters(), list(part[1:].parameters()), strict=True):
            torch.testing.assert_close(mine.grad, source.grad, rtol=1e-3, atol=1e-5)


def test_its_authors_groups_are_the_default_and_leave_the_student_as_it_is_also_with_nothing_to_see() -> None:
    training = tiny.make_training(tiny.recipe(OWN))
    groups, names = training.module.query_groups, set(training.student.state_dict())
    assert groups is not None
    assert groups.count == 12
    for batch in (tiny.batch_of(2, 1), tiny.batch_of(0, 0), tiny.batch_of()):
        values = training.train_step(batch)
        assert all(torch.isfinite(value) for value in values.values())
        learns = {name: each for name, each in training.module.named_parameters() if each.requires_grad}
        assert [name for name, each in learns.items() if each.grad is None] == []  # DDP waits for all of them
    assert set(training.student.state_dict()) == names
    assert training.student.model.config.group_detr == 1
    alone = tiny.make_training(tiny.recipe(OWN, "detection.query_groups=1"))
    assert alone.module.query_groups is None


def test_the_students_own_queries_say_what_they_say_alone() -> None:
    training = tiny.make_training(tiny.recipe(OWN, "detection.query_groups=3"))
    tiny.shake(training.student, 5)
    groups, student = training.module.query_groups, training.student.eval()
    assert groups is not None
    pixels, mask = torch.randn(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        alone = student(pixels, mask, with_attention=False)
        with groups.asked(student):
            own, others = groups.parted(student(pixels, mask, with_attention=False))
    for name in ("logits", "boxes_cxcywh", "query_states", "early_logits", "early_boxes_cxcywh"):
        torch.testing.assert_close(getattr(own, name), getattr(alone, name), rtol=1e-5, atol=1e-5)
    assert others[0].shape == (2 * (1 + 2), 2, 6, 3)
    assert not torch.allclose(others[1][:3], others[1][3:], atol=1e-3)  # each chose, or looks, elsewhere
    assert not any(module.training for module in student.modules())


def test_a_checkpoint_with_groups_is_loaded_without_them_and_says_the_same(tmp_path: Path) -> None:
    theirs = grouped()
    theirs.save_pretrained(tmp_path)
    hf.DeformableDetrImageProcessorPil().save_pretrained(tmp_path)
    detector, (pixels, mask) = load_detector(tmp_path), whole_batch()
    assert len(detector.model.model.query_feat.weight) == 9
    with torch.no_grad():
        said, expected = detector(pixels, mask), theirs.eval()(pixels, pixel_mask=mask)
    torch.testing.assert_close(said.logits[-1], expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.boxes_cxcywh[-1], expected.pred_boxes, rtol=1e-5, atol=1e-5)


def test_in_a_loop_of_someone_else_s_the_first_group_alone_is_distilled() -> None:
    model = grouped().train()
    pixels, mask = whole_batch()
    distiller = Distiller(model, tiny.random_teacher("lw_detr"), Preprocessing(StudentConfig().resize))
    outputs = model(pixels, pixel_mask=mask)
    heard = distiller._heard(mask, torch.ones(2, 4))
    assert outputs.logits.shape[1] == 27
    torch.testing.assert_close(heard.logits[-1], outputs.logits[:, :9])
    torch.testing.assert_close(heard.boxes_cxcywh[-1], outputs.pred_boxes[:, :9])


def rates(*overrides: str, **student: Any) -> tuple[Training, dict[str, float]]:
    training = tiny.make_training(tiny.recipe({**OWN, **student}, "training.learning_rate=1", *overrides))
    named = {id(each): name for name, each in training.student.backbone.named_parameters()}
    groups = training.optimizer.param_groups
    return training, {named[id(p)]: group["scale"] for group in groups for p in group["params"] if id(p) in named}


def test_layers_of_a_vit_whose_weights_are_given_learn_the_slower_the_earlier_they_are() -> None:
    _, random = rates("training.backbone_learning_rate_scale=0.5")
    assert set(random.values()) == {0.5}
    overrides = ("training.backbone_learning_rate_scale=0.5", "training.backbone_layer_decay=0.8")
    training, found = rates(*overrides)
    wanted = {"embeddings.projection.weight": 0.5 * 0.8**3, "encoder.layer.0.gamma_1": 0.5 * 0.8**2}
    for name, rate in (wanted | {"encoder.layer.1.intermediate.fc1.weight": 0.5 * 0.8}).items():
        assert found[name] == pytest.approx(rate)
    undecayed = {
        id(p) for group in training.optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]
    }
    own = {id(each): name for name, each in training.student.backbone.named_parameters()}
    assert undecayed <= own.keys()
    free = {own[each] for each in undecayed}
    assert {
        "embeddings.position_embeddings",
        "encoder.layer.0.gamma_2",
        "encoder.layer.1.attention.q_proj.bias",
    } <= free
    assert not any("weight" in name and "norm" not in name for name in free)
    _, inheriting = rates(inherit=True)
    assert min(inheriting.values()) == pytest.approx(0.1 * 0.8**3)


# The conversion script of transformers has these of the published checkpoints: width, layers, windows and maps of the ViT; width,
# self- and cross-attention heads, points, scales and queries of the decoder.
PUBLISHED = {
    "micro": ((192, 6, [0, 2, 4], [2, 4, 6]), (256, 8, 16, 2, [1.0], 100)),  # tiny
    "small": ((192, 10, [0, 1, 3, 6, 7, 9], [3, 5, 6, 10]), (256, 8, 16, 2, [1.0], 300)),
    "medium": ((384, 10, [0, 1, 3, 6, 7, 9], [3, 5, 6, 10]), (256, 8, 16, 2, [1.0], 300)),
    "large": ((384, 10, [0, 1, 3, 6, 7, 9], [3, 5, 6, 10]), (384, 12, 24, 4, [2.0, 0.5], 300)),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_dial_has_the_published_sizes_and_their_configurations_are_taken(size: str) -> None:
    with torch.device("meta"):
        made = _unlearned(StudentConfig.model_validate({"size": size, "family": "lw_detr"}), ["a", "b"]).config
    vit = made.backbone_config
    assert vit.num_attention_heads == 12
    (width, layers, windows, maps), (d_model, own, cross, points, scales, queries) = PUBLISHED[size]
    assert (vit.hidden_size, vit.num_hidden_layers, vit.window_block_indices) == (width, layers, windows)
    assert list(vit.out_indices) == maps
    assert (made.d_model, made.decoder_self_attention_heads, made.decoder_cross_attention_heads) == (
        d_model,
        own,
        cross,
    )
    assert (made.decoder_n_points, made.projector_scale_factors, made.num_queries) == (points, scales, queries)
    assert made.decoder_layers == 3
    said = json.loads(made.to_json_string()) | {"group_detr": 13}  # as a checkpoint has it
    read = detector_config(said, "config.json")
    assert read.backbone_config.out_indices == vit.out_indices
    assert read.group_detr == 13


def test_a_narrower_student_inherits_channels_of_all_but_what_reads_another_vit() -> None:
    sizes = {**tiny.STUDENT, **OWN}
    teacher = tiny.silent_student(
        StudentConfig.model_validate({**sizes, "width": 64, "ffn_width": 64, "queries": 10}), tiny.LABELS, 1
    )
    student = tiny.silent_student(StudentConfig.model_validate(sizes), tiny.LABELS, 2)
    done = inherit(student, teacher, (0, 1, 2))
    assert not done.left
    every_other = teacher.model.model.query_feat.weight[[0, 2, 4, 5, 7, 9]]
    assert torch.equal(student.model.model.query_feat.weight, every_other[:, 1::2])
    other = tiny.silent_student(
        StudentConfig.model_validate({**sizes, "backbone": {"hidden_sizes": [36], "depths": [1, 1]}}), tiny.LABELS, 2
    )
    left = inherit(other, teacher, (0, 1, 2)).left
    assert set(left) == {
        "model.backbone.backbone",
        *(f"model.backbone.projector.scale_layers.{scale}.projector_layer.conv1.conv" for scale in (0, 1)),
        *(name for name in left if "sampling_layers" in name),
    }


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backbone": BackboneConfig()}, "lw_detr stands on a lw_detr_vit, backbone.type is resnet"),
        ({"backbone": {"hidden_sizes": [8, 16]}}, "a ViT has one width"),
        ({"resize": {"size": 96}}, "16 windows of whole patches, 64: set resize: {mode: square, size: 128}"),
        ({"family": "detr", "backbone": {"type": "lw_detr_vit"}}, "detr stands on one of resnet"),
        ({"queries": 200}, "more than the 68 cells"),
    ],
)
def test_a_student_that_cannot_be_built_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("{", r"\{")):
        StudentConfig.model_validate({**tiny.STUDENT, **OWN, **changes})


def test_a_vit_of_its_own_is_a_students_start(tmp_path: Path) -> None:
    config = StudentConfig.model_validate({**tiny.STUDENT, **OWN})
    vit = tiny.silent_student(config, tiny.LABELS, 1).backbone
    vit.save_pretrained(tmp_path)  # type: ignore[operator]
    started = {**tiny.STUDENT, **OWN, "backbone": {**tiny.VIT, "init": str(tmp_path)}}
    student = tiny.silent_student(StudentConfig.model_validate(started), tiny.LABELS, 2)
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in student.backbone.state_dict().items())
    other = {**started, "backbone": {"hidden_sizes": [36], "depths": [1, 1], "init": str(tmp_path)}}
    with pytest.raises(QskdError, match=r"hidden_size 24.*\n.*hidden_size 36"):
        tiny.silent_student(StudentConfig.model_validate(other), tiny.LABELS, 2)
