"""A detector in an ONNX file as a teacher: what is told of it is what it does, in every form that files have."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_loader import Pictures
from test_teacher_cache import losses, make_cache, stream_of
from tiny import STUDENT, shake, silent_student
from tiny import own as own_fields

import qskd
from pipelines.demo.quickstart import TEACHER
from pipelines.deployment.export import ExportOptions, foresee
from pipelines.health.checkpoint import model_checks
from pipelines.inspection.results import ids_for
from pipelines.reporting.cards import figures
from qskd.boxes import cxcywh_to_xyxy
from qskd.checks import check_cache
from qskd.config import Config, ResizeConfig, StudentConfig
from qskd.config.recipe import apply_overrides, build
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.datasets.views import resized_size
from qskd.deploy.export import export_onnx
from qskd.detectors import checkpoint_digests, describe_student, load_detector, read_preprocessing, save_detector
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher, start_student
from qskd.structures import SILENT_LOGIT, TeacherNeeds
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.identity import cache_identity, teachers_preprocessing
from qskd.teacher.several.checks import check_several_teachers
from qskd.teacher.several.members import members_of
from qskd.teacher.told.checks import check_told

torch.set_num_threads(1)
SIDE, QUERIES = 64, 30
WORDS: dict[str, Any] = {
    **{"classes": {"1": "three", "2": "eight", "4": "nine"}, "boxes": "xyxy", "units": "pixels"},
    **{"resize": "square", "mean": [0, 0, 0], "std": [1, 1, 1]},
}
# Of every picture: x0, y0, x1, y1 in pixels, score, label.
ROWS = np.array(
    [[8, 16, 40, 48, 0.9, 1], [8, 16, 40, 48, 0.4, 2], [32, 0, 64, 32, 0.7, 4], [0, 0, 0, 0, 0, 0]], np.float32
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's detector of shapes beside its own ONNX file, of any batch."""
    folder = tmp_path_factory.mktemp("own")
    for file in TEACHER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    export_onnx(load_detector(TEACHER), folder / "model.onnx", SIDE, batch=None)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(22), path, rows_per_shard=8, rows_per_group=3)
    return path


def said(folder: Path, words: Mapping[str, Any] | None = None, name: str = "other.onnx") -> Path:
    file = folder / name
    if words is not None:
        (folder / f"{name}.json").write_text(json.dumps(words))
    return file


def by_hand(own: Path, folder: Path) -> Path:
    """The same network as somebody else writes it: pixels in 0..1 in; corners in pixels, scores, and labels from 1 out."""
    model = onnx.load(str(own / "model.onnx"))
    graph, looks = model.graph, read_preprocessing(own)
    for name, value in {
        "mean": np.array(looks.mean, np.float32).reshape(1, 3, 1, 1),
        "std": np.array(looks.std, np.float32).reshape(1, 3, 1, 1),
        **{"half": np.float32(0.5), "side": np.float32(SIDE), "from_one": np.int64(1)},
        **{"two": np.array([2, 2]), "last": np.array([-1])},
    }.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    node, network = helper.make_node, list(graph.node)
    graph.input[0].name = "images"
    del graph.node[:], graph.output[:]
    graph.node.extend(
        [
            node("Sub", ["images", "mean"], ["shifted"]),
            node("Div", ["shifted", "std"], ["pixel_values"]),
            *network,
            node("Split", ["pred_boxes", "two"], ["centre", "size"], axis=-1),
            node("Mul", ["size", "half"], ["half_size"]),
            node("Sub", ["centre", "half_size"], ["low"]),
            node("Add", ["centre", "half_size"], ["high"]),
            node("Concat", ["low", "high"], ["corners"], axis=-1),
            node("Mul", ["corners", "side"], ["boxes"]),
            node("Sigmoid", ["logits"], ["probabilities"]),
            node("ReduceMax", ["probabilities", "last"], ["scores"], keepdims=0),
            node("ArgMax", ["logits"], ["best"], axis=-1, keepdims=0),
            node("Add", ["best", "from_one"], ["labels"]),
        ]
    )
    number, real = TensorProto.INT64, TensorProto.FLOAT
    for name, kind, shape in (("labels", number, ()), ("boxes", real, (4,)), ("scores", real, ())):
        graph.output.append(helper.make_tensor_value_info(name, kind, ["n", QUERIES, *shape]))
    onnx.save(model, str(folder / "hand.onnx"))
    names = {str(slot + 1): name for slot, name in enumerate(load_detector(own).labels)}
    return said(folder, WORDS | {"classes": names}, "hand.onnx")


