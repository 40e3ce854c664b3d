"""Channel-wise distillation (Shu et al., ICCV 2021): each channel of the student's memory must look where the teacher's does."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field

from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.shared.maps import Meeting
from qskd.structures import LossTerm, TeacherNeeds

_NOWHERE = -1e30  # a logit whose softmax is 0; of -inf the divergence would be NaN


class Settings(MethodSettings):
    """Channel-wise distillation: each channel's softmax over the map's positions towards the teacher's."""

    method: str = "cwd"
    weight: NonNegative = 1.0  # of its one term, the Kullback-Leibler divergence
    temperature: Annotated[float, Field(gt=0)] = 1.0  # what features are divided by before the softmax

    def weight_fields(self) -> dict[str, str]:
        return {"cwd": "weight"} if self.weight > 0 else {}


class ChannelWise(Method):
    """The term "cwd": of each image, summed over its maps, the mean over channels c of
    T^2 KL(softmax_p(F_T,c / T) || softmax_p(phi(F_S)_c / T)), p the positions that are no padding."""

    title = "channel-wise distillation"
    citation = "Features are distilled channel-wise (CWD: Shu et al., ICCV 2021), on the encoder's memory.\n"
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        return TeacherNeeds(memory=settings.weight > 0)

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        if settings.weight > 0:
            self.projectors = Meeting(student, teacher)
            self.weights["cwd"] = settings.weight

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        total, heat = lesson.student.memory[0].new_zeros((), dtype=torch.float32), self.settings.temperature
        for shown, goal, valid in self.projectors.of(lesson):
            padding = (valid == 0).unsqueeze(-1)
            mine, theirs = ((part / heat).masked_fill(padding, _NOWHERE).flatten(1, 2) for part in (shown, goal))
            apart = F.kl_div(mine.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True)
            total = total + heat**2 * apart.sum(1).mean(-1).sum()
        return {"cwd": LossTerm(total, total.new_full((), len(lesson.targets.counts)))}
