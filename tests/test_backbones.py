"""Students on other backbones than ResNets: built from sizes and from checkpoints, trained, saved, exported, searched."""

from __future__ import annotations

import functools
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from pydantic import ValidationError
from tiny import EASY_SELECTION, LABELS, SIZE, STUDENT, arrays, own, random_teacher, silent_student
from torch import nn

from pipelines.run.resolve import resolve
from pipelines.training.notices import notices
from qskd.config import FACTS, Config, StudentConfig
from qskd.config.backbone import FREE, KINDS, BackboneConfig
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.deploy.export import check_parity, export_onnx, open_session, random_batches, require_parity
from qskd.deploy.qdq import TOLERANCE
from qskd.detectors import build_student, load_detector, save_detector
from qskd.detectors.backbone import backbone_config, sized_by_init
from qskd.errors import QskdError
from qskd.families.table import find_family
from qskd.quantization.model import activation_quantisers
from qskd.teacher.online import OnlineTeacher
from qskd.training.step import Training
from search_spaces import student_architecture
from search_spaces._trials import RandomTrial

torch.set_num_threads(1)

STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1]}
SIZES: dict[str, dict[str, Any]] = {
    name: {"type": name, **({"hidden_sizes": [24], "depths": [2]} if KINDS[name].patch else STAGES)}
    for name in FREE
    if "resnet" not in name
}
SIDE = 112  # pixels: whole patches of 14 and of 16, and whole cells of stride 16
ONE_MAP = ("detr", "conditional_detr")  # is what they read; they may have one decoder layer
READERS = {  # of each backbone: a family that reads one map, and of those of stages one that reads several
    **{(name, "detr"): 1 for name in SIZES},
    **{(name, "d_fine"): 2 for name in SIZES if not KINDS[name].patch},
    ("hgnet_v2", "deimv2"): 2,
    ("convnextv2", "deformable_detr"): 2,
    ("dinov3_vit", "conditional_detr"): 1,
}
PUBLISHED = {
    "hgnet_v2": hf.HGNetV2ForImageClassification,
    "convnext": hf.ConvNextForImageClassification,
    "convnextv2": hf.ConvNextV2ForImageClassification,
    "dinov3_convnext": hf.DINOv3ConvNextModel,
    "dinov2": hf.Dinov2ForImageClassification,
    "dinov2_with_registers": hf.Dinov2WithRegistersModel,
    "dinov3_vit": hf.DINOv3ViTModel,
}


def sized(kind: str, family: str = "detr", **changes: Any) -> StudentConfig:
    resize = {"mode": "square", "size": SIDE}
    backbone = {**SIZES[kind], **changes.pop("backbone", {})}
    layers = {"decoder_layers": 1} if family in ONE_MAP else {}  # it is the backbone that is tried
    fields = {**STUDENT, **layers, **own(family, levels=2), "backbone": backbone, "resize": resize, **changes}
    return StudentConfig.model_validate(fields)


@functools.cache
def teacher() -> OnlineTeacher:
    return random_teacher()


def batch(patch: int) -> TrainBatch:
    """Of sides that are whole patches."""
    given = arrays([2, 0, 3])
    side = SIZE // patch * patch if patch else SIZE
    return train_batch({**given, "images": given["images"][:, :side, :side], "sizes": np.minimum(given["sizes"], side)})


def test_every_backbone_that_a_recipe_may_name_is_tried() -> None:
    assert {kind for kind, _ in READERS} == set(SIZES) == set(PUBLISHED)


