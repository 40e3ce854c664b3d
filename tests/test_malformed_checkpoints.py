"""Malformed files of a checkpoint end in an error that names the file, in bounded time and memory."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change, copied, make
from safetensors.torch import load_file, save_file
from tiny import LABELS, STUDENT, silent_student

from qskd.checkpoints.json_files import MOST_BYTES, read_json_file
from qskd.config import StudentConfig
from qskd.detectors import build_student, load_detector, read_config, read_preprocessing
from qskd.errors import QskdError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: make(family, tmp_path_factory.mktemp("made") / family) for family in ("conditional_detr", "rt_detr_v2")
    }


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    return copied(saved["conditional_detr"], tmp_path / "checkpoint")


# --- safetensors ----------------------------------------------------------------------------------------------------
def header(entries: Any, length: int | None = None, body: int = 64) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * body


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD_WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x08\0\0",
    "long header": header({}, 10**18),
    "no header": header({}, 2**63),
    "list": header([]),
    "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "overlap": header({"a": entry([16], 0, 64), "b": entry([8], 32, 64)}),
    "beyond": header({"a": entry([32], 0, 128)}),
    "enormous": header({"a": entry([10**9, 10**9], 0, 64)}),
    "overflow": header({"a": entry([2**40, 2**40], 0, 64)}),
    "negative": header({"a": entry([-16], 0, 64)}),
    "type": header({"a": entry([16], 0, 64, "F99")}),
    "quantised": header({"a": entry([64], 0, 64, "F8_E4M3")}),
    "name": header({"a\x1b[2J\n": entry([16], 0, 64)}),
    "long name": header({"a" * 10**6: entry([16], 0, 64)}),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_malformed_safetensors_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / "model.safetensors").write_bytes(BAD_WEIGHTS[name])
    with pytest.raises(QskdError, match=r"model\.safetensors") as caught:
        load_detector(folder)
    assert len(str(caught.value)) < 2000
    assert "\x1b" not in str(caught.value)


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["class_labels_classifier.weight"] = state["class_labels_classifier.weight"].long()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QskdError, match=r"class_labels_classifier\.weight is of type I64"):
        load_detector(folder)


# --- config.json ----------------------------------------------------------------------------------------------------
BAD_FIELDS: dict[str, tuple[str, Any]] = {
    "a width of 10^9": ("d_model", 10**9),
    "a width that fits no memory": ("d_model", 2**20),
    "too many queries": ("num_queries", 2**20),
    "no number": ("num_queries", "a"),
    "negative": ("num_queries", -1),
    "null": ("encoder_layers", None),
    "not a number": ("dropout", float("nan")),
    "infinite": ("init_std", float("inf")),
    "400 digits": ("encoder_ffn_dim", 10**400),
    "by another name": ("hidden_size", 10**400),
    "many layers": ("decoder_layers", 10**6),
    "other sizes": ("encoder_ffn_dim", 48),
    "no heads": ("encoder_attention_heads", 0),
    "heads that don't divide": ("encoder_attention_heads", 7),
    "an activation that is none": ("activation_function", "__import__('os')"),
    "a list": ("d_model", [1]),
    "classes in a list": ("id2label", ["cat"]),
    "no class": ("id2label", {}),
    "a number for a class": ("id2label", {"0": 1}),
    "a class that is no number": ("id2label", {"zero": "cat"}),
    "a negative class": ("id2label", {"-1": "cat"}),
    "a long class": ("id2label", {"0": "c" * 10**6}),
    "many classes": ("num_labels", 10**9),
    "classes below none": ("num_labels", -3),
    "architectures": ("architectures", "DetrForObjectDetection\x1b"),
    "no type": ("model_type", None),
    "a list of types": ("model_type", ["detr"]),
    "a long type": ("model_type", "\x1b" * 10**6),
    "a list for a backbone": ("backbone_config", [1]),
    "a timm switch": ("use_timm_backbone", "yes"),
}
BAD_BACKBONES: dict[str, tuple[str, Any]] = {
    "depths": ("depths", [10**6, 1]),
    "many stages": ("depths", [1] * 10**5),
    "widths": ("hidden_sizes", [10**9, 16]),
    "other widths": ("hidden_sizes", [8, 24]),
    "no widths": ("hidden_sizes", ["a", None]),
    "stages": ("out_features", ["stage9"]),
    "indices": ("out_indices", [10**400]),
    "type": ("layer_type", "x" * 10**6),
}


def refused_within_bounds(folder: Path) -> None:
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(QskdError) as caught:
        load_detector(folder)
    assert time.monotonic() - begun < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_field_that_no_detector_has_is_refused(folder: Path, name: str) -> None:
    field, value = BAD_FIELDS[name]
    change(folder, {field: value})
    refused_within_bounds(folder)


@pytest.mark.parametrize("name", BAD_BACKBONES)
def test_a_backbone_s_field_that_no_detector_has_is_refused(folder: Path, name: str) -> None:
    backbone = json.loads((folder / "config.json").read_text())["backbone_config"]
    field, value = BAD_BACKBONES[name]
    change(folder, {"backbone_config": backbone | {field: value}})
    refused_within_bounds(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_feature_levels", 10**6),
        ("anchor_image_size", [10**6, 10**6]),
        ("anchor_image_size", 7),
        ("feat_strides", [0, 0]),
        ("hidden_expansion", 1e300),
        ("hidden_expansion", 1e6),
        ("decoder_in_channels", [10**6] * 2),
        ("decoder_n_points", 255),
    ],
)
def test_a_field_of_the_hybrid_families_is_refused_too(
    saved: dict[str, Path], tmp_path: Path, field: str, value: Any
) -> None:
    folder = copied(saved["rt_detr_v2"], tmp_path / "checkpoint")
    change(folder, {field: value})
    refused_within_bounds(folder)


def test_the_message_names_the_field(folder: Path) -> None:
    change(folder, {"num_queries": 10**400})
    with pytest.raises(QskdError, match=r"config\.json: num_queries: a number of about 401 digits\n.*1 to 1048576"):
        read_config(folder)
    change(folder, {"num_queries": 2**19})
    with pytest.raises(QskdError, match=r"query_position_embeddings\.weight is \[6, 32\] in .*\n.*\[524288, 32\]"):
        load_detector(folder)


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "a number": b"7",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "many digits": b'{"model_type": ' + b"9" * 10_000 + b"}",
    "other bytes": b"\xff\xfe\x00{",
    "half": b'{"model_type": "detr", ',
}


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_is_no_object_is_refused_by_name(folder: Path, file: str, content: str) -> None:
    (folder / file).write_bytes(CONTENTS[content])
    with pytest.raises(QskdError, match=file) as caught:
        read_preprocessing(folder)
    assert len(str(caught.value)) < 1000


def test_a_file_larger_than_any_configuration_is_not_read_whole(folder: Path) -> None:
    with open(folder / "config.json", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(QskdError, match=r"config\.json: more than 16777216 bytes"):
        read_json_file(folder / "config.json")
    with pytest.raises(QskdError, match=r"config\.json: more than"):
        load_detector(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_mean", 0.5),
        ("image_mean", ["a", "b", "c"]),
        ("image_mean", [10**400, 0, 0]),
        ("image_mean", [float("nan"), 0, 0]),
        ("image_std", [0, 0, 0]),
        ("image_std", {}),
        ("do_normalize", "yes"),
        ("do_rescale", []),
        ("rescale_factor", "1/255"),
        ("size", [64, 64]),
        ("size", "64"),
        ("size", {"height": "64", "width": "64"}),
        ("size", {"height": -64, "width": -64}),
        ("size", {"height": 10**400, "width": 10**400}),
        ("size", {"shortest_edge": 10**9}),
        ("size", {"shortest_edge": 64, "longest_edge": [1]}),
        ("size", {"shortest_edge": True}),
        ("size", {}),
    ],
)
def test_an_image_processor_s_field_of_the_wrong_type_is_refused(folder: Path, field: str, value: Any) -> None:
    change(folder, {field: value}, "preprocessor_config.json")
    with pytest.raises(QskdError, match=f"{field}|NaN is no JSON" if field != "size" else "image processor of"):
        read_preprocessing(folder)


def test_a_backbone_to_start_from_is_checked_alike(folder: Path, tmp_path: Path) -> None:
    resnet = tmp_path / "resnet"
    student = silent_student(StudentConfig.model_validate(STUDENT), LABELS, 0)
    student.backbone.get_submodule("model").save_pretrained(resnet)
    config = StudentConfig.model_validate({**STUDENT, "backbone": {**STUDENT["backbone"], "init": str(resnet)}})
    build_student(config, LABELS, 0)
    for fields, words in (
        ({"model_type": ["resnet"]}, "a model of type a list"),
        ({"num_channels": 10**400}, "num_channels: a number of about 401 digits"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised weights"),
    ):
        place = copied(resnet, tmp_path / next(iter(fields)))
        change(place, fields)
        spoiled = config.backbone.model_copy(update={"init": str(place)})
        with pytest.raises(QskdError, match=words):
            build_student(config.model_copy(update={"backbone": spoiled}), LABELS, 0)
