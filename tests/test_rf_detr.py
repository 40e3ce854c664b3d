"""RF-DETR's own: windows, groups of queries and their loss as in transformers, what no gradient reaches, the published names."""

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
from safetensors import safe_open
from test_families import rf_detr_config
from test_lw_detr import rates
from test_pretrained import published_keys
from torch import Tensor

from pipelines.health.checkpoint import model_checks
from qskd.checkpoints.clean_config import detector_config
from qskd.config import DetectionLossConfig, StudentConfig
from qskd.detectors import Detector, build_student, inherit, load_detector
from qskd.detectors.student import _unlearned
from qskd.errors import QskdError
from qskd.families.table import FAMILIES
from qskd.losses.detection_loss import combine, detection_terms, detection_weights
from qskd.losses.matching import assign
from qskd.training.query_groups import ChosenGroups, query_groups_of

torch.set_num_threads(1)
OWN = tiny.own("rf_detr")
VIT = "model.backbone.backbone"
RF_DETR: Any = FAMILIES["rf_detr"]


def random_model(kind: Any = hf.RfDetrForObjectDetection, **changes: Any) -> Any:
    """transformers' own with four windows, three groups and every parameter random; its last ViT layer gives no map."""
    torch.manual_seed(0)
    config = rf_detr_config(2, **{"group_detr": 3, "auxiliary_loss": True, **changes})
    vit = config.backbone_config
    vit.out_features, vit.window_block_indexes = ["stage1", "stage2"], [0]
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def square_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(2, 96, 96, dtype=torch.bool)
    mask[1, 70:], mask[1, :, 90:] = False, False
    return torch.randn(2, 3, 96, 96) * mask[:, None], mask


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    hf.DeformableDetrImageProcessorPil(size={"height": 96, "width": 96}, do_pad=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(random_model(), tmp_path_factory.mktemp("rf_detr"))


def test_a_checkpoint_of_the_published_names_says_the_same_without_what_evaluation_never_asks(checkpoint: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        names = set(file.keys())
    assert {"refpoint_embed.weight", "backbone.0.encoder.encoder.embeddings.mask_token"} <= names  # its authors' own
    detector, (pixels, mask) = load_detector(checkpoint), square_batch()
    with torch.no_grad():
        said, expected = detector(pixels, mask), random_model().eval()(pixels, pixel_mask=mask)
    torch.testing.assert_close(said.logits[-1], expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.boxes_cxcywh[-1], expected.pred_boxes, rtol=1e-5, atol=1e-5)
    kept = set(detector.model.state_dict())
    assert not any("mask_token" in name or "encoder.layer.2" in name or "enc_output.1" in name for name in kept)
    assert len(detector.model.model.query_feat.weight) == 9
    config = detector.model.config
    assert (config.group_detr, config.backbone_config.num_hidden_layers) == (1, 2)
    assert not config.backbone_config.use_mask_token


def test_the_detector_of_a_checkpoint_with_a_segmentation_head_is_read_and_says_the_same(tmp_path: Path) -> None:
    model = random_model(hf.RfDetrForInstanceSegmentation)
    detector, (pixels, mask) = load_detector(saved(model, tmp_path)), square_batch()
    with torch.no_grad():
        said, expected = detector(pixels, mask), model.eval()(pixels, pixel_mask=mask)
    torch.testing.assert_close(said.logits[-1], expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.boxes_cxcywh[-1], expected.pred_boxes, rtol=1e-5, atol=1e-5)


def test_windows_of_an_image_that_is_no_square_are_refused_for_transformers_mixes_them_up() -> None:
    model = random_model().eval()
    embeddings, vit = model.model.backbone.backbone.embeddings, model.model.backbone.backbone
    for height, width in ((96, 96), (64, 96)):
        cells = torch.arange(1 + (height // 16) * (width // 16), dtype=torch.float32)[None, :, None]
        parted = embeddings.window_partition(cells, height, width)[:, 1:]
        again = vit.window_unpartition(parted, height, width).flatten()
        assert torch.equal(again, cells[0, 1:, 0]) == (height == width)  # refuse no more once they are equal
    detector = Detector(model)
    with pytest.raises(QskdError, match=r"64 x 96 pixels\n.*height = width"):
        detector(torch.zeros(1, 3, 64, 96), torch.ones(1, 64, 96, dtype=torch.bool))
    with pytest.raises(QskdError, match=r"80 x 80 pixels\n.*divisible by 32\n.*mode: square"):
        detector(torch.zeros(1, 3, 80, 80), torch.ones(1, 80, 80, dtype=torch.bool))


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("backbone_config", hf.ResNetConfig(), r"a resnet\n.*rf_detr_dinov2"),
        ("num_feature_levels", 2, r"num_feature_levels 2\n.*one map"),
    ],
)
def test_a_configuration_that_can_not_run_is_refused(field: str, value: Any, complaint: str) -> None:
    config = rf_detr_config()
    setattr(config, field, value)
    with pytest.raises(QskdError, match=complaint):
        RF_DETR.check(config)


def ours_of(theirs: Any) -> tuple[Detector, ChosenGroups]:
    """The same weights: a student of one group, and the others as training has them."""
    model, parts = copy.deepcopy(theirs), RF_DETR.group_parts(theirs)
    RF_DETR.drop_unused(model)
    student = Detector(model)
    groups = query_groups_of(DetectionLossConfig(query_groups=3), student)
    assert isinstance(groups, ChosenGroups)
    with torch.no_grad():
        groups.others.copy_(theirs.model.query_feat.weight[9:])
        groups.places.copy_(parts.places.weight[9:])
        for mine, other in zip(groups.heads, parts.lists, strict=True):
            for one, source in zip(mine, list(other)[1:], strict=True):
                one.load_state_dict(source.state_dict())
    return student, groups


def test_the_loss_of_all_groups_is_transformers_values_and_gradients() -> None:
    theirs = random_model().train()
    student, groups = ours_of(theirs)
    pixels, mask = square_batch()
    targets = tiny.batch_of(2, 1).targets
    expected = theirs(pixels, pixel_mask=mask, labels=transformers_labels(targets)).loss
    config, kind = DetectionLossConfig(), student.classification
    with groups.asked(student):
        output, others = groups.parted(student(pixels, mask, with_attention=False))
    assert output.early_logits is not None
    assert output.early_boxes_cxcywh is not None
    logits = torch.cat([output.early_logits, output.logits])
    boxes = torch.cat([output.early_boxes_cxcywh, output.boxes_cxcywh])
    first, rest = assign([(logits, boxes), others], targets, config, [kind, kind])
    terms = detection_terms(logits, boxes, targets, first, config, kind, early=1)
    own = combine(terms, detection_weights(3, config, early=1))
    total = (own + 2 * combine(groups.terms(others, targets, rest, kind), groups.weights)) / 3  # a mean over groups
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    total.backward()
    expected.backward()
    wanted = dict(theirs.named_parameters())
    for name, mine in student.model.named_parameters():
        grad: Tensor = wanted[name].grad
        torch.testing.assert_close(mine.grad, grad[: len(mine)], rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(groups.others.grad, wanted["model.query_feat.weight"].grad[9:], rtol=1e-3, atol=1e-4)
    without = {name for name, value in wanted.items() if value.grad is None}
    assert without >= {f"{VIT}.embeddings.mask_token", f"{VIT}.encoder.layer.2.norm1.weight"}  # DDP would wait for them
    assert not without & dict(student.model.named_parameters()).keys()


def test_its_authors_groups_are_the_default_and_every_parameter_learns_also_with_nothing_to_see() -> None:
    training = tiny.make_training(tiny.recipe(OWN))
    groups = training.module.query_groups
    assert groups is not None
    assert groups.count == 12
    for batch in (tiny.batch_of(2, 1), tiny.batch_of(0, 0), tiny.batch_of()):
        values = training.train_step(batch)
        assert all(torch.isfinite(value) for value in values.values())
        learns = {name: each for name, each in training.module.named_parameters() if each.requires_grad}
        assert [name for name, each in learns.items() if each.grad is None] == []  # DDP waits for all of them
    assert training.student.model.config.group_detr == 1


def test_a_student_from_a_checkpoint_learns_everywhere_and_other_classes_keep_what_they_know(checkpoint: Path) -> None:
    made = build_student(StudentConfig(init=str(checkpoint)), ["LABEL_3", "fox"], 0)
    assert torch.equal(made.model.class_embed.weight[0], random_model().class_embed.weight[3])
    output = made(*square_batch(), with_attention=False)
    assert output.early_logits is not None
    assert output.early_boxes_cxcywh is not None
    said = (output.logits, output.boxes_cxcywh, output.early_logits, output.early_boxes_cxcywh)
    torch.stack([each.square().sum() for each in said]).sum().backward()
    assert [name for name, value in made.named_parameters() if value.requires_grad and value.grad is None] == []


def test_layers_of_its_vit_have_rates_of_their_own_and_its_embeddings_no_decay() -> None:
    training, found = rates("training.backbone_learning_rate_scale=0.5", "training.backbone_layer_decay=0.8", **OWN)
    wanted = {"embeddings.cls_token": 0.5 * 0.8**3, "encoder.layer.0.layer_scale1.lambda1": 0.5 * 0.8**2}
    for name, rate in (wanted | {"encoder.layer.1.mlp.fc1.weight": 0.5 * 0.8, "layernorm.weight": 0.5}).items():
        assert found[name] == pytest.approx(rate)
    groups = training.optimizer.param_groups
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    free = {name for name, each in training.student.backbone.named_parameters() if id(each) in undecayed}
    assert {name for name in found if "embeddings" in name} <= free
    assert all("norm" in name or "embeddings" in name or name.endswith("bias") for name in free)
    assert {"encoder.layer.0.norm1.weight", "encoder.layer.1.mlp.fc1.bias"} <= free


# Its authors' configurations: side, decoder layers; all on DINOv2's small ViT (384 wide, 12 layers, 6 heads, maps after 3, 6, 9 and
# 12), of patches of 16 pixels in 4 windows, with 300 queries and 13 groups.
PUBLISHED = {"micro": (384, 2), "small": (512, 3), "medium": (576, 4), "large": (704, 4)}  # micro is their nano


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_dial_has_the_published_sizes_and_their_configurations_are_taken(size: str) -> None:
    config = StudentConfig.model_validate({"size": size, "family": "rf_detr"})
    with torch.device("meta"):
        made = _unlearned(config, ["a", "b"]).config
    side, layers = PUBLISHED[size]
    vit = made.backbone_config
    assert (config.resize.size, made.decoder_layers, made.num_queries) == (side, layers, 300)
    assert (vit.hidden_size, vit.num_hidden_layers, vit.num_attention_heads) == (384, 12, 6)
    assert (vit.patch_size, vit.num_windows, list(vit.out_indices)) == (16, 2, [3, 6, 9, 12])
    assert (vit.image_size, vit.window_block_indexes) == (side, [0, 1, 2, 4, 5, 7, 8, 10, 11])
    assert (made.d_model, made.decoder_self_attention_heads, made.decoder_cross_attention_heads) == (256, 8, 16)
    said = json.loads(made.to_json_string()) | {"group_detr": 13}  # as a checkpoint has it
    read = detector_config(said, "config.json")
    assert (read.group_detr, read.backbone_config.window_block_indexes) == (13, vit.window_block_indexes)


def test_a_look_alike_of_rf_detr_base_has_exactly_the_published_names_and_is_described(tmp_path: Path) -> None:
    """Its configuration but for widths; the fixture has its authors' names, which transformers writes."""
    vit = hf.RfDetrDinov2Config(
        **{"hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14, "image_size": 518},
        **{"num_windows": 4, "out_indices": [2, 5, 8, 11]},
    )
    config = rf_detr_config(backbone_config=vit, group_detr=13, num_labels=91, num_queries=12, decoder_layers=3)
    folder = saved(hf.RfDetrForObjectDetection(config), tmp_path)
    hf.DeformableDetrImageProcessorPil(size={"height": 112, "width": 112}, do_pad=False).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        assert set(file.keys()) == published_keys("Roboflow--rf-detr-base")
    said = {check.name: check for check in model_checks(str(folder))}
    assert "RF-DETR (rf_detr) on rf_detr_dinov2; maps: 32 channels at stride 14" in said["family"].found
    assert "3 decoder layers, 12 queries" in said["size"].found
    assert said["as a student"].found.startswith("yes, of any classes")
    assert "groups of queries" in said["as a student"].found
    assert "a cached image takes" in said["as a teacher"].found


def test_a_narrower_student_of_another_image_size_inherits_all_its_places_fitted() -> None:
    sizes = {**tiny.STUDENT, **OWN}
    teacher = tiny.silent_student(
        StudentConfig.model_validate({**sizes, "width": 64, "ffn_width": 64, "queries": 10, "resize": {"size": 96}}),
        tiny.LABELS,
        1,
    )
    student = tiny.silent_student(StudentConfig.model_validate(sizes), tiny.LABELS, 2)
    assert not inherit(student, teacher, (0, 1, 2)).left
    own, theirs = (each.model.model.backbone.backbone.embeddings for each in (student, teacher))
    fitted = theirs.interpolate_pos_encoding(torch.zeros(1, 17, 24), 64, 64)
    torch.testing.assert_close(own.position_embeddings, fitted)


def test_a_vit_of_its_own_is_a_students_start(tmp_path: Path) -> None:
    config = StudentConfig.model_validate({**tiny.STUDENT, **OWN, "resize": {"size": 96}})
    vit = tiny.silent_student(config, tiny.LABELS, 1).backbone
    vit.save_pretrained(tmp_path)  # type: ignore[operator]
    started = {**tiny.STUDENT, **OWN, "backbone": {**tiny.VIT, "init": str(tmp_path)}}
    student = tiny.silent_student(StudentConfig.model_validate(started), tiny.LABELS, 2)
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in student.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backbone": {"type": "lw_detr_vit"}}, "rf_detr stands on a rf_detr_dinov2, backbone.type is lw_detr_vit"),
        ({"backbone": {"hidden_sizes": [8, 16]}}, "a ViT has one width"),
        ({"resize": {"size": 80}}, "4 windows of whole patches, 32: set resize: {mode: square, size: 64}"),
        ({"feature_levels": 2}, "feature_levels 2 is more than 1"),
        ({"queries": 17}, "more than the 16 cells"),
    ],
)
def test_a_student_that_cannot_be_built_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("{", r"\{")):
        StudentConfig.model_validate({**tiny.STUDENT, **OWN, **changes})
