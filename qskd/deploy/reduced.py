"""A detector's ONNX graph with fewer bits: INT8 by post-training static quantisation, and float16. Both by onnxruntime's own tools.

What is INT8: convolutions and linear layers, weights a scale each output channel, activations calibrated on images. What stays in
float, and why:

- where a box is: box heads, sampling offsets, reference points and what chooses queries. 8 bits part an image of 640 pixels into
  steps of 2.5; the same modules stay in float32 under autocast (`qskd.detectors.forward.exact`).
- attention's products of queries with keys and of weights with values: both sides are activations, and little time is spent there.
- softmax, norms, GridSample, top-k and all arithmetic of single numbers: onnxruntime has no faster kernels of 8 bits for them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qskd.deploy.export import INPUT
from qskd.detectors import FAMILIES, Detector
from qskd.errors import QskdError
from qskd.imports import need
from qskd.storage.scratch import scratch_folder

MULTIPLIES = ("Conv", "Gemm", "MatMul")
PLACES, ATTENTION, OTHER = "where boxes are", "attention's products", "without constant weights"
_PLACING = re.compile(r"(?:^|\.)(?:\w*bbox\w*|sampling_offsets)(?:\.|$)")
# Of an activation's values this share, in per cent, is within its range; the few beyond are clipped. The largest values as a range
# cost 0.1 to 0.2 AP points more on the detector of shapes (docs/export.md).
_PERCENTILE = 99.999


class Images(Protocol):
    """What INT8 is calibrated with: pixel_values float32 [B, 3, S, S], by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Census:
    """How many nodes that multiply are of which kind: "Conv", "Gemm" (a linear layer) and "MatMul". in_float: by the reason."""

    int8: Mapping[str, int]
    in_float: Mapping[str, Mapping[str, int]]

    @property
    def text(self) -> str:
        total = sum(self.int8.values()) + sum(sum(some.values()) for some in self.in_float.values())
        left = [f"{why} ({_counted(some)})" for why, some in self.in_float.items()]
        return (
            f"INT8: {sum(self.int8.values())} of {total} nodes that multiply ({_counted(self.int8)}). In float: "
            f"{', '.join([*left, 'and all that does not multiply (softmax, norms, sampling, top-k)'])}."
        )


def _counted(some: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(some.items())) or "none"


def placing_parts(detector: Detector) -> tuple[str, ...]:
    """The modules, as transformers names them (a shared one under each name), that say where a box is or choose queries."""
    family, model = FAMILIES[detector.family], detector.model
    own = {id(inner) for part in family.placing(model) for inner in part.modules()}
    return tuple(
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name and (id(module) in own or _PLACING.search(name))
    )


def nodes_of(graph: Any, parts: Sequence[str]) -> list[str]:
    """The nodes of a graph (by torch's TorchScript exporter, which names a node by its module) that belong to these modules."""
    again = r"(?:_\d+)?"  # at the end of a name where the exporter meets a module a second time
    within = [
        r"\.".join(f"{re.escape(step)}{again}" for step in part.split("."))
        for part in ("model." + one for one in parts)
    ]
    pattern = re.compile(rf"\.(?:{'|'.join(within)})\.") if within else re.compile(r"(?!)")
    return [node.name for node in graph.node if pattern.match(node.name.replace("/", "."))]


class _Reader:
    """As onnxruntime's calibration reads: some images at a time, so that not all activations are in memory at once."""

    def __init__(self, images: Images) -> None:
        self._images, self._left = images, iter(range(len(images)))

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, np.ndarray] | None:
        number = next(self._left, None)
        return None if number is None else {INPUT: self._images[number]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # onnxruntime's tools print to standard output and warn through the root logger.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def quantize_int8(detector: Detector, file: Path, target: Path, images: Images) -> Census:
    """Write `target`: the graph of `file` (`export_onnx`, TorchScript) in INT8, as ONNX's QuantizeLinear and DequantizeLinear.

    The graph is simplified first (batch norms into convolutions, biases into linear layers), as those tools ask for. Raises
    QskdError where they fail.
    """
    need("onnxruntime")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx = need("onnx")
    try:
        with scratch_folder("int8") as scratch, _quiet():
            simple = scratch / "simple.onnx"
            quant_pre_process(str(file), str(simple), skip_symbolic_shape=True)
            graph = onnx.load(str(simple)).graph
            why = _left_in_float(graph, placing_parts(detector))
            quantize_static(
                str(simple),
                str(target),
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(MULTIPLIES),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(why),
                calibrate_method=CalibrationMethod.Percentile,
                extra_options={
                    "CalibStridedMinMax": 1,
                    "CalibPercentile": _PERCENTILE,
                    # Norms and softmax read it in float: in 8 bits it would lose something for nothing. And OpenVINO's CPU plugin
                    # can't run one that a layer scale follows (LW-DETR, RF-DETR).
                    "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                },
            )
        _finish(onnx.load(str(target)), target)
    except QskdError:  # of an image
        raise
    except Exception as error:
        raise _failed(f"{detector.family} as INT8", "onnxruntime.quantization", error) from error
    return census(onnx.load(str(target)).graph, why)


def _failed(where: str, tool: str, error: Exception) -> QskdError:
    said = (str(error).strip() or "no reason given").splitlines()[0]
    return QskdError(where, f"{tool} failed: {type(error).__name__}: {said[:300]}")


def _finish(model: Any, target: Path) -> None:
    """Write and check a graph that a tool of onnxruntime's made: its nodes in an order that ONNX asks for, and of operator sets
    only those that it uses."""
    from onnxruntime.transformers.onnx_model import OnnxModel

    onnx = need("onnx")
    OnnxModel.graph_topological_sort(model.graph)
    used = {node.domain for node in model.graph.node}
    sets = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(sets)
    onnx.save(model, str(target))
    onnx.checker.check_model(str(target))


def _left_in_float(graph: Any, parts: Sequence[str]) -> dict[str, str]:
    """Name of a node that multiplies -> why it stays in float."""
    places = set(nodes_of(graph, parts))
    constant = {value.name for value in graph.initializer}
    why: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in MULTIPLIES:
            continue
        if node.name in places:
            why[node.name] = PLACES
        elif node.input[1] not in constant:
            why[node.name] = ATTENTION if node.op_type == "MatMul" else OTHER
    return why


def census(graph: Any, why: Mapping[str, str]) -> Census:
    """Counted in the graph that was written, by what each node reads."""
    integers = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    int8: Counter[str] = Counter()
    in_float: dict[str, Counter[str]] = {}
    for node in graph.node:
        if node.op_type not in MULTIPLIES:
            continue
        if integers.issuperset(node.input[:2]):
            int8[node.op_type] += 1
        else:
            in_float.setdefault(why.get(node.name, OTHER), Counter())[node.op_type] += 1
    return Census(int8, in_float)


def to_float16(detector: Detector, file: Path, target: Path) -> None:
    """Write `target`: the graph of `file` (`export_onnx`) in float16, input and outputs still float32, and what says where a box
    is (`placing_parts`). Raises QskdError where onnxruntime's converter fails."""
    need("onnxruntime")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx = need("onnx")
    model = onnx.load(str(file))
    kept = nodes_of(model.graph, placing_parts(detector))
    try:
        with _quiet():
            _finish(convert_float_to_float16(model, keep_io_types=True, node_block_list=kept), target)
    except Exception as error:
        raise _failed(f"{detector.family} as float16", "onnxruntime's converter", error) from error
