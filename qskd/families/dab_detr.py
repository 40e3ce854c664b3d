"""DAB-DETR (Liu et al., ICLR 2022): one map, dense cross-attention, queries that are boxes, refined layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ConditionalDetrImageProcessorPil, DabDetrConfig, DabDetrForObjectDetection

from qskd.config import StudentConfig
from qskd.families.family import (
    Family,
    Predictions,
    dense_attention,
    detr_sizes,
    head_scores,
    linear32,
    shift_boxes,
    take,
)
from qskd.families.initialisation import START_SIZE_LOGIT, grid_points, set_class_prior, xavier, zero_box_head


class DabDetr(Family):
    name = "dab-detr"
    model_class = DabDetrForObjectDetection
    processor_class = ConditionalDetrImageProcessorPil

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

    def prepare_student(self, model: Any) -> None:
        if len(model.model.decoder.layers) == 1:  # read from the second layer on
            model.model.decoder.query_scale.requires_grad_(False)
