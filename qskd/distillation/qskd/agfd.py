"""Attention-Guided Feature Distillation: the student's memory must agree where the teacher's selected queries look.

equations.md 1.3 AGFD, our reconstruction. The paper's (as equations.md 1.1 has it): a foreground mask, generated under the
guidance of the selected queries, steers feature distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qskd.distillation.qskd.query_selection import QuerySelection
from qskd.distillation.qskd.settings import FeatureDistillationConfig
from qskd.distillation.qskd.whitening import metric
from qskd.distillation.shared.maps import pair_levels, projector, resampler
from qskd.errors import QskdError
from qskd.structures import LossTerm, TeacherRecord

if TYPE_CHECKING:
    from qskd.teacher.memory.basis import Basis
    from qskd.teacher.memory.moments import Directions

_TINY = 1e-12


def foreground_mask(
    selection: QuerySelection, teacher: TeacherRecord, confidence: Tensor, config: FeatureDistillationConfig
) -> tuple[Tensor, ...]:
    """The attention of the kept queries, summed and normalised: one mask [B, H, W] float32 for each teacher map; with
    `attention_layers: all` [B, L, H, W], each layer's own.

        m = sum over kept queries i of weight_i * w_i * A_i;  M = max(m / max(m), background)

    w_i is the teacher's max_c p_i ("confidence", [B, Q]), confidence^gamma * max(0, GIoU_i)^(1 - gamma) ("quality", the
    score equations.md 2 recalls of DETRDistill), 1 + GIoU_i ("giou"), or 1. The maximum runs over all the image's maps; it cancels
    in a loss that divides by the mask's sum, but sets what `background` is a share of. A query whose attention is not in the
    record adds nothing; an image without objects has a mask of zeros.

    selection, confidence: of the teacher's last layer, without layer dimension; of all L with `attention_layers: all`.
    equations.md 1.3 AGFD, our reconstruction.
    """
    if teacher.attention_queries is None or not teacher.attention:
        raise QskdError(
            "distillation.features",
            "the teacher's record holds no attention",
            "the attention of the teacher's selected queries",
            "cache it, or use features.background: 1",
        )
    weight = selection.weight
    if config.query_weight == "confidence":
        weight = weight * confidence.float()
    elif config.query_weight == "quality":
        gamma = config.quality_gamma
        weight = weight * confidence.float() ** gamma * selection.giou.clamp(min=0) ** (1 - gamma)
    elif config.query_weight == "giou":
        weight = weight * (1 + selection.giou)
    if weight.dim() == 3:
        each = [_masks(part, teacher, config, before) for before, part in enumerate(weight.flip(0))]
        return tuple(torch.stack(parts[::-1], dim=1) for parts in zip(*each, strict=True))
    return _masks(weight, teacher, config)


def _masks(
    weight: Tensor, teacher: TeacherRecord, config: FeatureDistillationConfig, before: int = 0
) -> tuple[Tensor, ...]:
    """Of the layer `before` layers before the last. weight: [B, Q]."""
    assert teacher.attention_queries is not None
    query = teacher.attention_queries - before * weight.shape[1]
    known = (query >= 0) & (query < weight.shape[1])
    weight = torch.where(known, weight.gather(1, query.clamp(0, weight.shape[1] - 1)), 0.0)  # [B, A]
    with torch.autocast(weight.device.type, enabled=False):
        maps = [
            torch.einsum("ba,bahw->bhw", weight, attention.float()) * valid
            for attention, valid in zip(teacher.attention, teacher.memory_valid, strict=True)
        ]
    everywhere = torch.cat([part.flatten(1) for part in maps], dim=1)
    top = everywhere.amax(1)[:, None, None]
    background = config.background * (top > 0)
    return tuple(
        torch.maximum(part / top.clamp(min=_TINY), background) * valid
        for part, valid in zip(maps, teacher.memory_valid, strict=True)
    )


class AttentionGuidedFeatureDistillation(nn.Module):
    """The student's encoder memory, through a 1x1 projector, towards the teacher's inside the foreground mask.

        L = sum_p M_p * mean_c (phi(F_S)_p - F_T,p)^2 / sum_p M_p,   for each image over all its levels and valid
        positions

    With `mask_weighting: squared` the mean over all cells of M_p^2 * mean_c (...)^2 instead, as TPRD has it (equations.md 5).

    equations.md 1.3 AGFD, our reconstruction. The projectors, one for each student map that meets one of the teacher's
    (`projector` says how they begin), are for training only and belong to this module, never to the exported student.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        config: FeatureDistillationConfig,
        pairs: Sequence[tuple[int, int]] | None = None,
        directions: Sequence[Directions] = (),
        turned: bool = False,
        bases: Sequence[Basis] = (),
    ) -> None:
        """student_channels, teacher_channels: the width of each memory map. pairs: (student map, teacher map), by
        `pair_levels`; QskdError when they are needed, for the numbers of maps differ, and not given. directions: of each
        teacher map, for `whitening`; QskdError when that is on, and they are not known. turned: as of `projector`. bases: in
        which teacher maps are known, one each; none: as they are."""
        super().__init__()
        self.config = config
        self.maps = len(student_channels), len(teacher_channels)
        if pairs is None and len(student_channels) != len(teacher_channels):
            raise QskdError(
                "distillation.features",
                f"{len(student_channels)} student maps and {len(teacher_channels)} teacher maps of unknown sizes",
                "to know which of them are alike",
                "make the cache of teacher outputs anew (qskd cache RECIPE --overwrite, which deletes its files), or set "
                "distillation.features.weight=0",
            )
        self.pairs = tuple(pairs or pair_levels(student_channels, teacher_channels))
        self.projectors = nn.ModuleDict(
            {
                str(own): projector(
                    *(student_channels[own], teacher_channels[other], turned), bases[other] if bases else None
                )
                for own, other in self.pairs
            }
        )

        if config.whitening and not directions:
            raise QskdError(
                "distillation.features.whitening",
                "a teacher that runs in every step, of whose memory no directions are known",
                "a cache of its outputs; or, but in a loop of your own, whitened_by: variance",
                "set teacher.cache.path, and run `qskd cache RECIPE`, which computes them; or whitening: 0",
            )
        self.metrics: dict[int, str] = {}  # by student map, a buffer's name
        alpha = config.alpha(bool(directions))
        for own, other in self.pairs if alpha else ():
            self.metrics[own] = f"metric_{own}"
            found = metric(directions[other], alpha, config.whitened_share)
            self.register_buffer(self.metrics[own], found)
        self.leanings = (
            nn.ParameterDict()
        )  # by student map: the logarithms of what channels or directions count, but for a sum
        for own, other in self.pairs if config.importance else ():
            number = self.get_buffer(self.metrics[own]).shape[1] if own in self.metrics else teacher_channels[other]
            self.leanings[str(own)] = nn.Parameter(torch.zeros(number))

    def _distance(self, level: int, shown: Tensor, goal: Tensor) -> Tensor:
        """[..., C], [..., C] -> [...]: mean_c of the squared difference, or sum_k of it along the directions, over C."""
        if level not in self.metrics and not self.leanings:
            return F.mse_loss(shown, goal, reduction="none").mean(-1)
        along = shown - goal
        if level in self.metrics:
            with torch.autocast(shown.device.type, enabled=False):
                along = along @ self.get_buffer(self.metrics[level])
        errors = along.square()
        if self.leanings:
            errors = errors * self.importance(level)
        return errors.sum(-1) / shown.shape[-1]

    def importance(self, level: int) -> Tensor:
        """What each channel or direction of a student map counts: [C] or [K], above 0, of mean 1."""
        leaning = self.leanings[str(level)].float()
        return len(leaning) * leaning.softmax(0)

    def preference(self) -> LossTerm:
        """What keeps the learned importances from one another: the sum over maps of mean -log w, 0 where all count alike. Each
        worker's is the same."""
        levels = [-self.importance(own).log().mean() for own, _ in self.pairs]
        total = torch.stack(levels).sum()
        return LossTerm(total, torch.ones_like(total))

    def forward(
        self,
        student_memory: Sequence[Tensor],
        student_valid: Sequence[Tensor],
        teacher: TeacherRecord,
        mask: Sequence[Tensor] | None,
    ) -> LossTerm:
        """Maps [B, C, H, W] and their [B, H, W] validity; `mask` [B, H, W] or, of several decoder layers, [B, L, H, W] for each
        teacher map (None: 1 everywhere).

        total: sum of the losses of images whose mask is not empty; count: the number of those images (of L layers, an L-th of
        the masks that are not empty). "squared": sum over the cells; count: their number, of every image. The teacher and its
        mask are detached and resampled to the student's grid. The loss of an image whose record is derived is multiplied by
        `derived_weight`; it is counted like any other.
        """
        found = len(student_memory), len(teacher.memory)
        if found != self.maps:
            said = ("{} student maps, {} teacher maps".format(*numbers) for numbers in (found, self.maps))
            raise QskdError("distillation.features", *said)
        squared = self.config.mask_weighting == "squared"
        masks = None if mask is None else [part.unsqueeze(1) if part.dim() == 3 else part for part in mask]
        layers = 1 if masks is None else masks[0].shape[1]
        above = below = student_memory[0].new_zeros(len(student_memory[0]), layers, dtype=torch.float32)
        for student_level, teacher_level in self.pairs:
            valid, teacher_valid = student_valid[student_level], teacher.memory_valid[teacher_level]
            move = resampler(teacher_valid, valid)
            goal = move(teacher.memory[teacher_level].detach())
            shown = self.projectors[str(student_level)](student_memory[student_level]).float()
            weight = valid.float().unsqueeze(1)
            if masks is not None:
                weight = weight * move(masks[teacher_level].detach())  # [B, L, H, W]
            distance = self._distance(student_level, shown, goal.movedim(1, -1))
            above = above + ((weight**2 if squared else weight) * distance.unsqueeze(1)).flatten(2).sum(2)
            below = below + (valid.float().unsqueeze(1) if squared else weight).flatten(2).sum(2)
        if teacher.derived is not None and self.config.derived_weight != 1:
            above = above * torch.where(teacher.derived, self.config.derived_weight, 1.0)[:, None]
        if squared:
            return LossTerm(above.sum(), below[:, 0].sum())
        has_mask = below > 0
        total = (above / torch.where(has_mask, below, 1.0)).sum()  # an empty mask leaves 0 above
        return LossTerm(total, has_mask.sum().float() / layers)
