"""Groups of queries that exist in training only (Group DETR, Chen et al., ICCV 2023): more queries learn from each object, while
those of a group still compete for it, and the student's own are what they would be alone.

Queries meet each other in self-attention only. There, groups are laid side by side as images are, so that none sees another;
everywhere else a query goes its way by itself. So no mask is needed, and attention costs as many times as there are groups, not
their square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qskd.config import FACTS, DetectionLossConfig
from qskd.detectors import Detector
from qskd.errors import QskdError
from qskd.families.table import FAMILIES
from qskd.losses.detection_loss import detection_terms
from qskd.structures import Classification, DetectorOutput, LossTerm, Targets

_START_NOISE = 0.5  # of the spread of the student's own queries: the others start about where those are, and differ
_PARTS = ("class", "l1", "giou")
Predictions = tuple[Tensor, Tensor]  # logits [N, B, Q, K], boxes_cxcywh [N, B, Q, 4]


class QueryGroups(nn.Module):
    """What the other groups' queries start from, and how they come into a student's forward and out of it.

    count: groups beside the student's own. weights: of the terms that `terms` gives.
    """

    def __init__(self, own: Tensor, count: int, queries: int, config: DetectionLossConfig) -> None:
        """own: [Q, D], the embedding of the student's own queries."""
        super().__init__()
        self.count, self.queries, self.config = count, queries, config
        self.names = {part: f"groups_{part}" for part in _PARTS}
        values = (config.class_weight, config.l1_weight, config.giou_weight)
        self.weights = {
            self.names[part]: config.query_group_weight * value for part, value in zip(_PARTS, values, strict=True)
        }
        with torch.no_grad():
            noise = torch.randn(count, *own.shape) * own.detach().cpu().std(0, unbiased=False)
            self.others = nn.Parameter((own.detach().cpu() + _START_NOISE * noise).flatten(0, 1).to(own.device))

    @contextmanager
    def asked(self, student: Detector) -> Iterator[None]:
        """A forward of the student within has the queries of all groups, its own first."""
        family, model = FAMILIES[student.family], student.model
        embedding = family.query_embedding(model)
        assert embedding is not None  # `query_groups_of` has looked
        own, hooks = embedding.weight, list[Any]()
        del embedding.weight
        embedding.weight = torch.cat(
            [own, self.others.to(own.dtype)]
        )  # a tensor, no parameter: gradients go on to both
        try:
            for attention in family.self_attentions(model):
                hooks.append(attention.register_forward_pre_hook(self._side_by_side, with_kwargs=True))
                hooks.append(attention.register_forward_hook(self._in_a_row))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            del embedding.weight
            embedding.weight = own

    def _side_by_side(
        self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def parted(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.reshape(-1, self.queries, value.shape[-1])  # [B, G * Q, D] -> [B * G, Q, D]

        return tuple(map(parted, args)), {name: parted(value) for name, value in given.items()}

    def _in_a_row(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        states, attention = output
        return states.reshape(-1, (1 + self.count) * self.queries, states.shape[-1]), attention

    def parted(self, output: DetectorOutput) -> tuple[DetectorOutput, Predictions]:
        """What the student itself said, and what the other groups' queries did: N are all
        supervised layers of the first group, then those of the next."""
        queries, layers = self.queries, slice(None) if self.config.auxiliary else slice(-1, None)

        def others(values: Tensor) -> Tensor:
            grouped = values[layers, :, queries:].unflatten(2, (self.count, queries))  # [L, B, G, Q, ...]
            return grouped.movedim(2, 0).flatten(0, 1)

        own = replace(
            output,
            logits=output.logits[:, :, :queries],
            boxes_cxcywh=output.boxes_cxcywh[:, :, :queries],
            query_states=output.query_states[:, :queries],
        )
        return own, (others(output.logits), others(output.boxes_cxcywh))

    def terms(
        self, predictions: Predictions, targets: Targets, assignment: Tensor, kind: Classification
    ) -> dict[str, LossTerm]:
        """The detection loss of the other groups: summed over layers, and a mean over groups (which the counts divide by)."""
        every_one = self.config.model_copy(update={"auxiliary": True})
        found = detection_terms(*predictions, targets, assignment, every_one, kind)
        count = self.count * found["class"].count
        return {
            name: LossTerm(
                torch.stack([term.total for key, term in found.items() if key.partition("_")[0] == part]).sum(),
                count,
                floor=float(self.count),
            )
            for part, name in self.names.items()
        }


def query_groups_of(config: DetectionLossConfig, student: Detector) -> QueryGroups | None:
    """What the recipe asks for; None where it asks for the student's own queries alone. QskdError where it can't have others."""
    if config.query_groups == 1:
        return None
    embedding = FAMILIES[student.family].query_embedding(student.model)
    if embedding is None:
        able = ", ".join(name for name, facts in FACTS.items() if facts.groups)
        raise QskdError(
            "detection.query_groups",
            f"{config.query_groups}, and a {student.family} of such a configuration makes its queries otherwise",
            f"1, or a student whose queries are one embedding ({able}; no two-stage, no patterns)",
            "leave detection.query_groups out",
        )
    return QueryGroups(embedding.weight, config.query_groups - 1, student.num_queries, config)
