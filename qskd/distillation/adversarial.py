"""Adversarial feature alignment: a critic tells the teacher's features of objects from the student's, which learn to pass for them.

From Adversarial Score Distillation (arXiv 2312.00739) is a critic that is trained on both of its terms in every
step; that it looks at memory, is conditioned on class and box, and its form, are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qskd.boxes import extent_wh
from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.shared.maps import Meeting
from qskd.errors import QskdError
from qskd.structures import LossTerm, Targets, TeacherNeeds

_CLASSES = 4096  # that a critic is told apart, where the teacher's number of classes is not known


class Settings(MethodSettings):
    """Adversarial feature alignment, beside a feature loss (`also: {adversarial: {}}`): a critic on the memory at objects'
    centres."""

    method: str = "adversarial"
    weight: NonNegative = 1.0  # of what the student learns of it
    critic_weight: NonNegative = 1.0  # of what the critic learns

    def weight_fields(self) -> dict[str, str]:
        parts = {"adversarial": "weight", "adversarial_critic": "critic_weight"}
        return {term: field for term, field in parts.items() if getattr(self, field) > 0} if self.weight > 0 else {}


class Critic(nn.Module):
    """D(f, y, b) = psi(f) . (e_y + P b) + u(psi(f)), a projection critic of class y and box b; psi: two layers, of which each
    stretches nothing (spectral norm)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        inner = max(16, width // 2)
        normed = nn.utils.parametrizations.spectral_norm
        self.look = nn.Sequential(
            normed(nn.Linear(width, inner)), nn.ReLU(), normed(nn.Linear(inner, inner)), nn.ReLU()
        )
        self.classes, self.place = nn.Embedding(classes, inner), nn.Linear(4, inner, bias=False)
        self.whole = nn.Linear(inner, 1)

    def forward(self, features: Tensor, labels: Tensor, boxes_cxcywh: Tensor) -> Tensor:
        """[B, M, C], [B, M], [B, M, 4] -> [B, M]; above 0: the teacher's."""
        seen = self.look(features)
        asked = self.classes(labels) + self.place(boxes_cxcywh)
        found: Tensor = (seen * asked).sum(-1) + self.whole(seen)[..., 0]
        return found


class Adversarial(Method):
    """Over all objects, summed over pairs of maps, with f the memory at an object's centre (the student's through a projector phi):

    adversarial          mean of softplus(-D(phi f_S)); the critic learns nothing of it
    adversarial_critic   mean of softplus(-D(f_T)) + softplus(D(phi f_S)); the student learns nothing of it
    adversarial_accuracy of weight 0: the share of both that the critic tells rightly, 0.5 where it can't
    """

    title = "adversarial feature alignment"
    citation = (
        "A critic tells the teacher's features of objects from the student's, which learn to pass for them: qskd's transfer of "
        "the fully trained discriminator of Adversarial Score Distillation ([arXiv 2312.00739](https://arxiv.org/abs/2312.00739)).\n"
    )
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        return TeacherNeeds(memory=settings.weight > 0)

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.weights = {term: getattr(settings, field) for term, field in settings.weight_fields().items()}
        if not self.weights:
            return
        if "adversarial_critic" not in self.weights:
            raise QskdError(
                "distillation.critic_weight", "0", "a critic that learns", "leave it at 1, or set weight: 0"
            )
        self.weights["adversarial_accuracy"] = 0.0
        self.projectors = Meeting(student, teacher)
        classes = teacher.classes or _CLASSES
        self.critics = nn.ModuleList(Critic(width, classes) for width in self.projectors.channels)

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        targets = lesson.targets
        there, boxes = targets.valid, targets.boxes_cxcywh.float()
        fooled = learnt = right = lesson.student.memory[0].new_zeros((), dtype=torch.float32)
        for critic, (shown, goal, valid) in zip(self.critics, self.projectors.of(lesson), strict=True):
            mine, theirs = (at_centres(map_, valid, targets) for map_ in (shown, goal))
            with torch.autocast(boxes.device.type, enabled=False):
                ours, real = (critic(each.detach(), targets.labels, boxes) for each in (mine, theirs))
                held = {name: value.detach() for name, value in critic.named_parameters()}
                taken = functional_call(critic, held, (mine, targets.labels, boxes))
            fooled = fooled + torch.where(there, F.softplus(-taken), 0.0).sum()
            learnt = learnt + torch.where(there, F.softplus(-real) + F.softplus(ours), 0.0).sum()
            right = right + (((real > 0).float() + (ours < 0).float()) / 2 * there).sum()
        count = there.sum().float()
        pairs = len(self.critics)
        found = {"adversarial": fooled, "adversarial_critic": learnt, "adversarial_accuracy": right.detach() / pairs}
        return {name: LossTerm(total, count) for name, total in found.items()}


def at_centres(map_: Tensor, valid: Tensor, targets: Targets) -> Tensor:
    """[B, H, W, C], with `valid` [B, H, W] 1 in a rectangle at the top left -> [B, M, C], bilinear, at the objects' centres."""
    cells = extent_wh(valid)[:, None]
    whole = torch.tensor([map_.shape[2], map_.shape[1]], device=map_.device)
    at = targets.boxes_cxcywh.float()[..., :2] * cells  # in cells
    at = torch.minimum(at.clamp(min=0.5), cells - 0.5) / whole * 2 - 1
    found = F.grid_sample(map_.movedim(-1, 1).float(), at[:, :, None], mode="bilinear", align_corners=False)
    return found[..., 0].transpose(1, 2)