def small(
    file: Path,
    rows: np.ndarray = ROWS,
    form: str = "detections",
    shape: Sequence[int | str] = ("n", 3, SIDE, SIDE),
    kind: int = TensorProto.FLOAT,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A graph that says `rows` of every picture (of a batch of one where it has no batch), each score times the picture's mean."""
    node, factor = helper.make_node, np.array([0, 0, 0, 0, 1, 0], np.float32)
    stored = [("rows", rows[None]), ("factor", factor), ("other", 1 - factor), ("parts", np.array([4, 1, 1]))]
    stored.append(("pixel_axes", np.array([-3, -2, -1])))
    nodes = [
        node("ReduceMean", ["images", "pixel_axes"], ["mean"], keepdims=1),
        node("Cast", ["mean"], ["bright"], to=TensorProto.FLOAT),
        node("Squeeze", ["bright", "flat"], ["each"]),
        node("Mul", ["each", "factor"], ["scaled"]),
        node("Add", ["scaled", "other"], ["times"]),
        node("Mul", ["rows", "times"], ["output0"]),
    ]
    stored.append(("flat", np.array([1] if len(shape) == 4 else [], np.int64)))
    batch = shape[0] if len(shape) == 4 else 1
    outputs = [("output0", [batch, len(rows), 6])]
    if form != "rows":
        nodes.append(node("Split", ["output0", "parts"], ["boxes", "score", "label"], axis=-1))
        stored.append(("end", np.array([-1])))
        nodes.append(node("Squeeze", ["label", "end"], ["labels"]))
        if form == "scored":
            nodes.append(node("Concat", ["boxes", "score"], ["dets"], axis=-1))
            outputs = [("dets", [batch, len(rows), 5]), ("labels", [batch, len(rows)])]
        else:
            nodes.append(node("Squeeze", ["score", "end"], ["scores"]))
            outputs = [("boxes", [batch, len(rows), 4]), ("scores", [batch, len(rows)]), ("labels", [batch, len(rows)])]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", kind, list(shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(size)) for name, size in outputs],
        [numpy_helper.from_array(value, name) for name, value in stored],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(file))
    return file


