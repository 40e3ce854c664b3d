"""Students of every family: where they start, what learns, what is saved, what they inherit. Distilled: test_family_pairs.py."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from pydantic import ValidationError
from test_detectors import tiny_model as two_stage_model
from test_detectors_checkpoint import SQUARE, VARIANTS, batch, train_a_little
from test_detectors_checkpoint import tiny as tiny_student
from torch import Tensor, nn

from qskd.config import StudentConfig
from qskd.detectors import FAMILIES, Detector, build_student, inherit, load_detector, save_detector
from qskd.errors import QskdError
from qskd.families.initialisation import grid_points
from qskd.structures import DetectorOutput

torch.set_num_threads(1)

LABELS = ("cat", "dog", "owl")
STUDENTS: dict[str, dict[str, Any]] = {
    "detr": {"family": "detr"},
    "dab": {"family": "dab-detr"},
    "rt_detr": {"family": "rt_detr", "feature_levels": 2},
    "vd backbone": {
        **{"family": "rt_detr", "feature_levels": 2},
        "backbone": {"type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    },
    "rt_detr_v2": {"family": "rt_detr_v2", "feature_levels": 2},
    "one level": {"family": "rt_detr_v2"},
    "table": {"family": "table-transformer"},
    "d_fine": {"family": "d_fine", "feature_levels": 2},
    "deimv2": {"family": "deimv2", "feature_levels": 2},
    "lw_detr": tiny.own("lw_detr"),
    "rf_detr": {**tiny.own("rf_detr"), "queries": 12},  # of 16 cells
}
ONE_LAYER = {
    f"{name}, one layer": {**STUDENTS[name], "decoder_layers": 1}
    for name in ("detr", "dab", "rt_detr", "lw_detr", "rf_detr")
}
EVERY = STUDENTS | ONE_LAYER
CHOOSING = [name for name in STUDENTS if name not in ("detr", "table", "dab")]  # their queries, in each image
HYBRID = [name for name in CHOOSING if name not in ("lw_detr", "rf_detr")]


def student(name: str, seed: int = 0, labels: tuple[str, ...] = LABELS, **changes: Any) -> Detector:
    config = StudentConfig.model_validate({**tiny.STUDENT, "queries": 20, **EVERY[name], **changes})
    return build_student(config, labels, seed)


@functools.cache
def first_output(name: str) -> DetectorOutput:
    """Of a student that has learnt nothing."""
    with torch.no_grad():
        return student(name)(*images(name))


def images(name: str = "") -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    height = 128 if name.startswith("rf_detr") else 64  # of squares alone
    return torch.randn(2, 3, height, 128), torch.ones(2, height, 128, dtype=torch.bool)


@pytest.mark.parametrize("name", EVERY)
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    detector = student(name)
    assert all(parameter.requires_grad for parameter in detector.backbone.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in detector.modules()) == (detector.family != "rf_detr")
    waiting, trainable = without_gradient(detector, name)
    assert waiting == []
    assert trainable > 0.9 * len(list(detector.parameters()))


def without_gradient(detector: Detector, name: str) -> tuple[list[str], int]:
    """What waits for a gradient in vain, and how many parameters learn."""
    output = detector(*images(name), with_attention=False)
    loss = output.logits.square().sum() + output.boxes_cxcywh.square().sum()
    for early in (output.early_logits, output.early_boxes_cxcywh):
        loss = loss if early is None else loss + early.square().sum()
    loss.backward()
    trainable = {key: value for key, value in detector.named_parameters() if value.requires_grad}
    return [key for key, value in trainable.items() if value.grad is None], len(trainable)


@pytest.mark.parametrize("name", ["dab", *CHOOSING])
def test_training_starts_from_rare_classes(name: str) -> None:
    output = first_output(name)
    for logits in (output.logits, output.early_logits):
        assert logits is None or logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.3)


def test_dab_starts_from_boxes_spread_over_the_image() -> None:
    detector = student("dab")
    output, points = detector(*images()), FAMILIES["dab-detr"].reference_points(detector.model)
    assert points is not None
    torch.testing.assert_close(points.detach(), grid_points(20))
    for boxes in output.boxes_cxcywh.flatten(0, 1):
        torch.testing.assert_close(boxes[:, :2].detach(), points.detach(), atol=1e-3, rtol=0)
        torch.testing.assert_close(boxes[:, 2:], torch.full((20, 2), 0.198), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", CHOOSING)
def test_hybrids_start_from_the_anchors_of_the_chosen_cells(name: str) -> None:
    output = first_output(name)
    assert output.early_boxes_cxcywh is not None
    for boxes in output.boxes_cxcywh:
        torch.testing.assert_close(boxes, output.early_boxes_cxcywh[0], atol=1e-4, rtol=0)
    sizes = output.early_boxes_cxcywh[0][..., 2:].detach().unique().tolist()
    assert all(min(abs(size - anchor) for anchor in (0.05, 0.1)) < 1e-4 for size in sizes)


@pytest.mark.parametrize("name", CHOOSING)
def test_signals_keep_their_scale_through_a_hybrid_encoder(name: str) -> None:
    """transformers starts every weight and norm at N(0, 0.01): its maps would vanish."""
    output = first_output(name)
    for map_ in (*output.features, *output.memory):
        assert 0.1 < map_.std().item() < 10


def test_detr_queries_start_apart() -> None:
    output = first_output("detr")
    assert output.query_states.std(1).mean().item() > 0.05
    assert output.boxes_cxcywh[-1].std(1).mean().item() > 0.001


@pytest.mark.parametrize("name", STUDENTS)
def test_weights_depend_on_the_seed_only(name: str) -> None:
    torch.manual_seed(11)
    first = student(name, seed=5).state_dict()
    torch.manual_seed(12)
    again, other = student(name, seed=5).state_dict(), student(name, seed=6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


PLAIN = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForObjectDetection, pipeline
from PIL import Image
for folder, given in torch.load("batches.pt").items():
    model, info = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        said = model.eval()(given["pixels"], pixel_mask=given["mask"])
    torch.save({"logits": said.logits, "boxes": said.pred_boxes}, folder + ".pt")
    detect = pipeline("object-detection", model=model, image_processor=folder, threshold=0.0)
    found = detect(Image.new("RGB", (90, 60), "red"))
    assert {one["label"] for one in found} <= {"cat", "dog", "owl"} and found, found
assert not {"qskd", "timm", "torchvision"} & set(sys.modules)
"""


