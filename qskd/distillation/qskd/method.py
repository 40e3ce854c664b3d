"""QSKD (arXiv 2409.06443): query selection, and the two distillation losses that it guides, as one method.

What is the paper's and what is our reconstruction is marked in docs/METHODS.md (METHODS 1) and in the three modules this one sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from qskd.config import DistillationConfig
from qskd.distillation.qskd.agfd import AttentionGuidedFeatureDistillation, foreground_mask
from qskd.distillation.qskd.lapd import alignment_terms, teacher_layer_of_student
from qskd.distillation.qskd.pairing import Side
from qskd.distillation.qskd.query_selection import select_both, select_queries
from qskd.structures import DetectorOutput, LossTerm, Targets, TeacherNeeds, TeacherRecord


class QSKD(nn.Module):
    """Maps a student's output and a teacher's record to the terms "agfd", "lapd_class", "lapd_l1" and "lapd_giou".

    A part of weight 0 is left out whole: no terms, nothing asked of the teacher, no projector.

    needs: what the teacher's record must hold. weights: by term name, for `qskd.losses.detection_loss.combine`.
    """

    def __init__(
        self,
        config: DistillationConfig,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        pairs: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """As `qskd.distillation.build_method` has it."""
        super().__init__()
        self.config = config
        features, predictions = config.features, config.predictions
        self.features: AttentionGuidedFeatureDistillation | None = None
        self.weights: dict[str, float] = {}
        if features.weight > 0:
            self.features = AttentionGuidedFeatureDistillation(student_channels, teacher_channels, features, pairs)
            self.weights["agfd"] = features.weight
        if predictions.weight > 0:
            self.weights["lapd_class"] = predictions.weight * predictions.class_weight
            self.weights["lapd_l1"] = predictions.weight * predictions.l1_weight
            self.weights["lapd_giou"] = predictions.weight * predictions.giou_weight
        self.needs = self.needs_of(config)

    @staticmethod
    def needs_of(config: DistillationConfig) -> TeacherNeeds:
        """What the teacher's record must hold, known before anything is built."""
        features, predictions = config.features, config.predictions
        every_layer = predictions.teacher_layers == "same_index" and predictions.student_layers == "all"
        attention = features.weight > 0 and features.background < 1
        return TeacherNeeds(
            memory=features.weight > 0,
            attention=attention,
            attention_layers=features.attention_layers,
            all_layers=predictions.weight > 0 and every_layer,
            attention_giou_floor=config.selection.floor if attention else 1.0,
        )

    def forward(
        self,
        student: DetectorOutput,
        teacher: TeacherRecord,
        targets: Targets,
        student_assignment: Tensor,
        teacher_assignment: Tensor,
    ) -> dict[str, LossTerm]:
        """student_assignment [L, B, M], teacher_assignment [L', B, M]: of `qskd.losses.matching.assign`, -1 = none."""
        terms: dict[str, LossTerm] = {}
        if not self.needs.all_layers:  # the record may hold more than this method reads
            teacher = replace(teacher, logits=teacher.logits[-1:], boxes_cxcywh=teacher.boxes_cxcywh[-1:])
            teacher_assignment = teacher_assignment[-1:]
        config = self.config
        if config.predictions.weight == 0:
            selection = select_queries(teacher.boxes_cxcywh, targets, teacher_assignment, config.selection)
        else:
            ours, theirs = teacher_layer_of_student(len(student.logits), len(teacher.logits), config.predictions)
            distilled = slice(ours[0], None)  # all layers or the last
            boxes = student.boxes_cxcywh[distilled], teacher.boxes_cxcywh
            assignments = student_assignment[distilled], teacher_assignment
            own, selection = select_both(boxes, targets, assignments, config.selection)
        if self.features is not None:
            mask = None
            if self.needs.attention:
                confidence = teacher.logits[-1].detach().float().amax(-1).sigmoid()
                mask = foreground_mask(selection[-1], teacher, confidence, config.features)
            terms["agfd"] = self.features(student.memory, student.memory_valid, teacher, mask)
        if config.predictions.weight > 0:
            terms |= alignment_terms(
                Side(student.logits[distilled].float(), boxes[0].float(), own),
                Side(teacher.logits.detach().float(), boxes[1].detach().float(), selection).layers(theirs),
                num_objects=targets.valid.shape[1],
                num_slots=1 + (config.selection.max_per_object or max(boxes[0].shape[2], boxes[1].shape[2])),
                config=config.predictions,
            )
        return terms