def ask(file: Path, pixels: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> Any:
    given = torch.ones(1, 3, SIDE, SIDE) if pixels is None else pixels
    with torch.no_grad():
        return load_detector(file)(given, torch.ones(given[:, 0].shape, dtype=torch.bool) if mask is None else mask)


def config_of(shards: str, file: Path, *overrides: str) -> Config:
    tree: dict[str, Any] = {
        "data": {"train": shards, "views": {"count": 2, "crop_probability": 0.5}},
        "teacher": {"path": str(file)},
        "student": STUDENT,
        "distillation": {"features": {"weight": 0}, "selection": {"boundaries": [-0.9], "band_weights": [0.0, 1.0]}},
    }
    return build(apply_overrides(tree, overrides))


def test_our_own_export_says_what_its_checkpoint_says(own: Path) -> None:
    graph, whole = load_detector(own / "model.onnx"), load_detector(own)
    pixels, mask = torch.randn(3, 3, SIDE, SIDE), torch.ones(3, SIDE, SIDE, dtype=torch.bool)
    with torch.no_grad():
        mine, theirs = graph(pixels, mask), whole(pixels, mask)
    assert (mine.logits.sigmoid() - theirs.logits[-1:].sigmoid()).abs().max() < 1e-4
    assert (mine.boxes_cxcywh - theirs.boxes_cxcywh[-1:]).abs().max() < 1e-4
    assert (graph.labels, graph.category_ids) == (whole.labels, whole.category_ids)
    assert read_preprocessing(own / "model.onnx") == read_preprocessing(own)


def test_an_export_whose_classes_share_a_softmax_says_it_too(tmp_path: Path) -> None:
    config = StudentConfig.model_validate(STUDENT | own_fields("detr"))
    whole = silent_student(config, ("three", "eight"), 0).eval()
    shake(whole, 1)
    save_detector(whole, tmp_path / "out", config.resize)
    export_onnx(whole, tmp_path / "out" / "model.onnx", SIDE)
    assert not any(module.training for module in whole.modules())  # an export leaves it in evaluation mode
    pixels, mask = torch.randn(2, 3, SIDE, SIDE), torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    with torch.no_grad():
        mine, theirs = load_detector(tmp_path / "out" / "model.onnx")(pixels, mask), whole(pixels, mask)
    assert mine.no_object is not None
    assert theirs.no_object is not None
    assert torch.allclose(mine.logits.sigmoid(), theirs.logits[-1:].sigmoid(), atol=1e-4)
    assert torch.allclose(mine.no_object, theirs.no_object[-1:], atol=1e-3)
    assert torch.allclose(mine.boxes_cxcywh, theirs.boxes_cxcywh[-1:], atol=1e-4)


def test_corners_in_pixels_and_labels_from_one_are_the_same_detector(own: Path, tmp_path: Path) -> None:
    hand, whole = load_detector(by_hand(own, tmp_path)), load_detector(own)
    looks, bright = read_preprocessing(own), torch.rand(2, 3, SIDE, SIDE)
    mask = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (looks.mean, looks.std))
    with torch.no_grad():
        mine, theirs = hand(bright, mask), whole((bright - mean) / std, mask)
    assert hand.labels[1:] == whole.labels
    best = theirs.logits[-1].sigmoid().amax(-1)  # [B, Q]: of each query its best class alone is said
    order = best.argsort(-1, descending=True)
    assert torch.allclose(mine.logits[0].sigmoid().amax(-1), best.gather(1, order), atol=1e-4)
    assert torch.equal(mine.logits[0].argmax(-1) - 1, theirs.logits[-1].argmax(-1).gather(1, order))
    clipped = cxcywh_to_xyxy(theirs.boxes_cxcywh[-1]).clamp(0, 1).gather(1, order[..., None].expand(-1, -1, 4))
    assert torch.allclose(cxcywh_to_xyxy(mine.boxes_cxcywh[0]), clipped, atol=1e-4)


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "boxes, scores, labels": ({}, {}),
    "one picture at a time": ({"shape": (3, SIDE, SIDE)}, {}),
    "a fixed batch": ({"shape": (2, 3, SIDE, SIDE)}, {}),
    "any size": ({"shape": ("n", 3, "h", "w")}, {"size": SIDE}),
    "float16": ({"kind": TensorProto.FLOAT16}, {}),
    "mmdetection's": ({"form": "scored"}, {}),
    "rows": ({"form": "rows"}, {"boxes": None}),
    "left, top, width, height": (
        {"rows": np.concatenate([ROWS[:, :2], ROWS[:, 2:4] - ROWS[:, :2], ROWS[:, 4:]], 1)},
        {"boxes": "xywh"},
    ),
    "relative": ({"rows": ROWS / [SIDE, SIDE, SIDE, SIDE, 1, 1]}, {"units": "relative"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_says_the_same(form: str, tmp_path: Path) -> None:
    made, words = FORMS[form]
    made = made | ({"rows": made["rows"].astype(np.float32)} if "rows" in made else {})
    file = said(tmp_path, {name: value for name, value in (WORDS | words).items() if value is not None})
    found = ask(small(file, **made), torch.ones(3, 3, SIDE, SIDE))
    assert found.logits.shape == (1, 3, 4, 5)
    assert torch.allclose(found.boxes_cxcywh[0, :, :2], torch.tensor([[0.375, 0.5, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5]]))
    first, second = found.logits[0, 1, :2].sigmoid()  # two classes of one box are one query
    assert [round(first[label].item(), 3) for label in (1, 2, 4)] == [0.9, 0.4, 0.0]
    assert [round(second[label].item(), 3) for label in (1, 2, 4)] == [0.0, 0.0, 0.7]
    assert (found.logits[0, :, 2:] == SILENT_LOGIT).all()
    assert found.memory == found.attend(torch.zeros(1, 1, dtype=torch.int64)) == ()


def said_by(
    file: Path, nodes: list[Any], stored: Mapping[str, np.ndarray], outputs: Mapping[str, Sequence[Any]], sizes: bool
) -> Path:
    """A graph of these nodes, with the input of sizes that RT-DETR's own export has, or without."""
    given = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])]
    given += [helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, ["n", 2])] if sizes else []
    graph = helper.make_graph(
        nodes,
        "said",
        given,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(file))
    return file


def test_boxes_that_are_scaled_to_a_given_size_are_those_of_the_picture(tmp_path: Path) -> None:
    """As RT-DETR's and D-FINE's own exports have them: labels, boxes, scores, in this order."""
    node = helper.make_node
    nodes = [
        node("Cast", ["orig_target_sizes"], ["size"], to=TensorProto.FLOAT),
        node("Concat", ["size", "size"], ["sizes"], axis=1),
        node("Unsqueeze", ["sizes", "one"], ["scale"]),
        node("Mul", ["shares", "scale"], ["boxes"]),
        node(
            "ReduceSum", ["scale", "last"], ["total"], keepdims=0
        ),  # 256 of each: for scores and labels of every picture
        node("Mul", ["total", "of_scores"], ["scores"]),
        node("Mul", ["total", "of_labels"], ["labels"]),
    ]
    stored = {
        **{"one": np.array([1]), "last": np.array([-1]), "shares": ROWS[None, :3, :4] / SIDE},
        **{"of_scores": ROWS[None, :3, 4] / 256, "of_labels": ROWS[None, :3, 5] / 256},
    }
    shapes = {"labels": ["n", 3], "boxes": ["n", 3, 4], "scores": ["n", 3]}
    found = ask(said_by(said(tmp_path, WORDS), nodes, stored, shapes, True), torch.ones(2, 3, SIDE, SIDE))
    assert torch.allclose(found.boxes_cxcywh[0, :, :2], torch.tensor([[0.375, 0.5, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5]]))
    assert found.logits[0, :, 0, [1, 2]].sigmoid().flatten().tolist() == pytest.approx([0.9, 0.4] * 2, abs=1e-4)


