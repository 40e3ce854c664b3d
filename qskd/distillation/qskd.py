"""QSKD (arXiv 2409.06443): query selection, and the two distillation losses that it guides, as one method.

What is the paper's and what is our reconstruction is marked in METHODS 1 and in the three modules this one sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from qskd.config import DistillationConfig
from qskd.distillation.features import AttentionGuidedFeatureDistillation, foreground_mask
from qskd.distillation.predictions import Side, alignment_terms, teacher_layer_of_student
from qskd.distillation.query_selection import QuerySelection, select_queries
from qskd.structures import DetectorOutput, LossTerm, Targets, TeacherNeeds, TeacherRecord


def _selection_layer(selection: QuerySelection, layer: int) -> QuerySelection:
    return QuerySelection(**{name: value[layer] for name, value in vars(selection).items()})


class QSKD(nn.Module):
    """Maps a student's output and a teacher's record to the terms "agfd", "lapd_class", "lapd_l1" and "lapd_giou".

    A part of weight 0 is left out whole: no terms, nothing asked of the teacher, no projector.

    needs: what the teacher's record must hold. weights: by term name, for `qskd.detection_loss.combine`.
    """

    def __init__(
        self, config: DistillationConfig, student_channels: Sequence[int], teacher_channels: Sequence[int]
    ) -> None:
        """student_channels, teacher_channels: the width of each encoder memory map, finest first."""
        super().__init__()
        self.config = config
        features, predictions = config.features, config.predictions
        self.features: AttentionGuidedFeatureDistillation | None = None
        self.weights: dict[str, float] = {}
        if features.weight > 0:
            self.features = AttentionGuidedFeatureDistillation(student_channels, teacher_channels, features)
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
        """student_assignment [L, B, M], teacher_assignment [L', B, M]: of `qskd.matching.assign`, -1 = none."""
        terms: dict[str, LossTerm] = {}
        if not self.needs.all_layers:  # the record may hold more than this method reads
            logits, boxes, teacher_assignment = teacher.logits[-1:], teacher.boxes_cxcywh[-1:], teacher_assignment[-1:]
            teacher = replace(teacher, logits=logits, boxes_cxcywh=boxes)
        selection = select_queries(teacher.boxes_cxcywh, targets, teacher_assignment, self.config.selection)
        if self.features is not None:
            mask = None
            if self.needs.attention:
                confidence = teacher.logits[-1].detach().float().amax(-1).sigmoid()
                mask = foreground_mask(_selection_layer(selection, -1), teacher, confidence, self.config.features)
            terms["agfd"] = self.features(student.memory, student.memory_valid, teacher, mask)
        if self.config.predictions.weight > 0:
            terms |= self._align(student, teacher, targets, student_assignment, selection)
        return terms

    def _align(
        self,
        student: DetectorOutput,
        teacher: TeacherRecord,
        targets: Targets,
        student_assignment: Tensor,
        teacher_selection: QuerySelection,
    ) -> dict[str, LossTerm]:
        config, limit = self.config.predictions, self.config.selection.max_per_object
        ours, theirs = teacher_layer_of_student(len(student.logits), len(teacher.logits), config)
        student_boxes = student.boxes_cxcywh[ours[0] :]  # `ours` is all layers or the last
        selection = select_queries(
            student_boxes.detach(), targets, student_assignment[ours[0] :], self.config.selection
        )
        return alignment_terms(
            Side(student.logits[ours[0] :].float(), student_boxes.float(), selection),
            Side(teacher.logits.detach().float(), teacher.boxes_cxcywh.detach().float(), teacher_selection).layers(
                theirs
            ),
            num_objects=targets.valid.shape[1],
            num_slots=1 + (limit or min(student.logits.shape[2], teacher.logits.shape[2])),
            config=config,
        )
