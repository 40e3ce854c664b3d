"""Making a student: from sizes or from a checkpoint, the same for the same seed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qskd.checkpoints.clean_config import CATEGORY_IDS
from qskd.checkpoints.preprocessing import read_preprocessing
from qskd.checkpoints.timm_resnet import find_timm, is_dilated
from qskd.checkpoints.weights import read_config
from qskd.config import StudentConfig
from qskd.config.backbone import NO_TIMM, TIMM
from qskd.config.quantization import QuantizationConfig
from qskd.datasets.classes import Vocabulary
from qskd.detectors.backbone import backbone_config, first_stages, load_backbone, thaw_norms
from qskd.detectors.checkpoint import load_detector
from qskd.detectors.cost import gflops, parameters
from qskd.detectors.detector import Detector
from qskd.detectors.norms import keep_precision
from qskd.errors import QskdError
from qskd.families.facts import TEACHERS_ONLY
from qskd.families.initialisation import set_class_prior
from qskd.families.table import FAMILIES, find_family
from qskd.quantization.model import quantise

log = logging.getLogger(__name__)


def build_student(config: StudentConfig, labels: Sequence[str], seed: int) -> Detector:
    """A student in training mode, on the CPU. Its weights depend on the arguments only; global random state is kept.

    labels: class names by slot, unique. Raises QskdError for a checkpoint that can't be used.
    """
    if not labels or len(set(labels)) != len(labels):
        raise QskdError("student labels", f"{list(labels)}", "at least one class name, and none of them twice")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_checkpoint(config, labels) if config.init else _from_sizes(config, labels)
        find_family(model.config.model_type, "student").prepare_student(model)
        if config.quantization_taken is not None:  # before the detector takes hold of any layer's forward
            quantise(model, model.config.model_type, config.quantization_taken)
            _warn_of_random_ranges(config)
        detector = Detector(model).train()
    if config.init:
        seen_as = read_preprocessing(config.init, config.resize)
        detector.mean, detector.std = seen_as.mean, seen_as.std
    trunk = find_family(detector.family, "student").trunk(model)
    frozen = config.frozen_stages_taken(detector.family)
    if config.frozen_stages is None and "ResNet" not in type(trunk).__name__:
        frozen = 0  # the family's own is of ResNets
    _set_backbone(detector.backbone, trunk, config, frozen)
    return detector


def _warn_of_random_ranges(config: StudentConfig) -> None:
    """A network that has learnt nothing has other ranges than it will have."""
    bits = config.quantization_taken
    if bits is None or bits.rest_from or bits.parts == ("backbone",) or config.init or config.inherit:
        return
    _warn(
        "student.quantization.rest_from = 0: layers that begin at random are quantised from the start, with the ranges of a "
        "network that has learnt nothing. At 8 bits an RT-DETR had an AP of 0.267 so, 0.387 with rest_from: 0.5, and 0.389 in "
        "float; a Deformable DETR 0.022 and 0.171 (docs/quantization.md)"
    )


def _from_sizes(config: StudentConfig, labels: Sequence[str]) -> Any:
    family = find_family(config.family, "student.family")
    if config.feature_levels != 1 and not family.many_maps:
        _warn(f"student.feature_levels = {config.feature_levels} has no effect: {config.family} reads one map")
    if not config.box_refinement and not family.refinement_optional:
        _warn(f"student.box_refinement = false has no effect: {config.family} leaves no choice")
    if config.backbone_norm == "frozen" and not config.backbone.kind.batch_norms:
        _warn(f"student.backbone_norm = frozen has no effect: a {config.backbone.type} has no batch norms")
    model = _unlearned(config, labels)
    family.initialise(model)
    if config.backbone.init:
        load_backbone(family.trunk(model), config.backbone.init, model.config.backbone_config)
    elif config.frozen_stages and not config.inherit:
        _warn(
            f"student.frozen_stages = {config.frozen_stages} keeps random weights: set backbone.init, or frozen_stages: 0"
        )
    elif config.backbone_norm == "frozen" and config.backbone.kind.batch_norms:
        _warn("student.backbone_norm = frozen on a random backbone normalises nothing: set backbone.init, or use batch")
    return model


def _unlearned(config: StudentConfig, labels: Sequence[str]) -> Any:
    """A model of the sizes, with transformers' own random weights."""
    family = find_family(config.family, "student.family")
    backbone = backbone_config(config.backbone, config.feature_levels if family.many_maps else 1)
    if config.backbone.is_vit and not config.backbone.kind.family and not config.backbone.init:
        backbone.image_size = config.resize.size  # a place for each patch: nothing to fit
    return family.model_class(family.student_config(config, backbone, labels))


