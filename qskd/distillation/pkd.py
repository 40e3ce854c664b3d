"""PKD (Cao et al., NeurIPS 2022): features are normalised before they are compared, so that only how they correlate counts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.shared.maps import Meeting
from qskd.structures import LossTerm, TeacherNeeds

_EPS = 1e-5  # on the variance, as norms have it: the gradient of a channel that is the same everywhere stays small


class Settings(MethodSettings):
    """PKD: 1 - Pearson's correlation of each channel of the student's encoder memory with the teacher's."""

    method: str = "pkd"
    weight: NonNegative = 10.0  # of its one term
    # What a channel's mean and deviation are taken over: the positions of one image, which is ours, and makes two workers equal
    # one; or of all the worker's images, as the release has it.
    statistics: Literal["image", "batch"] = "image"

    def weight_fields(self) -> dict[str, str]:
        return {"pkd": "weight"} if self.weight > 0 else {}


class Pearson(Method):
    """The term "pkd": of each image, summed over its maps, the mean over channels and valid positions of
    1/2 (N(phi(F_S)) - N(F_T))^2, N(F) = (F - mean) / deviation, by channel."""

    title = "PKD"
    citation = "Features are distilled by their Pearson correlation (PKD: Cao et al., NeurIPS 2022), on the encoder's memory.\n"
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        return TeacherNeeds(memory=settings.weight > 0)

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        if settings.weight > 0:
            self.projectors = Meeting(student, teacher)
            self.weights["pkd"] = settings.weight

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        images = len(lesson.targets.counts)
        total = lesson.student.memory[0].new_zeros((), dtype=torch.float32)
        over = (1, 2) if self.settings.statistics == "image" else (0, 1, 2)
        for shown, goal, valid in self.projectors.of(lesson):
            share = (valid / valid.sum(over, keepdim=True)).unsqueeze(-1)  # sums to 1 over what statistics are taken of
            apart = (_normalised(shown, share, over) - _normalised(goal, share, over)) ** 2
            loss = 0.5 * (share * apart).sum(over).mean(-1)  # of each image, or of all
            total = total + (loss.sum() if over == (1, 2) else images * loss)
        return {"pkd": LossTerm(total, total.new_full((), images))}


def _normalised(features: Tensor, share: Tensor, over: tuple[int, ...]) -> Tensor:
    """[B, H, W, C] -> each channel with mean 0 and variance 1 under the weights `share` [B, H, W, 1]."""
    centred = features - (features * share).sum(over, keepdim=True)
    variance = (centred**2 * share).sum(over, keepdim=True)
    return centred * (variance + _EPS).rsqrt()
