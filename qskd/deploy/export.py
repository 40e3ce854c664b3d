"""A detector as ONNX: pixel_values in, transformers' own logits and boxes out; and the proof that both compute the same.

Images have one fixed square size and no mask. What comes before and after the graph is `qskd.deploy.onnx_detect`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qskd.datasets.pictures import decoding
from qskd.deploy import onnx_detect
from qskd.deploy.onnx_detect import probabilities_of
from qskd.deploy.qdq import store_whole_numbers
from qskd.detectors import FAMILIES, Detector
from qskd.detectors.teachers.session import open_session as open_session
from qskd.errors import QskdError
from qskd.imports import need
from qskd.quantization.parity import least_different, sure_differences

OPSET = 18  # 16 brought grid_sample, which every sampled attention is made of; 17 layer normalisation
INPUT, OUTPUTS = "pixel_values", ("logits", "pred_boxes")
TOLERANCE = 1e-4
MOST_BYTES = 2**31 - 2**26  # a protobuf has less than 2 GiB: weights, and some room for the graph
Exporter = Literal["torchscript", "dynamo"]


class Predicting(nn.Module):
    """A detector of transformers as a function of one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> logits [B, Q, K] (DETR: K + 1) and boxes [B, Q, 4], cxcywh in 0..1, of the last layer."""
        outputs = self.model(pixel_values, return_dict=True)
        return outputs.logits, outputs.pred_boxes


def detect_program() -> str:
    """The text of detect.py."""
    return standing_alone(onnx_detect)


def standing_alone(module: ModuleType) -> str:
    """The text of a program that imports the decoder and nothing else of qskd, with the decoder's text in place of that import."""
    (imported,) = re.findall(r"^from qskd\..* import .*\n", program := _text(module), re.MULTILINE)
    there = set(program.splitlines())
    lines = _text(decoding).partition("from __future__ import annotations\n")[2].strip().splitlines()
    rule = [line for line in lines if not (line.startswith(("import ", "from ")) and line in there)]
    said = [f"# {line}".rstrip() for line in (decoding.__doc__ or "").strip().splitlines()]
    return program.replace(imported, "\n".join([*said, *rule, "", ""]))


def _text(module: ModuleType) -> str:
    return Path(module.__file__ or "").read_text(encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    # Tracing warns of every size that becomes a constant: here they are meant to, and the batch, which is not, is tried at
    # several sizes afterwards. The other exporter names each operator of torchvision that it does without.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def export_onnx(
    detector: Detector, file: Path, size: int, batch: int | None = 1, exporter: Exporter = "torchscript"
) -> None:
    """Write one file; the detector is left in evaluation mode.

    size: side of the square images in pixels. batch: images at a time; None: any number.
    Raises QskdError for a size that the family can't take, a model that one file can't hold, and where torch fails.
    """
    need("onnx")
    where = f"{detector.family} as ONNX"
    FAMILIES[detector.family].check_size(detector.model.config, size, size)
    weights = sum(value.numel() * value.element_size() for value in detector.model.state_dict().values())
    if weights > MOST_BYTES:
        raise QskdError(where, f"{weights / 2**30:.1f} GiB of weights", "less than 2 GiB, which one file can hold")
    tracing = exporter == "torchscript"
    # A trace of a fixed batch folds sizes into float64 constants that onnxruntime has no kernel for (Deformable DETR's
    # reference points). So the batch is always traced as free, with two images, and pinned afterwards.
    free = tracing or batch is None
    images = torch.zeros(2 if free else batch or 1, 3, size, size)
    named: dict[str, Any] = {"input_names": [INPUT], "output_names": list(OUTPUTS), "opset_version": OPSET}
    if tracing:
        named |= {"dynamo": False, "dynamic_axes": {name: {0: "batch"} for name in (INPUT, *OUTPUTS)}}
    else:
        # Its optimiser breaks Deformable DETR's graph when boxes are refined; onnxruntime optimises what it loads itself.
        named |= {"dynamo": True, "external_data": False, "verbose": False, "optimize": False}
        named |= {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if free else {}
        need("onnxscript")
    try:
        sized = FAMILIES[detector.family].for_one_size(detector.eval().model, size, size)
        with _quiet(), torch.no_grad(), sized:
            # The exporter gives back the mode that it finds, to all in it.
            predicting = Predicting(detector.model).eval()
            torch.onnx.export(predicting, (images,), str(file), **named)
            _state_shapes(file, detector, size, batch)
    except Exception as error:
        cause = error.__cause__ or error  # dynamo wraps the reason in advice
        said = (str(cause).strip() or "no reason given").splitlines()[0]
        raise QskdError(
            where,
            f"torch's {exporter} exporter failed: {type(cause).__name__}: {said[:300]}",
            remedy=f"try --exporter {'dynamo' if tracing else 'torchscript'}; docs/export.md has what was tried",
        ) from error


def _state_shapes(file: Path, detector: Detector, size: int, batch: int | None) -> None:
    """Write the shapes of input and outputs down in the file, the batch as a number where it is fixed; check the file."""
    onnx = need("onnx")
    model = onnx.load(str(file))
    classes = detector.model.config.num_labels + FAMILIES[detector.family].no_object_rows
    shapes = {
        INPUT: [3, size, size],
        "logits": [detector.num_queries, classes],
        "pred_boxes": [detector.num_queries, 4],
    }
    for value in (*model.graph.input, *model.graph.output):
        sizes = ["batch" if batch is None else batch, *shapes[value.name]]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, sizes))
    del model.graph.value_info[:]  # sizes in between were those of a free batch
    store_whole_numbers(model)
    onnx.save(model, str(file))
    onnx.checker.check_model(str(file))


