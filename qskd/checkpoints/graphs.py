"""A detector in an ONNX file, read and not run: what it is given, what it says, and in which form."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qskd.checkpoints.clean_config import CATEGORY_IDS, detector_config
from qskd.checkpoints.graph_forms import OURS, Form, boxes_of, form_of
from qskd.checkpoints.graph_words import REMEDY, GraphWords, read_words, words_file
from qskd.checkpoints.json_files import first_line, read_json_file
from qskd.config import ONNX
from qskd.datasets.classes import UNNAMED
from qskd.errors import QskdError
from qskd.families.table import find_family
from qskd.imports import need

ENDING = ".onnx"
MOST_BOXES = 300  # of an image, the best, where the graph does not say how many it gives
_SIZES = "orig_target_sizes"  # of RT-DETR's and D-FINE's own exports: what boxes are scaled to


@dataclass(frozen=True)
class Graph:
    """form: "logits" of all classes and boxes of each query; "detections": boxes, scores and labels; "scored": boxes with the score
    behind their four numbers, and labels; "rows" of the six numbers.

    given: name of the image input; rank 4 with a batch, 3 without. batch: images at a time, None: any number. side: of the square
    images that it takes, None: any. sizes_input: name of an input that says what boxes are scaled to; empty: there is none.
    outputs: names, in the form's order; batched: they have a place for several images. queries: the most boxes of an image.
    numbers: how many it stores, its weights above all.
    softmax: "logits" share one with "no object", their last. labels: class names by label. boxes, units: as `GraphWords` has them.
    words: how its pictures are made; None where a checkpoint's files beside it say that, as `qskd export` writes them.
    """

    file: str
    form: Form
    given: str
    rank: int
    batch: int | None
    side: int | None
    sizes_input: str
    outputs: tuple[str, ...]
    batched: bool
    queries: int
    numbers: int
    softmax: bool
    labels: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    boxes: str
    units: str
    words: GraphWords | None

    @property
    def letterbox(self) -> bool:
        return self.words is not None and self.words.resize == "letterbox"

    @property
    def config(self) -> Any:
        """What stands for the configuration of a checkpoint of transformers."""
        named = {label: name for label, name in enumerate(self.labels) if name != UNNAMED}
        said: dict[str, Any] = {
            "model_type": ONNX,
            "id2label": named,
            "num_labels": len(self.labels),
            "queries": self.queries,
        }
        return SimpleNamespace(**said, **({CATEGORY_IDS: list(self.category_ids)} if self.category_ids else {}))


def is_graph(path: str | Path) -> bool:
    """Whether a path is meant as an ONNX file."""
    return str(path).lower().endswith(ENDING)


def read_graph(path: str | Path) -> Graph:
    """QskdError for what is no detector, or does not say how it is meant. The last ones are kept."""
    file = Path(path).expanduser()
    beside = [words_file(file), file.parent / "config.json"]
    try:
        marks = [(found := each.stat()).st_mtime_ns + found.st_size if each.is_file() else 0 for each in beside]
        size, changed_ns = (found := file.stat()).st_size, found.st_mtime_ns
    except OSError as error:
        what = f"can't be read: {error.strerror or error}"
        raise QskdError(str(path), what, "a detector in an ONNX file", "name one that is there") from None
    if not size:
        raise QskdError(str(path), "an empty file", "a detector in an ONNX file", "copy or download it again")
    return _read(file, str(path), (size, changed_ns, *marks))


@lru_cache(maxsize=4)
def _read(file: Path, path: str, _: tuple[int, ...]) -> Graph:
    onnx = need("onnx", path)
    try:
        model = onnx.load(str(file), load_external_data=False)
        graph = model.graph
    except Exception as error:  # protobuf's own
        raise QskdError(path, f"no ONNX file: {first_line(error)}", "a detector in an ONNX file") from None
    if _outside(onnx, graph):
        raise QskdError(
            path,
            "weights that lie in another file",
            "one file, whose checksum tells whether a cache is of it",
            "save it as one: onnx.save(onnx.load(FILE), NEW_FILE)",
        )
    stored = {each.name for each in graph.initializer}
    inputs = {each.name: _shape(each) for each in graph.input if each.name not in stored}
    outputs = {each.name: _shape(each) for each in graph.output}
    said = {each.key: each.value for each in model.metadata_props}
    given, sizes_input = _given(path, onnx, graph, inputs)
    shape = inputs[given]
    batch = shape[0] if len(shape) == 4 else 1
    side = _side(path, given, shape[-2:])
    numbers = sum(_product(each.dims) for each in graph.initializer)
    words = read_words(file)
    form: Form
    names: tuple[str, ...]
    softmax, ids, most = False, None, MOST_BOXES
    if words is None and outputs.keys() >= set(OURS) and (config_file := file.parent / "config.json").is_file():
        config = detector_config(read_json_file(config_file), str(config_file))
        family = find_family(config.model_type, str(config_file))
        if family.asked_in_words:
            raise QskdError(path, "a detector that is asked in words", "one with classes of its own", "use its folder")
        form, names, written = "logits", OURS, ("cxcywh", "relative")
        softmax, ids = family.no_object_rows == 1, getattr(config, CATEGORY_IDS, None)
        most = family.num_queries(config)
        labels = tuple(str(config.id2label.get(label, UNNAMED)) for label in range(config.num_labels))
    else:
        form, names = form_of(path, outputs, words)
        words = words or _ultralytics(said, form, side)
        if words is None:
            raise QskdError(
                path,
                "nothing says what its labels are called and how its pictures are made",
                f"{words_file(path)}, beside it",
                REMEDY,
            )
        written = boxes_of(path, words, form)
        labels = _slots(path, words, outputs[names[0]][-1:]) if form == "logits" else words.labels
    boxes = outputs[names[form == "logits"]]
    queries = (boxes[-2] if len(boxes) > 1 else None) or most
    return Graph(
        file=path,
        form=form,
        given=given,
        rank=len(shape),
        batch=batch,
        side=side,
        sizes_input=sizes_input,
        outputs=names,
        batched=form == "logits" or len(boxes) == 3,
        queries=queries if form == "logits" else min(queries, MOST_BOXES),
        numbers=numbers,
        softmax=softmax,
        labels=labels,
        category_ids=None if ids is None else tuple(ids),
        boxes=written[0],
        units=written[1],
        words=words,
    )


def _outside(onnx: Any, graph: Any) -> bool:
    """Whether a tensor of it, or of a graph in one of its nodes, is stored elsewhere."""
    values = [*graph.initializer, *(part.t for node in graph.node for part in node.attribute)]
    inner = [part.g for node in graph.node for part in node.attribute if part.g.node]
    return any(each.data_location == onnx.TensorProto.EXTERNAL for each in values) or any(
        _outside(onnx, each) for each in inner
    )


def _shape(value: Any) -> tuple[int | None, ...]:
    """None where a size is free. () also of what has no shape."""
    sizes = value.type.tensor_type.shape.dim
    return tuple(int(each.dim_value) if each.dim_value > 0 else None for each in sizes)


def _product(dims: Any) -> int:
    found = 1
    for each in dims:
        found *= int(each)
    return found


def _given(path: str, onnx: Any, graph: Any, inputs: Mapping[str, tuple[int | None, ...]]) -> tuple[str, str]:
    """The image input, and the one for sizes."""
    images = [name for name, shape in inputs.items() if len(shape) in (3, 4) and shape[-3] == 3]
    others = [name for name in inputs if name not in images]
    if len(images) != 1 or others not in ([], [_SIZES]):
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items()) or "none"
        raise QskdError(
            path,
            f"inputs: {listed[:300]}",
            f"one of images, [B, 3, H, W] or [3, H, W] (and {_SIZES}, as RT-DETR's and D-FINE's exports have it)",
            "export the detector with images as its only input; a mask or further inputs are not given",
        )
    kind = next(each.type.tensor_type.elem_type for each in graph.input if each.name == images[0])
    if kind not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
        name = onnx.TensorProto.DataType.Name(kind).lower()
        raise QskdError(path, f"input {images[0]} of {name}", "float or float16", "export it for float images")
    return images[0], others[0] if others else ""


def _side(path: str, given: str, sides: tuple[int | None, ...]) -> int | None:
    fixed = [side for side in sides if side]
    if not fixed:
        return None
    if len(set(fixed)) > 1:
        raise QskdError(
            path,
            f"input {given} of {fixed[0]} x {fixed[1]} pixels",
            "square images",
            "export it with one side for both",
        )
    return fixed[0]


def _ultralytics(said: Mapping[str, str], form: Form, side: int | None) -> GraphWords | None:
    """What the metadata says that ultralytics writes into its exports; None of others'."""
    if form != "rows" or "ultralytics" not in " ".join(said.values()).lower() or said.get("task") != "detect":
        return None
    try:
        names, sides = ast.literal_eval(said["names"][:100_000]), ast.literal_eval(said.get("imgsz", "[]")[:100])
        words = {
            "classes": {str(int(label)): str(name) for label, name in names.items()},
            "boxes": "xyxy",
            "units": "pixels",
        }
        looks = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "resize": "letterbox"}
        return GraphWords.model_validate(words | looks | {"size": side or (sides[0] if sides else None)})
    except (ValueError, SyntaxError, TypeError, AttributeError, LookupError, RecursionError, MemoryError):
        return None


def _slots(path: str, words: GraphWords, last: tuple[int | None, ...]) -> tuple[str, ...]:
    """A name for each of the logits."""
    labels, count = words.labels, last[0] if last and last[0] else len(words.labels)
    if len(labels) > count:
        found = f"classes: a name for label {len(labels) - 1}, and a detector of {count} logits"
        raise QskdError(str(words_file(path)), found, f"labels below {count}", "correct the numbers")
    return (*labels, *(UNNAMED,) * (count - len(labels)))
