"""A quantised student as ONNX, and what `qskd predict` runs of its folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from rich.console import Console
from test_quantized_students import trained

from pipelines.deployment.benchmark import BenchmarkOptions, benchmark
from pipelines.deployment.export import ExportOptions, export
from pipelines.deployment.variants import VariantOptions
from pipelines.health.checkpoint import model_checks
from pipelines.inspection.predict import predict_all, request
from pipelines.tracking.student_pyfunc import Student
from qskd.deploy.export import check_parity, check_sure, export_onnx, open_session, random_batches
from qskd.deploy.model_card import Card, Figures, read_card, write_card
from qskd.deploy.qdq import TOLERANCE, notice_of_onnx, tolerance_of
from qskd.deploy.runtimes import as_stored, runnable, session_of_openvino, to_openvino
from qskd.deploy.variants import FLOAT32, OPENVINO_BFLOAT16, OPENVINO_FLOAT32
from qskd.detectors import load_detector, read_preprocessing, save_detector
from qskd.errors import QskdError
from qskd.evaluation.inference import predict_image
from qskd.quantization.files import FILE, read_quantisers
from qskd.quantization.parity import require_some

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


Saved = Callable[[str, str], Path]
Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a student of a family, with these bits."""

    @cache
    def of(family: str, bits: str) -> Path:
        training, folder = trained(family, bits, "training.ema_decay=0.9"), tmp_path_factory.mktemp("student")
        with training.evaluation_weights() as student:
            tiny.shake(student, 2)
            save_detector(student, folder, training.config.student.resize)
        return folder

    return of


