"""All of a training step that has gradients, as one module whose forward gives every loss term."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qskd.config import Config, DetectionLossConfig
from qskd.detectors import Detector, to_pixels
from qskd.detectors.decoding import decode
from qskd.distillation.method import Lesson, Method, Online, Several, build_method
from qskd.distillation.shared.apart import matched, prediction
from qskd.errors import QskdError
from qskd.losses.denoising import Denoising, Groups, Noise, denoising_terms, denoising_weights
from qskd.losses.dense_head import DENSE_WEIGHTS, DenseHead
from qskd.losses.detection_loss import detection_terms, detection_weights
from qskd.losses.fine_grained import fine_grained_terms, fine_grained_weights
from qskd.losses.matching import all_costs, begin_assigning, positions_of
from qskd.losses.pairs import own_pairs, united_pairs
from qskd.structures import DetectorOutput, LossTerm, Queries, Targets, TeacherRecord
from qskd.teacher.cached import Teacher
from qskd.teacher.online import facts_of
from qskd.training.query_groups import query_groups_of

Terms = dict[str, LossTerm]


def own_terms(module: StepModule, *given: Any) -> Terms:
    return module.own_terms(*given)


def dense_terms(head: DenseHead, *given: Any) -> Terms:
    return head.forward(*given)


def as_they_are(targets: Targets) -> Targets:
    return targets


def method_terms(method: Method, lesson: Lesson) -> Terms:
    return method.forward(lesson if isinstance(method, Several) else lesson.of_method())


@dataclass(frozen=True)
class Parts:
    """The parts of a step around the student's forward: plain functions, or compiled ones (`qskd.training.compiling`), which
    want targets laid out for them."""

    lay_out: Callable[[Targets], Targets] = as_they_are
    costs: Callable[..., tuple[list[tuple[int, ...]], Tensor]] = all_costs
    dense: Callable[..., Terms] = dense_terms
    terms: Callable[..., Terms] = own_terms
    method: Callable[[Method, Lesson], Terms] = method_terms


class StepModule(nn.Module):
    """Everything with gradients. forward -> the named terms of one worker's share of a batch."""

    def __init__(self, config: Config, student: Detector, teacher: Teacher | None) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.parts = Parts()
        self.method = _method(config, student, teacher) if teacher else None
        asked = self.method is not None and self.method.needs.decoder
        self.decoder = teacher.decoder if asked and teacher is not None else None
        dense = config.detection.dense_weight > 0
        self.dense_head = DenseHead(student.feature_channels[0], len(student.labels)) if dense else None
        self.query_groups = query_groups_of(config.detection, student)
        self.weights = detection_weights(student.num_layers, config.detection, student.num_early)
        if self.query_groups is not None:
            self.weights |= self.query_groups.weights
        if student.side_distributions:
            self.weights |= fine_grained_weights(config.detection)
        if dense:
            self.weights |= {name: config.detection.dense_weight * value for name, value in DENSE_WEIGHTS.items()}
        if self.method is not None:
            if taken := sorted(self.method.weights.keys() & {*self.weights, *DENSE_WEIGHTS, "total"}):
                raise QskdError(
                    f"distillation.method = {config.distillation.method}",
                    f"a term called {taken[0]}, as one of the training's own",
                    "terms of other names",
                    "rename the term in the method's file",
                )
            self.weights |= self.method.weights
        self.denoising_queries = denoising_queries(config.detection, student)
        denoises = self.denoising_queries > 0
        self.denoising = Denoising(len(student.labels), student.memory_channels[0]) if denoises else None
        if denoises:
            self.weights |= denoising_weights(config.detection, student.side_distributions)

    def weights_at(self, step: int, total_steps: int) -> dict[str, float]:
        """Each term's weight at a step (0-based): the teacher's terms warm up and decay, the others stay."""
        if self.method is None:
            return self.weights
        return self.weights | self.method.weights_at(step, total_steps)

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Targets,
        teacher: TeacherRecord | None,
        online: Online | None = None,
        noise: Noise | None = None,
        least: tuple[int, int] | None = None,
        boosts: tuple[Tensor, ...] = (),
    ) -> dict[str, LossTerm]:
        """noise: of the images' denoising queries, for a student that has them; None where no image of the global batch has an
        object. boosts: of `Lesson`."""
        pixels, mask = to_pixels(images, sizes, self.student.mean, self.student.std)
        noised = self.denoising(targets, noise) if self.denoising is not None and noise is not None else None
        groups, others = self.query_groups, None
        with groups.asked(self.student) if groups is not None else nullcontext():
            looks = self.method is not None and self.method.reads_attention
            output = self.student(pixels, mask, looks, noised and noised.queries, least)
        if groups is not None:
            output, others = groups.parted(output)
        early, kind = self.student.num_early, self.student.classification
        logits, boxes = output.logits, output.boxes_cxcywh
        if output.early_logits is not None and output.early_boxes_cxcywh is not None:
            logits = torch.cat([output.early_logits, logits])
            boxes = torch.cat([output.early_boxes_cxcywh, boxes])
        predictions: list[Any] = [(logits, boxes), *([others] if others is not None else [])]
        kinds = [kind] * len(predictions)
        if teacher is not None:
            predictions.append(prediction(teacher))
        parts = self.parts
        targets = parts.lay_out(replace(targets, packed=positions_of(targets)))
        finish = begin_assigning(predictions, targets, self.config.detection, kinds, parts.costs)
        dense: dict[str, LossTerm] = {}
        if self.dense_head is not None:  # before the matching is waited for: it needs none
            dense = parts.dense(self.dense_head, output.features[0], output.memory_valid[0], targets)
        assignments = finish()
        terms = parts.terms(self, output, (logits, boxes), others, targets, assignments, noised)
        terms |= dense
        if self.method is not None and teacher is not None:
            ask = partial(self._ask_student, output, mask)
            theirs = matched(teacher, assignments[-1], targets)
            own = assignments[0][early:]
            lesson = Lesson(
                *(output, teacher, targets, own, theirs, online, self.decoder, ask, boosts), costs=self.config.detection
            )
            terms |= parts.method(self.method, lesson)
        return terms

    def own_terms(
        self,
        output: DetectorOutput,
        predictions: tuple[Tensor, Tensor],
        others: tuple[Tensor, Tensor] | None,
        targets: Targets,
        assignments: list[Tensor],
        noised: Groups | None,
    ) -> dict[str, LossTerm]:
        """The student's own losses. predictions: its logits and boxes, early ones first; others: of further groups of queries.
        assignments: of both; noised: its denoising queries."""
        config, early, kind = self.config.detection, self.student.num_early, self.student.classification
        own = assignments[0]
        united = united_pairs(own, targets, output.logits.shape[2]) if self.config.detection.united_matches else None
        terms = detection_terms(*predictions, targets, own, config, kind, early, output.no_object, united)
        if self.query_groups is not None and others is not None:
            terms |= self.query_groups.terms(others, targets, assignments[1], kind)
        if output.sides is not None:
            pairs = united or own_pairs(own, targets)
            terms |= fine_grained_terms(output.sides, output.logits, output.boxes_cxcywh, pairs.after(early), config)
        if noised is not None and output.extra is not None:
            terms |= denoising_terms(output.extra, noised, config, kind)
        elif self.denoising is not None:
            terms |= self.denoising.nothing(denoising_weights(config, output.sides is not None))
        return terms

    def _ask_student(self, output: DetectorOutput, pixel_mask: Tensor, queries: Queries) -> DetectorOutput:
        padded = self.config.student.resize.mode != "square"
        return decode(self.student, output.memory, output.memory_valid, queries, padded, pixel_mask).output


def denoising_queries(config: DetectionLossConfig, student: Detector) -> int:
    """How many positive ones a step has at most, unless an image has more objects; 0: the student is trained without."""
    if not (student.denoises and config.auxiliary):
        return 0
    return student.num_queries // 3 if config.denoising_queries is None else config.denoising_queries


def _method(config: Config, student: Detector, teacher: Teacher) -> Method | None:
    return build_method(config.distillation, facts_of(student, config.student.resize), teacher.facts)
