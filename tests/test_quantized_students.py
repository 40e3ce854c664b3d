"""Students with few bits in training: each family, what keeps 8 bits, stages, resuming, and the folder that is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection

from qskd.config import StudentConfig
from qskd.detectors import Detector, build_student, checkpoint_digests, load_detector, save_detector
from qskd.errors import QskdError
from qskd.quantization.files import FILE, quantisers_of, read_quantisers, restore_quantisers
from qskd.quantization.model import activation_quantisers, belongs_to_quantiser, part_of, set_mode, weight_quantisers
from qskd.quantization.quantiser import ActivationQuantiser, SavedActivation, WeightQuantiser
from qskd.quantization.size import megabytes
from qskd.training.groups import parameter_groups
from qskd.training.step import Training

ONE = {"decoder_layers": 1}  # of Deformable DETR there are two at least
FAMILIES: dict[str, dict[str, Any]] = {
    "detr": {**tiny.own("detr"), **ONE},
    "conditional_detr": {**tiny.own("conditional_detr"), **ONE},
    "rt_detr": {**tiny.own("rt_detr"), **ONE, "resize": {"mode": "square", "size": tiny.SIZE}},
    "deformable": dict(tiny.FAMILIES["deformable"]),
    "refined": dict(tiny.FAMILIES["refined"]),
}
PIXELS = torch.randn(2, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(5))
WHOLE = torch.ones(2, tiny.SIZE, tiny.SIZE, dtype=torch.bool)


def begin(family: str, quantization: Any = "w4a4-attn8", *options: str, total: int = 5) -> Training:
    bits = {"bits": quantization} if isinstance(quantization, str) else quantization or {}
    student = {**FAMILIES[family], "quantization": {"rest_from": 0, **bits} if bits else None}
    return tiny.make_training(tiny.recipe(student, "distillation.method=none", *options), None, total)


def trained(family: str, quantization: Any = "w4a4-attn8", *options: str, steps: int = 3) -> Training:
    training = begin(family, quantization, *options)
    for seed in range(steps):
        training.train_step(tiny.batch_of(2, 1, seed=seed))
    return training


def detect(detector: Detector) -> list[Tensor]:
    with torch.no_grad():
        output = detector.eval()(PIXELS, WHOLE)
    return [output.logits, output.boxes_cxcywh, output.query_states]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_with_every_quantiser_on(family: str) -> None:
    training = begin(family)
    before = {name: value.clone() for name, value in training.student.state_dict().items()}
    for seed in range(3):
        training.train_step(tiny.batch_of(2, 1, seed=seed))
        assert training.whole == (seed >= 0)  # one step is watched
    training.check_finite()
    model = training.student.model
    weights, activations = weight_quantisers(model), activation_quantisers(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert {id(layer.weight) for layer in layers} == {id(layer.weight) for layer, _ in weights.values()}
    assert {each.mode for each in activations.values()} == {"on"}
    learning = {name: each for name, each in training.module.named_parameters() if each.requires_grad}
    assert [name for name, each in learning.items() if each.grad is None] == []
    own = [name for name in learning if belongs_to_quantiser(name)]
    assert own
    # Zero is not moved where nothing is clipped, as after a ReLU; a step always is.
    still = [name for name in own if torch.equal(before[name.removeprefix("student.")], learning[name])]
    assert [name for name in still if not name.endswith("zero")] == []
    assert training.evaluation_weights().__enter__() is training.student


@pytest.mark.parametrize("family", ["conditional_detr", "refined"])
def test_groups_of_queries_learn_through_the_same_quantisers(family: str) -> None:
    training = trained(family, "w4a4", "detection.query_groups=3", steps=2)
    training.check_finite()
    learning = [each for each in training.module.parameters() if each.requires_grad]
    assert not [each for each in learning if each.grad is None]


def test_parts_that_are_not_named_stay_in_float() -> None:
    training = trained("rt_detr", {"bits": "w4a4", "parts": ["encoder", "heads"]}, steps=1)
    parts = {name.partition(".layers")[0].partition(".weight")[0] for name in quantisers_of(training.student.model)[1]}
    assert not [name for name in parts if "backbone" in name]
    assert [name for name in parts if name.startswith("model.decoder.") and "_embed" not in name] == []
    assert any(name.startswith("model.encoder.") for name in parts)
    assert any("bbox_embed" in name for name in parts)


def test_a_student_in_float_has_nothing_of_it() -> None:
    training = tiny.make_training(tiny.recipe(FAMILIES["refined"], "distillation.method=none"), None)
    assert training.stages is None
    assert training.whole
    assert not [name for name in training.student.state_dict() if belongs_to_quantiser(name)]


def test_the_backbone_comes_first_and_the_rest_later() -> None:
    training = begin("refined", {"bits": "w4a4", "rest_from": 2})
    seen = []
    for seed in range(4):
        training.train_step(tiny.batch_of(2, 1, seed=seed))
        modes = {name.split(".")[1] == "backbone": each.mode for name, each in training.stages.activations.items()}  # type: ignore[union-attr]
        seen.append((modes[True], modes[False], training.whole))
    assert seen == [("on", "off", False), ("on", "observing", False), ("on", "on", True), ("on", "on", True)]


def test_a_stage_that_would_never_come_is_refused() -> None:
    with pytest.raises(QskdError, match="rest_from"):
        begin("refined", {"bits": "w4a4", "rest_from": 4}, total=5)


def test_a_stopped_training_goes_on_exactly_whatever_the_stage(tmp_path: Path) -> None:
    """Twenty steps would watch two: it is stopped while the backbone is watched, after that, and while the rest is."""
    quantization = {"bits": "w4a4-attn8", "rest_from": 2}
    options = ("training.ema_decay=0.9", "student.dropout=0.1")
    whole, steps, stops = begin("refined", quantization, *options, total=20), 5, (1, 2, 3)
    for seed in range(steps):
        whole.train_step(tiny.batch_of(2, 1, seed=seed))
        if seed + 1 in stops:
            save_file(whole.state(), tmp_path / f"{seed + 1}.safetensors")
    assert whole.whole
    for stop in stops:
        again = begin("refined", quantization, *options, total=20)
        again.load_state(load_file(tmp_path / f"{stop}.safetensors"), stop)
        for seed in range(stop, steps):
            again.train_step(tiny.batch_of(2, 1, seed=seed))
        tiny.assert_equal(again.state(), whole.state())


def test_quantisers_learn_at_the_full_rate_and_without_weight_decay() -> None:
    training = begin("refined", "w4a4", "training.backbone_learning_rate_scale=0.1")
    names = {id(each): name for name, each in training.module.named_parameters()}
    for group in training.optimizer.param_groups:
        own = [names[id(each)] for each in group["params"] if belongs_to_quantiser(names[id(each)])]
        if own:
            assert group["scale"] == 1.0
            assert group["weight_decay"] == 0.0
            assert len(own) == len(group["params"])
    assert parameter_groups(training.module, training.config.training)[0]["scale"] == 1.0


def test_an_average_begins_with_the_quantisers_as_they_begin() -> None:
    training = begin("conditional_detr", "w4a4", "training.ema_decay=0.9")
    training.train_step(tiny.batch_of(2, 1))
    state = training.student.state_dict()
    own = [name for name in state if belongs_to_quantiser(name)]
    assert len(own) > 100
    assert [name for name in own if not torch.equal(training.average[name], state[name])] == []


@pytest.mark.parametrize("frozen", [{"train_backbone": False}, {"frozen_stages": 1}])
def test_layers_that_keep_their_weights_keep_their_quantisers(frozen: dict[str, Any]) -> None:
    student = {**FAMILIES["refined"], **frozen, "quantization": "w4a4"}
    training = tiny.make_training(tiny.recipe(student, "distillation.method=none"), None, 5)
    training.train_step(tiny.batch_of(2, 1))
    stem = training.student.model.get_submodule("model.backbone.model.embedder.embedder.convolution")
    found = [each.clone() for each in stem.parameters()]
    training.train_step(tiny.batch_of(1, 3, seed=1))
    assert not any(each.requires_grad for each in stem.parameters())
    assert [each for each, now in zip(found, stem.parameters(), strict=True) if not torch.equal(each, now)] == []
    assert stem.weight_quantiser.mode == stem.input_quantiser.mode == "on"  # type: ignore[union-attr]


def test_a_quantised_student_inherits_as_one_in_float_does() -> None:
    from qskd.detectors import inherit

    def inherited(quantization: Any) -> dict[str, Tensor]:
        config = tiny.recipe({**FAMILIES["refined"], "quantization": quantization}).student
        student = tiny.silent_student(config, tiny.LABELS, 0)
        teacher = tiny.silent_student(tiny.recipe({**tiny.TEACHER, **FAMILIES["refined"]}).student, tiny.LABELS, 3)
        done = inherit(student, teacher, [0, 1, 2])
        assert done.backbone
        return {name: value for name, value in student.state_dict().items() if not belongs_to_quantiser(name)}

    tiny.assert_equal(inherited("w4a4"), inherited(None))


def test_under_autocast_quantisers_count_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = set()
    real = torch._fake_quantize_learnable_per_tensor_affine

    def noted(x: Tensor, *rest: Any) -> Tensor:
        kinds.add(x.dtype)
        return real(x, *rest)

    monkeypatch.setattr(torch, "_fake_quantize_learnable_per_tensor_affine", noted)
    training = trained("rt_detr", "w4a4", "compute.precision=bfloat16", steps=2)
    training.check_finite()
    assert kinds == {torch.float32}


# ---- the folder


BITS = "w3a2-attn4"
Saved = dict[str, tuple[Path, list[Tensor], list[Tensor]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """By family: a folder, what its student said, and what it said with its activations in float."""
    found = {}
    for family in FAMILIES:
        training = trained(family, BITS, "training.ema_decay=0.9")
        folder = tmp_path_factory.mktemp("students") / family
        with training.evaluation_weights() as student:
            save_detector(student, folder, training.config.student.resize)
            said = detect(student)
            for quantiser in activation_quantisers(student.model).values():
                quantiser.mode = "off"
            in_float = detect(student)
        found[family] = (folder, said, in_float)
    return found


def test_the_first_and_the_last_layers_and_what_says_where_have_eight_bits(saved: Saved) -> None:
    said = {family: read_quantisers(folder / FILE)[1] for family, (folder, _, _) in saved.items()}
    eight = {
        family: {name.rpartition(".")[0] for name, bits in each.items() if bits == 8} for family, each in said.items()
    }
    stem = "model.backbone.model.embedder.embedder.convolution"
    assert eight["detr"] == {stem, "class_labels_classifier", "bbox_predictor.layers.2"}
    assert eight["conditional_detr"] == eight["detr"] | {"model.decoder.ref_point_head.layers.1"}
    sampled = ("encoder.layers.0.self_attn", "decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn")
    offsets = {f"model.{part}.sampling_offsets" for part in sampled}
    assert offsets <= eight["refined"]
    assert "model.reference_points" in eight["refined"]
    for family, each in said.items():
        kinds = {
            name.rpartition(".")[2]: bits for name, bits in each.items() if name.rpartition(".")[0] not in eight[family]
        }
        expected = {"weight": 3, "input": 2, "query": 4, "key": 4, "attention": 4, "value": 4}
        assert kinds == expected, family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_says_what_it_said_in_training(family: str, saved: Saved) -> None:
    folder, said, in_float = saved[family]
    assert not torch.allclose(said[0], in_float[0], atol=1e-3)  # activations' bits do matter
    for found, expected in zip(detect(load_detector(folder)), said, strict=True):
        assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_the_quantised_weights_and_no_more(family: str, saved: Saved) -> None:
    folder, said, in_float = saved[family]
    model, info = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    steps = load_file(folder / FILE)
    checked = 0
    for name, layer in model.named_modules():
        if f"{name}.weight.step" in steps:
            step = steps[f"{name}.weight.step"].view(-1, *[1] * (layer.weight.dim() - 1))
            levels = layer.weight.detach() / step
            assert (levels - levels.round()).abs().max() < 1e-3
            assert len(levels.round().unique()) <= 256
            checked += 1
    assert checked == sum(name.endswith("weight.step") for name in steps) > 20
    for found, expected in zip(detect(load_detector(folder, quantised=False)), in_float, strict=True):
        assert (found - expected).abs().max() <= 1e-5
    restore_quantisers(model.eval(), folder / FILE)
    with torch.no_grad():
        boxes = model(PIXELS, pixel_mask=WHOLE).pred_boxes
    assert (boxes - said[1][-1]).abs().max() <= 1e-5


def test_what_was_loaded_is_saved_again_as_it_was(saved: Saved, tmp_path: Path) -> None:
    folder, said, _ = saved["refined"]
    loaded = load_detector(folder)
    save_detector(loaded, tmp_path / "again", tiny.recipe().student.resize)
    for file in ("model.safetensors", FILE):
        tiny.assert_equal(load_file(tmp_path / "again" / file), load_file(folder / file))
    assert (detect(load_detector(tmp_path / "again"))[0] - said[0]).abs().max() <= 1e-5
    assert json.loads((folder / "config.json").read_text())["qskd_quantization"]["bits"] == BITS


def test_a_student_that_is_partly_quantised_is_saved_as_it_is(tmp_path: Path) -> None:
    training = begin("refined", {"bits": "w4a4", "rest_from": 3})
    for seed in range(2):
        training.train_step(tiny.batch_of(2, 1, seed=seed))
    with training.evaluation_weights() as student:
        save_detector(student, tmp_path / "student", training.config.student.resize)
        said = detect(student)
    loaded = load_detector(tmp_path / "student")
    kinds = {name.split(".")[1] for name, each in loaded.model.named_modules() if isinstance(each, SavedActivation)}
    assert kinds == {"backbone"}
    assert (detect(loaded)[0] - said[0]).abs().max() <= 1e-5


def test_a_student_starts_from_another_s_quantised_weights_and_watches_anew(saved: Saved) -> None:
    folder = saved["refined"][0]
    student = {"init": str(folder), "resize": {"size": tiny.SIZE}}
    plain = tiny.silent_student(tiny.recipe().student.model_validate(student), tiny.LABELS, 0)
    assert not [each for each in plain.modules() if isinstance(each, SavedActivation)]
    again = tiny.silent_student(
        tiny.recipe().student.model_validate({**student, "quantization": "w8a8"}), tiny.LABELS, 0
    )
    assert {each.mode for each in again.modules() if isinstance(each, WeightQuantiser | ActivationQuantiser)} == {"off"}
    state = load_file(folder / "model.safetensors")
    for name, value in again.model.state_dict().items():
        assert belongs_to_quantiser(name) or name not in state or torch.equal(value, state[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_starts_from_a_folder_learns_with_every_quantiser_on(family: str, saved: Saved) -> None:
    student = {
        "init": str(saved[family][0]),
        "resize": {"mode": "square", "size": tiny.SIZE},
        "quantization": "w4a4-attn8",
    }
    training = tiny.make_training(tiny.recipe(student, "distillation.method=none"), None, 5)
    for seed in range(2):
        training.train_step(tiny.batch_of(2, 1, seed=seed))
    found = [each for each in training.student.modules() if isinstance(each, WeightQuantiser | ActivationQuantiser)]
    assert {each.mode for each in found} == {"on"}


def test_quantisers_are_part_of_what_a_checkpoint_is(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved["refined"][0], tmp_path / "other")
    steps = load_file(tmp_path / "other" / FILE)
    name = next(each for each in steps if each.endswith("input.step"))
    before = checkpoint_digests(tmp_path / "other")
    metadata = _metadata(tmp_path / "other" / FILE)
    save_file({**steps, name: steps[name] * 2}, tmp_path / "other" / FILE, metadata=metadata)
    assert checkpoint_digests(tmp_path / "other") != before


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("wrong", ["gone", "cut", "of another", "zero point", "no step", "bits", "nan"])
def test_a_folder_whose_quantisers_are_damaged_is_refused_by_file(wrong: str, saved: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(saved["refined"][0], folder)
    file = folder / FILE
    steps, metadata = load_file(file), _metadata(file)
    name = next(each for each in steps if each.endswith("input.step"))
    if wrong == "gone":
        file.unlink()
    elif wrong == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif wrong == "of another":
        shutil.copy(saved["detr"][0] / FILE, file)
    elif wrong == "zero point":
        place = name.replace("step", "zero_point")
        save_file({**steps, place: torch.full_like(steps[place], 999)}, file, metadata=metadata)
    elif wrong == "no step":
        save_file({each: value for each, value in steps.items() if each != name}, file, metadata=metadata)
    elif wrong == "bits":
        save_file(steps, file, metadata={**metadata, "bits": json.dumps({"x": 77})})
    else:
        save_file({**steps, name: steps[name] * float("nan")}, file, metadata=metadata)
    with pytest.raises(QskdError) as caught:
        load_detector(folder)
    assert "quantization" in str(caught.value)
    load_detector(folder, quantised=False)  # the weights are still there


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_at_its_bits_is_counted_of_what_is_saved(family: str, saved: Saved) -> None:
    folder = saved[family][0]
    tensors, bits, _ = read_quantisers(folder / FILE)
    model = load_detector(folder).model
    in_float = load_file(folder / "model.safetensors")  # what is shared is there once
    expected = sum(each.numel() * each.element_size() for each in [*in_float.values(), *tensors.values()])
    for name in bits:
        if name.endswith(".weight"):
            numbers = model.get_parameter(name).numel()
            expected -= 4 * numbers - numbers * bits[name] // 8
    assert 1e6 * megabytes(model) == pytest.approx(expected, abs=8 * len(bits))  # batch counters, and what fills a byte
    assert megabytes(build_student_of(family).model) == pytest.approx(megabytes(model), rel=0.01)
    plain = AutoModelForObjectDetection.from_pretrained(folder)
    assert megabytes(plain) > 2 * megabytes(model)


def build_student_of(family: str) -> Detector:
    student = {**FAMILIES[family], "quantization": BITS}
    return tiny.silent_student(tiny.recipe(student).student, tiny.LABELS, 0)


def test_a_folder_in_float_has_no_such_file(tmp_path: Path) -> None:
    student = tiny.silent_student(tiny.recipe().student, tiny.LABELS, 0)
    save_detector(student, tmp_path / "student", tiny.recipe().student.resize)
    assert not (tmp_path / "student" / FILE).exists()
    assert "qskd_quantization" not in json.loads((tmp_path / "student" / "config.json").read_text())


def test_a_quantised_student_s_folder_is_qskd_s_own_and_is_replaced(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved["refined"][0], tmp_path / "student")
    float_student = tiny.silent_student(tiny.recipe().student, tiny.LABELS, 0)
    save_detector(float_student, tmp_path / "student", tiny.recipe().student.resize)
    assert not (tmp_path / "student" / FILE).exists()


def test_modes_can_be_set_for_all() -> None:
    training = trained("detr", steps=1)
    assert {each.mode for each in activation_quantisers(training.student.model).values()} == {"on"}
    set_mode(training.student.model, "off")
    assert {each.mode for each in activation_quantisers(training.student.model).values()} == {"off"}


def test_all_is_quantised_at_once_where_layers_are_trained_and_halfway_where_they_begin_at_random() -> None:
    for said, step in (({}, 50), ({"inherit": True}, 0), ({"init": "somewhere"}, 0)):
        for own, expected in ((None, step), (0, 0), (0.25, 25), (7, 7)):
            bits = {"bits": "w8a8"} if own is None else {"bits": "w8a8", "rest_from": own}
            taken = StudentConfig.model_validate({**said, "quantization": bits}).quantization_taken
            assert taken is not None
            assert taken.rest_step(100) == expected
    student = tiny.recipe({**FAMILIES["detr"], "quantization": "w8a8"})
    training = tiny.make_training(tiny.recipe(student.student.model_dump(), "distillation.method=none"), None, 20)
    assert {part_of(name) for name, step in training.stages.begins.items() if step == 0} == {"backbone"}
    assert set(training.stages.begins.values()) == {0, 10}


@pytest.mark.parametrize(
    ("said", "warns"),
    [
        ({"quantization": {"bits": "w8a8", "rest_from": 0}}, True),
        ({"quantization": "w8a8"}, False),
        ({"quantization": {"bits": "w8a8", "rest_from": 0.5}}, False),
        ({"quantization": {"bits": "w8a8", "parts": ["backbone"]}}, False),
        ({"quantization": "w8a8", "inherit": True}, False),
        ({}, False),
    ],
)
def test_ranges_of_layers_that_begin_at_random_are_warned_of(
    said: dict[str, Any], warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    build_student(tiny.recipe({**FAMILIES["detr"], **said}).student, tiny.LABELS, 0)
    assert any("student.quantization.rest_from = 0" in str(each.message) for each in recwarn) == warns
