"""The decoder of families that read one map with dense attention, run on a memory that it is given."""

from __future__ import annotations

from typing import Any

import torch

from qskd.families.family import Memory
from qskd.structures import Queries


def decode_one_map(model: Any, memory: Memory, queries: Queries) -> Any:
    """The decoder of DETR, and of Conditional DETR: queries are positions, and their states begin as zeros."""
    assert queries.embedding is not None
    positions = queries.embedding.expand(len(memory.tokens), -1, -1)
    (shape,), (mask,) = memory.shapes, memory.valid
    where = model.model.position_embedding(
        shape=torch.Size((len(mask), memory.tokens.shape[2], *shape)),
        device=mask.device,
        dtype=torch.float32,
        mask=mask,
    )
    outputs = model.model.decoder(
        inputs_embeds=torch.zeros_like(positions),
        attention_mask=None,
        spatial_position_embeddings=where.flatten(2).transpose(1, 2),
        object_queries_position_embeddings=positions,
        encoder_hidden_states=memory.tokens,
        encoder_attention_mask=memory.mask if memory.masked else None,
    )
    outputs.asked = positions
    return outputs
