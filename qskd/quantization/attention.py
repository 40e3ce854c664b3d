"""Quantised attention: softmax(Q(q) Q(k)^T / sqrt d), and Q(A) Q(v); of a sampled attention Q(A) and Q(v).

transformers keeps a table of attention functions and asks it by a name in each attention's configuration: this one is
entered there. A sampled attention has a module of its own for A and v, which gets them quantised.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "qskd_quantised"
DENSE, SAMPLED = ("query", "key", "attention", "value"), ("value", "attention")


class AttentionQuantisers(nn.ModuleDict):
    """The quantisers of one attention, by what they quantise."""

    def sampled(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a sampled attention's inner module. args: value, sizes, their list, starts, places, weights, ..."""
        value, *between, weights, rest = args
        return (self["value"](value), *between, self["attention"](weights), rest)


def quantised_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """As transformers' attention functions: query, key, value [B, heads, N, d] -> [B, N, heads, d], and A. attention_mask: True
    where a query may look, or what is added to the scores."""
    quantisers: Any = module.quantisers
    scores = quantisers["query"](query) @ quantisers["key"](key).transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    attention = quantisers["attention"](scores.softmax(-1))
    seen = F.dropout(attention, p=dropout, training=module.training)
    return (seen @ quantisers["value"](value)).transpose(1, 2).contiguous(), attention


ALL_ATTENTION_FUNCTIONS.register(NAME, quantised_attention)


def is_dense(module: nn.Module) -> bool:
    """Whether it is an attention that asks transformers' table."""
    return type(module).__name__.endswith("Attention") and hasattr(module, "config") and hasattr(module, "scaling")


def is_sampled(module: nn.Module) -> bool:
    """Whether it is the inner module of a sampled attention."""
    return type(module).__name__ == "MultiScaleDeformableAttention"


def quantise_attention(module: Any, quantisers: dict[str, nn.Module]) -> None:
    """Let an attention (in place) have its quantisers, by `DENSE` or `SAMPLED`."""
    module.quantisers = AttentionQuantisers(quantisers)
    if is_sampled(module):
        module.register_forward_pre_hook(module.quantisers.sampled)
        return
    # A copy for this module alone: masks are made by what the whole model's configuration says. Not by the property, which sets
    # configurations inside this one too.
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = NAME