def student_cost(config: StudentConfig, classes: int) -> tuple[float, float]:
    """Millions of parameters, and 10^9 operations (`qskd.detectors.cost.gflops`) for one image of the student's input size.

    For an aspect ratio of 1.5 where `resize` keeps ratios. The weights, which don't matter, are not made ready to learn.
    """
    resize = config.resize
    family_of(config)  # its complaint
    with torch.random.fork_rng(devices=[]):
        model = (
            load_detector(config.init).model if config.init else _unlearned(config, [str(i) for i in range(classes)])
        )
    height, width = resize.size, resize.usual_pixels // resize.size
    pixels, mask = torch.zeros(1, 3, height, width), torch.ones(1, height, width, dtype=torch.bool)
    return parameters(model) / 1e6, gflops(model, pixels, mask)


def family_of(config: StudentConfig) -> str:
    """The family's name; of a student that starts from a checkpoint, the checkpoint's. QskdError of one that can only teach, and of
    one that stands on a network of timm's."""
    if not config.init:
        return config.family
    start = read_config(config.init)
    kind, backbone = str(start.model_type), getattr(start, "backbone_config", None)
    if getattr(backbone, "model_type", "") in TIMM and find_timm(start) is None:
        found = f"{config.init}, whose backbone is timm's {getattr(backbone, 'backbone', '?')}"
        raise QskdError("student.init", found, "a detector on a backbone of transformers", NO_TIMM)
    if kind in TEACHERS_ONLY:
        raise QskdError(
            "student.init",
            f"{config.init}, a {TEACHERS_ONLY[kind]}, which can only teach",
            f"a checkpoint of {', '.join(FAMILIES)}",
            f"--set teacher.path={config.init}, and a student.family",
        )
    return kind


def queries_of(config: StudentConfig) -> int:
    """How many objects it can find in an image; of a student that starts from a checkpoint, the checkpoint's."""
    if not config.init:
        return config.queries
    return find_family(family_of(config), config.init).num_queries(read_config(config.init))


def describe_student(config: StudentConfig, classes: int) -> str:
    """Its sizes and what they come to, in a line or two."""
    backbone, resize = config.backbone, config.resize
    try:
        cost = "{:.2f} M parameters, {:.2f} GFLOPs an image".format(*student_cost(config, classes))
    except QskdError as error:  # a checkpoint that can't be reached, say: training will complain of it
        if error.where == "student.init":  # and one that can't be a start
            raise
        cost = f"parameters and GFLOPs not known: {error.where}: {error.found}"
    side = f"{resize.size} x {resize.size}" if resize.mode == "square" else f"{resize.size}/{resize.longest}"
    what = f"{config.init}'s sizes"
    if not config.init:
        what = (
            f"{config.family}, {backbone.type} of {'-'.join(map(str, backbone.depths))} "
            f"{f'{backbone.layer_type} ' if 'resnet' in backbone.type else ''}layers of "
            f"{'-'.join(map(str, backbone.hidden_sizes))} channels, width {config.width}, "
            f"{config.encoder_layers} + {config.decoder_layers} layers, {config.heads} heads, ffn {config.ffn_width}, "
            f"{config.queries} queries"
        )
    return f"{what}{_bits_said(config.quantization_taken)}, images {side}\n  {cost}"


def _bits_said(bits: QuantizationConfig | None) -> str:
    """And when all of them begin, where that is not at once: until then there is no AP."""
    if bits is None:
        return ""
    at = bits.rest_from or 0.0
    if not at or "backbone" not in bits.parts:
        return f", {bits.bits}"
    when = f"step {at:g}" if at >= 1 else f"{at:.0%} of the training"
    return f", {bits.bits} (all but its backbone from {when} on; not evaluated before)"


