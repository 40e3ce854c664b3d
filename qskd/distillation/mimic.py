"""Plain feature mimicking (FitNets: Romero et al., ICLR 2015): the student's memory must equal the teacher's, everywhere alike.

The method to copy: settings, what it needs, its module, its one term.
"""

from __future__ import annotations

from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.shared.maps import Meeting
from qskd.structures import LossTerm, TeacherNeeds


class Settings(MethodSettings):
    """Plain feature mimicking: the student's encoder memory towards the teacher's, at every position alike."""

    method: str = "mimic"
    weight: NonNegative = 50.0  # of its one term, the mean squared error

    def weight_fields(self) -> dict[str, str]:
        return {"mimic": "weight"} if self.weight > 0 else {}


class Mimic(Method):
    """The term "mimic": mean over valid positions and channels of (phi(F_S) - F_T)^2, phi a 1x1 projector a level."""

    title = "plain feature mimicking"
    citation = "Features are mimicked as by FitNets (Romero et al., ICLR 2015), on the encoder's memory.\n"
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        return TeacherNeeds(memory=settings.weight > 0)

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        if settings.weight > 0:
            self.projectors = Meeting(student, teacher)
            self.weights["mimic"] = settings.weight

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        totals, counts = [], []
        for shown, goal, valid in self.projectors.of(lesson):  # [B, H, W, C], [B, H, W, C], [B, H, W]
            totals.append(((shown - goal) ** 2).mean(-1).mul(valid).sum())
            counts.append(valid.sum())
        return {"mimic": LossTerm(sum(totals[1:], totals[0]), sum(counts[1:], counts[0]))}