def test_logits_of_every_class_are_taken_as_they_are(tmp_path: Path) -> None:
    """RF-DETR's own export: `dets`, centre and size in shares, and `labels`, which are logits."""
    logits, boxes = np.linspace(-4, 4, 15, dtype=np.float32).reshape(1, 3, 5), np.full((1, 3, 4), 0.25, np.float32)
    nodes = [helper.make_node("Identity", [name], [out]) for name, out in (("a", "dets"), ("b", "labels"))]
    words = {name: WORDS[name] for name in ("classes", "resize", "mean", "std")}
    file = said_by(
        said(tmp_path, words), nodes, {"a": boxes, "b": logits}, {"dets": [1, 3, 4], "labels": [1, 3, 5]}, False
    )
    found = ask(file)
    assert np.array_equal(found.logits[0], logits)
    assert np.allclose(found.boxes_cxcywh[0], boxes, atol=1e-6)
    assert load_detector(file).labels == ("N/A", "three", "eight", "N/A", "nine")
    said(tmp_path, words | {"classes": {"5": "three"}})
    with pytest.raises(QskdError, match="a name for label 5, and a detector of 5 logits"):
        load_detector(file)


def test_ultralytics_metadata_is_read_and_pictures_are_framed_in_grey(tmp_path: Path) -> None:
    names = {0: "", 1: "three", 2: "eight", 3: "", 4: "nine"}
    told = {
        "description": "Ultralytics YOLO11n model",
        "task": "detect",
        "names": str(names),
        "imgsz": f"[{SIDE}, {SIDE}]",
    }
    file = small(tmp_path / "yolo.onnx", form="rows", metadata=told)
    assert read_preprocessing(file).resize == ResizeConfig(mode="shortest_edge", size=SIDE, longest=SIDE)
    assert load_detector(file).labels[1:3] == ("three", "eight")
    pixels, mask = torch.zeros(1, 3, 32, SIDE), torch.ones(1, 32, SIDE, dtype=torch.bool)
    pixels[..., :] = 1.0
    found = ask(file, pixels, mask)  # 64 x 32, with 16 rows of grey above and below
    assert torch.allclose(found.boxes_cxcywh[0, 0, 0], torch.tensor([0.375, 0.5, 0.5, 1.0]))
    grey = (1 + 114 / 255) / 2
    assert found.logits[0, 0, 0, 1].sigmoid() == pytest.approx(0.9 * grey, abs=1e-4)


@pytest.mark.parametrize("names", ["{0: 'a'", "[1]", "{}", "{'x': 'a'}", "{1000000: 'a'}"])
def test_metadata_that_can_not_be_read_says_nothing(names: str, tmp_path: Path) -> None:
    told = {"author": "Ultralytics", "task": "detect", "names": names, "imgsz": "64"}
    with pytest.raises(QskdError, match="nothing says what its labels are called"):
        read_preprocessing(small(tmp_path / "yolo.onnx", form="rows", metadata=told))


def test_the_folder_of_a_detector_that_is_asked_in_words_lends_its_graph_no_classes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "grounding-dino"}))
    nodes = [helper.make_node("Identity", [name], [name + "s"]) for name in ("logit", "pred_boxe")]
    stored = {"logit": np.zeros((1, 3, 256), np.float32), "pred_boxe": np.zeros((1, 3, 4), np.float32)}
    file = said_by(tmp_path / "model.onnx", nodes, stored, {"logits": [1, 3, 256], "pred_boxes": [1, 3, 4]}, False)
    with pytest.raises(QskdError, match="asked in words"):
        load_detector(file)