def _from_checkpoint(config: StudentConfig, labels: Sequence[str]) -> Any:
    family_of(config)  # its complaint, before weights are read
    detector = load_detector(config.init, quantised=False)
    if is_dilated(detector.model):
        raise QskdError(
            "student.init",
            f"{config.init}, whose ResNet is dilated (DC5)",
            "a detector that can be saved as transformers describes it, without timm",
            "choose a checkpoint without dilation; this one can be a teacher",
        )
    family = find_family(detector.family, config.init)
    if not getattr(detector.model.config, "freeze_backbone_batch_norms", True):
        # As transformers builds all others: what is to learn is thawed, and nothing else moves.
        keep_precision(detector.backbone, batch_too=True)
        detector.model.config.freeze_backbone_batch_norms = True
    default = StudentConfig()
    for field, found in family.sizes(detector.model.config).items():
        wanted = getattr(config, field)
        if wanted not in (found, getattr(default, field)):
            _warn(f"student.{field} = {wanted} has no effect: student.init ({config.init}) has {found}")
    dropout = getattr(detector.model.config, "dropout", None)
    if config.dropout not in (None, dropout):
        _warn(f"student.dropout = {config.dropout:g} has no effect: student.init ({config.init}) has {dropout}")
    if config.backbone != default.backbone:
        _warn(f"student.backbone has no effect: the backbone is that of student.init ({config.init})")
    known = _rows_by_name(detector.labels, labels)
    if known == dict(enumerate(range(len(detector.labels)))) and len(labels) == len(detector.labels):
        _name_classes(detector.model, labels)  # the same ones, at most spelled otherwise
        return detector.model
    if not family.classes_replaceable(detector.model.config):
        raise QskdError(
            "student.init",
            f"{config.init}, which chooses its queries by a class head, with classes {list(detector.labels)}",
            f"the classes to train: {list(labels)}",
            "start from a checkpoint without two_stage, or with these very classes",
        )
    _remake_class_heads(detector.model, family.class_heads(detector.model), labels, known, family.no_object_rows)
    return detector.model


def _rows_by_name(theirs: Sequence[str], labels: Sequence[str]) -> dict[int, int]:
    """The checkpoint's row of each class that it knows, by names as a teacher's are matched (`qskd.datasets.classes`)."""
    vocabulary = Vocabulary(theirs)
    found = {place: vocabulary.slots(label) for place, label in enumerate(labels)}
    return {place: slots[0] for place, slots in found.items() if len(slots) == 1 and theirs[slots[0]] != "N/A"}


def _name_classes(model: Any, labels: Sequence[str]) -> None:
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: slot for slot, label in enumerate(labels)}


def _remake_class_heads(
    model: Any, heads: Sequence[nn.Linear], labels: Sequence[str], known: Mapping[int, int], more: int
) -> None:
    """Give the heads a row a label: a class the checkpoint knows (`known`) keeps its row, others start anew. The `more` rows
    after those of the classes ("no object") are kept."""
    rows = [*known.items()] + [(len(labels) + extra, model.config.num_labels + extra) for extra in range(more)]
    made: dict[int, nn.Linear] = {}  # heads that shared parameters go on sharing them
    shared: list[nn.Linear] = []
    for head in heads:
        if id(head.weight) not in made:
            fresh = made[id(head.weight)] = nn.Linear(head.in_features, len(labels) + more)
            nn.init.normal_(fresh.weight, std=0.02)
            set_class_prior(fresh)
            with torch.no_grad():
                for slot, old in rows:
                    fresh.weight[slot], fresh.bias[slot] = head.weight[old], head.bias[old]
        shared.append(made[id(head.weight)])
    for head, fresh in zip(heads, shared, strict=True):
        head.weight, head.bias, head.out_features = fresh.weight, fresh.bias, len(labels) + more
    if hasattr(model.config, CATEGORY_IDS):
        delattr(model.config, CATEGORY_IDS)  # of other classes
    _name_classes(model, labels)
    model.num_labels = len(labels)
    log.warning(
        "student.init: class head re-made for %d classes, %d kept their weights by name", len(labels), len(known)
    )


def _set_backbone(backbone: nn.Module, trunk: nn.Module, config: StudentConfig, frozen_stages: int) -> None:
    """Norm and trainability; transformers freezes the whole ResNet by itself."""
    frozen = first_stages(trunk, frozen_stages) if frozen_stages else []
    if config.backbone_norm != "frozen" and config.train_backbone:
        thaw_norms(backbone, frozen)
    elif config.backbone_norm != "frozen":
        log.info("student.train_backbone = false keeps the backbone's norms frozen too")
    keep_precision(backbone)
    backbone.requires_grad_(config.train_backbone)
    for name, parameter in backbone.named_parameters():
        if name.endswith(
            "mask_token"
        ):  # of a ViT's own pretraining: no image has a masked patch, and DDP waits for gradients
            parameter.requires_grad_(False)
    for part in frozen:
        part.requires_grad_(False)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