def test_plain_transformers_reads_trained_students_of_all_families_alike(tmp_path: Path) -> None:
    """In a process of its own that has never heard of qskd."""
    made = {name: student(name) for name in STUDENTS if name != "one level"}
    made |= {variant: tiny_student(**changes) for variant, changes in VARIANTS.items()}
    detectors = {name.replace(" ", "_"): train_a_little(detector) for name, detector in made.items()}
    assert {detector.family for detector in detectors.values()} == set(FAMILIES)
    given = {}
    for folder, detector in detectors.items():
        save_detector(detector, tmp_path / folder, SQUARE)
        given[folder] = batch()
        if not FAMILIES[detector.family].masks_padding:  # boxes would be relative to other things
            given[folder]["mask"] = torch.ones_like(given[folder]["mask"])
    torch.save(given, tmp_path / "batches.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", PLAIN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, detector in detectors.items():
        said, seen = torch.load(tmp_path / f"{folder}.pt"), given[folder].values()
        with torch.no_grad():
            expected, again = detector(*seen), load_detector(tmp_path / folder)(*seen)
        torch.testing.assert_close(said["boxes"], expected.boxes_cxcywh[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.logits, expected.logits, atol=1e-5, rtol=1e-5)
        if folder in ("detr", "table"):
            probability = said["logits"].softmax(-1)[..., :-1]
            torch.testing.assert_close(probability, expected.logits[-1].sigmoid(), atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(said["logits"], expected.logits[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_new_class_head_keeps_the_classes_it_knows(tmp_path: Path, name: str) -> None:
    source = student(name).eval()
    tiny.shake(source, 1)
    save_detector(source, tmp_path / "source", SQUARE)
    made = build_student(StudentConfig(init=str(tmp_path / "source")), ["owl", "fox", "cat", "emu"], 1).eval()
    assert made.labels == ("owl", "fox", "cat", "emu")
    head, old = (FAMILIES[made.family].class_heads(one.model)[-1] for one in (made, source))
    for slot, before in ((0, 2), (2, 0), *([(4, 3)] if name == "detr" else [])):  # DETR's last row is "no object"
        assert torch.equal(head.weight[slot], old.weight[before])
        assert head.bias[slot] == old.bias[before]
    save_detector(made, tmp_path / "made", SQUARE)
    with torch.no_grad():
        again = load_detector(tmp_path / "made")(*images(name))
        torch.testing.assert_close(again.logits, made(*images(name)).logits, atol=1e-5, rtol=1e-5)


def test_a_student_that_starts_from_a_checkpoint_with_denoising_trains_without(tmp_path: Path) -> None:
    config = student("rt_detr").model.config
    config.num_denoising = 10
    full = hf.RTDetrForObjectDetection(config)
    full.save_pretrained(tmp_path)
    hf.RTDetrImageProcessorPil().save_pretrained(tmp_path)
    assert hasattr(load_detector(tmp_path).model.model, "denoising_class_embed")  # a teacher keeps all it has
    made = build_student(StudentConfig(init=str(tmp_path)), ["fox", "cat"], 0)
    assert not any("denoising" in name for name in made.state_dict())
    save_detector(made, tmp_path / "made", SQUARE)
    assert load_detector(tmp_path / "made").model.config.num_denoising == 0


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine", "deimv2"])
def test_offsets_that_are_rounded_to_cells_are_not_waited_for(tmp_path: Path, name: str) -> None:
    source = student(name)
    source.model.config.decoder_method = "discrete"
    save_detector(source, tmp_path, SQUARE)
    made = build_student(StudentConfig(init=str(tmp_path)), LABELS, 0)
    assert without_gradient(made, name)[0] == []


def test_proposals_of_a_two_stage_deformable_detr_stay_as_they_are(tmp_path: Path) -> None:
    source = two_stage_model("two_stage")
    source.config.id2label = {slot: f"class {slot}" for slot in range(5)}
    save_detector(Detector(source), tmp_path, SQUARE)
    with pytest.raises(QskdError, match="chooses its queries by a class head"):
        build_student(StudentConfig(init=str(tmp_path)), LABELS, 0)
    made = build_student(StudentConfig(init=str(tmp_path)), [f"class {slot}" for slot in range(5)], 0)
    output = made(*images(), with_attention=False)
    (output.logits.square().sum() + output.boxes_cxcywh.square().sum()).backward()
    assert [name for name, value in made.named_parameters() if value.requires_grad and value.grad is None] == []


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_the_teachers_sizes_becomes_the_teacher(name: str) -> None:
    teacher, mine = student(name, seed=1).eval(), student(name, seed=2).eval()
    tiny.shake(teacher, 1)
    tiny.shake(mine, 2)
    done = inherit(mine, teacher, (2, 0, 1))  # its classes in another order
    assert not done.left
    with torch.no_grad():
        said, expected = mine(*images(name)), teacher(*images(name))
    torch.testing.assert_close(said.logits, expected.logits[..., (2, 0, 1)], atol=1e-6, rtol=1e-6)
    assert torch.equal(said.boxes_cxcywh, expected.boxes_cxcywh)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_with_fewer_layers_takes_the_first_and_the_last(name: str) -> None:
    teacher = student(name, seed=1, decoder_layers=3, encoder_layers=2, labels=("emu", *LABELS))
    mine = student(name, seed=2)
    tiny.shake(teacher, 1)
    done = inherit(mine, teacher, (1, 2, 3))
    assert not done.left
    encoder = "model.encoder.aifi.0.layers" if name in HYBRID else "model.encoder.layers"
    if name not in ("lw_detr", "rf_detr"):  # their encoder is the backbone
        assert done.copied[f"{encoder}.0"] == f"{encoder}.1"
    assert done.copied["model.decoder.layers.1"] == "model.decoder.layers.2"
    if name in HYBRID:
        assert done.copied["model.decoder.class_embed.1"] == "model.decoder.class_embed.2"
        assert done.copied["model.decoder.bbox_embed.1"] == "model.decoder.bbox_embed.2"
    if name in ("d_fine", "deimv2"):
        assert done.copied["model.decoder.lqe_layers.1"] == "model.decoder.lqe_layers.2"
    head, theirs = (FAMILIES[mine.family].class_heads(one.model)[-1] for one in (mine, teacher))
    assert torch.equal(head.weight, theirs.weight[1:])


def test_fields_without_effect_are_said() -> None:
    with pytest.warns(UserWarning, match="box_refinement = false has no effect: rt_detr"):
        student("rt_detr", box_refinement=False)
    with pytest.warns(UserWarning, match="feature_levels = 3 has no effect: dab-detr"):
        student("dab", feature_levels=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        student("d_fine")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"resize": {"mode": "shortest_edge", "size": 64}}, "mode: square, size: 64"),
        ({"resize": {"size": 100}}, "multiples of the backbone's stride 8"),
        ({"feature_levels": 3}, "feature_levels 3 is more than 2"),
        ({"family": "d_fine", "decoder_layers": 1}, "2 decoder_layers or more"),
        ({"family": "rt_detr_v2", "decoder_layers": 1}, "2 decoder_layers or more"),
        ({"queries": 400}, "queries 400 are more than the 320 cells"),
        ({"backbone": {"type": "rt_detr_resnet", "embedding_size": 4, "hidden_sizes": [8], "depths": [1]}}, "equal"),
    ],
)
def test_a_hybrid_that_cannot_be_built_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        student("rt_detr", **changes)