def test_an_image_is_seen_without_its_padding(tmp_path: Path) -> None:
    words = WORDS | {"resize": "shortest_edge", "size": 32, "longest": 80}
    file = small(said(tmp_path, words), shape=("n", 3, "h", "w"))
    pixels, mask = torch.zeros(2, 3, 64, 80), torch.zeros(2, 64, 80, dtype=torch.bool)
    for image, (height, width) in enumerate([(64, 64), (48, 80)]):
        pixels[image, :, :height, :width], mask[image, :height, :width] = 1, True
    found = ask(file, pixels, mask)
    assert torch.allclose(found.logits[0, :, 0, 1].sigmoid(), torch.tensor(0.9), atol=1e-4)
    assert torch.allclose(found.boxes_cxcywh[0, 1, 0], torch.tensor([24 / 80, 32 / 48, 32 / 80, 32 / 48]))


def test_cached_and_online_give_the_same_losses_and_boxes_that_are_not_there_teach_nothing(
    shards: str, tmp_path: Path
) -> None:
    file = small(said(tmp_path, WORDS))
    config = config_of(shards, file, f"teacher.cache.path={tmp_path}/cache", "teacher.cache.precision=float32")
    data = load_manifest(shards)
    teacher = make_teacher(config, data.labels)
    assert teacher is not None
    check_told(config)
    record = teacher(
        torch.full((1, SIDE, SIDE, 3), 255, dtype=torch.uint8), torch.tensor([[SIDE, SIDE]]), TeacherNeeds()
    )
    assert record.absent[0, 0].tolist() == [False, False, True, True]
    online = losses(config, teacher, stream_of(shards, "", None))
    assert "agfd" not in online[0]
    assert max(terms["lapd_giou"] for terms in online) > 0
    manifest = make_cache(config, teacher, teacher.resize, cache_identity(config, data))
    check_told(config, check_cache(config, data))
    stream = stream_of(shards, config.teacher.cache.path, None)
    for mine, theirs in zip(losses(config, CachedTeacher(manifest.sizes), stream), online, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_a_cache_is_of_the_file_and_of_all_that_is_said_of_it(shards: str, tmp_path: Path) -> None:
    file, data = small(said(tmp_path, WORDS)), load_manifest(shards)
    first = cache_identity(config_of(shards, file), data)
    assert first == cache_identity(config_of(shards, file), data)
    for words in ({"classes": {"1": "nine", "2": "eight", "4": "three"}}, {"boxes": "xywh"}, {"mean": [0.5, 0.5, 0.5]}):
        said(tmp_path, WORDS | words)
        assert cache_identity(config_of(shards, file), data) != first
    said(tmp_path, WORDS)
    digests = checkpoint_digests(file)
    small(file, ROWS[::-1].copy())
    assert checkpoint_digests(file)["teacher.weights_sha256"] != digests["teacher.weights_sha256"]


def test_features_inheritance_a_student_and_an_export_are_refused_by_name(shards: str, tmp_path: Path) -> None:
    file = small(said(tmp_path, WORDS))
    with pytest.raises(QskdError, match=r"(?s)says boxes and classes alone.*features\.weight=0"):
        check_told(config_of(shards, file, "distillation.features.weight=1"))
    with pytest.raises(QskdError, match="in an ONNX file, of which no part fits"):
        start_student(config_of(shards, file, "student.inherit=true"), load_manifest(shards).labels)
    for start in (start_student, lambda config, labels: describe_student(config.student, len(labels))):
        with pytest.raises(QskdError, match="in an ONNX file, which can only teach"):
            start(build({"student": {"init": str(file)}}), ("three",))
    with pytest.raises(QskdError, match="in an ONNX file, which can only teach"):
        qskd.export(file, tmp_path / "out", size=SIDE)
    backbone = {"type": "resnet", "init": str(file), "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    with pytest.raises(QskdError, match="an ONNX file, of which no part can be a student's"):
        start_student(build({"student": STUDENT | {"backbone": backbone}}), ("three",))


def test_label_evaluate_predict_doctor_and_the_card_take_it(
    shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, photos = small(said(tmp_path, WORDS)), tmp_path / "photos"
    photos.mkdir()
    picture = np.full((128, SIDE, 3), 255, np.uint8)
    Image.fromarray(picture).save(photos / "a.png")
    labels = qskd.label(file, photos, tmp_path / "out.json", like=shards, threshold=0.5)
    assert labels.objects == {"three": 1, "eight": 0, "nine": 1}
    assert qskd.evaluate(file, shards, workers=0).metrics["AP"] >= 0
    (one,) = qskd.predict(file, picture, threshold=0.5)
    caplog.clear()
    assert ids_for(load_detector(file), [photos / "a.png"], None).categories[4] == 4
    assert caplog.messages == ["the detector keeps no category ids: category_id is the number of the label"]
    assert (one.labels, one.boxes_xyxy.tolist()) == (("three", "nine"), [[8, 32, 40, 96], [32, 0, 64, 64]])
    checks = {check.name: check for check in model_checks(str(file))}
    assert "in an ONNX file" in checks["family"].found
    assert "of predictions alone" in checks["as a teacher"].found
    assert checks["as a student"].found == "no: it can only teach"
    rows, _ = figures(
        {"teacher": (load_detector(file), {"AP": 0.5})}, {"teacher": read_preprocessing(file).resize}, build({})
    )
    assert (rows[0].metrics, rows[0].parameters, rows[0].input) == ({"AP": 0.5}, None, "64 x 64")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "nothing said": ({}, None, r'(?s)how its pictures are made.*other\.onnx\.json.*"classes": \["cat", "dog"\]'),
    "a field missing": ({}, {"std": None}, "std: Field required"),
    "a field of no meaning": ({}, {"means": 1}, "means: Extra inputs"),
    "boxes not said": ({}, {"boxes": None}, "without boxes"),
    "a mean of bytes": (
        {},
        {"mean": [123.7, 116.3, 103.5]},
        r"(?s)mean: 123\.7, of pixels in 0\.\.255.*divide mean and std by 255",
    ),
    "a std of bytes": ({}, {"std": [255, 255, 255]}, "std: 255, of pixels in"),
    "a size that the graph does not take": (
        {},
        {"size": 32},
        r"(?s)other\.onnx\.json: size: 32.*squares of 64 pixels.*leave size out",
    ),
    "no size at all": ({"shape": ("n", 3, "h", "w")}, {}, "no size, and a graph that takes any"),
    "two sides": ({"shape": ("n", 3, 32, 64)}, {}, "32 x 64 pixels"),
    "bytes": ({"kind": TensorProto.DOUBLE}, {}, "of double"),
    "an output of another name": ({}, {"outputs": ["boxes", "scores", "number"]}, "number, which it does not have"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_said_or_not_so_is_refused_before_it_runs(what: str, tmp_path: Path) -> None:
    made, words, message = REFUSED[what]
    told = None if words is None else {name: value for name, value in (WORDS | words).items() if value is not None}
    file = said(tmp_path, told)
    if what == "bytes":  # no graph of onnxruntime's own: it is not opened
        model = onnx.load(str(small(file)))
        model.graph.input[0].type.tensor_type.elem_type = made["kind"]
        onnx.save(model, str(file))
    else:
        small(file, **made)
    with pytest.raises(QskdError, match=message):
        read_preprocessing(file)


def test_raw_candidates_weights_elsewhere_and_what_is_no_graph_are_refused(tmp_path: Path) -> None:
    file = said(tmp_path, WORDS)
    raw = np.zeros((1, 84, 8400), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["raw"], ["output0"])],
        "yolo",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 84, 8400])],
        [numpy_helper.from_array(raw, "raw")],
    )
    model = helper.make_model(graph, ir_version=8)
    onnx.save(model, str(file))
    with pytest.raises(QskdError, match=r"(?s)raw candidates.*nms=True"):
        load_detector(file)
    onnx.save(model, str(file), save_as_external_data=True, location="elsewhere.bin")
    with pytest.raises(QskdError, match="weights that lie in another file"):
        load_detector(file)
    file.write_bytes(b"no graph")
    with pytest.raises(QskdError, match="no ONNX file"):
        load_detector(file)
    file.write_bytes(b"")
    with pytest.raises(QskdError, match="an empty file"):
        load_detector(file)
    said(tmp_path, name="broken.onnx.json").write_text("{classes: 1}")
    with pytest.raises(QskdError, match=r"(?s)broken\.onnx\.json.*it is written by hand: correct it"):
        load_detector(small(tmp_path / "broken.onnx"))
    with pytest.raises(QskdError, match="No such file"):
        load_detector(tmp_path / "none.onnx")


