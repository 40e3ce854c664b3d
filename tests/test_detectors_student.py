"""Students: what is trainable, where training starts, what a checkpoint gives them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import HGNetV2Backbone, HGNetV2Config, ResNetBackbone, ResNetConfig, ResNetForImageClassification

from qskd.config import BackboneConfig, ResizeConfig, StudentConfig
from qskd.detectors import FAMILIES, Detector, build_student, save_detector
from qskd.detectors.backbone import backbone_config, sized_by_init
from qskd.errors import QskdError
from qskd.families.initialisation import grid_points

torch.set_num_threads(1)

LABELS = ("cat", "dog", "owl")
BACKBONE = BackboneConfig(embedding_size=8, hidden_sizes=(8, 16, 24), depths=(1, 1, 1))
BOTTLENECK = BackboneConfig(layer_type="bottleneck", embedding_size=8, hidden_sizes=(16, 32), depths=(1, 2))
SMALL: dict[str, Any] = {
    **{"backbone": BACKBONE, "width": 32, "encoder_layers": 1, "decoder_layers": 2, "heads": 4},
    **{"ffn_width": 32, "queries": 20},
}
STUDENTS = {
    "conditional": StudentConfig(**SMALL),
    "one decoder layer": StudentConfig(**{**SMALL, "decoder_layers": 1, "backbone": BOTTLENECK}),
    "deformable": StudentConfig(**SMALL, family="deformable_detr", box_refinement=False),
    "refined": StudentConfig(**SMALL, family="deformable_detr", feature_levels=2),
    "extra levels": StudentConfig(**{**SMALL, "backbone": BOTTLENECK}, family="deformable_detr", feature_levels=4),
}


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, 3, 64, 96), torch.ones(2, 64, 96, dtype=torch.bool)


def student(name: str = "conditional", seed: int = 0, **changes: Any) -> Detector:
    return build_student(STUDENTS[name].model_copy(update=changes), LABELS, seed)


def points(detector: Detector) -> Tensor:
    return FAMILIES[detector.family].reference_points(detector.model).detach()


@pytest.mark.parametrize("name", STUDENTS)
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    detector = student(name)
    assert detector.training
    assert all(parameter.requires_grad for parameter in detector.backbone.parameters())
    output = detector(*images(), with_attention=False)
    (output.logits.square().sum() + output.boxes_cxcywh.square().sum()).backward()
    trainable = {key: value for key, value in detector.named_parameters() if value.requires_grad}
    assert [key for key, value in trainable.items() if value.grad is None] == []
    assert all(value.grad.abs().sum() > 0 for key, value in trainable.items() if "backbone" in key)  # type: ignore[union-attr]
    assert len(trainable) > 0.9 * len(list(detector.parameters()))


@pytest.mark.parametrize("name", STUDENTS)
def test_training_starts_from_rare_classes_and_boxes_spread_over_the_image(name: str) -> None:
    output = student(name)(*images())
    assert output.logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)
    # Without training every layer says: a fifth of the image, about the query's reference point.
    wh, centres = output.boxes_cxcywh[..., 2:], output.boxes_cxcywh[0, 0, :, :2]
    torch.testing.assert_close(wh, torch.full_like(wh, 0.198), atol=1e-3, rtol=0)
    torch.testing.assert_close(centres.detach(), points(student(name)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("queries", [1, 7, 20, 300])
@pytest.mark.parametrize("name", ["conditional", "refined"])
def test_reference_points_cover_the_image(name: str, queries: int) -> None:
    found = points(student(name, queries=queries))
    assert found.shape == (queries, 2)
    assert (torch.cdist(found, grid_points(queries)).min(0).values < 0.5 / queries**0.5).all()
    if queries > 1:
        everywhere = torch.cartesian_prod(torch.linspace(0, 1, 21), torch.linspace(0, 1, 21))
        assert torch.cdist(everywhere, found).min(1).values.max() < 1.2 / queries**0.5


def test_grid_points_are_the_middles_of_even_cells() -> None:
    torch.testing.assert_close(grid_points(4), torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]))
    for count in range(1, 50):
        found = grid_points(count)
        assert len(found) == len(found.unique(dim=0)) == count
        torch.testing.assert_close(found[:, 0].mean(), torch.tensor(0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["conditional", "refined"])
def test_weights_depend_on_the_seed_only_and_global_randomness_is_left_alone(name: str) -> None:
    torch.manual_seed(11)
    first = student(name, seed=5).state_dict()
    drawn = torch.rand(3)
    with torch.no_grad():
        again, other = student(name, seed=5).state_dict(), student(name, seed=6).state_dict()
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_backbone_activations_keep_their_scale_from_the_start() -> None:
    features = student()(*images()).features[0]
    backbone_maps = student().backbone(*images())[-1][0]
    assert 0.1 < backbone_maps.std() < 10
    assert torch.isfinite(features).all()


def test_extra_levels_halve_the_last_stage() -> None:
    detector = student("extra levels")
    assert [tuple(part.shape[-2:]) for part in detector(*images()).memory] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert len(detector.memory_channels) == 4


def test_a_frozen_backbone_does_not_move() -> None:
    detector = student(train_backbone=False)
    before = {key: value.clone() for key, value in detector.backbone.state_dict().items()}
    detector(*images()).logits.sum().backward()
    assert not any(parameter.requires_grad for parameter in detector.backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in detector.backbone.state_dict().items())


def test_norms_are_batch_norms_unless_asked_to_be_frozen() -> None:
    def norms(detector: Detector) -> list[nn.Module]:
        return [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]

    assert len(norms(student())) == 9
    with pytest.warns(UserWarning, match="normalises nothing"):
        assert norms(student(backbone_norm="frozen")) == []


def test_labels_reach_the_configuration() -> None:
    detector = student()
    assert detector.labels == LABELS
    assert detector.model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    assert (detector.num_queries, detector.family) == (20, "conditional_detr")
    with pytest.raises(QskdError, match="none of them twice"):
        build_student(STUDENTS["conditional"], ["cat", "cat"], 0)


def test_levels_without_effect_are_said() -> None:
    with pytest.warns(UserWarning, match="feature_levels = 3 has no effect"):
        student(feature_levels=3)


def resnet(**changes: Any) -> ResNetConfig:
    sizes = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]}
    return ResNetConfig(**{**sizes, **changes})


@pytest.mark.parametrize("kind", [ResNetBackbone, ResNetForImageClassification])
def test_a_backbone_starts_from_a_resnet_s_weights(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(4)
    source = kind(resnet())
    source.train()
    source(images()[0])  # running statistics of its own
    source.save_pretrained(tmp_path)
    detector = student("refined", backbone=BACKBONE.model_copy(update={"init": str(tmp_path)})).eval()
    base = source.eval().resnet if kind is ResNetForImageClassification else source.eval()
    expected = base.encoder(base.embedder(images()[0])).last_hidden_state
    torch.testing.assert_close(detector.backbone(*images())[-1][0], expected, atol=1e-5, rtol=1e-5)


def test_a_backbone_stored_as_float16_becomes_a_float32_student_s(tmp_path: Path) -> None:
    ResNetBackbone(resnet()).half().save_pretrained(tmp_path)
    detector = student("refined", backbone=BACKBONE.model_copy(update={"init": str(tmp_path)})).eval()
    assert {parameter.dtype for parameter in detector.parameters()} == {torch.float32}
    assert detector(*images()).logits.isfinite().all()


def test_an_hgnets_sizes_are_those_of_its_stages(tmp_path: Path) -> None:
    sizes = {"hidden_sizes": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "embedding_size": 12}
    own = BackboneConfig.model_validate({"type": "hgnet_v2", **sizes})
    made = backbone_config(own, 1)
    del made.hidden_sizes, made.depths, made.embedding_size  # as in the folder of a D-FINE's: of the largest HGNetV2
    source = HGNetV2Backbone(HGNetV2Config(**made.to_dict()))
    assert source.config.hidden_sizes == [256, 512, 1024, 2048]
    source.save_pretrained(tmp_path)
    for given in ({}, sizes):
        backbone = BackboneConfig.model_validate({"type": "hgnet_v2", "init": str(tmp_path), **given})
        assert sized_by_init(backbone).model_dump() == own.model_dump() | {"init": str(tmp_path)}
        detector = build_student(StudentConfig.model_validate({**SMALL, "backbone": backbone}), LABELS, 0)
        held = detector.backbone.state_dict()
        assert all(torch.equal(value, held[f"model.{name}"]) for name, value in source.state_dict().items())
        assert detector(*images()).features[0].shape[1] == 32


def test_a_backbone_of_other_sizes_is_refused(tmp_path: Path) -> None:
    ResNetBackbone(resnet(hidden_sizes=[8, 16, 32])).save_pretrained(tmp_path)
    with pytest.raises(QskdError, match=r"hidden_sizes \[8, 16, 32\]\n.*student.backbone.hidden_sizes \[8, 16, 24\]"):
        student(backbone=BACKBONE.model_copy(update={"init": str(tmp_path)}))


@pytest.mark.parametrize("name", ["conditional", "deformable", "refined"])
def test_a_student_starts_from_a_whole_detector(tmp_path: Path, name: str) -> None:
    source = student(name)
    for _ in range(2):
        source(*images())  # running statistics of its own
    save_detector(source.eval(), tmp_path / "source", ResizeConfig())
    same = build_student(StudentConfig(init=str(tmp_path / "source")), LABELS, 1)
    with torch.no_grad():
        torch.testing.assert_close(same.eval()(*images()).logits, source(*images()).logits, atol=1e-5, rtol=1e-5)
    assert same.family == source.family
    learns = {name: parameter.requires_grad for name, parameter in same.backbone.named_parameters()}
    kept = ("embedder.", "stages.0.")  # stem and first stage stay, as with the authors
    assert learns == {name: not any(part in name for part in kept) for name in learns}
    whole = build_student(StudentConfig(init=str(tmp_path / "source"), frozen_stages=0), LABELS, 1)
    assert all(parameter.requires_grad for parameter in whole.backbone.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in same.modules())


@pytest.mark.parametrize("name", ["conditional", "deformable", "refined"])
def test_a_new_class_head_keeps_the_classes_it_knows(tmp_path: Path, name: str) -> None:
    source = student(name).eval()
    save_detector(source, tmp_path / "source", ResizeConfig())
    made = build_student(StudentConfig(init=str(tmp_path / "source")), ["owl", "fox", "emu", "cat"], 1).eval()
    assert made.labels == ("owl", "fox", "emu", "cat")
    with torch.no_grad():
        ours, theirs = made(*images()), source(*images())
    torch.testing.assert_close(ours.boxes_cxcywh, theirs.boxes_cxcywh, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.logits[..., [0, 3]], theirs.logits[..., [2, 0]], atol=1e-5, rtol=1e-5)
    assert ours.logits[..., 1:3].sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)
    save_detector(made, tmp_path / "made", ResizeConfig())  # shared heads are still shared: saved and loaded alike
    with torch.no_grad():
        again = build_student(StudentConfig(init=str(tmp_path / "made")), made.labels, 2).eval()(*images())
    torch.testing.assert_close(again.logits, ours.logits, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_s_classes_are_known_by_other_spellings_too(tmp_path: Path) -> None:
    hybrid = StudentConfig(**SMALL, family="rt_detr", feature_levels=2, resize=ResizeConfig(size=64))
    source = build_student(hybrid, ["Motorbike", "sofa", "tvmonitor"], 0).eval()
    save_detector(source, tmp_path / "source", ResizeConfig(size=64))
    config = StudentConfig(init=str(tmp_path / "source"))
    for labels, rows in ((("motorcycle", "couch", "tv"), [0, 1, 2]), (("couch", "tv", "motorcycle"), [1, 2, 0])):
        made = build_student(config, labels, 1).eval()
        assert made.labels == labels
        with torch.no_grad():
            ours, theirs = made(*images()).logits, source(*images()).logits
        torch.testing.assert_close(ours, theirs[..., rows], atol=1e-5, rtol=1e-5)


def test_sizes_that_contradict_the_detector_to_start_from_are_said(tmp_path: Path) -> None:
    save_detector(student(), tmp_path / "source", ResizeConfig())
    with pytest.warns(UserWarning, match=r"student.queries = 50 has no effect: .* has 20"):
        build_student(StudentConfig(init=str(tmp_path / "source"), queries=50), LABELS, 0)
    with pytest.warns(UserWarning, match=r"student.dropout = 0.3 has no effect: .* has 0.1"):
        build_student(StudentConfig(init=str(tmp_path / "source"), dropout=0.3), LABELS, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build_student(StudentConfig(init=str(tmp_path / "source")), LABELS, 0)
