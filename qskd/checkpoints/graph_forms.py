"""In which form a detector in an ONNX file answers: as its outputs are called and shaped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from qskd.checkpoints.graph_words import REMEDY, GraphWords, words_file
from qskd.errors import QskdError

OURS = ("logits", "pred_boxes")  # transformers' own, as `qskd export` names them
_NAMES = {
    "boxes": ("boxes", "bboxes", "dets", "pred_boxes"),
    "scores": ("scores",),
    "labels": ("labels", "classes", "label_ids"),
}
_FORMS = (
    "boxes, scores and labels; or rows of six numbers (x0, y0, x1, y1, score, label); or what `qskd export` writes, "
    "logits and pred_boxes"
)

Form = Literal["logits", "detections", "scored", "rows"]


def form_of(
    path: str, outputs: Mapping[str, tuple[int | None, ...]], words: GraphWords | None
) -> tuple[Form, tuple[str, ...]]:
    """How it answers, and its outputs in that form's order."""
    if words is None and outputs.keys() >= set(OURS):
        raise QskdError(
            path,
            f"outputs {' and '.join(OURS)}, as `qskd export` names them, and no config.json beside it",
            "config.json and preprocessor_config.json in its folder, which say its classes and how its pictures are made",
            "copy them from the folder that it was exported to, or name the file there",
        )
    if words is not None and words.outputs:
        if strange := [name for name in words.outputs if name not in outputs]:
            found = f"outputs: {strange[0]}, which it does not have"
            raise QskdError(str(words_file(path)), found, f"of {', '.join(outputs)}")
        named = dict(zip(("boxes", "scores", "labels"), words.outputs, strict=True))
    else:
        low = {name.lower(): name for name in outputs}
        named = {part: low[name] for part, names in _NAMES.items() for name in names[::-1] if name in low}
    if {"boxes", "scores", "labels"} <= named.keys():
        return "detections", (named["boxes"], named["scores"], named["labels"])
    if named.keys() == {"boxes", "labels"}:  # two meanings: mmdetection's boxes have the score in a fifth column
        boxes, labels = outputs[named["boxes"]], outputs[named["labels"]]
        if boxes[-1:] == (5,):
            return "scored", (named["boxes"], named["labels"])
        if boxes[-1:] == (4,) and len(labels) == len(boxes):  # RF-DETR's own export: logits of every class
            return "logits", (named["labels"], named["boxes"])
    if len(outputs) == 1 and (only := next(iter(outputs.items())))[1][-1:] == (6,):
        return "rows", (only[0],)
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in outputs.items())
    raw = [shape for shape in outputs.values() if len(shape) == 3 and (shape[2] or 0) > 1000]
    remedy = (
        "these are a YOLO's raw candidates: export it with suppression, `yolo export format=onnx nms=True`"
        if len(outputs) == 1 and raw
        else f'export it so; or say which outputs these are: "outputs": [BOXES, SCORES, LABELS] in {words_file(Path(path)).name}'
    )
    raise QskdError(path, f"outputs: {listed[:300]}", _FORMS, remedy)


def boxes_of(path: str, words: GraphWords, form: Form) -> tuple[str, str]:
    """How its boxes are written, and in which units; what the form of its outputs decides need not be said."""
    boxes = words.boxes or {"logits": "cxcywh", "rows": "xyxy"}.get(form)
    units = words.units or ("relative" if form == "logits" else None)
    if boxes is None or units is None:
        found = " and ".join(name for name, value in (("boxes", boxes), ("units", units)) if value is None)
        raise QskdError(str(words_file(path)), f"without {found}", "how its boxes are written", REMEDY)
    return boxes, units