def test_an_onnx_file_that_a_recipe_names_and_that_is_not_there_is_named_with_its_field(
    shards: str, tmp_path: Path
) -> None:
    file, labels = small(said(tmp_path, WORDS)), load_manifest(shards).labels
    missing = tmp_path / "none.onnx"
    for check in (check_told, teachers_preprocessing, lambda config: members_of(config, labels)):
        with pytest.raises(QskdError, match=r"teacher\.path: .*none\.onnx: can't be read: No such file"):
            check(config_of(shards, missing))
    for check in (check_several_teachers, teachers_preprocessing, lambda config: members_of(config, labels)):
        with pytest.raises(QskdError, match=r"teacher\.also\.b\.path: .*none\.onnx: can't be read"):
            check(config_of(shards, file, f"teacher.also.b.path={missing}", "teacher.class_map={nine: null}"))


def test_our_own_graph_without_its_folder_s_files_names_them(own: Path, tmp_path: Path) -> None:
    file = said(tmp_path, name="model.onnx")
    file.write_bytes((own / "model.onnx").read_bytes())
    with pytest.raises(QskdError, match=r"no config\.json beside it[\s\S]*preprocessor_config\.json"):
        load_detector(file)


def test_of_a_letterboxed_file_no_size_is_proposed_for_an_export_and_the_card_has_its_square(tmp_path: Path) -> None:
    file = small(said(tmp_path, WORDS | {"resize": "letterbox"}))
    for size in (None, SIDE):
        with pytest.raises(QskdError, match="can only teach"):
            qskd.export(file, tmp_path / "out", size=size)
    with pytest.raises(QskdError, match="can only teach"):
        foresee(str(file), tmp_path / "out", ExportOptions())
    rows, _ = figures({"teacher": (load_detector(file), {})}, {"teacher": read_preprocessing(file).resize}, build({}))
    assert rows[0].input == f"{SIDE} x {SIDE}"  # filled up to a square
    assert "--size" not in {check.name: check for check in model_checks(str(file))}["images"].found


