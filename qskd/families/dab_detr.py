"""DAB-DETR (Liu et al., ICLR 2022): one map, dense cross-attention, queries that are boxes, refined layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ConditionalDetrImageProcessorPil, DabDetrConfig, DabDetrForObjectDetection

from qskd.config import StudentConfig
from qskd.families.family import (
    Family,
    Memory,
    Predictions,
    dense_attention,
    detr_sizes,
    head_scores,
    linear32,
    shift_boxes,
    take,
)
from qskd.families.initialisation import START_SIZE_LOGIT, grid_points, set_class_prior, xavier, zero_box_head
from qskd.structures import Queries


class DabDetr(Family):
    name = "dab-detr"
    model_class = DabDetrForObjectDetection
    processor_class = ConditionalDetrImageProcessorPil
    query_kind = "boxes"

    def projections(self, model: Any) -> list[nn.Module]:
        return [model.model.input_projection]

    def class_heads(self, model: Any) -> list[nn.Linear]:
        return [model.class_embed]

    def backbone(self, model: Any) -> nn.Module:
        backbone: nn.Module = model.model.backbone.conv_encoder
        return backbone

    def cross_attentions(self, model: Any) -> list[nn.Module]:
        return [layer.cross_attn for layer in model.model.decoder.layers]

    def num_queries(self, config: Any) -> int:
        return int(config.num_queries * max(config.num_patterns, 1))

    def memory_channels(self, config: Any) -> int:
        return int(config.hidden_size)

    def placing(self, model: Any) -> list[nn.Module]:
        return [model.model.decoder.bbox_embed]

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        states = outputs.intermediate_hidden_states.float()  # [L, B, Q, D], each layer's after the norm
        # Not detached: a layer's box also teaches the layers before it, as in transformers.
        boxes = shift_boxes(model.bbox_predictor(states), outputs.reference_points.float())
        return Predictions(model.class_embed(states), boxes, states[-1])

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        # The content and the position halves of queries and keys are concatenated a head, so their scores add up.
        query = linear32(module.cross_attn_query_content_proj, take(given["hidden_states"], queries))
        key = linear32(module.cross_attn_key_content_proj, given["encoder_hidden_states"])
        key_position = linear32(module.cross_attn_key_pos_proj, given["object_queries"])
        if module.is_first or module.keep_query_pos:
            position = take(given["query_position_embeddings"], queries)
            query, key = query + linear32(module.cross_attn_query_pos_proj, position), key + key_position
        query_position = linear32(module.cross_attn_query_pos_sine_proj, take(given["query_sine_embed"], queries))
        heads = module.decoder_attention_heads
        scores = head_scores(query, key, heads) + head_scores(query_position, key_position, heads)
        return dense_attention(scores * module.cross_attn.scaling, valid)

    def query_embedding(self, model: Any) -> nn.Embedding | None:
        if model.config.num_patterns:  # each box is several queries, which differ in their content
            return None
        embedding: nn.Embedding = model.model.query_refpoint_embeddings
        return embedding

    def reference_points(self, model: Any) -> Tensor:
        anchors: Tensor = model.model.query_refpoint_embeddings.weight
        return anchors[:, :2].sigmoid().repeat(max(model.config.num_patterns, 1), 1)

    def own_queries(self, model: Any, memory: Memory) -> Queries:
        inner, patterns = model.model, model.config.num_patterns
        boxes = inner.query_refpoint_embeddings.weight[None]
        if not patterns:
            return Queries(places=boxes)
        states = inner.patterns.weight.repeat_interleave(
            boxes.shape[1], 0
        )  # every box with the first pattern, then the next
        return Queries(places=boxes.repeat(1, patterns, 1), states=states[None])

    def decode(self, model: Any, memory: Memory, queries: Queries) -> Any:
        assert queries.places is not None
        inner, batch = model.model, len(memory.tokens)
        boxes, (mask,) = queries.places.expand(batch, -1, -1), memory.valid
        states = boxes.new_zeros(*boxes.shape[:2], inner.hidden_size) if queries.states is None else queries.states
        where = inner.backbone.position_embedding(memory.tokens, mask)
        return inner.decoder(
            inputs_embeds=states.expand(batch, -1, -1),
            query_position_embeddings=boxes,
            object_queries=where.flatten(2).transpose(1, 2),
            encoder_hidden_states=memory.tokens,
            memory_key_padding_mask=memory.mask if memory.masked else None,
            return_dict=True,
        )

    def exchanged(self, model: Any, outputs: Any, states: Sequence[Tensor], before: Sequence[Tensor]) -> Any:
        normed = torch.stack([model.model.decoder.layernorm(state) for state in states])
        return SimpleNamespace(intermediate_hidden_states=normed, reference_points=outputs.reference_points)

    def drop_front(self, model: Any) -> None:
        inner = model.model
        inner.backbone.conv_encoder, inner.encoder, inner.input_projection = nn.Identity(), nn.Identity(), nn.Identity()

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        sizes = detr_sizes(config, backbone, labels)
        return DabDetrConfig(hidden_size=sizes.pop("d_model"), **sizes)

    @torch.no_grad()
    def initialise(self, model: Any) -> None:
        inner = model.model
        for part in (inner.input_projection, inner.encoder, inner.decoder):  # the decoder holds the box head too
            xavier(part)
        set_class_prior(model.class_embed)
        anchors = inner.query_refpoint_embeddings.weight  # the boxes' logits
        anchors[:, :2], anchors[:, 2:] = torch.logit(grid_points(len(anchors))), START_SIZE_LOGIT
        zero_box_head(model.bbox_predictor.layers[-1], 0.0)  # start as the anchors

    def place_queries(self, model: Any, first: int) -> None:
        added = model.model.query_refpoint_embeddings.weight.detach()[first:]
        added[:, :2] = torch.logit(grid_points(len(added)))

    def prepare_student(self, model: Any) -> None:
        if len(model.model.decoder.layers) == 1:  # read from the second layer on
            model.model.decoder.query_scale.requires_grad_(False)
