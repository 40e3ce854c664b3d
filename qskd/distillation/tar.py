"""Task Adaptive Regularization (Sun et al., arXiv 2006.13108), told for queries: the teacher is followed where it is better.

The paper's (by its abstract; its body was not at hand): class and box of the teacher are taken only where they are better than
the student's, features near objects, and all of it fades out over the training. Ours: queries matched to objects in place of
proposals, and the gates and losses as docs/methods.md has them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, extent_wh, giou, iou
from qskd.config.distillation import MethodSettings
from qskd.config.section import Fraction, NonNegative
from qskd.distillation.method import Facts, Lesson, Method, last_layer
from qskd.distillation.shared.maps import Meeting
from qskd.structures import SILENT_LOGIT, LossTerm, Targets, TeacherNeeds


class Settings(MethodSettings):
    """Task Adaptive Regularization: of each object, the teacher's class and box where they are better than the student's, and its
    features near objects."""

    method: str = "tar"
    decay: Fraction = 1.0  # as in the paper: all weights fall linearly from the first step to the last
    feature_weight: NonNegative = 50.0  # of the features' squared error near objects
    class_weight: NonNegative = 1.0  # of the classes' BCE
    l1_weight: NonNegative = 5.0  # of the boxes' L1 distance
    giou_weight: NonNegative = 2.0  # of 1 - GIoU
    # Whose class and box are learned: better: the teacher's where it is better than the student's, each for itself; open: always;
    # reversed: only where it is not, the control
    gates: Literal["better", "open", "reversed"] = "better"

    def weight_fields(self) -> dict[str, str]:
        parts = {"features": "feature_weight", "class": "class_weight", "l1": "l1_weight", "giou": "giou_weight"}
        return {f"tar_{part}": field for part, field in parts.items() if getattr(self, field) > 0}


class TaskAdaptive(Method):
    """The terms "tar_features", and, summed over the student's decoder layers, "tar_class", "tar_l1" and "tar_giou":

        features   of each image, sum_p G_p mean_c (phi(F_S)_p - F_T,p)^2 / sum_p G_p,  G the sum of a Gaussian for each object
        class      mean over objects of gamma_j sum_c BCE(p_s, p_t),  gamma_j = 1[p_t > p_s], both of the object's class
        l1, giou   mean over objects of beta_j |b_s - b_t|_1, beta_j (1 - GIoU),  beta_j = 1[IoU(b_t, g_j) > IoU(b_s, g_j)]

    s, t: the queries that student and teacher (its last layer) matched to the object. "tar_open_class" and "tar_open_boxes", of
    weight 0, are the shares of open gates.
    """

    title = "task adaptive regularization"
    citation = (
        "The teacher is followed where it is better than the student, by class and by box (Task Adaptive Regularization: Sun "
        "et al., [arXiv 2006.13108](https://arxiv.org/abs/2006.13108)); for queries, the form is qskd's.\n"
    )
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        return TeacherNeeds(memory=settings.feature_weight > 0)

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.weights = {term: getattr(settings, field) for term, field in settings.weight_fields().items()}
        if settings.feature_weight > 0:
            self.projectors = Meeting(student, teacher)
        if self.weights.keys() - {"tar_features"}:
            self.weights |= {"tar_open_class": 0.0, "tar_open_boxes": 0.0}  # to look at

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        terms = {}
        if "tar_features" in self.weights:
            terms["tar_features"] = self._features(lesson)
        if "tar_open_class" in self.weights:
            terms |= self._predictions(lesson)
        return {name: term for name, term in terms.items() if name in self.weights}

    def _features(self, lesson: Lesson) -> LossTerm:
        """A mean over the images that have objects."""
        above = below = lesson.student.memory[0].new_zeros(len(lesson.targets.counts), dtype=torch.float32)
        for shown, goal, valid in self.projectors.of(lesson):
            weight = near_objects(lesson.targets, valid)
            above = above + (weight * ((shown - goal) ** 2).mean(-1)).sum((1, 2))
            below = below + weight.sum((1, 2))
        with_objects = below > 0
        return LossTerm((above / torch.where(with_objects, below, 1.0)).sum(), with_objects.sum().float())

    def _predictions(self, lesson: Lesson) -> dict[str, LossTerm]:
        student, teacher, targets = lesson.student, last_layer(lesson.teacher), lesson.targets
        own, theirs = lesson.student_assignment, lesson.teacher_assignment[-1:]
        both = (own >= 0) & (theirs >= 0) & targets.valid  # [L, B, M]

        def of_objects(values: Tensor, query: Tensor) -> Tensor:  # [L, B, Q, N], [L, B, M] -> [L, B, M, N]
            return values.float().gather(2, query.clamp(min=0)[..., None].expand(-1, -1, -1, values.shape[-1]))

        silent = lesson.teacher.silent
        logits = of_objects(student.logits, own).masked_fill(silent, SILENT_LOGIT)
        goal = of_objects(teacher.logits.detach(), theirs).sigmoid()
        boxes, aims = of_objects(student.boxes_cxcywh, own), of_objects(teacher.boxes_cxcywh.detach(), theirs)
        label = targets.labels[None, ..., None]
        sure = [
            part.gather(-1, label.expand(len(part), -1, -1, -1))[..., 0] for part in (logits.detach().sigmoid(), goal)
        ]
        objects = cxcywh_to_xyxy(targets.boxes_cxcywh.float())
        corners, their_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(aims)
        fits = [iou(part, objects) for part in (corners.detach(), their_corners)]
        by_class, by_box = (self._gate(mine, better) & both for mine, better in (sure, fits))
        by_class &= ~silent[targets.labels]  # whatever it takes such an object for is wrong

        classes = F.binary_cross_entropy_with_logits(logits, goal.expand_as(logits), reduction="none").sum(-1)
        count = both.sum().float()

        def term(gate: Tensor, loss: Tensor) -> LossTerm:
            return LossTerm(torch.where(gate, loss, 0.0).sum(), count / len(both))

        return {
            "tar_class": term(by_class, classes),
            "tar_l1": term(by_box, (boxes - aims).abs().sum(-1)),
            "tar_giou": term(by_box, 1 - giou(corners, their_corners)),
            "tar_open_class": LossTerm(by_class.sum().float(), count),
            "tar_open_boxes": LossTerm(by_box.sum().float(), count),
        }

    def _gate(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """[L, B, M] bool: where the teacher is followed. mine, theirs: how good each is."""
        if self.settings.gates == "open":
            return torch.ones_like(mine, dtype=torch.bool)
        better = theirs > mine
        return ~better if self.settings.gates == "reversed" else better


def near_objects(targets: Targets, valid: Tensor) -> Tensor:
    """[B, H, W] float32: at each cell that is no padding the sum of a Gaussian for each object, about its centre, with
    deviations of a quarter of its width and height, half a cell at the least. valid: [B, H, W], 1 in a rectangle at the top
    left."""
    sizes = extent_wh(valid).clamp(min=1)[:, None, :, None]
    centre, size = targets.boxes_cxcywh.float()[..., None].split(2, 2)  # [B, M, 2, 1]
    parts = []
    for axis, cells in enumerate((valid.shape[2], valid.shape[1])):
        # [B, 1, cells], relative to the image
        at = (torch.arange(cells, device=valid.device) + 0.5) / sizes[:, :, axis]
        deviation = torch.maximum(size[:, :, axis] / 4, 0.5 / sizes[:, :, axis])
        away = (at - centre[:, :, axis]) / deviation
        parts.append(torch.exp(-0.5 * away**2) * targets.valid[..., None])
    across, down = parts
    return torch.einsum("bmh,bmw->bhw", down, across) * valid