def with_column(column: int, value: float) -> np.ndarray:
    rows = ROWS.copy()
    rows[0, column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (with_column(5, 3), {}, "a box of label 3"),
        (with_column(5, 9), {}, "a box of label 9"),
        (with_column(4, 40), {}, "a score of 40"),
        (np.tile(ROWS[:3], (4, 1)), {"units": "relative"}, "coordinates up to 64"),
        (np.tile(ROWS[:3], (4, 1)) / [64, 64, 64, 64, 1, 1], {}, r"no coordinate above 1\.00"),
        (np.tile(ROWS[:3, [2, 3, 0, 1, 4, 5]], (4, 1)), {}, "not right and below"),
    ],
)
def test_answers_that_are_not_what_is_said_of_them_are_refused(
    rows: np.ndarray, words: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QskdError, match=message):
        ask(small(said(tmp_path, WORDS | words), rows.astype(np.float32)))


def of_logits(folder: Path, logits: np.ndarray, boxes: np.ndarray, **words: Any) -> Path:
    """A graph in RF-DETR's form that says these of every picture. logits: [Q, 5]; boxes: [Q, 4]."""
    stored = {"a": boxes.astype(np.float32)[None], "b": logits.astype(np.float32)[None]}
    nodes = [helper.make_node("Identity", [name], [out]) for name, out in (("a", "dets"), ("b", "labels"))]
    shapes = {"dets": [1, len(boxes), 4], "labels": [1, len(logits), 5]}
    asked = {name: WORDS[name] for name in ("classes", "resize", "mean", "std")} | words
    return said_by(said(folder, asked), nodes, stored, shapes, False)


UNSURE = np.linspace(-8, -3, 15).reshape(3, 5)
SURE_FIRST = np.concatenate([np.full((1, 5), 2.0), UNSURE[1:]])
SHARES = np.array([[0.5, 0.5, 0.25, 0.25], [0.25, 0.25, 0.5, 0.5], [0.75, 0.5, 0.125, 0.25]])
NAN_AT_ONE = np.where(np.arange(12).reshape(3, 4) == 0, np.nan, SHARES)


