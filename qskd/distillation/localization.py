"""Localization distillation between two networks of D-FINE's kind: a box side's distribution, not only its mean.

The loss and its two regions are LD's (Zheng et al., CVPR 2022), temperature and weight those of D-FINE's distillation of itself;
queries in place of anchors, hard negatives as the region, and the way from one network's bins to another's are ours
(docs/methods.md has the equation).
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou
from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method, last_layer
from qskd.distillation.qskd.pairing import pair_by_rank
from qskd.distillation.qskd.query_selection import select_both
from qskd.distillation.qskd.settings import QuerySelectionConfig
from qskd.distillation.shared.kept import places_of
from qskd.errors import QskdError
from qskd.families.table import FAMILIES, TEACHERS
from qskd.losses.fine_grained import SIDES, moved_to, rebinned
from qskd.structures import LossTerm, SideDistributions, TeacherNeeds, TeacherRecord

_LEAST = 1e-5  # chance of every bin: at a high temperature a chance of 1e-8, which is rounding, would count


class Settings(MethodSettings):
    """Localization distillation (docs/methods.md): the distributions of box sides towards the teacher's, between D-FINE
    detectors."""

    method: str = "localization"
    # Positives are LD's main region, hard negatives its valuable localization region.
    selection: QuerySelectionConfig = QuerySelectionConfig()
    # Of the main region's term: the best of 0.05, 0.15 and 1.5 (docs/evidence.md). D-FINE weighs its distillation of itself 1.5,
    # which here is many times the detection loss's own gradient; LD has 0.25 at temperature 10.
    weight: NonNegative = 0.05
    region_weight: NonNegative = 0.05  # of the valuable localization region's term, likewise; 0 = positives alone
    temperature: Annotated[float, Field(gt=0)] = (
        5.0  # of both distributions, as in D-FINE's own distillation; LD has 10
    )

    def weight_fields(self) -> dict[str, str]:
        fields = {"ld_main": "weight", "ld_region": "region_weight"}
        return {term: field for term, field in fields.items() if getattr(self, field) > 0}


class Localization(Method):
    """The terms "ld_main" and "ld_region": of each decoder layer of the student, over pairs (s, t) of its queries with the
    teacher's, positive with positive and hard negative with hard negative of the same object,

        mean over pairs, by w_t, of mean over sides of T^2 KL(P || softmax(z_s / T)),   P ~ (rebinned(softmax(z_t)) + 1e-5)^(1/T)

    summed over layers. w_t: the IoU of the teacher's box with the object, of positives; its GIoU, at least 0, of hard
    negatives; both times the selection's weight.
    """

    title = "localization distillation"
    citation = (
        "Box sides are distilled as distributions (LD: Zheng et al., CVPR 2022), between the queries of two detectors of "
        "D-FINE's kind (Peng et al., ICLR 2025); the way from the one's bins to the other's is qskd's.\n"
    )
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        if not settings.weight_fields():
            return TeacherNeeds()
        floor = settings.selection.floor if settings.region_weight > 0 else 1.0
        reasons = {
            "attention_giou_floor": ("selection", f"boundaries that reach down to GIoU {floor:g}"),
            "columns": ("method", "localization, which reads how the teacher's box sides are distributed"),
        }
        return TeacherNeeds(attention_giou_floor=floor, columns=frozenset({"sides"}), reasons=reasons)

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.weights = {term: getattr(settings, field) for term, field in settings.weight_fields().items()}
        for whose, facts in (("student", student), ("teacher", teacher)) if self.weights else ():
            if facts.family and not (FAMILIES | TEACHERS)[facts.family].side_distributions:
                able = ", ".join(name for name, known in FAMILIES.items() if known.side_distributions)
                raise QskdError(
                    "distillation.method = localization",
                    f"a {whose} of family {facts.family}, whose boxes are four numbers each",
                    f"student and teacher that give each side of a box as a distribution: {able}",
                    "use another method: qskd distils boxes of any family",
                )

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        student, targets = lesson.student, lesson.targets
        teacher = last_layer(lesson.teacher)
        assert student.sides is not None
        assignments = lesson.student_assignment, lesson.teacher_assignment[-1:]
        rule = self.settings.selection
        own, theirs = select_both((student.boxes_cxcywh, teacher.boxes_cxcywh), targets, assignments, rule)
        slots = 1 + (rule.max_per_object or max(student.boxes_cxcywh.shape[2], teacher.boxes_cxcywh.shape[2]))
        layers = len(student.logits)
        partner = pair_by_rank(own, theirs[[0] * layers], targets.valid.shape[1], slots)  # [L, B, Q]
        overlap = theirs.giou[0].clamp(min=0)
        if targets.valid.shape[1]:  # of positives: IoU, as LD's main region weighs them
            objects = targets.boxes_cxcywh.float().gather(
                1, theirs.object_of_query[0].clamp(min=0)[..., None].expand(-1, -1, SIDES)
            )
            fits = iou(cxcywh_to_xyxy(teacher.boxes_cxcywh[0].detach().float()), cxcywh_to_xyxy(objects))
            overlap = torch.where(theirs.is_positive[0], fits, overlap)
        weights = theirs.weight[0] * overlap  # [B, Q of the teacher]

        terms = {term: student.sides.logits[0].new_zeros((), dtype=torch.float32) for term in self.weights}
        counts = {term: value.detach() for term, value in terms.items()}
        for layer in range(layers):
            apart, known, query = _apart(student.sides, layer, teacher, partner[layer], self.settings.temperature)
            weight = torch.where(known, weights.gather(1, query), 0.0)
            positive = theirs.is_positive[0].gather(1, query)
            for term in terms:
                part = weight * (positive if term == "ld_main" else ~positive)
                terms[term] = terms[term] + (part * apart).sum()
                counts[term] = counts[term] + part.sum() / layers
        return {term: LossTerm(total, counts[term]) for term, total in terms.items()}


def _apart(
    sides: SideDistributions, layer: int, teacher: TeacherRecord, partner: Tensor, heat: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one layer's queries [B, Q], -1 = without partner: T^2 KL of the partner's distributions and their own, the mean over
    sides; whether the partner is there and its distributions are known; the partner, 0 where there is none."""
    said = teacher.extra
    queries, bins = said["sides_queries"], said["sides_bins"]
    query = partner.clamp(min=0)
    there = places_of(queries, teacher.logits.shape[2]).gather(1, query)
    known, there = (partner >= 0) & (there >= 0), there.clamp(min=0)
    if not queries.shape[1]:  # no image has a kept query
        nothing = 0.0 * sides.logits[layer].float().sum(-1)
        return nothing, torch.zeros_like(known), query
    chances, about = said["sides"].flatten(2), said["sides_about_cxcywh"]
    chances, about = (
        part.detach().float().gather(1, there[..., None].expand(-1, -1, part.shape[-1])) for part in (chances, about)
    )
    chances = chances.unflatten(-1, (SIDES, -1)).softmax(-1)
    values = sides.values.detach().float()
    moved = moved_to(
        about, bins[:, None].expand(-1, query.shape[1], -1), sides.about_cxcywh.float(), sides.scale.float()
    )
    goal = (rebinned(chances, moved, values) + _LEAST) ** (1 / heat)
    goal = goal / goal.sum(-1, keepdim=True)
    guess = sides.logits[layer].float().unflatten(-1, (SIDES, -1)) / heat
    apart = F.kl_div(guess.log_softmax(-1), goal, reduction="none").sum(-1)
    return heat**2 * apart.mean(-1), known, query