@dataclass(frozen=True)
class Parity:
    """The largest absolute differences of one batch, PyTorch against onnxruntime.

    logits; probabilities, of classes; boxes, in 0..1 of the image. reordered: queries that stand in another place. compared: how
    many of them, where it is not all (`check_sure`).
    """

    name: str
    batch: int
    logits: float
    probabilities: float
    boxes: float
    reordered: int = 0
    compared: int = -1

    @property
    def worst(self) -> float:
        """Of probabilities and boxes: what a user sees. NaN where something is not a number."""
        return float(np.max([self.probabilities, self.boxes]))


def together(name: str, found: Sequence[Parity]) -> Parity:
    """The worst of several batches."""
    logits, probabilities, boxes = (
        np.array([(one.logits, one.probabilities, one.boxes) for one in found]).max(0).tolist()
    )
    images, reordered = sum(one.batch for one in found), sum(one.reordered for one in found)
    return Parity(name, images, logits, probabilities, boxes, reordered)


def compare(
    name: str, mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray], model_type: str, reorder: bool
) -> Parity:
    """mine, theirs: logits [B, Q, K] and boxes [B, Q, 4].

    reorder: queries are chosen by score in each image, and two whose scores differ in the last bit may stand the other way
    round. Where they do, each query is compared with its likeness, found by the least sum of differences.
    """
    model = [(*outputs, probabilities_of(outputs[0], model_type)) for outputs in (mine, theirs)]
    moved = 0
    worst = np.zeros(3)
    for image in range(len(mine[0])):
        first, second = ([values[image] for values in outputs] for outputs in model)
        differences = _largest(first, second)
        if reorder and not differences[1:].max() <= TOLERANCE:
            order = likeness(first[1:], second[1:])
            second = [values[order] for values in second]
            differences = _largest(first, second)
            moved += int((order != np.arange(len(order))).sum())
        worst = np.maximum(worst, differences)  # NaN stays NaN
    logits, boxes, probabilities = worst.tolist()
    return Parity(name, len(mine[0]), logits, probabilities, boxes, moved)


def _largest(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([np.abs(a - b).max() for a, b in zip(first, second, strict=True)])


def likeness(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """The place in `second` of each query's likeness in `first`, by the least sum of largest differences. Arrays [Q, ...]: boxes
    and probabilities of one image."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    features = [np.nan_to_num(np.concatenate(values, axis=-1)) for values in (first, second)]
    return np.asarray(linear_sum_assignment(cdist(*features, "chebyshev"))[1])


def outputs_of_both(
    detector: Detector, session: Any, pixels: Tensor
) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """Logits and boxes of pixel_values [B, 3, S, S] by PyTorch, and by onnxruntime."""
    with torch.inference_mode():
        mine = [value.numpy() for value in Predicting(detector.eval().model)(pixels)]
    try:
        return mine, session.run(list(OUTPUTS), {INPUT: pixels.numpy()})
    except Exception as error:
        raise QskdError(
            f"{detector.family} as ONNX",
            f"onnxruntime fails on {len(pixels)} image(s): {str(error).splitlines()[0][:300]}",
            remedy="the other --exporter, or without --dynamic-batch; docs/export.md has what was tried",
        ) from error


def check_parity(detector: Detector, session: Any, batches: Sequence[tuple[str, Tensor]]) -> list[Parity]:
    """PyTorch against onnxruntime on each (name, pixel_values [B, 3, S, S])."""
    return [
        compare(name, *outputs_of_both(detector, session, pixels), detector.family, detector.chooses_queries)
        for name, pixels in batches
    ]


def check_sure(detector: Detector, session: Any, name: str, batches: Sequence[tuple[str, Tensor]]) -> Parity:
    """Of all batches together, the largest differences of the sure queries that differ least (`qskd.quantization.parity`)."""
    rows, images, moved = [], 0, 0
    for _, pixels in batches:
        both = [
            (*outputs, probabilities_of(outputs[0], detector.family))
            for outputs in outputs_of_both(detector, session, pixels)
        ]
        for first, second in zip(*(zip(*outputs, strict=True) for outputs in both), strict=True):
            order, found = sure_differences(first, second)
            images, moved = images + 1, moved + int((order != np.arange(len(order))).sum())
            rows.append(found)
    kept = least_different(np.concatenate(rows))
    logits, boxes, probabilities = kept.max(0).tolist() if len(kept) else (0.0, 0.0, 0.0)
    return Parity(name, images, logits, probabilities, boxes, moved, len(kept))


def random_batches(size: int, sizes: Sequence[int], seed: int = 0) -> list[tuple[str, Tensor]]:
    """Batches of normal noise, as many images as `sizes` says."""
    generator = torch.Generator().manual_seed(seed)
    return [("random", torch.randn(batch, 3, size, size, generator=generator)) for batch in sizes]


def require_parity(found: Sequence[Parity], where: str, tolerance: float = TOLERANCE) -> None:
    """QskdError when probabilities or boxes differ by more than `tolerance` somewhere."""
    for parity in found:
        if not parity.worst <= tolerance:
            raise QskdError(
                where,
                f"{parity.name}, {parity.batch} image(s): probabilities differ by {parity.probabilities:.2g} and boxes by "
                f"{parity.boxes:.2g} between PyTorch and onnxruntime",
                f"at most {tolerance:g}",
                "try the other --exporter, or allow more with --tolerance; a network that has learnt nothing yet has queries of "
                "all but equal scores, whose order is chance (docs/export.md): train it first. Nothing was written",
            )