@pytest.mark.parametrize(
    ("logits", "boxes", "words", "message"),
    [
        (
            1 / (1 + np.exp(-UNSURE)),
            SHARES,
            {},
            r"(?s)labels: each of 3 queries' numbers lies in 0 to 1.*without the sigmoid",
        ),
        (UNSURE, SHARES * SIDE, {}, r"(?s)coordinates up to 48.*shares of the picture.*units: pixels\?"),
        (SURE_FIRST, np.concatenate([SHARES[:1] * SIDE, SHARES[1:]]), {}, "coordinates up to 32"),
        (UNSURE, SHARES, {"units": "pixels"}, r"(?s)no coordinate above 0\.75.*units: relative\?"),
        (
            SURE_FIRST,
            np.concatenate([SHARES[:1], SHARES[1:] * SIDE]),
            {"units": "pixels"},
            r"no coordinate above 0\.50",
        ),
        (np.where(UNSURE < -7, np.nan, UNSURE), SHARES, {}, "labels: nan among its numbers"),
        (UNSURE, NAN_AT_ONE, {}, "dets: nan among its numbers"),
    ],
)
def test_logits_and_their_boxes_that_can_not_be_what_is_said_of_them_are_refused(
    logits: np.ndarray, boxes: np.ndarray, words: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = of_logits(tmp_path, logits, boxes, **words)
    with pytest.raises(QskdError, match=message):
        ask(file)
    checks = {check.name: check for check in model_checks(str(file))}
    assert checks["as a teacher"].status == "problem"


def test_boxes_far_outside_of_queries_that_found_nothing_are_no_fault(tmp_path: Path) -> None:
    far = np.concatenate([SHARES[:1], SHARES[1:] * SIDE])
    assert np.allclose(ask(of_logits(tmp_path, SURE_FIRST, far)).boxes_cxcywh[0, 0], far, atol=1e-4)


def test_a_box_or_score_that_is_no_number_is_refused_where_it_counts(tmp_path: Path) -> None:
    file = said(tmp_path, WORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(QskdError, match="a score of nan"):
            ask(small(file, with_column(4, np.nan)))
        with pytest.raises(QskdError, match="boxes: nan among its numbers"):
            ask(small(file, with_column(0, np.nan)))
    padded = ROWS.copy()
    padded[3, :4] = np.nan  # a score of 0: no box
    assert torch.isfinite(ask(small(file, padded)).boxes_cxcywh).all()


def test_outputs_of_other_shapes_are_taken_or_refused_with_theirs(tmp_path: Path) -> None:
    file, node = small(said(tmp_path, WORDS)), helper.make_node
    plain, whole = ask(file), onnx.load(str(file))

    def changed(name: str, ways: list[Any], shape: Sequence[Any], **stored: Any) -> Path:
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        model.graph.node.extend(ways)
        model.graph.initializer.extend(numpy_helper.from_array(np.array(each), at) for at, each in stored.items())
        (output,) = (each for each in model.graph.output if each.name == name)
        output.CopyFrom(helper.make_tensor_value_info(f"{name}_2", TensorProto.FLOAT, shape))
        onnx.save(model, str(file))
        said(
            tmp_path, WORDS | {"outputs": [f"{one}_2" if one == name else one for one in ("boxes", "scores", "labels")]}
        )
        return file

    for name in ("labels", "scores"):
        again = ask(changed(name, [node("Unsqueeze", [name, "end"], [f"{name}_2"])], ["n", 4, 1]))
        assert torch.equal(again.logits, plain.logits)
    fewer = changed("scores", [node("Slice", ["scores", "a", "b", "c"], ["scores_2"])], ["n", 3], a=[0], b=[3], c=[1])
    with pytest.raises(QskdError, match=r"(?s)other\.onnx.*boxes \[1, 4, 4\], scores_2 \[1, 3\].*scores_2 \[B, N\]"):
        ask(fewer)


def test_remedies_for_teachers_of_unlike_framing_are_of_use(shards: str, tmp_path: Path) -> None:
    boxed = WORDS | {"resize": "letterbox"}
    square = small(said(tmp_path, WORDS, "square.onnx"))
    also = small(said(tmp_path, boxed, "boxed.onnx"))
    with pytest.raises(QskdError, match=r"(?s)boxed\.onnx.*no teacher\.resize suits them all.*Export one again"):
        teachers_preprocessing(config_of(shards, square, f"teacher.also.b.path={also}"))
    free = small(said(tmp_path, WORDS | {"size": 32}, "free.onnx"), shape=("n", 3, "h", "w"))
    for first, second in ((free, square), (square, free)):
        with pytest.raises(QskdError, match=r"--set 'teacher\.resize=") as refused:
            teachers_preprocessing(config_of(shards, first, f"teacher.also.b.path={second}"))
        (asked,) = re.findall(r"--set '(.*)'", refused.value.remedy)
        found = teachers_preprocessing(config_of(shards, first, f"teacher.also.b.path={second}", asked))
        assert [each.resize.size for each in found] == [SIDE, SIDE]


def test_a_picture_a_pixel_longer_than_the_frame_fits_into_it(tmp_path: Path) -> None:
    """DETR's rule leaves a picture alone whose shorter side it would not change, although the longer one is over its limit."""
    teacher = load_detector(small(said(tmp_path, WORDS | {"resize": "letterbox"})))
    limit = ResizeConfig(mode="shortest_edge", size=SIDE, longest=SIDE)
    longer = [(h, SIDE + 1) for h in range(1, SIDE) if resized_size(h, SIDE + 1, limit)[1] > SIDE]
    assert longer
    height, width = resized_size(*longer[0], limit)
    framed, _ = teacher._framed(np.zeros((3, height, width), np.float32))  # type: ignore[attr-defined]
    assert framed.shape == (3, SIDE, SIDE)
