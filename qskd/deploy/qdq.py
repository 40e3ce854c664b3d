"""A quantised student's ONNX: weights as whole numbers of 8 bits, and what is to be said of it.

torch writes a quantiser of 8 bits as QuantizeLinear and DequantizeLinear with its step and zero point, and leaves weights in
float before them. Here they are stored as what QuantizeLinear makes of them: a quarter of the bytes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from qskd.errors import QskdError
from qskd.quantization.files import quantisers_of

TOLERANCE = (
    0.02  # of probabilities and boxes: a number between two levels goes to either, and what follows from it differs
)


def store_whole_numbers(model: Any) -> int:
    """Replace (in place) each QuantizeLinear of an initialiser by an initialiser of int8 or uint8; returns how many. model: an
    onnx.ModelProto."""
    from onnx import numpy_helper

    graph = model.graph
    floats = {each.name: each for each in graph.initializer}
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    same = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}  # of two that are equal

    def value(name: str) -> Any:
        name = same.get(name, name)
        if name in floats:
            return numpy_helper.to_array(floats[name])
        if name in constants:
            return numpy_helper.to_array(next(each.t for each in constants[name].attribute if each.name == "value"))
        return None

    replaced, made = [], {}
    for node in graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        weight, step, zero = (value(name) for name in node.input)
        if weight is None or step is None or zero is None:
            continue
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        along = [-1 if place == axis % weight.ndim else 1 for place in range(weight.ndim)] if step.ndim else []
        bounds = np.iinfo(zero.dtype)
        level = np.rint(weight / step.reshape(along)) + zero.reshape(along).astype(np.float32)
        made[node.output[0]] = np.clip(level, bounds.min, bounds.max).astype(zero.dtype)
        replaced.append(node)
    if not replaced:  # a graph in float
        return 0
    for node in replaced:
        graph.node.remove(node)
    _leave_unused(graph, set(same))
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in made.items())
    return len(replaced)


def _leave_unused(graph: Any, names: set[str]) -> None:
    """Drop what nobody reads any more: Identity nodes of these outputs, and then initialisers."""

    def used() -> set[str]:
        return {name for node in graph.node for name in node.input} | {each.name for each in graph.output}

    read = used()
    for node in [each for each in graph.node if each.op_type == "Identity" and each.output[0] in names - read]:
        graph.node.remove(node)
    read = used()
    for stored in [each for each in graph.initializer if each.name not in read]:
        graph.initializer.remove(stored)


def is_quantised(model: Any) -> bool:
    """Whether a model of transformers has quantisers at work."""
    return bool(quantisers_of(model)[1])


def tolerance_of(model: Any, asked: float) -> float:
    """How far a detector's ONNX may be from it, in probabilities and boxes. model: transformers'. QskdError for a student of fewer
    than 8 bits where no more than `TOLERANCE` is asked for: one number that goes to another of 16 levels moves a probability by
    several hundredths, and so no check could tell a good graph from a bad one."""
    bits = quantisers_of(model)[1].values()
    if bits and min(bits) < 8 and asked <= TOLERANCE:
        raise QskdError(
            "qskd export",
            f"a student with {sum(each < 8 for each in bits)} quantisers of fewer than 8 bits, as ONNX",
            "8 bits, which runtimes have",
            "--no-onnx for the folder alone; or, say, --tolerance 0.2 for a graph in float arithmetic, as slow as a float one's",
        )
    return max(asked, TOLERANCE) if bits else asked


def notice_of_onnx(model: Any) -> str:
    """What to say of the ONNX of a student with quantisers; empty of one in float. model: transformers'."""
    bits = Counter(quantisers_of(model)[1].values())
    if not bits:
        return ""
    fewer = sum(count for each, count in bits.items() if each < 8)
    whole = f"{bits[8]} quantisers of 8 bits as QuantizeLinear and DequantizeLinear, with their learned steps"
    if not fewer:
        return whole
    return (
        f"{whole}; {fewer} of fewer bits in float arithmetic (Round, Clip): as exact, and no faster than float anywhere"
    )
