"""What the project can do with a checkpoint: `qskd doctor --model NAME_OR_FOLDER`. Loads it, runs it on one image of noise, and
writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pipelines.health.machine import show
from pipelines.health.services import Check, guarded
from qskd.config import BOXES_ALONE, FACTS, ONNX, TEACHERS_ONLY, BackboneConfig
from qskd.errors import QskdError
from qskd.redaction import redacted

if TYPE_CHECKING:
    from qskd.checkpoints.preprocessing import Preprocessing
    from qskd.detectors import Detector
    from qskd.teacher.online import OnlineTeacher

_BACKBONES = get_args(BackboneConfig.model_fields["type"].annotation)
_TRIED = ("object",)  # what a detector that is asked in words is asked here
_SHOWN = 5  # names of classes
_ATTENDED = 10  # queries whose attention is measured


@dataclass(frozen=True)
class _Loaded:
    detector: Detector
    preprocessing: Preprocessing

    @property
    def config(self) -> Any:
        return self.detector.model.config


def model_checks(path: str) -> list[Check]:
    """Everything that is said of a checkpoint, in order; ends at the first thing without which nothing more can be said."""
    from qskd.checkpoints.graphs import is_graph
    from qskd.checkpoints.weights import check_path, read_said
    from qskd.detectors import load_detector, read_preprocessing

    try:
        if is_graph(path):
            folder, kind = path, ONNX
        else:
            folder = check_path(path, weights=False)
            said, _ = read_said(folder)
            kind = str(said.get("model_type", "unknown"))[:80]
        if kind not in FACTS and kind not in TEACHERS_ONLY:
            return [_other(kind, folder)]
        loaded = _Loaded(load_detector(folder, words=_TRIED), read_preprocessing(folder))
    except QskdError as error:
        return [Check("checkpoint", "problem", f"{error.where}: {_said(error)}", error.remedy)]
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("family", lambda: _family(loaded)),
        ("size", lambda: _size(loaded)),
        ("classes", lambda: _classes(loaded)),
        ("images", lambda: _images(loaded)),
        ("as a teacher", lambda: _teacher(loaded)),
        ("as a student", lambda: _student(loaded, path)),
    ]
    return [guarded(name, step) for name, step in steps]


def _said(error: QskdError) -> str:
    return f"{error.found}, expected {error.expected}" if error.expected else error.found


def _other(kind: str, folder: str) -> Check:
    """Of a checkpoint that is no detector of a family."""
    if kind in _BACKBONES:
        found = f"a {kind}, which is a backbone: a student can start on it"
        remedy = f"student: {{backbone: {{type: {kind}, init: {redacted(folder)}}}}}, with its sizes"
        return Check("checkpoint", "note", found, remedy)
    known = f"a detector of {', '.join([*FACTS, *TEACHERS_ONLY])}, or a backbone: {', '.join(_BACKBONES)}"
    return Check("checkpoint", "problem", f"a model of type {kind!r}, which qskd does not know", f"choose {known}")


def _family(loaded: _Loaded) -> Check:
    config, kind = loaded.config, loaded.detector.family
    title = TEACHERS_ONLY.get(kind) or FACTS[kind].title
    if kind == ONNX:
        found = f"a {title}; it says boxes and classes, and has no maps; computed by onnxruntime, on the CPU"
        return Check("family", "ok", found)
    if kind in BOXES_ALONE:
        return Check("family", "ok", f"{title} ({kind}), which is no DETR: it says boxes and classes, and has no maps")
    backbone = getattr(config.backbone_config, "model_type", "unknown")
    maps = zip(loaded.detector.memory_strides, loaded.detector.memory_channels, strict=True)
    levels = ", ".join(f"{channels} channels at stride {stride}" for stride, channels in maps)
    return Check("family", "ok", f"{title} ({kind}) on {backbone}; maps: {levels}")


def _size(loaded: _Loaded) -> Check:
    from qskd.detectors.cost import parameters
    from qskd.quantization.model import notice_of

    model, detector = loaded.detector.model, loaded.detector
    if detector.family == ONNX:
        numbers = f"{model.graph.numbers / 1e6:.1f} M numbers stored"
        return Check("size", "ok", f"{numbers}, {detector.num_queries} boxes of an image at most")
    sizes = f"{parameters(model) / 1e6:.1f} M parameters, {detector.num_layers} decoder layers"
    chosen = "chosen in each image" if detector.chooses_queries else "learned"
    notice = notice_of(model)
    return Check("size", "ok", f"{sizes}, {detector.num_queries} queries, {chosen}{f'; {notice}' if notice else ''}")


def _classes(loaded: _Loaded) -> Check:
    if _family_of(loaded).asked_in_words:
        most = loaded.config.max_text_len
        found = f"asked in words, for a dataset's names or --classes, in texts of {most} tokens at most; tried with {_TRIED[0]!r}"
        return Check(
            "classes",
            "ok",
            f"{found}; of several texts each is a pass of all but the backbone, with queries of its own",
        )
    labels = loaded.detector.labels
    named = [label for label in labels if label != "N/A"]
    more = f", and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    nameless = f"; {len(labels) - len(named)} slots without a name" if len(named) < len(labels) else ""
    found = f"{len(named)}: {', '.join(named[:_SHOWN])}{more}{nameless}"
    if named and all(label == f"LABEL_{slot}" for slot, label in enumerate(labels)):
        remedy = "give its slots by number: teacher.class_map: {cat: '17'}, or write id2label into its config.json"
        return Check("classes", "note", f"{found}: names that were never given", remedy)
    return Check("classes", "ok", found)


def _images(loaded: _Loaded) -> Check:
    resize = loaded.preprocessing.resize
    square = resize.mode == "square"
    size = (
        f"{resize.size} x {resize.size}" if square else f"shorter side {resize.size}, longer {resize.longest} at most"
    )
    height, width = _shape(loaded)
    try:
        _family_of(loaded).check_size(loaded.config, height, width)
    except QskdError as error:
        return Check("images", "problem", f"{size}: {_said(error)}", error.remedy)
    exported = "" if square or loaded.detector.family in TEACHERS_ONLY else "; ONNX has one square size: --size N"
    return Check("images", "ok", f"{size}{exported}")


def _shape(loaded: _Loaded) -> tuple[int, int]:
    """Height and width of a usual image."""
    resize = loaded.preprocessing.resize
    return resize.size, resize.usual_pixels // resize.size


def _family_of(loaded: _Loaded) -> Any:
    from qskd.families.table import find_family

    return find_family(loaded.detector.family, "checkpoint")


def _teacher(loaded: _Loaded) -> Check:
    """Whether it runs, and what a cache of it takes."""
    from pipelines.caching.plan import bytes_text
    from qskd.teacher.online import OnlineTeacher

    detector, maps = loaded.detector, len(loaded.detector.memory_channels)

    def teacher(levels: tuple[int, ...] | None = None) -> OnlineTeacher:
        return OnlineTeacher(detector, tuple(range(len(detector.labels))), loaded.preprocessing, levels)

    try:
        attended = min(_ATTENDED, detector.num_queries)
        none, some = (_row_bytes(teacher(), _shape(loaded), queries) for queries in (0, attended))
        least = _row_bytes(teacher((maps - 1,) if maps > 1 else None), _shape(loaded), 0)
    except QskdError as error:
        return Check("as a teacher", "problem", f"{error.where}: {_said(error)}", error.remedy)
    if not detector.memory_channels:
        found = f"runs; a cached image takes {bytes_text(none)}; of predictions alone: distillation.features.weight=0"
        return Check("as a teacher", "ok", found)
    found = (
        f"runs; a cached image takes {bytes_text(none)} in int8, and {bytes_text((some - none) / attended)} for each query "
        "whose attention is kept (those that overlap an object)"
    )
    if maps > 1:
        found += f"; of its {maps} maps the coarsest alone (teacher.levels: [{maps - 1}]) {bytes_text(least)}"
    return Check("as a teacher", "ok", found)


def _row_bytes(teacher: OnlineTeacher, shape: tuple[int, int], queries: int) -> int:
    """Of one view of an image of noise, with the attention of so many queries."""
    import torch

    from qskd.structures import TeacherNeeds
    from qskd.teacher.columns.table import encode

    images = torch.randint(0, 256, (1, *shape, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    asked = torch.arange(queries)[None]
    record = teacher(images, torch.tensor([shape]), TeacherNeeds(memory=True, attention=True), choose=lambda _: asked)
    (row,) = encode(record, [0], "int8")
    return int(row.nbytes)


def _student(loaded: _Loaded, path: str) -> Check:
    from qskd.checkpoints.timm_resnet import is_dilated

    name, detector = "as a student", loaded.detector
    if detector.family in TEACHERS_ONLY:
        return Check(
            name, "note", "no: it can only teach", f"teacher: {{path: {redacted(path)}}}, and a student.family"
        )
    facts, start = FACTS[detector.family], f"student.init: {redacted(path)}"
    if is_dilated(detector.model):
        return Check(
            name, "note", "no: its ResNet is dilated (DC5), which only a teacher can be", "use it as teacher.path"
        )
    family = _family_of(loaded)
    classes = "of any classes" if family.classes_replaceable(loaded.config) else "of these very classes"
    groups = "groups of queries" if family.query_embedding(detector.model) is not None else ""
    extras = [part for part in (groups, "denoising" if family.denoises else "") if part]
    found = f"yes, {classes} ({start}); a smaller {facts.title} inherits its layers (student.inherit)"
    found += f"; trains with {' and '.join(extras)}" if extras else ""
    if facts.missing:
        return Check(
            name, "note", f"{found}; trains without {facts.missing}", "docs/families.md has what its authors train with"
        )
    return Check(name, "ok", found)


def checkpoint_doctor(path: str, console: Any = None) -> int:
    """Print what can be done with a checkpoint. Returns 1 if there is a problem, else 0."""
    return show(model_checks(path), console)
