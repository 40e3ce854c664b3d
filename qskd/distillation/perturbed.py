"""How answers change when queries move: the student's must change as the teacher's do.

From Mind the Gap in Distilling StyleGANs (Xu et al., ECCV 2022) is the idea of a loss on how outputs move along
latent directions; queries in the place of latents, and the form, are ours.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Lesson
from qskd.distillation.shared.asked import AskingBoth
from qskd.distillation.shared.classes import shares_by_confidence
from qskd.distillation.shared.maps import uniform
from qskd.structures import DetectorOutput, LossTerm, Queries

_LEAST = 1e-3  # of a moved box's sides and centre, and of what is left to 1


class Settings(MethodSettings):
    """Perturbed queries: an edge of each of the teacher's queries is moved, and the student's answer must change as the teacher's
    does."""

    method: str = "perturbed"
    # How far, as a share of the box's side. Of a query that is a learned vector: of the way to another one of the teacher's.
    move: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    class_weight: NonNegative = 1.0  # of the probabilities' change
    box_weight: NonNegative = 1.0  # of the boxes' change

    def weight_fields(self) -> dict[str, str]:
        parts = {"class": "class_weight", "boxes": "box_weight"}
        return {f"perturbed_{part}": field for part, field in parts.items() if getattr(self, field) > 0}


class Perturbed(AskingBoth):
    """The terms "perturbed_class" and "perturbed_boxes": of each image the mean over queries q, weighted by max_c p_T, of

        |(o_S(q') - o_S(q)) - (o_T(q') - o_T(q))|^2 / move^2

    o: the probabilities of the last layer's classes, or its boxes (cxcywh); q: the teacher's own queries; q': each with one edge
    moved in or out by `move` of its side, drawn anew in each step, alike on every worker. Both are asked in passes of their own.
    """

    title = "perturbed queries"
    citation = (
        "When a query moves, the student's answer changes as the teacher's does: qskd's transfer of the latent-direction loss of "
        "Mind the Gap in Distilling StyleGANs (Xu et al., ECCV 2022, [arXiv 2208.08840](https://arxiv.org/abs/2208.08840)).\n"
    )
    settings: Settings

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        assert lesson.decoder is not None
        assert lesson.ask_student is not None
        own = lesson.decoder.ask(lesson.teacher)
        moved = self.moved(own.decoded.queries)
        theirs = changes(own.output, lesson.decoder.ask(lesson.teacher, moved).output)
        asked = (lesson.ask_student(self.asked(queries)) for queries in (own.decoded.queries, moved))
        mine = changes(*asked)
        weight = shares_by_confidence(own.output.logits[-1])
        apart = [(one - other) / self.settings.move for one, other in zip(mine, theirs, strict=True)]
        apart[0] = apart[0].masked_fill(lesson.teacher.silent, 0.0)
        self.steps += 1
        totals = [(weight * each.square().sum(-1)).sum() for each in apart]
        if self.asked.adapter is not None:  # where no state is asked, its gradient is waited for nonetheless
            totals = [total + 0.0 * self.asked.adapter.weight.sum() for total in totals]
        count = totals[0].detach().new_full((), len(lesson.targets.counts))
        named = dict(zip(("perturbed_class", "perturbed_boxes"), totals, strict=True))
        return {name: LossTerm(named[name], count) for name in self.weights}

    def moved(self, own: Queries) -> Queries:
        """The queries with one edge each elsewhere, the same in every image."""
        share = self.settings.move
        if own.embedding is not None:
            rows = own.embedding.detach()
            drawn = uniform(self.seed, self.steps, rows.shape[1], 1)[:, 0]
            return Queries(embedding=torch.lerp(rows, rows[:, (drawn * rows.shape[1]).long()], share))
        assert own.places is not None
        edge, out = uniform(self.seed, self.steps, own.places.shape[1], 2).unbind(1)
        edge, out = (4 * edge).long(), torch.where(out < 0.5, -share, share)  # left, top, right, bottom
        centre, size = own.places.detach().float().sigmoid().split(2, -1)
        of_axis = torch.stack([edge % 2 == 0, edge % 2 == 1], -1) * out[:, None]  # [Q, 2]
        far = torch.where(edge[:, None] < 2, -1.0, 1.0)
        places = torch.cat([centre + far * of_axis * size / 2, size * (1 + of_axis)], -1).clamp(_LEAST, 1 - _LEAST)
        return Queries(places=torch.logit(places).to(own.places.dtype), states=own.states)


def changes(before: DetectorOutput, after: DetectorOutput) -> tuple[Tensor, Tensor]:
    """Of the last layer's probabilities [B, Q, K] and boxes [B, Q, 4], float32."""
    sure = [said.logits[-1].float().sigmoid() for said in (before, after)]
    boxes = [said.boxes_cxcywh[-1].float() for said in (before, after)]
    return sure[1] - sure[0], boxes[1] - boxes[0]
