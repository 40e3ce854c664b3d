"""KD-DETR (Wang et al., CVPR 2024): both networks are asked the same queries, and the student must answer as the teacher does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou
from qskd.config.distillation import MethodSettings
from qskd.config.section import Count, NonNegative
from qskd.distillation.method import Lesson
from qskd.distillation.shared.asked import AskingBoth
from qskd.distillation.shared.classes import shares_by_confidence
from qskd.distillation.shared.maps import uniform
from qskd.losses.detection_loss import PARTS
from qskd.structures import SILENT_LOGIT, DetectorOutput, LossTerm, Queries

_LIMIT = 4.6  # of a random box's logits: sides and centre from 0.01 to 0.99


class Settings(MethodSettings):
    """KD-DETR: the student learns the teacher's answers to the teacher's own queries and to random ones."""

    method: str = "kd-detr"
    # specific: the teacher's own queries. general: random ones, others in every step. both: two groups, which do not see each
    # other.
    points: Literal["both", "specific", "general"] = "both"
    general_points: Count = 300  # how many random queries a step has
    temperature: Annotated[float, Field(gt=0)] = 10.0  # what logits are divided by before the softmax over classes
    class_weight: NonNegative = 2.0  # of the Kullback-Leibler divergence
    l1_weight: NonNegative = 5.0  # of the boxes' L1 distance
    giou_weight: NonNegative = 2.0  # of 1 - GIoU

    def weight_fields(self) -> dict[str, str]:
        fields = {part: f"{part}_weight" for part in PARTS}
        return {f"kd_{part}": field for part, field in fields.items() if getattr(self, field) > 0}


class KDDETR(AskingBoth):
    """The terms "kd_class", "kd_l1", "kd_giou": summed over both groups and the student's decoder layers, of each image the mean
    over queries, weighted by w = max_c p_T, of T^2 KL(softmax(c_T / T) || softmax(c_S / T)), |b_S - b_T|_1 and 1 - GIoU(b_S, b_T);
    c_T, b_T: what the teacher's last layer says.

    The student is asked in a pass of its decoder of its own for each group: nothing that it is asked sees anything else.
    """

    title = "KD-DETR"
    citation = "The student answers the teacher's queries and random ones as the teacher does (KD-DETR: Wang et al., CVPR 2024).\n"
    settings: Settings

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        assert lesson.decoder is not None
        assert lesson.ask_student is not None
        totals = [lesson.student.logits.new_zeros((), dtype=torch.float32) for _ in range(3)]
        own = lesson.decoder.ask(lesson.teacher)
        for queries, goal in self._groups(lesson, own.decoded.queries, own.output):
            said = lesson.ask_student(self.asked(queries))
            for number, part in enumerate(self._apart(said, goal, lesson.teacher.silent)):
                totals[number] = totals[number] + part
        self.steps += 1
        count = totals[0].detach().new_full((), len(lesson.targets.counts))
        named = dict(zip(("kd_class", "kd_l1", "kd_giou"), totals, strict=True))
        if self.asked.adapter is not None:  # where no state is asked, its gradient is waited for nonetheless
            first = next(iter(self.weights))
            named[first] = named[first] + 0.0 * self.asked.adapter.weight.sum()
        return {name: LossTerm(named[name], count) for name in self.weights}

    def _groups(self, lesson: Lesson, own: Queries, answer: DetectorOutput) -> Iterator[tuple[Queries, DetectorOutput]]:
        if self.settings.points != "general":
            yield own, answer
        if self.settings.points != "specific":
            assert lesson.decoder is not None
            queries = self._general(own)
            yield queries, lesson.decoder.ask(lesson.teacher, queries).output

    def _general(self, own: Queries) -> Queries:
        """Random boxes, with states of zeros; of an embedding: places between two of the teacher's own, anywhere on the line."""
        number = self.settings.general_points
        if own.embedding is None:
            drawn = uniform(self.seed, self.steps, number, 4)
            return Queries(places=torch.logit(drawn).clamp(-_LIMIT, _LIMIT)[None])
        rows = own.embedding.detach()[0]
        one, other, share = uniform(self.seed, self.steps, number, 3).unbind(1)
        start, end = (rows[(each * len(rows)).long()] for each in (one, other))
        return Queries(embedding=torch.lerp(start, end, share[:, None])[None])

    def _apart(self, said: DetectorOutput, goal: DetectorOutput, silent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three terms of a group of queries, summed over the student's layers and images."""
        heat = self.settings.temperature
        theirs, boxes = goal.logits[-1].float(), goal.boxes_cxcywh[-1].float()
        weight = shares_by_confidence(theirs)
        mine = said.logits.float().masked_fill(silent, SILENT_LOGIT)
        wanted = (theirs / heat).log_softmax(-1).expand_as(mine)
        apart = F.kl_div((mine / heat).log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
        found = said.boxes_cxcywh.float()
        distance = (found - boxes).abs().sum(-1)
        overlap = giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(boxes))
        return (weight * apart).sum() * heat**2, (weight * distance).sum(), (weight * (1 - overlap)).sum()
