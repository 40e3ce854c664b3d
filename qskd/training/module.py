"""All of a training step that has gradients, as one module whose forward gives every loss term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qskd.config import Config
from qskd.detectors import Detector, to_pixels
from qskd.distillation.method import Facts, Lesson, Method, Online, build_method
from qskd.errors import QskdError
from qskd.losses.dense_head import DENSE_WEIGHTS, DenseHead
from qskd.losses.detection_loss import detection_terms, detection_weights
from qskd.losses.matching import begin_assigning
from qskd.structures import LossTerm, Targets, TeacherRecord
from qskd.teacher.cached import Teacher


class StepModule(nn.Module):
    """Everything with gradients. forward -> the named terms of one worker's share of a batch."""

    def __init__(self, config: Config, student: Detector, teacher: Teacher | None) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.method = _method(config, student, teacher) if teacher else None
        dense = config.detection.dense_weight > 0
        self.dense_head = DenseHead(student.feature_channels[0], len(student.labels)) if dense else None
        self.weights = detection_weights(student.num_layers, config.detection, student.num_early)
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
        least: tuple[int, int] | None = None,
    ) -> dict[str, LossTerm]:
        pixels, mask = to_pixels(images, sizes, self.student.mean, self.student.std)
        output = self.student(pixels, mask, with_attention=False, least=least)
        early, kind = self.student.num_early, self.student.classification
        logits, boxes = output.logits, output.boxes_cxcywh
        if output.early_logits is not None and output.early_boxes_cxcywh is not None:
            logits = torch.cat([output.early_logits, logits])
            boxes = torch.cat([output.early_boxes_cxcywh, boxes])
        predictions = [(logits, boxes)]
        if teacher is not None:
            predictions.append((teacher.logits, teacher.boxes_cxcywh))
        finish = begin_assigning(predictions, targets, self.config.detection, [kind])
        dense: dict[str, LossTerm] = {}
        if self.dense_head is not None:  # before the matching is waited for: it needs none
            dense = self.dense_head(output.features[0], output.memory_valid[0], targets)
        assignments = finish()
        terms = detection_terms(
            logits, boxes, targets, assignments[0], self.config.detection, kind, early, output.no_object
        )
        terms |= dense
        if self.method is not None and teacher is not None:
            lesson = Lesson(output, teacher, targets, assignments[0][early:], assignments[1], online)
            terms |= self.method(lesson)
        return terms


def _method(config: Config, student: Detector, teacher: Teacher) -> Method | None:
    own = Facts(
        student.memory_channels,
        student.memory_cells(config.student.resize),
        student.family,
        student.num_layers,
        student.num_queries,
        len(student.labels),
        student.chooses_queries,
    )
    return build_method(config.distillation, own, teacher.facts)
