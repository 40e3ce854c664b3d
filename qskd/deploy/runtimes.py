"""A graph at work in onnxruntime or OpenVINO, as one function; and a graph of ONNX made one of OpenVINO."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qskd.deploy.export import INPUT, OUTPUTS, Predicting, open_session
from qskd.deploy.variants import OPENVINO_BFLOAT16, Variant
from qskd.detectors import Detector
from qskd.errors import QskdError

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


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 itself, as OpenVINO sees it."""
    return "BF16" in need_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def run_of(session: Any) -> Run:
    """Of onnxruntime's session, or `session_of_openvino`'s."""

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, boxes = session.run(list(OUTPUTS), {INPUT: pixels})
        return logits, boxes

    return run


def run_of_torch(detector: Detector) -> Run:
    """transformers' own forward pass, on the CPU."""
    model = Predicting(detector.eval().model)

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            logits, boxes = model(torch.from_numpy(pixels))
        return logits.numpy(), boxes.numpy()

    return run


def open_variant(variant: Variant, folder: Path, threads: int = 1) -> Run:
    """The variant's file in this folder, on the CPU. Raises QskdError where the runtime can't run it."""
    file = folder / variant.file
    if file.suffix == ".xml":
        return run_of(session_of_openvino(file, threads, "bf16" if variant == OPENVINO_BFLOAT16 else "f32"))
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
    openvino = need_openvino()
    how = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    try:
        core = openvino.Core()
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
        openvino.save_model(openvino.Core().read_model(str(file)), str(target), compress_to_fp16=False)
    except RuntimeError as error:
        raise QskdError(
            f"{file.name} for OpenVINO", f"it can't be converted: {_reason(error)}", remedy="leave --openvino away"
        ) from error
