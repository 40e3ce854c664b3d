"""How the objects of an image stand to one another in a decoder's eyes: relations between query states, in both networks.

The implicit knowledge of Explicit and Implicit Knowledge Distillation via Unlabeled Data (arXiv 2302.08771), of which only the
abstract was at hand; the form for detection is ours (docs/methods.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.shared.kept import places_of
from qskd.structures import LossTerm, TeacherNeeds


class Settings(MethodSettings):
    """Relations: the cosines between the query states of an image's objects, as the teacher has them."""

    method: str = "relations"
    weight: NonNegative = 1.0  # of its one term

    def weight_fields(self) -> dict[str, str]:
        return {"relations": "weight"} if self.weight > 0 else {}


class Relations(Method):
    """The term "relations": the mean over images with two objects or more of

        sum over i, j of (cos(h_i, h_j) - cos(t_i, t_j))^2 / n^2

    h_i, t_i: the last layer's state of the query that is matched with object i, the student's and the teacher's; n: the objects
    that have one in both. Widths may differ, and nothing is projected. On images without labels objects are pseudo-objects.
    """

    title = "relations between objects"
    citation = (
        "Relations between objects' query states are taught after the abstract of Explicit and Implicit Knowledge Distillation "
        "via Unlabeled Data ([arXiv 2302.08771](https://arxiv.org/abs/2302.08771)).\n"
    )
    settings: Settings
    traceable = True

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        asked = "relations, which compares the states of the teacher's queries"
        columns = frozenset({"states"}) if settings.weight > 0 else frozenset[str]()
        return TeacherNeeds(columns=columns, reasons={"columns": ("method", asked)} if columns else {})

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        if settings.weight > 0:
            self.weights["relations"] = settings.weight

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        said, states = lesson.teacher.extra, lesson.student.query_states
        own, asked = lesson.student_assignment[-1], lesson.teacher_assignment[-1]  # [B, M]
        queries = lesson.teacher.logits.shape[2]
        theirs = places_of(said["states_queries"], queries).gather(1, asked.clamp(min=0))
        both = (own >= 0) & (asked >= 0) & (theirs >= 0) & lesson.targets.valid
        mine, goal = _cosines(states, own), _cosines(said["states"].detach(), theirs)
        pairs = both[:, :, None] & both[:, None]
        number = both.sum(1)
        apart = torch.where(pairs, (mine - goal).square(), 0.0).sum((1, 2)) / number.clamp(min=1).square()
        related = number > 1
        return {"relations": LossTerm(torch.where(related, apart, 0.0).sum(), related.sum().float())}


def _cosines(states: Tensor, queries: Tensor) -> Tensor:
    """[B, Q, D], [B, M] -> [B, M, M], of each two of these queries."""
    chosen = states.gather(1, queries.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))
    unit = F.normalize(chosen.float(), dim=-1)
    with torch.autocast(unit.device.type, enabled=False):  # their differences are small beside them
        return unit @ unit.transpose(1, 2)
