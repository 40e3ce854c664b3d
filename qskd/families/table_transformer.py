"""Table Transformer (Smock et al., CVPR 2022): DETR with norms before each part, for tables and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TableTransformerConfig, TableTransformerForObjectDetection

from qskd.config import StudentConfig
from qskd.families.detr import Detr
from qskd.families.family import Memory, detr_sizes
from qskd.structures import Queries


class TableTransformer(Detr):
    name = "table-transformer"
    model_class = TableTransformerForObjectDetection

    def backbone(self, model: Any) -> nn.Module:
        backbone: nn.Module = model.model.backbone.conv_encoder
        return backbone

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        as_detr = given | {
            "position_embeddings": given["object_queries"],
            "encoder_position_embeddings": given["spatial_position_embeddings"],
        }
        return super().attention(module, as_detr, queries, shapes, valid)

    def decode(self, model: Any, memory: Memory, queries: Queries) -> Any:
        assert queries.embedding is not None
        positions = queries.embedding.expand(len(memory.tokens), -1, -1)
        (shape,), (mask,) = memory.shapes, memory.valid
        where = model.model.backbone.position_embedding(memory.tokens.new_empty(len(mask), 1, *shape), mask)
        outputs = model.model.decoder(
            inputs_embeds=torch.zeros_like(positions),
            attention_mask=None,
            object_queries=where.flatten(2).transpose(1, 2),  # of the map's cells, in spite of the name
            query_position_embeddings=positions,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=memory.mask if memory.masked else None,
            return_dict=True,
        )
        outputs.asked = positions
        return outputs

    def drop_front(self, model: Any) -> None:
        inner = model.model
        inner.backbone.conv_encoder = nn.Identity()
        inner.encoder, inner.input_projection = nn.Identity(), nn.Identity()

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        return TableTransformerConfig(**detr_sizes(config, backbone, labels))
