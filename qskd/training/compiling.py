"""`compute.compile`: the parts of a training step that go through torch.compile.

The student is one graph, where all images have one size; the matching's costs, up to the one wait for them, are another; the
losses, after it, are further ones. What varies from batch to batch, as the number of objects and of denoising queries, is a
variable of the graphs, so that each is compiled once. What is compiled again is bounded: a batch without any object (it has no
denoising queries), one with a single object (a method that compares objects), a share of another number of images (once for the
first, once for any), or of one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qskd.config import FACTS, Config
from qskd.detectors.forward.compiled import varies
from qskd.distillation.method import Lesson, Method, Several
from qskd.losses.denoising import Groups
from qskd.losses.dense_head import DenseHead
from qskd.losses.matching import all_costs
from qskd.structures import DetectorOutput, ExtraPredictions, Targets
from qskd.training.module import Parts, StepModule, Terms, dense_terms, method_terms, own_terms

LEAST_SLOTS = 2  # to torch a size of 0 or 1 is another graph


def compiles_whole(config: Config) -> bool:
    """Whether every forward of a training has images of one size, so that the whole student is one graph. Groups of queries come
    into it by hooks of a step's own, which are compiled into none."""
    sizes_fixed = config.student.resize.mode == "square" and not config.augmentation.changes_sizes
    groups = config.detection.query_groups or FACTS[config.student.family].query_groups
    return sizes_fixed and groups == 1


def compile_step(module: StepModule, config: Config, **options: Any) -> None:
    """Let the parts of a step be compiled at their first use. Parameters, their names, and what is saved stay.

    Of a student whose images change in size the backbone alone is. options: of `torch.compile`.
    """
    if compiles_whole(config):
        module.student.compile_training(**options)
    else:
        module.student.compile_backbone(**options)
    parts: list[Any] = [torch.compile(part, **options) for part in (all_costs, dense_terms, own_terms, method_terms)]
    costs, dense, terms, method = parts

    def our_costs(predictions: Any, targets: Targets, *given: Any) -> tuple[list[tuple[int, ...]], Tensor]:
        return costs(predictions, _vary(_never_alone(targets)), *given)

    def our_dense(head: DenseHead, features: Tensor, valid: Tensor, targets: Targets) -> Terms:
        return dense(head, features, valid, _vary(targets))

    def our_terms(
        module: StepModule,
        output: DetectorOutput,
        own: Any,
        others: Any,
        targets: Targets,
        assignments: list[Tensor],
        noised: Groups | None,
    ) -> Terms:
        varies(2, *assignments)
        if output.extra is not None and noised is not None:
            _vary_extra(output.extra)
            _vary(noised.targets)
            varies(1, noised.assignment)
        return terms(module, output, own, others, _vary(targets), assignments, noised)

    def our_method(kind: Method, lesson: Lesson) -> Terms:
        if isinstance(kind, Several) and lesson.boosts:  # each part has its own
            return method_terms(kind, lesson)
        lesson = lesson.of_method()  # before anything is traced
        if not kind.traceable:
            return method_terms(kind, lesson)
        _vary(lesson.targets)
        varies(2, lesson.student_assignment, lesson.teacher_assignment)
        varies(1, lesson.teacher.attention_queries, *lesson.teacher.attention)
        return method(kind, lesson)

    module.parts = Parts(_with_slots, our_costs, our_dense, our_terms, our_method)


def _with_slots(targets: Targets) -> Targets:
    """With at least so many slots for objects as one graph is for; those that are added are padding."""
    missing = LEAST_SLOTS - targets.valid.shape[1]
    if missing <= 0:
        return targets
    return replace(
        targets,
        boxes_cxcywh=functional.pad(targets.boxes_cxcywh, (0, 0, 0, missing)),
        labels=functional.pad(targets.labels, (0, missing)),
        valid=functional.pad(targets.valid, (0, missing)),
    )


def _never_alone(targets: Targets) -> Targets:
    """For the matching's costs: a batch's one object twice. The second's come after all that is looked at."""
    if targets.packed is None or len(targets.packed[0]) != 1:
        return targets
    image, slot = torch.stack(targets.packed).repeat(
        1, 2
    )  # laid out as `packed_positions` lays them out, which a graph is for too
    return replace(targets, packed=(image, slot))


def _vary(targets: Targets) -> Targets:
    varies(1, targets.boxes_cxcywh, targets.labels, targets.valid, targets.unsure_xyxy, targets.unsure)
    varies(0, *(targets.packed or ()))
    return targets


def _vary_extra(extra: ExtraPredictions) -> None:
    varies(2, extra.logits, extra.boxes_cxcywh, extra.early_logits, extra.early_boxes_cxcywh)
    if extra.sides is not None:
        varies(1, *extra.sides.logits, extra.sides.about_cxcywh)
