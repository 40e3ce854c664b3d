"""The graph of every family, traced once: as float32 for any batch and for one image, INT8, float16, and in OpenVINO."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import test_families
import torch
from test_export import SIZE, random_detector

from qskd.deploy.export import INPUT, OUTPUTS, check_parity, export_onnx, open_session, random_batches, require_parity
from qskd.deploy.reduced import MULTIPLIES, PLACES, Census, nodes_of, placing_parts, quantize_int8, to_float16
from qskd.deploy.runtimes import Run, as_stored, open_variant, session_of_openvino, to_openvino
from qskd.deploy.side_by_side import Pictures, side_by_side
from qskd.deploy.variants import FLOAT16, FLOAT32, INT8, OPENVINO_FLOAT32, OPENVINO_INT8
from qskd.detectors import FAMILIES, Detector
from qskd.errors import QskdError

torch.set_num_threads(1)

KINDS = ["conditional", "deformable", "refined", "two_stage", "detr", "table", "dab", *test_families.SAMPLED]
# Random scores are all alike: once rounded, others are chosen.
CHOOSING = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr")
ONE_OF_EACH = {  # of Deformable DETR with refined boxes, as all its students here
    **{"conditional_detr": "conditional", "detr": "detr", "table-transformer": "table", "dab-detr": "dab"},
    **{"deformable_detr": "refined", **{family: family for family in CHOOSING}},
}
needs_openvino = pytest.mark.skipif(  # importorskip would import it, and let it post what `need_openvino` switches off
    find_spec("openvino") is None, reason="an optional runtime: pip install -e '.[openvino]'"
)


def noise(count: int, seed: int) -> list[np.ndarray]:
    return [pixels.numpy() for _, pixels in random_batches(SIZE, (1,) * count, seed)]


@dataclass
class Graphs:
    """Of one kind of detector. To trace it is what takes time."""

    detector: Detector
    folder: Path

    @cached_property
    def free(self) -> Path:
        file = self.folder / "free" / FLOAT32.file
        file.parent.mkdir()
        export_onnx(self.detector, file, SIZE, batch=None)
        return file

    @cached_property
    def census(self) -> Census:
        """Writes float32 for one image (the same trace: `export_onnx` writes the batch into it afterwards), INT8 and float16."""
        model = onnx.load(str(self.free))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(model, str(file := self.folder / FLOAT32.file))
        to_float16(self.detector, file, self.folder / FLOAT16.file)
        return quantize_int8(self.detector, file, self.folder / INT8.file, noise(3, 1))

    @cached_property
    def runs(self) -> dict[str, Run]:
        assert self.census
        return {variant.name: open_variant(variant, self.folder) for variant in (FLOAT32, FLOAT16, INT8)}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Graphs]:
    root = tmp_path_factory.mktemp("graphs")

    @cache
    def of(kind: str) -> Graphs:
        (root / kind).mkdir()
        return Graphs(random_detector(kind), root / kind)

    return of


@pytest.fixture
def made(request: pytest.FixtureRequest, graphs: Callable[[str], Graphs]) -> Graphs:
    found = graphs(ONE_OF_EACH[request.param])
    assert found.detector.family == request.param
    return found


each_family = pytest.mark.parametrize("made", ONE_OF_EACH, indirect=True)


def test_every_family_is_tried() -> None:
    assert ONE_OF_EACH.keys() == FAMILIES.keys()
    assert {*ONE_OF_EACH.values()} <= {*KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_of_free_batch_computes_what_transformers_computes(kind: str, graphs: Callable[[str], Graphs]) -> None:
    detector, file = graphs(kind).detector, graphs(kind).free
    session = open_session(file)
    assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
    found = check_parity(detector, session, random_batches(SIZE, (1, 2, 3)))
    require_parity(found, kind)
    assert max(one.logits for one in found) < 1e-4
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]  # no weights beside it
    with torch.inference_mode():  # the check itself compares with the model's own call
        images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
        theirs = detector.model(images)
    mine = session.run(list(OUTPUTS), {INPUT: images.numpy()})
    np.testing.assert_allclose(mine[0], theirs.logits, atol=1e-4)
    np.testing.assert_allclose(mine[1], theirs.pred_boxes, atol=1e-5)


def test_a_fixed_batch_is_written_in_the_graph(tmp_path: Path) -> None:
    detector, file = random_detector("refined"), tmp_path / "model.onnx"
    export_onnx(detector, file, SIZE, batch=2)
    session = open_session(file)
    shapes = [value.shape for value in (*session.get_inputs(), *session.get_outputs())]
    assert shapes == [[2, 3, SIZE, SIZE], [2, 9, 5], [2, 9, 4]]
    require_parity(check_parity(detector, session, random_batches(SIZE, (2, 2))), "fixed")
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        session.run(None, {INPUT: np.zeros((1, 3, SIZE, SIZE), np.float32)})
    opset = {entry.domain: entry.version for entry in onnx.load(str(file)).opset_import}
    assert opset[""] >= 16  # below there is no grid_sample
    onnx.checker.check_model(str(file), full_check=True)


def test_torchs_other_exporter_is_there_too(tmp_path: Path) -> None:
    detector = Detector(test_families.tiny_model("detr", layers=1)).eval()
    export_onnx(detector, file := tmp_path / "model.onnx", SIZE, batch=1, exporter="dynamo")
    session = open_session(file)
    require_parity(check_parity(detector, session, random_batches(SIZE, (1,))), "dynamo")
    with pytest.raises(QskdError, match=r"onnxruntime fails on 3 image\(s\): .*\n.*without --dynamic-batch"):
        check_parity(detector, session, random_batches(SIZE, (3,)))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@each_family
def test_a_precision_is_what_the_file_holds_whatever_its_name(made: Graphs, tmp_path: Path) -> None:
    assert made.census
    for variant in (FLOAT32, FLOAT16, INT8):
        assert as_stored(variant, made.folder) == variant
    shutil.copy(made.folder / INT8.file, tmp_path / FLOAT32.file)
    assert as_stored(FLOAT32, tmp_path).name == INT8.name


@each_family
def test_every_family_has_int8_and_float16_within_bounds_and_boxes_stay_float(made: Graphs) -> None:
    detector, found, family = made.detector, made.census, made.detector.family
    assert INT8.bytes_in(made.folder) < 0.8 * FLOAT32.bytes_in(made.folder)

    graph = onnx.load(str(made.folder / INT8.file)).graph
    assert {node.domain for node in graph.node} == {""}
    integers = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    placing = set(nodes_of(graph, placing_parts(detector)))
    kept = [node for node in graph.node if node.op_type in MULTIPLIES and node.name in placing]
    assert len(kept) == sum(found.in_float[PLACES].values()) >= 3
    assert not [node.name for node in kept if node.input[1] in integers]
    total = sum(node.op_type in MULTIPLIES for node in graph.node)
    assert f"INT8: {sum(found.int8.values())} of {total} nodes" in found.text
    assert sum(found.int8.values()) > 0.6 * total

    measured = side_by_side(detector, made.runs, [Pictures(pixels) for pixels in noise(4, 2)], 1)
    assert measured[FLOAT32.name].differences is None
    half, int8 = (measured[variant.name].differences for variant in (FLOAT16, INT8))
    assert half is not None
    assert int8 is not None
    assert (half.images, int8.images) == (4, 4)
    assert 0 < half.mean_probability < int8.mean_probability < (0.05 if family in CHOOSING else 0.02)
    assert 0 < max(half.mean_box, int8.mean_box) < (0.1 if family in CHOOSING else 0.01)
    if family not in CHOOSING:
        assert half.mean_box < int8.mean_box
        assert max(half.largest_box, half.largest_probability) < 5e-3
        assert max(int8.largest_box, int8.largest_probability) < 0.1


@needs_openvino
@each_family
def test_openvino_computes_every_family_and_its_int8_as_onnxruntime_does(made: Graphs) -> None:
    folder, family, runs = made.folder, made.detector.family, made.runs
    session = session_of_openvino(folder / FLOAT32.file, 1)
    require_parity(check_parity(made.detector, session, random_batches(SIZE, (1, 1))), family)
    to_openvino(folder / INT8.file, folder / OPENVINO_INT8.file)
    pairs = [(INT8, OPENVINO_INT8, 0.01)]
    if family in ("conditional_detr", "dab-detr"):  # whose places suffer most when they are rounded
        to_openvino(folder / FLOAT32.file, folder / "whole.xml")
        assert 'element_type="f16"' not in (folder / "whole.xml").read_text()  # each number as the graph has it
        to_openvino(folder / FLOAT16.file, folder / OPENVINO_FLOAT32.file)
        pairs.append((FLOAT32, OPENVINO_FLOAT32, 1e-3))
    pictures = [Pictures(pixels) for pixels in noise(2, 2)]
    for first, second, most in pairs:
        both = {first.name: runs[first.name], second.name: open_variant(second, folder)}
        gaps = side_by_side(made.detector, both, pictures, 1)[second.name].differences
        assert gaps is not None
        assert max(gaps.mean_box, gaps.mean_probability) < (0.1 if family in CHOOSING else most), second
    assert as_stored(OPENVINO_INT8, folder) == OPENVINO_INT8
    assert OPENVINO_INT8.bytes_in(folder) > (folder / OPENVINO_INT8.file).stat().st_size
