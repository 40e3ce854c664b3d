"""Queries that are added to a detector for one training step: they go through its decoder before the model's own, in groups
that see themselves and the model's own queries, but not each other. The model's own see none of them, and so say what they
would say without them.

transformers does the same with its denoising queries (`get_contrastive_denoising_training_group`), of noise that it draws itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qskd.families.family import inverse_sigmoid


@dataclass(frozen=True)
class ExtraQueries:
    """states: [B, D, C], what the first decoder layer is given. boxes_cxcywh: [B, D, 4] in 0..1, where they look first,
    relative to the image. group: [D] int64, which group each is in, counted from 0."""

    states: Tensor
    boxes_cxcywh: Tensor
    group: Tensor

    def within(self, part: Tensor) -> ExtraQueries:
        """With boxes relative to the padded batch. part: [B, 1, 4], the real part of its width, height, width, height."""
        return replace(self, boxes_cxcywh=self.boxes_cxcywh * part)

    @property
    def places(self) -> Tensor:
        """[B, D, 4], as the decoder takes reference points: before the sigmoid."""
        return inverse_sigmoid(self.boxes_cxcywh)

    def hidden(self, own: int) -> Tensor:
        """[D + own, D + own] float: -infinity where a query (row) may not look at another (column), 0 elsewhere."""
        group = torch.cat([self.group, self.group.new_full((own,), -1)])
        apart = (group[:, None] != group[None, :]) & (group >= 0)[None, :]
        return torch.zeros(apart.shape, device=group.device).masked_fill(apart, float("-inf"))

    def join(self, outputs: Any) -> None:
        """Let outputs of the base model, which ran with these queries, say so as with transformers' own denoising queries."""
        own = outputs.init_reference_points
        outputs.denoising_meta_values = {"dn_num_split": [self.states.shape[1], own.shape[1]]}
        outputs.init_reference_points = torch.cat([self.places.to(own.dtype), own], 1)


def added(outputs: Any) -> int:
    """How many queries stand before the model's own in outputs of the base model."""
    said = getattr(outputs, "denoising_meta_values", None)
    return int(said["dn_num_split"][0]) if said else 0


class QueryInlet:
    """Where queries enter a decoder of RT-DETR's kind.

    As with `Tap`, the hook is a bound method and registered once, so that a deep copy has its own.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.queries: ExtraQueries | None = None
        decoder.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(
        self, decoder: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.queries is None:
            return None
        states, places = given["inputs_embeds"], given["reference_points"]
        more = {
            "inputs_embeds": torch.cat([self.queries.states.to(states.dtype), states], 1),
            "reference_points": torch.cat([self.queries.places.to(places.dtype), places], 1),
            "encoder_attention_mask": self.queries.hidden(states.shape[1]),
        }
        return args, given | more

    @contextmanager
    def adding(self, queries: ExtraQueries) -> Iterator[None]:
        """Let them in, in the block."""
        self.queries = queries
        try:
            yield
        finally:
            self.queries = None
