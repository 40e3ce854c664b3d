"""All of a training step that has gradients, as one module whose forward gives every loss term."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from qskd.config import Config, DetectionLossConfig
from qskd.detectors import Detector, to_pixels
from qskd.detectors.decoding import decode
from qskd.distillation.method import Lesson, Method, Online, build_method
from qskd.errors import QskdError
from qskd.losses.denoising import Denoising, Noise, denoising_terms, denoising_weights
from qskd.losses.dense_head import DENSE_WEIGHTS, DenseHead
from qskd.losses.detection_loss import detection_terms, detection_weights
from qskd.losses.fine_grained import fine_grained_terms, fine_grained_weights
from qskd.losses.matching import begin_assigning
from qskd.structures import DetectorOutput, LossTerm, Queries, Targets, TeacherRecord
from qskd.teacher.cached import Teacher
from qskd.teacher.online import facts_of
from qskd.training.query_groups import query_groups_of


class StepModule(nn.Module):
    """Everything with gradients. forward -> the named terms of one worker's share of a batch."""

    def __init__(self, config: Config, student: Detector, teacher: Teacher | None) -> None:
        super().__init__()
        self.config = config
        self.student = student
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
    ) -> dict[str, LossTerm]:
        """noise: of the images' denoising queries, for a student that has them; None where no image of the global batch has an
        object."""
        pixels, mask = to_pixels(images, sizes, self.student.mean, self.student.std)
        noised = self.denoising(targets, noise) if self.denoising is not None and noise is not None else None
        groups, others = self.query_groups, None
        with groups.asked(self.student) if groups is not None else nullcontext():
            output = self.student(pixels, mask, with_attention=False, extra=noised and noised.queries, least=least)
        if groups is not None:
            output, others = groups.parted(output)
        early, kind = self.student.num_early, self.student.classification
        logits, boxes = output.logits, output.boxes_cxcywh
        if output.early_logits is not None and output.early_boxes_cxcywh is not None:
            logits = torch.cat([output.early_logits, logits])
            boxes = torch.cat([output.early_boxes_cxcywh, boxes])
        predictions = [(logits, boxes), *([others] if others is not None else [])]
        kinds = [kind] * len(predictions)
        if teacher is not None:
            predictions.append((teacher.logits, teacher.boxes_cxcywh))
        finish = begin_assigning(predictions, targets, self.config.detection, kinds)
        dense: dict[str, LossTerm] = {}
        if self.dense_head is not None:  # before the matching is waited for: it needs none
            dense = self.dense_head(output.features[0], output.memory_valid[0], targets)
        assignments = finish()
        terms = detection_terms(
            logits, boxes, targets, assignments[0], self.config.detection, kind, early, output.no_object
        )
        if groups is not None and others is not None:
            terms |= groups.terms(others, targets, assignments[1], kind)
        if output.sides is not None:
            terms |= fine_grained_terms(
                output.sides,
                output.logits,
                output.boxes_cxcywh,
                targets,
                assignments[0][early:],
                self.config.detection,
            )
        if noised is not None:
            terms |= denoising_terms(output.extra, noised, self.config.detection, kind)
        elif self.denoising is not None:
            terms |= self.denoising.nothing(denoising_weights(self.config.detection, output.sides is not None))
        terms |= dense
        if self.method is not None and teacher is not None:
            ask = partial(self._ask_student, output, mask)
            theirs = teacher.matched(assignments[-1])
            lesson = Lesson(output, teacher, targets, assignments[0][early:], theirs, online, self.decoder, ask)
            terms |= self.method(lesson)
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
