"""Q-DETR's terms (Xu et al., CVPR 2023): the student's queries that lie on objects have the teacher's features.

docs/methods.md has the equations. The paper rectifies queries inside a quantised network, and keeps that in it; here it is a
part of training alone, since a saved student is plain transformers. That, the last layer's states for the paper's co-attended
features, and the teacher's queries whose states a cache keeps, are this project's reading.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qskd.boxes import cxcywh_to_xyxy, pairwise_giou
from qskd.config.distillation import MethodSettings
from qskd.config.section import Fraction, NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.shared.maps import eye_or_orthogonal
from qskd.structures import LossTerm, Targets, TeacherNeeds

EPS = 1e-5  # of the alignment, as in the paper
GIOU, L1 = 2.0, 5.0  # of a pair's likeness


class Settings(MethodSettings):
    """Q-DETR: queries on objects, found by GIoU, have the features of the teacher's most similar ones."""

    method: str = "qdetr"
    weight: NonNegative = 2.5  # of its one term, as in the paper
    # A query is kept whose GIoU with some object is more than so much of the best that any query has with it, as in the paper; 0:
    # every query that overlaps it more than not.
    threshold: Fraction = 0.6
    alignment: bool = (
        True  # the student's features are normalised, with learned scale and shift, before they are compared
    )

    def weight_fields(self) -> dict[str, str]:
        return {"qdetr": "weight"} if self.weight > 0 else {}


class QDETR(Method):
    """The term "qdetr": over all kept queries of the batch, the mean of

        |a(phi(h_j)) - t_k|_2      a(q) = gamma (q - mean(q)) / sqrt(var(q) + 1e-5) + beta, or q without alignment
        kept      j with GIoU(g_i, b_j) > 0.6 G_i for some object i,  G_i = max_j GIoU(g_i, b_j)
        k         argmax_k 2 GIoU(b_j, b_k) - 5 |b_j - b_k|_1

    h_j, t_k: states of the last layer's queries; b: their boxes; phi: a linear map where the widths differ. Of the teacher's
    queries those count whose states are known, the hundred surest of a cache. Objects that no query overlaps keep none.
    """

    title = "Q-DETR"
    citation = (
        "The student's queries on objects learn the teacher's features after Q-DETR (Xu et al., CVPR 2023, "
        "[arXiv 2304.00253](https://arxiv.org/abs/2304.00253)), with its alignment in training alone.\n"
    )
    settings: Settings
    traceable = True

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        asked = "qdetr, which compares the states of the teacher's queries"
        columns = frozenset({"states"}) if settings.weight > 0 else frozenset[str]()
        return TeacherNeeds(columns=columns, reasons={"columns": ("method", asked)} if columns else {})

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.weights = {term: getattr(settings, field) for term, field in settings.weight_fields().items()}
        if not self.weights:
            return
        own, theirs = student.channels[-1], teacher.channels[-1]
        self.projector: nn.Module = nn.Identity()
        if own != theirs:
            self.projector = nn.Linear(own, theirs, bias=False)
            eye_or_orthogonal(self.projector.weight)
        self.align = nn.LayerNorm(theirs, eps=EPS) if settings.alignment else nn.Identity()

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        said, boxes = lesson.teacher.extra, lesson.student.boxes_cxcywh[-1].detach().float()
        kept = foreground(boxes, lesson.targets, self.settings.threshold)
        partner = self._partners(lesson, boxes)  # among the states
        theirs = said["states"].detach().float()
        goal = theirs.gather(1, partner.clamp(min=0)[..., None].expand(-1, -1, theirs.shape[-1]))
        with torch.autocast(boxes.device.type, enabled=False):
            mine = self.align(self.projector(lesson.student.query_states.float()))
            # Below the root, for where the two are equal it has no slope.
            apart = ((mine - goal).square().sum(-1) + 1e-12).sqrt()
        paired = kept & (partner >= 0)
        return {"qdetr": LossTerm(torch.where(paired, apart, 0.0).sum(), paired.sum().float())}

    def _partners(self, lesson: Lesson, boxes: Tensor) -> Tensor:
        """[B, Q]: which of the teacher's states belongs to the query most like each of the student's; -1 where none is known."""
        record = lesson.teacher
        queries = record.extra["states_queries"]  # [B, A]
        known = queries >= 0
        if record.absent is not None:
            known &= ~record.absent[-1].gather(1, queries.clamp(min=0))
        places = record.boxes_cxcywh[-1].detach().float()
        places = places.gather(1, queries.clamp(min=0)[..., None].expand(-1, -1, 4))
        alike = GIOU * pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(places))
        alike = alike - L1 * (boxes[:, :, None] - places[:, None]).abs().sum(-1)
        best = alike.masked_fill(~known[:, None], float("-inf")).argmax(-1)
        return torch.where(known.any(1, keepdim=True), best, -1)


def foreground(boxes_cxcywh: Tensor, targets: Targets, threshold: float) -> Tensor:
    """[B, Q, 4] -> [B, Q] bool: the queries whose GIoU with some object is above `threshold` of the best that it has."""
    if not targets.valid.shape[1]:
        return boxes_cxcywh.new_zeros(boxes_cxcywh.shape[:2], dtype=torch.bool)
    objects = cxcywh_to_xyxy(targets.boxes_cxcywh.float())
    overlap = pairwise_giou(cxcywh_to_xyxy(boxes_cxcywh), objects)  # [B, Q, M]
    return ((overlap > threshold * overlap.amax(1, keepdim=True)) & targets.valid[:, None]).any(2)