@pytest.mark.parametrize(("kind", "family"), READERS)
def test_a_student_learns_on_any_backbone_and_plain_transformers_reads_it_alike(
    kind: str, family: str, tmp_path: Path
) -> None:
    config = Config.model_validate(
        {"student": sized(kind, family).model_dump(), "distillation": {"selection": EASY_SELECTION}}
    )
    student = silent_student(config.student, LABELS, seed=0)
    before = {name: value.clone() for name, value in student.backbone.named_parameters() if value.requires_grad}
    training = Training(config, student, teacher(), 2, torch.device("cpu"))
    for _ in range(2):
        training.train_step(batch(KINDS[kind].patch))
    after = dict(student.backbone.named_parameters())
    assert [name for name in before if after[name].grad is None] == []  # DDP waits for each
    assert sum(not after[name].equal(before[name]) for name in before) > 0.9 * len(before)
    assert student.memory_strides[-1] == (KINDS[kind].patch or 16)

    student.eval()
    save_detector(student, tmp_path, config.student.resize)
    plain, load = hf.AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(load.values())
    images, mask = torch.randn(2, 3, SIDE, SIDE), torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    with torch.inference_mode():
        mine, theirs = student(images, mask), plain.eval()(images, pixel_mask=mask)
        again = load_detector(tmp_path).eval()(images, mask)
    torch.testing.assert_close(mine.boxes_cxcywh[-1], theirs.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.boxes_cxcywh, again.boxes_cxcywh, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", SIZES)
def test_a_published_backbone_gives_its_weights_and_what_it_has_not_begins_anew(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = find_family("detr", "here")
    shape = family.trunk(silent_student(sized(kind), LABELS, seed=0).model).config
    torch.manual_seed(5)
    model = PUBLISHED[kind](shape).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error", UserWarning)
        student = build_student(sized(kind, backbone={"init": str(tmp_path)}), LABELS, seed=1).eval()
    trunk = family.trunk(student.model)
    theirs = {name.split(".", 1)[1] if kind in name else name: value for name, value in model.named_parameters()}
    same = [name for name, value in trunk.named_parameters() if name in theirs and value.equal(theirs[name])]
    anew = [name for name, _ in trunk.named_parameters() if name not in same and "hidden_states_norms" not in name]
    assert anew == []
    assert len(same) >= 0.8 * len(theirs)

    wider = {**SIZES[kind], "hidden_sizes": [2 * each for each in SIZES[kind]["hidden_sizes"]], "init": str(tmp_path)}
    with pytest.raises(QskdError, match="the checkpoint's sizes"):
        build_student(sized(kind, backbone=wider), LABELS, seed=1)
    with pytest.raises(QskdError, match=f"a model of type '?{kind}"):
        build_student(
            sized("convnext" if kind != "convnext" else "dinov2", backbone={"init": str(tmp_path)}), LABELS, 1
        )


@pytest.mark.parametrize("kind", [*SIZES, "resnet"])
def test_a_recipe_that_gives_no_size_has_the_checkpoint_s(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_sizes": (24,), "depths": (3,)}
    if not KINDS[kind].patch:
        sizes = {"hidden_sizes": (16, 32, 48, 64), "depths": (1, 2, 1, 1)}
    backbone_config(BackboneConfig.model_validate({"type": kind, **sizes}), 1).save_pretrained(tmp_path)
    recipe = Config.model_validate(
        {"student": {"backbone": {"type": kind, "init": str(tmp_path)}, "resize": {"size": 224}}}
    )
    for found in (resolve(recipe, "train").student.backbone, sized_by_init(recipe.student.backbone)):
        assert found.model_dump(include=set(sizes)) == sizes
    other = {"type": kind, "init": str(tmp_path), **sizes, "depths": tuple(2 * each for each in sizes["depths"])}
    assert (
        sized_by_init(BackboneConfig.model_validate(other)).depths == other["depths"]
    )  # and the student will be refused


@pytest.mark.parametrize("kind", SIZES)
def test_a_graph_on_any_backbone_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    detector = silent_student(sized(kind), LABELS, seed=0).eval()
    export_onnx(detector, tmp_path / "model.onnx", SIDE, batch=None)
    found = check_parity(detector, open_session(tmp_path / "model.onnx"), random_batches(SIDE, (1, 2)))
    require_parity(found, kind)
    assert max(one.logits for one in found) < 1e-4


@pytest.mark.parametrize(
    ("kind", "family", "changes", "words"),
    [
        ("dinov2", "rt_detr", {}, "rt_detr stands on one of .*convnext.*, backbone.type is dinov2"),
        ("convnext", "lw_detr", {}, "lw_detr stands on a lw_detr_vit, backbone.type is convnext"),
        (
            "dinov3_vit",
            "detr",
            {"resize": {"mode": "shortest_edge", "size": 112}},
            "dinov3_vit needs images .* its patches' side, 16: set resize",
        ),
        ("dinov2", "detr", {"resize": {"mode": "square", "size": 100}}, r"14: set resize: \{mode: square, size: 98\}"),
        ("dinov2", "detr", {"backbone": {"depths": [2, 2]}}, "gives one map: depths has 2"),
        ("convnext", "detr", {"backbone": {"depths": [2, 2]}}, "hidden_sizes has 3 stages but depths has 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(
    kind: str, family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        sized(kind, family, **changes)


def test_a_type_alone_has_the_sizes_of_a_published_one_and_the_dial_leaves_them() -> None:
    small = StudentConfig.model_validate({"size": "small", "backbone": {"type": "convnextv2"}})
    assert small.backbone.hidden_sizes == (40, 80, 160, 320)
    assert (small.width, small.backbone.depths) == (192, (2, 2, 6, 2))
    assert StudentConfig.model_validate({"backbone": {"type": "dinov2"}, "resize": {"mode": "square", "size": 448}})


def test_first_stages_are_frozen_where_there_are_stages_and_only_when_asked(tmp_path: Path) -> None:
    for kind, part in (
        ("convnext", "encoder.stages.0"),
        ("dinov3_convnext", "model.stages.0"),
        ("hgnet_v2", "embedder"),
    ):
        student = silent_student(sized(kind, frozen_stages=1), LABELS, seed=0)
        learns = {name for name, value in student.backbone.named_parameters() if value.requires_grad}
        assert learns
        assert not [name for name in learns if part in name]
    with pytest.raises(QskdError, match="a network of stages"):
        silent_student(sized("dinov2", frozen_stages=1), LABELS, seed=0)

    save_detector(silent_student(sized("dinov2"), LABELS, seed=0), tmp_path, sized("dinov2").resize)
    started = silent_student(StudentConfig(init=str(tmp_path), resize=sized("dinov2").resize), LABELS, seed=0)
    assert FACTS["detr"].frozen_stages == 1  # of a ResNet
    held = [name for name, value in started.backbone.named_parameters() if not value.requires_grad]
    assert [name.rpartition(".")[2] for name in held] == ["mask_token"]


def test_norms_that_are_not_there_are_said() -> None:
    with pytest.warns(UserWarning, match="a convnext has no batch norms"):
        build_student(sized("convnext", backbone_norm="frozen"), LABELS, seed=0)
    student = silent_student(sized("hgnet_v2"), LABELS, seed=0)
    assert any(isinstance(part, nn.BatchNorm2d) for part in student.backbone.modules())


@pytest.mark.parametrize("kind", SIZES)
def test_architectures_on_any_backbone_are_searched_and_built(kind: str) -> None:
    recipe = Config.model_validate(
        {"student": sized(kind, backbone={"hidden_sizes": [24] * len(SIZES[kind]["depths"])})}
    )
    fields = set()
    for seed in range(4):
        found = student_architecture.suggest(RandomTrial(seed), recipe)
        fields |= {name for name in found if name.startswith("student.backbone.")}
        tree = recipe.model_dump()
        for name, value in found.items():
            *path, last = name.split(".")
            place = tree
            for part in path:
                place = place[part]
            place[last] = value
        if seed == 0:
            silent_student(Config.model_validate(tree).student, LABELS, seed=0)
    assert ("student.backbone.embedding_size" in fields) == KINDS[kind].embeds


# One of each kind of layers: convolutions with batch norms, those of ConvNeXt, and the attention of two ViTs.
@pytest.mark.parametrize("kind", ["hgnet_v2", "convnextv2", "dinov2", "dinov3_vit"])
def test_a_student_of_eight_bits_on_any_backbone_learns_and_its_folder_and_graph_say_the_same(
    kind: str, tmp_path: Path
) -> None:
    tree = {
        "student": sized(kind, quantization={"bits": "w8a8", "rest_from": 0}).model_dump(),
        "distillation": {"method": "none"},
    }
    config = Config.model_validate(tree)
    training = Training(config, silent_student(config.student, LABELS, seed=0), None, 4, torch.device("cpu"))
    for _ in range(2):
        training.train_step(batch(KINDS[kind].patch))
    inside = activation_quantisers(training.student.backbone)
    assert inside
    assert {each.mode for each in inside.values()} == {"on"}
    assert bool(KINDS[kind].patch) == any(name.endswith(".attention") for name in inside)  # of queries with keys
    student = training.student.eval()
    save_detector(student, tmp_path, config.student.resize)
    loaded = load_detector(tmp_path).eval()
    images, mask = torch.randn(2, 3, SIDE, SIDE), torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    with torch.inference_mode():
        mine, again = student(images, mask), loaded(images, mask)
    torch.testing.assert_close(mine.boxes_cxcywh, again.boxes_cxcywh, atol=1e-5, rtol=0)
    export_onnx(loaded, tmp_path / "model.onnx", SIDE)
    found = check_parity(loaded, open_session(tmp_path / "model.onnx"), random_batches(SIDE, (1, 1)))
    require_parity(found, kind, TOLERANCE)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit"])
def test_the_layers_of_a_plain_vit_learn_the_slower_the_earlier_they_are_where_it_is_asked(kind: str) -> None:
    tree = {"student": sized(kind).model_dump(), "training": {"learning_rate": 1.0, "backbone_layer_decay": 0.5}}
    config = Config.model_validate({**tree, "distillation": {"selection": EASY_SELECTION}})
    student = silent_student(config.student, LABELS, seed=0)
    training = Training(config, student, teacher(), 2, torch.device("cpu"))
    named = {id(value): name for name, value in student.backbone.named_parameters()}
    rates = {named[id(p)]: g["scale"] for g in training.optimizer.param_groups for p in g["params"] if id(p) in named}
    first, last = (next(rate for name, rate in rates.items() if f"layer.{layer}." in name) for layer in (0, 1))
    embedded = next(rate for name, rate in rates.items() if "patch_embeddings" in name)
    assert (embedded, first, last) == (0.1 * 0.5**3, 0.1 * 0.5**2, 0.1 * 0.5)
    assert not [said for said in notices(config, 1.0) if "layer_decay" in said]
    stages = Config.model_validate({**tree, "student": sized("convnext").model_dump()})
    assert [said for said in notices(stages, 1.0) if "a convnext is no ViT" in said]


def test_a_plain_vit_sees_whole_patches_at_every_size_that_it_is_trained_at() -> None:
    student = silent_student(sized("dinov2"), LABELS, seed=0)
    assert find_family("detr", "here").image_unit(student.model.config) == 14
    tree = {"student": sized("dinov2").model_dump(), "augmentation": {"scales": [0.8, 1.0]}}
    (said,) = [said for said in notices(Config.model_validate(tree), 1.0) if "augmentation.scales" in said]
    assert "the student sees 84 to 112 pixels" in said


def test_sides_that_a_plain_vit_would_cut_are_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    config = sized("dinov2")
    save_detector(silent_student(config, LABELS, seed=0).eval(), tmp_path, config.resize)
    images, mask = torch.zeros(1, 3, SIDE, SIDE + 2), torch.ones(1, SIDE, SIDE + 2, dtype=torch.bool)
    with pytest.raises(QskdError, match=r"divisible by 14.*cut off"):
        load_detector(tmp_path)(images, mask)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"type": "dinov3_vit", "hidden_sizes": [30], "depths": [2]}, "30 is no multiple of 4"),
        (
            {"type": "convnext", "hidden_sizes": [8] * 6, "depths": [1] * 6},
            "a convnext of 6 stages needs images of 128 pixels",
        ),
    ],
)
def test_what_could_not_be_built_or_run_is_said_before(made: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StudentConfig.model_validate({**STUDENT, "backbone": made, "resize": {"size": 64}})


def test_heads_of_a_dinov3_have_channels_in_fours() -> None:
    made = sized("dinov3_vit", backbone={"hidden_sizes": [20]})
    images, mask = torch.zeros(1, 3, SIDE, SIDE), torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    assert silent_student(made, LABELS, seed=0)(images, mask).logits.isfinite().all()


@pytest.mark.parametrize("other", [{"patch_size": 2}, {"num_channels": 1}])
def test_a_checkpoint_of_other_strides_or_channels_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    shape = backbone_config(BackboneConfig.model_validate({"type": "convnext", **STAGES}), 1)
    (name, value), *_ = other.items()
    setattr(shape, name, value)
    shape.save_pretrained(tmp_path)
    with pytest.raises(QskdError, match=f"{name} {value}"):
        build_student(sized("convnext", backbone={"init": str(tmp_path)}), LABELS, seed=0)


def test_layer_decay_without_effect_is_said_of_a_checkpoint_too(tmp_path: Path) -> None:
    for kind, heard in (("convnextv2", 1), ("dinov2", 0)):
        config = sized(kind)
        save_detector(silent_student(config, LABELS, seed=0).eval(), tmp_path / kind, config.resize)
        tree = {"student": {"init": str(tmp_path / kind)}, "training": {"backbone_layer_decay": 0.5}}
        said = notices(Config.model_validate(tree), 1.0)
        assert len([each for each in said if "backbone_layer_decay" in each]) == heard