@pytest.fixture(scope="module")
def exported(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The graph of its student of 8 bits."""

    @cache
    def of(family: str) -> Path:
        file = tmp_path_factory.mktemp("graph") / FLOAT32.file
        export_onnx(load_detector(saved(family, "w8a8")), file, tiny.SIZE)
        return file

    return of


@pytest.mark.parametrize("asked", [{"int8": True, "calibration": ("photos",)}, {"float16": True}])
def test_a_student_of_few_bits_is_not_rounded_once_more(asked: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    folder = saved("detr", "w8a8")
    with pytest.raises(QskdError, match="would round what is rounded already"):
        export(str(folder), tmp_path / "out", ExportOptions(variants=VariantOptions(**asked)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["detr", "conditional_detr", "refined", "rt_detr"])
def test_eight_bits_are_quantize_linear_with_the_learned_steps(
    family: str, saved: Saved, exported: Exported, tmp_path: Path
) -> None:
    folder, file = saved(family, "w8a8"), exported(family)
    detector = load_detector(folder)
    graph = onnx.load(str(file)).graph
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    constants = {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant"
    }
    known = stored | constants
    tensors, bits, _ = read_quantisers(folder / FILE)
    for kind, number in (("zero_point", "QuantizeLinear"), ("weight.step", "DequantizeLinear")):
        steps = {
            known[node.input[1]].tobytes()
            for node in graph.node
            if node.op_type == number and (number == "QuantizeLinear" or node.input[0] in stored)
        }
        names = [name for name in tensors if name.endswith(kind)]
        expected = {tensors[name.replace("zero_point", "step")].numpy().tobytes() for name in names}
        # What no evaluation asks is not in the graph.
        assert steps <= expected
        assert len(steps) > 0.8 * len(expected)
    weights = [
        stored[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored
    ]
    assert {each.dtype for each in weights} == {np.dtype(np.int8)}
    assert not any(each.dtype == np.float32 and each.ndim > 1 and each.size > 2000 for each in stored.values())
    assert set(bits.values()) == {8}
    assert "QuantizeLinear" in notice_of_onnx(detector.model)
    assert tolerance_of(detector.model, 1e-4) == TOLERANCE
    found = check_parity(detector, open_session(file), random_batches(tiny.SIZE, (1,) * 4))
    # Of a network that has learnt nothing, two queries of all but equal scores may change places, and an image is lost by it.
    assert sorted(each.worst for each in found)[2] < TOLERANCE
    assert as_stored(FLOAT32, file.parent).name == "int8 onnxruntime"
    if find_spec("openvino"):
        to_openvino(file, tmp_path / OPENVINO_FLOAT32.file)
        assert runnable([OPENVINO_FLOAT32, OPENVINO_BFLOAT16], tmp_path) == [
            replace(OPENVINO_FLOAT32, weights="int8", computes="int8")
        ]
        session = session_of_openvino(tmp_path / OPENVINO_FLOAT32.file, 1)
        found = check_parity(detector, session, random_batches(tiny.SIZE, (1,) * 4))
        assert sorted(each.worst for each in found)[2] < TOLERANCE


def test_a_student_of_eight_bits_is_called_so_in_its_card_and_its_benchmark(saved: Saved, tmp_path: Path) -> None:
    folder, openvino = saved("detr", "w8a8"), find_spec("openvino") is not None
    Image.new("RGB", (80, 60), "red").save(photo := tmp_path / "photo.png")
    options = ExportOptions(rounds=0, images=(photo,), variants=VariantOptions(openvino=openvino))
    out = export(str(folder), tmp_path / "out", options, Console(quiet=True))
    assert "`model.onnx`, whose weights are int8, takes" in (out / "README.md").read_text()
    names = ["int8 onnxruntime", *(["int8 OpenVINO"] if openvino else [])]
    card = read_card(out)
    assert card is not None
    if openvino:
        assert card.variants is not None
        assert [fact.variant.name for fact in card.variants.facts] == names
        assert "| openvino_model.xml | int8 |" in (out / "README.md").read_text()
    for asked, said in ({"exported": True}, names), ({"onnx": True}, names[:1]):
        found = benchmark([str(out)], BenchmarkOptions(batches=(1,), memory=False, rounds=1, **asked))
        assert [row.runtime for row in found.rows] == ["PyTorch", *said]
        assert "PyTorch rounds in float" in found.notes[0]


def test_of_chosen_queries_the_sure_ones_are_compared_and_a_wrong_graph_is_told(
    saved: Saved, exported: Exported, tmp_path: Path
) -> None:
    detector, file = load_detector(saved("rt_detr", "w8a8")), tmp_path / "model.onnx"
    images = random_batches(tiny.SIZE, (1,) * 3)
    nothing = check_sure(detector, open_session(exported("rt_detr")), "random", images)
    assert nothing.compared == 0  # it has learnt nothing
    with pytest.raises(QskdError, match="nothing to compare by"):
        require_some(nothing.compared, nothing.batch, "rt_detr")
    model = onnx.load(str(exported("rt_detr")))
    stored = {each.name: each for each in model.graph.initializer}
    for layer, head in enumerate(detector.model.model.decoder.class_embed):
        with torch.no_grad():
            head.bias.add_(3.0)
        bias = stored[f"model.model.decoder.class_embed.{layer}.bias"]
        bias.CopyFrom(onnx.numpy_helper.from_array(head.bias.detach().numpy(), bias.name))
    onnx.save(model, str(file))
    found = check_sure(detector, open_session(file), "random", images)
    assert found.compared > 8
    assert found.worst < TOLERANCE
    require_some(found.compared, found.batch, "rt_detr")
    steps = [n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    constants = {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"}
    step = constants[steps[0]]  # of the first convolution, which all else follows from
    step.CopyFrom(onnx.numpy_helper.from_array(1.5 * onnx.numpy_helper.to_array(step), step.name))
    onnx.save(model, str(file))
    assert check_sure(detector, open_session(file), "random", images).worst > TOLERANCE


def test_fewer_bits_are_the_same_in_float_and_it_is_said(saved: Saved, tmp_path: Path) -> None:
    detector, file = load_detector(saved("detr", "w3a4-attn2")), tmp_path / "model.onnx"
    export_onnx(detector, file, tiny.SIZE)
    assert "no faster than float" in notice_of_onnx(detector.model)
    found = check_parity(detector, open_session(file), random_batches(tiny.SIZE, (1,) * 4))
    assert max(each.worst for each in found) < TOLERANCE
    with pytest.raises(QskdError, match="--no-onnx"):
        tolerance_of(detector.model, 1e-4)
    assert tolerance_of(detector.model, 0.2) == 0.2
    in_float = load_detector(saved("detr", "w3a4-attn2"), quantised=False).model
    assert notice_of_onnx(in_float) == ""
    assert tolerance_of(in_float, 1e-4) == 1e-4


def test_the_card_of_a_quantised_student_says_what_a_plain_load_gives(saved: Saved, tmp_path: Path) -> None:
    card = Card("x", "detr", 3, (Figures("this model", {}),))
    folder = tmp_path / "student"
    shutil.copytree(saved("detr", "w8a8"), folder)
    write_card(folder, card)
    assert "activations in float" in (folder / "README.md").read_text()
    (folder / FILE).unlink()
    write_card(folder, card)
    assert "activations in float" not in (folder / "README.md").read_text()


def test_a_look_at_a_checkpoint_names_its_bits(saved: Saved) -> None:
    folder = saved("detr", "w8a8")
    assert any("a student of w8a8" in check.found for check in model_checks(str(folder)))


def test_mlflow_s_student_says_that_its_activations_run_in_float(saved: Saved) -> None:
    folder = saved("detr", "w8a8")
    with pytest.warns(UserWarning, match="activations run in float"):
        Student(str(folder))


def test_predict_runs_a_student_with_its_quantisers_and_says_so(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved("refined", "w2a2")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    with caplog.at_level(logging.WARNING, "qskd"):
        asked = request(str(folder), [tmp_path / "one.png"], tmp_path / "out.png", threshold=0.0)
        ((predictions, _),) = predict_all(asked)
    assert "a student of w2a2: it runs with its quantisers" in caplog.text

    def scores(quantised: bool) -> Any:
        detector = load_detector(folder, quantised=quantised)
        return predict_image(detector, pixels, read_preprocessing(folder), range(3), 0.0).scores

    assert np.allclose(predictions[0].found.scores, scores(True))
    assert not np.allclose(scores(True), scores(False), atol=1e-3)
