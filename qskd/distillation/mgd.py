"""MGD (Yang et al., ECCV 2022): from the student's memory with most cells hidden, a small generator must make the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qskd.config.distillation import MethodSettings
from qskd.config.section import Fraction, NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.shared.maps import Meeting, mixed
from qskd.structures import LossTerm, TeacherNeeds


class Settings(MethodSettings):
    """MGD: a generator makes the teacher's encoder memory from the student's, of which most cells are hidden."""

    method: str = "mgd"
    weight: NonNegative = 10.0  # of its one term, the mean squared error
    hidden: Fraction = 0.65  # part of the cells that are set to 0, others at every step

    def weight_fields(self) -> dict[str, str]:
        return {"mgd": "weight"} if self.weight > 0 else {}


class Masked(Method):
    """The term "mgd": mean over valid positions and channels of (G(m phi(F_S)) - F_T)^2, m 0 in the hidden cells, G a 3x3
    convolution, a ReLU and another one, for each map its own.

    Which cells are hidden is a hash of the image's id, its place in the map and the number of steps before, so that it is the
    same on however many workers the images are, and in a resumed run.
    """

    title = "masked generative distillation"
    citation = "Features are distilled by masked generation (MGD: Yang et al., ECCV 2022), on the encoder's memory.\n"
    settings: Settings
    steps: Tensor

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        return TeacherNeeds(memory=settings.weight > 0)

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        if settings.weight > 0:
            self.projectors = Meeting(student, teacher)
            self.generators = nn.ModuleList(
                nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
                for width in self.projectors.channels
            )
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.weights["mgd"] = settings.weight

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        totals, counts = [], []
        # The stand-in of an empty share has an image, but no id.
        ids = [*lesson.targets.image_ids, *[0] * len(lesson.targets.counts)][: len(lesson.targets.counts)]
        for level, ((shown, goal, valid), generator) in enumerate(
            zip(self.projectors.of(lesson), self.generators, strict=True)
        ):
            # Padding stays 0 throughout, so that an image's loss is the same whatever it is padded to.
            inside, kept = valid.unsqueeze(1), self._kept(ids, level, valid).unsqueeze(1)
            middle = generator[0](shown.movedim(-1, 1) * inside * kept).relu() * inside  # type: ignore[index]
            made = generator[1](middle).movedim(1, -1).float()  # type: ignore[index]
            totals.append(((made - goal) ** 2).mean(-1).mul(valid).sum())
            counts.append(valid.sum())
        self.steps += 1
        return {"mgd": LossTerm(sum(totals[1:], totals[0]), sum(counts[1:], counts[0]))}

    def _kept(self, ids: Sequence[int], level: int, valid: Tensor) -> Tensor:
        """[B, H, W] bool: what is not hidden in a map like `valid` [B, H, W] of these images."""
        _, high, wide = valid.shape
        image = torch.tensor(ids, dtype=torch.int64).to(valid.device, non_blocking=True)
        image = mixed(mixed(mixed(image ^ (image >> 32)) + self.steps) + level)
        rows, columns = (torch.arange(size, device=valid.device) for size in (high, wide))
        drawn = mixed(image[:, None, None] + rows[:, None] * 65536 + columns)
        return drawn >= round(self.settings.hidden * 2**32)
