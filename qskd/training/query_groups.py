"""Groups of queries that exist in training only (Group DETR, Chen et al., ICCV 2023): more queries learn from each object, while
those of a group still compete for it, and the student's own are what they would be alone.

Queries meet each other in self-attention only. There, groups are laid side by side as images are, so that none sees another;
everywhere else a query goes its way by itself. So no mask is needed, and attention costs as many times as there are groups, not
their square.

LW-DETR has groups of its own (`ChosenGroups`): each chooses its queries among the encoder's cells by heads of its own, and
transformers' code lays them side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qskd.config import FACTS, DetectionLossConfig
from qskd.detectors import Detector
from qskd.detectors.forward.exact import Exact, exactly
from qskd.errors import QskdError
from qskd.families.family import GroupParts
from qskd.families.table import FAMILIES
from qskd.losses.detection_loss import PARTS, detection_terms
from qskd.structures import Classification, DetectorOutput, LossTerm, Targets

_START_NOISE = 0.5  # of the spread of the student's own queries: the others start about where those are, and differ
Predictions = tuple[Tensor, Tensor]  # logits [N, B, Q, K], boxes_cxcywh [N, B, Q, 4]


class QueryGroups(nn.Module):
    """What the other groups' queries start from, and how they come into a student's forward and out of it.

    count: groups beside the student's own. weights: of the terms that `terms` gives.
    """

    def __init__(self, own: Tensor, count: int, queries: int, config: DetectionLossConfig) -> None:
        """own: [Q, D], the embedding of the student's own queries."""
        super().__init__()
        self.count, self.queries, self.config = count, queries, config
        self.names = {part: f"groups_{part}" for part in PARTS}
        values = (config.class_weight, config.l1_weight, config.giou_weight)
        self.weights = {
            self.names[part]: config.query_group_weight * value for part, value in zip(PARTS, values, strict=True)
        }
        self.others = nn.Parameter(_about(own, count).flatten(0, 1))

    @contextmanager
    def asked(self, student: Detector) -> Iterator[None]:
        """A forward of the student within has the queries of all groups, its own first."""
        family, model, hooks = FAMILIES[student.family], student.model, list[Any]()
        embedding = family.query_embedding(model)
        assert embedding is not None  # `query_groups_of` has looked
        with _longer(embedding, self.others):
            try:
                for attention in family.self_attentions(model):
                    hooks.append(attention.register_forward_pre_hook(self._side_by_side, with_kwargs=True))
                    hooks.append(attention.register_forward_hook(self._in_a_row))
                yield
            finally:
                for hook in hooks:
                    hook.remove()

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
        """What the student itself said, and what the other groups' queries did: N are all supervised layers of the first group,
        after what comes before the layers, then those of the next."""
        queries, layers = self.queries, slice(None) if self.config.auxiliary else slice(-1, None)

        def others(values: Tensor, early: Tensor | None) -> Tensor:
            supervised = values[layers] if early is None else torch.cat([early, values[layers]])
            grouped = supervised[:, :, queries:].unflatten(2, (self.count, queries))  # [L, B, G, Q, ...]
            return grouped.movedim(2, 0).flatten(0, 1)

        theirs = (others(output.logits, output.early_logits), others(output.boxes_cxcywh, output.early_boxes_cxcywh))
        return first_queries(output, queries), theirs

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
                objects=float(self.count),
            )
            for part, name in self.names.items()
        }


class ChosenGroups(QueryGroups):
    """Of a family whose own code has groups (`GroupParts`): what a group has of its own beside its embedding is here too.

    Heads that choose start as the student's own, after a layer that is moved at random: else all groups would choose alike.
    """

    def __init__(self, own: Tensor, parts: GroupParts, count: int, queries: int, config: DetectionLossConfig) -> None:
        super().__init__(own, count, queries, config)
        self.places = nn.Parameter(_about(parts.places.weight, count).flatten(0, 1))
        made: list[list[Any]] = [[copy.deepcopy(modules[0]) for _ in range(count)] for modules in parts.lists]
        for module in [module for group in made for module in group]:
            vars(module).pop("forward", None)  # the copy of the student's own `Exact`, which nobody would turn on
        with torch.no_grad():
            first: Any = parts.lists[0][0]
            for layer, weight in zip(made[0], _about(first.weight, count), strict=True):
                layer.weight.copy_(weight)
        self.heads = nn.ModuleList([nn.ModuleList(group) for group in made])
        self._exact = [Exact(module) for group in made for module in group]

    @contextmanager
    def asked(self, student: Detector) -> Iterator[None]:
        family, model = FAMILIES[student.family], student.model
        embedding, parts = family.query_embedding(model), family.group_parts(model)
        assert embedding is not None
        assert parts is not None
        modes = [module.training for module in parts.switches]
        with (
            _longer(embedding, self.others),
            _longer(parts.places, self.places),
            exactly(self._exact, embedding.weight.device.type),
        ):
            try:
                for modules, more in zip(parts.lists, self.heads, strict=True):
                    modules.extend(more)  # type: ignore[arg-type]
                for module in parts.switches:
                    module.training = True
                model.config.group_detr = model.model.group_detr = 1 + self.count
                yield
            finally:
                model.config.group_detr = model.model.group_detr = 1
                for module, mode in zip(parts.switches, modes, strict=True):
                    module.training = mode
                for modules in parts.lists:
                    del modules[1:]


def _about(own: Tensor, count: int) -> Tensor:
    """[count, *own.shape]: `own`, each moved at random by some of the spread of its rows."""
    values = own.detach().cpu()
    noise = torch.randn(count, *values.shape) * values.std(0, unbiased=False)
    return (values + _START_NOISE * noise).to(own.device)


@contextmanager
def _longer(embedding: nn.Embedding, more: Tensor) -> Iterator[None]:
    """Within it an embedding has more rows."""
    own = embedding.weight
    del embedding.weight
    embedding.weight = torch.cat([own, more.to(own.dtype)])  # gradients go on to both
    try:
        yield
    finally:
        del embedding.weight
        embedding.weight = own


def first_queries(output: DetectorOutput, queries: int) -> DetectorOutput:
    """What the first so many queries said."""
    early, early_boxes = output.early_logits, output.early_boxes_cxcywh
    return replace(
        output,
        logits=output.logits[:, :, :queries],
        boxes_cxcywh=output.boxes_cxcywh[:, :, :queries],
        query_states=output.query_states[:, :queries],
        early_logits=None if early is None else early[:, :, :queries],
        early_boxes_cxcywh=None if early_boxes is None else early_boxes[:, :, :queries],
    )


def query_groups_of(config: DetectionLossConfig, student: Detector) -> QueryGroups | None:
    """What the recipe asks for, or the family's authors; None for the student's own queries alone. QskdError where it can't have
    others."""
    asked = FACTS[student.family].query_groups if config.query_groups is None else config.query_groups
    if asked == 1:
        return None
    embedding = FAMILIES[student.family].query_embedding(student.model)
    if embedding is None:
        able = ", ".join(name for name, facts in FACTS.items() if facts.groups)
        raise QskdError(
            "detection.query_groups",
            f"{asked}, and a {student.family} of such a configuration makes its queries otherwise",
            f"1, or a student whose queries are one embedding ({able}; no two-stage, no patterns)",
            "leave detection.query_groups out",
        )
    parts, own = FAMILIES[student.family].group_parts(student.model), (asked - 1, student.num_queries, config)
    return QueryGroups(embedding.weight, *own) if parts is None else ChosenGroups(embedding.weight, parts, *own)
