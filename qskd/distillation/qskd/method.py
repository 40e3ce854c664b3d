"""QSKD (arXiv 2409.06443): query selection, and the two distillation losses that it guides, as one method.

What is the paper's and what is our reconstruction is marked in docs/equations.md, section 1, and in the three modules that this
one sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qskd.distillation.method import Facts, Lesson, Method, Seen, Sight, last_layer
from qskd.distillation.qskd.agfd import AttentionGuidedFeatureDistillation, foreground_mask
from qskd.distillation.qskd.lapd import alignment_terms, teacher_layer_of_student, terms_together
from qskd.distillation.qskd.pairing import Side
from qskd.distillation.qskd.query_selection import QuerySelection, of_known_classes, select_both, select_queries
from qskd.distillation.qskd.settings import FeatureDistillationConfig, Settings
from qskd.distillation.shared.apart import apart, facts_apart, matches_apart
from qskd.distillation.shared.maps import pair_levels
from qskd.errors import QskdError
from qskd.structures import SILENT_LOGIT, LossTerm, TeacherNeeds, TeacherRecord

COARSEST = 2.1  # twice, and what sizes that are no multiples of a stride make of it
CITATION = """\
QSKD is the method of Liu et al., *Knowledge Distillation via Query Selection for Detection Transformer*
([arXiv 2409.06443](https://arxiv.org/abs/2409.06443)). Its text was not at hand when qskd was written, only the abstract and
summaries: **the method as implemented is a reconstruction**. Equations, thresholds, weights and the choice of layers are
qskd's, not the paper's, and the paper's results are no claim about this model.

```bibtex
@article{liu2024qskd,
  title   = {Knowledge Distillation via Query Selection for Detection Transformer},
  author  = {Liu, Yi and Wang, Luting and Tang, Zongheng and Liao, Yue and Sun, Yifan and Zhang, Lijun and Liu, Si},
  journal = {arXiv preprint arXiv:2409.06443},
  year    = {2024}
}
```
"""


class QSKD(Method):
    """The terms "agfd" (and "agfd_importance", where that is learned), "lapd_class", "lapd_l1" and "lapd_giou". A part of weight 0
    is left out whole: no terms, nothing asked of the teacher, no projector."""

    title = "QSKD"
    citation = CITATION
    settings: Settings

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        for whose, facts in (("student", student), ("teacher", teacher)) if settings.keeps_queries() else ():
            if not facts.chooses_queries:
                continue
            raise QskdError(
                "distillation.predictions.pairing = index",
                f"a {whose} of family {facts.family or 'unknown'}, whose query i is another one in each image",
                "queries that are the same in every image",
                "use pairing: rank",
            )
        features, predictions = settings.features, settings.predictions
        self.features: AttentionGuidedFeatureDistillation | None = None
        self.further_features = nn.ModuleList()  # of each teacher after the first
        if features.weight > 0:
            self.features, *further = (_features(features, student, each) for each in facts_apart(teacher))
            self.further_features.extend(further)
            self.weights["agfd"] = features.weight
            if features.importance:
                self.weights["agfd_importance"] = features.weight
        if predictions.weight > 0:
            self.weights["lapd_class"] = predictions.weight * predictions.class_weight
            self.weights["lapd_l1"] = predictions.weight * predictions.l1_weight
            self.weights["lapd_giou"] = predictions.weight * predictions.giou_weight

    @property
    def traceable(self) -> bool:  # type: ignore[override]
        """But for pairings that are solved on the host."""
        return not self.settings.predictions.weight or self.settings.predictions.pairing in ("rank", "index")

    @classmethod
    def one_teacher(cls, settings: Settings) -> str:
        if settings.predictions.weight > 0 and settings.predictions.pairing == "index":
            return "predictions.pairing: index, by which query i learns from query i of one teacher"
        return ""

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        features, predictions, floor = settings.features, settings.predictions, settings.selection.floor
        every_layer = predictions.teacher_layers == "same_index" and predictions.student_layers == "all"
        every_layer = every_layer and predictions.weight > 0
        attention = features.weight > 0 and features.background < 1
        every_mask = attention and features.attention_layers == "all"
        reach = f"boundaries that reach down to GIoU {floor:g}"
        if floor == -1:
            reach = "relative boundaries, or a weight for the lowest band: a query of any GIoU can be kept"
        reasons: dict[str, tuple[str, str]] = {}
        if attention:
            reasons["attention_giou_floor"] = ("selection", reach)
            reasons["attention_layers"] = ("features.attention_layers", features.attention_layers)
        if features.weight > 0 and (features.background > 0 or not attention):
            reasons["memory"] = (
                "features.background",
                f"{features.background:g}, which compares features in every cell",
            )
        if every_layer:
            asked = "same_index, which needs every decoder layer of the teacher"
            reasons["all_layers"] = ("predictions.teacher_layers", asked)
        elif every_mask:
            asked = "all, whose masks are of the queries that every decoder layer's boxes select"
            reasons["all_layers"] = ("features.attention_layers", asked)
        return TeacherNeeds(
            memory=features.weight > 0,
            attention=attention,
            attention_layers=features.attention_layers,
            all_layers=every_layer or every_mask,
            attention_giou_floor=floor if attention else 1.0,
            directions=features.whitened_by if features.weight > 0 and features.whitening != 0 else "",
            attended=attention and features.background == 0,
            reasons=reasons,
        )

    @classmethod
    def seen(cls, settings: Settings, sight: Sight) -> Seen:
        from qskd.distillation.qskd.seen import see  # draws: a training has no use for it

        return see(settings, cls.needs_of(settings), sight)

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        student, teacher, targets = lesson.student, lesson.teacher, lesson.targets
        student_assignment, teacher_assignment = lesson.student_assignment, lesson.teacher_assignment
        terms: dict[str, LossTerm] = {}
        if not self.needs.all_layers:
            teacher, teacher_assignment = last_layer(teacher), teacher_assignment[-1:]
        config = self.settings
        if teacher.parts:
            return self._of_several(lesson, teacher, teacher_assignment)
        if config.predictions.weight == 0:
            selection = select_queries(
                teacher.boxes_cxcywh, targets, teacher_assignment, config.selection, teacher.absent
            )
        else:
            ours, theirs = teacher_layer_of_student(len(student.logits), len(teacher.logits), config.predictions)
            distilled = slice(ours[0], None)  # all layers or the last
            boxes = student.boxes_cxcywh[distilled], teacher.boxes_cxcywh
            assignments = student_assignment[distilled], teacher_assignment
            own, selection = select_both(boxes, targets, assignments, config.selection, teacher.absent)
        if self.features is not None:
            terms["agfd"] = self._agfd(self.features, lesson, teacher, selection)
            if config.features.importance:
                terms["agfd_importance"] = self.features.preference()
        if config.predictions.weight > 0:
            # Of a class that the teacher knows nothing of, nothing is learnt: both sides are as sure that it isn't there.
            mine = student.logits[distilled].float().masked_fill(teacher.silent, SILENT_LOGIT)
            mine_known, known = (of_known_classes(each, targets, teacher.silent) for each in (own, selection))
            terms |= alignment_terms(
                Side(mine, boxes[0].float(), mine_known),
                Side(teacher.logits.detach().float(), boxes[1].detach().float(), known).layers(theirs),
                num_objects=targets.valid.shape[1],
                num_slots=1 + (config.selection.max_per_object or max(boxes[0].shape[2], boxes[1].shape[2])),
                config=config.predictions,
            )
        return terms

    def _agfd(
        self,
        features: AttentionGuidedFeatureDistillation,
        lesson: Lesson,
        teacher: TeacherRecord,
        selection: QuerySelection,
    ) -> LossTerm:
        mask = None
        if self.needs.attention:
            logits, guide = teacher.logits, selection
            if self.settings.features.attention_layers != "all":
                logits, guide = logits[-1], selection[-1]
            sure = logits.detach().float().amax(-1).sigmoid()
            mask = foreground_mask(guide, teacher, sure, self.settings.features)
        term: LossTerm = features(lesson.student.memory, lesson.student.memory_valid, teacher, mask)
        return term

    def _of_several(self, lesson: Lesson, teacher: TeacherRecord, assignment: Tensor) -> dict[str, LossTerm]:
        """Each teacher's queries are selected about the objects of its own classes; the student's about all, so that those at
        another teacher's objects learn nothing of this one."""
        config, targets, student = self.settings, lesson.targets, lesson.student
        terms: dict[str, LossTerm] = {}
        parts = apart(teacher)
        selections = [
            select_queries(
                part.boxes_cxcywh, targets, given, config.selection, part.absent, part.silent[targets.labels]
            )
            for part, given in zip(parts, matches_apart(teacher, assignment), strict=True)
        ]
        if self.features is not None:
            modules = [self.features, *self.further_features]
            found = [self._agfd(*each) for each in zip(modules, [lesson] * len(parts), parts, selections, strict=True)]
            # Each is a mean over the images that its teacher has something to show in: so together, over both.
            terms["agfd"] = LossTerm(
                torch.stack([each.total for each in found]).sum(), torch.stack([each.count for each in found]).sum()
            )
            if config.features.importance:
                leanings = [each.preference() for each in modules]
                terms["agfd_importance"] = replace(
                    leanings[0], total=torch.stack([each.total for each in leanings]).sum()
                )
        if config.predictions.weight > 0:
            ours, theirs = teacher_layer_of_student(len(student.logits), len(teacher.logits), config.predictions)
            distilled = slice(ours[0], None)
            boxes = student.boxes_cxcywh[distilled].float()
            own = select_queries(boxes.detach(), targets, lesson.student_assignment[distilled], config.selection)
            logits = student.logits[distilled].float()
            sides = [
                (
                    Side(logits.masked_fill(part.silent, SILENT_LOGIT), boxes, own),
                    Side(part.logits.detach().float(), part.boxes_cxcywh.detach().float(), selection).layers(theirs),
                )
                for part, selection in zip(parts, selections, strict=True)
            ]
            known = [of_known_classes(own, targets, part.silent) for part in parts]
            strange = [(own.slot >= 0) & (each.slot < 0) for each in known]
            most = max(side.logits.shape[2] for pair in sides for side in pair)
            slots = 1 + (config.selection.max_per_object or most)
            terms |= terms_together(sides, strange, targets.valid.shape[1], slots, config.predictions)
        return terms


def _features(config: FeatureDistillationConfig, student: Facts, teacher: Facts) -> AttentionGuidedFeatureDistillation:
    pairs = pair_levels(student.cells, teacher.cells) if student.cells and teacher.cells else None
    if teacher.attended:
        _check_fine(student, teacher, pairs or [])
    return AttentionGuidedFeatureDistillation(
        *(
            student.channels,
            teacher.channels,
            config,
            pairs,
            teacher.directions,
            student.reads_raw_memory,
            teacher.bases,
        )
    )


def _check_fine(student: Facts, teacher: Facts, pairs: Sequence[tuple[int, int]]) -> None:
    """QskdError where a student's cell is the mean of several places of the teacher's map, not all of which may be kept."""
    for own, other in pairs:
        sides = math.sqrt(teacher.cells[other] / student.cells[own])
        if sides > COARSEST:
            raise QskdError(
                "teacher.cache.cells = attended",
                f"a student's map whose cells are {sides:.2g} times as wide as those of the teacher's map {other}, its own",
                f"at most {COARSEST:.2g} times: a mean over cells would count those that are not kept",
                "choose a coarser map of the teacher's (teacher.levels), or --set teacher.cache.cells=all",
            )
