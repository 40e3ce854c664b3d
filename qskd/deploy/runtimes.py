"""A graph at work in onnxruntime or OpenVINO, as one function; and a graph of ONNX made one of OpenVINO."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qskd.deploy.export import INPUT, OUTPUTS, Predicting, open_session
from qskd.deploy.onnx_detect import openvino_core
from qskd.deploy.variants import OPENVINO, Variant, there
from qskd.detectors import Detector
from qskd.errors import QskdError
from qskd.imports import need
from qskd.precision import autocast

BFLOAT16 = "bfloat16"
# Numbers that a weight may be stored as, by the names of either runtime's files; all others are indices.
_STORED = {
    **{"f32": "float32", "f16": "float16", "bf16": BFLOAT16, "i8": "int8", "u8": "int8"},
    **{"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": BFLOAT16, "INT8": "int8", "UINT8": "int8"},
}
Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # pixel_values [B, 3, S, S] -> logits, boxes


def need_openvino() -> Any:
    """The package, which must not call out: what it sends its maker when it is imported is switched off here. QskdError when it is
    not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise QskdError(
            "OpenVINO", "no openvino", "the package openvino", "in the project's folder: pip install -e '.[openvino]'"
        )
    # openvino imports openvino_telemetry where it can, and then posts an event; None makes that an ImportError, for which it has
    # a stand-in.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def _core() -> Any:
    """The process's one; QskdError when OpenVINO is not installed."""
    need_openvino()
    return openvino_core()


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 itself, as OpenVINO sees it."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def exported_variants(folder: Path) -> list[Variant]:
    """Those that a folder holds and this machine can run, each as its file is (`as_stored`)."""
    return runnable(there(folder), folder)


def runnable(variants: Sequence[Variant], folder: Path) -> list[Variant]:
    """These, as their files in `folder` are; without bfloat16 where the CPU has none, or the file whole numbers instead."""
    found = []
    for variant in variants:
        own = as_stored(variant, folder)
        if variant.computes != BFLOAT16 or (own.computes == BFLOAT16 and has_bfloat16()):
            found.append(own)
    return found


def as_stored(variant: Variant, folder: Path) -> Variant:
    """The variant, with the precision that its file in `folder` has, whatever its name: that of most of its weights. A student that
    was trained with 8 bits has whole numbers in model.onnx. QskdError for a file that can't be read."""
    file = folder / variant.file
    sizes: Counter[str] = Counter()
    for kind, count in _constants_of_openvino(file) if file.suffix == ".xml" else _constants_of_onnx(file):
        if kind in _STORED:
            sizes[_STORED[kind]] += count
    weights = sizes.most_common(1)[0][0] if sizes else variant.weights
    # OpenVINO is told what to compute in; onnxruntime computes in what is stored.
    asked = weights if weights == "int8" or variant.runtime != OPENVINO else variant.computes
    return replace(variant, weights=weights, computes=asked)


def _constants_of_onnx(file: Path) -> Iterator[tuple[str, int]]:
    """Type and count of numbers, of each constant; of whole numbers of 8 bits those that DequantizeLinear makes numbers of."""
    onnx = need("onnx")
    try:
        graph = onnx.load(str(file)).graph
    except Exception as error:  # protobuf has its own
        raise QskdError(str(file), f"can't be read as a graph: {error}", "what `qskd export` wrote") from None
    scaled = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for stored in graph.initializer:
        kind = onnx.TensorProto.DataType.Name(stored.data_type)
        if "INT" not in kind or stored.name in scaled:
            yield kind, prod(stored.dims)


def _constants_of_openvino(file: Path) -> Iterator[tuple[str, int]]:
    try:
        operations = _core().read_model(str(file)).get_ops()
    except RuntimeError as error:
        raise QskdError(str(file), f"can't be read as a graph: {_reason(error)}", "what `qskd export` wrote") from None
    for each in operations:
        if each.get_type_name() == "Constant":
            yield each.get_output_element_type(0).get_type_name(), prod(each.get_output_shape(0))


def run_of(session: Any) -> Run:
    """Of onnxruntime's session, or `session_of_openvino`'s."""

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, boxes = session.run(list(OUTPUTS), {INPUT: pixels})
        return logits, boxes

    return run


def run_of_torch(detector: Detector, precision: str = "float32") -> Run:
    """transformers' own forward pass, on the CPU. precision: of autocast."""
    model = Predicting(detector.eval().model)

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode(), autocast(precision, torch.device("cpu")):
            logits, boxes = model(torch.from_numpy(pixels))
        return logits.float().numpy(), boxes.float().numpy()

    return run


def open_variant(variant: Variant, folder: Path, threads: int = 1) -> Run:
    """The variant's file in this folder, on the CPU. Raises QskdError where the runtime can't run it."""
    file = folder / variant.file
    if file.suffix == ".xml":
        return run_of(session_of_openvino(file, threads, "bf16" if variant.computes == BFLOAT16 else "f32"))
    return run_of(open_session(file, threads))


class _Session:
    """OpenVINO's compiled model, called as a session of onnxruntime's is."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def run(self, names: Sequence[str], given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = self._compiled(dict(given))
        return [np.array(found[name]) for name in names]


def session_of_openvino(file: Path, threads: int, precision: str = "f32") -> _Session:
    """An .onnx or .xml file on the CPU. precision: of what is float in it, f32 or bf16; left to itself OpenVINO would compute in
    bfloat16 wherever the CPU can. QskdError where it can't run it."""
    core = _core()
    how = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    try:
        return _Session(core.compile_model(core.read_model(str(file)), "CPU", how))
    except RuntimeError as error:
        raise QskdError(
            f"{file.name} in OpenVINO",
            f"OpenVINO can't run it: {_reason(error)}",
            "a graph that its CPU plugin takes",
            "leave --openvino away; docs/export.md has the families that were tried",
        ) from error


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message that says something: those before name its own source files."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:300]


def to_openvino(file: Path, target: Path) -> None:
    """An .onnx file as OpenVINO's .xml and, beside it, .bin, which stores each weight as the graph has it. (OpenVINO's own way of
    storing weights in float16 takes all of them, also those that say where a box is.)"""
    openvino = need_openvino()
    try:
        openvino.save_model(_core().read_model(str(file)), str(target), compress_to_fp16=False)
    except RuntimeError as error:
        raise QskdError(
            f"{file.name} for OpenVINO", f"it can't be converted: {_reason(error)}", remedy="leave --openvino away"
        ) from error
