"""Conditional DETR (Meng et al., ICCV 2021): one map, dense cross-attention, boxes about reference points."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ConditionalDetrImageProcessorPil

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
from qskd.families.initialisation import fit_points, grid_points, set_class_prior, xavier, zero_box_head
from qskd.families.one_map import decode_one_map
from qskd.structures import Queries


class ConditionalDetr(Family):
    name = "conditional_detr"
    model_class = ConditionalDetrForObjectDetection
    processor_class = ConditionalDetrImageProcessorPil

    def projections(self, model: Any) -> list[nn.Module]:
        return [model.model.input_projection]

    def class_heads(self, model: Any) -> list[nn.Linear]:
        return [model.class_labels_classifier]

    def placing(self, model: Any) -> list[nn.Module]:
        return [model.model.decoder.ref_point_head]

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        decoder = model.model.decoder
        # Each layer's raw output goes on to the next; only a copy is normed, as in the original. (transformers with
        # auxiliary_loss=True feeds the normed one on, which moves a pretrained model's predictions.)
        states = [decoder.layernorm(state).float() for state in layer_states[:-1]] + [outputs.last_hidden_state.float()]
        batch = states[-1].shape[0]
        # Not outputs.reference_points: under bf16 autocast those are off by up to 0.2 % of the image.
        positions = getattr(outputs, "asked", None)
        if positions is None:
            positions = model.model.query_position_embeddings.weight.unsqueeze(0).repeat(batch, 1, 1)
        reference = decoder.ref_point_head(positions).sigmoid()
        return Predictions(
            logits=torch.stack([model.class_labels_classifier(state) for state in states]),
            boxes_cxcywh=torch.stack([shift_boxes(model.bbox_predictor(state), reference) for state in states]),
            query_states=states[-1],
        )

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        # The content and the position halves of queries and keys are concatenated a head, so their scores add up.
        query = linear32(module.q_content_proj, take(given["hidden_states"], queries))
        key = linear32(module.k_content_proj, given["encoder_hidden_states"])
        key_position = linear32(module.k_pos_proj, given["encoder_position_embeddings"])
        if given.get("query_position_embeddings") is not None:  # the first layer only
            query = query + linear32(module.q_pos_proj, take(given["query_position_embeddings"], queries))
            key = key + key_position
        query_position = linear32(module.q_pos_sine_proj, take(given["query_sine_embed"], queries))
        heads = module.num_attention_heads
        scores = head_scores(query, key, heads) + head_scores(query_position, key_position, heads)
        return dense_attention(scores * module.scaling, valid)

    def query_embedding(self, model: Any) -> nn.Embedding:
        embedding: nn.Embedding = model.model.query_position_embeddings
        return embedding

    def reference_points(self, model: Any) -> Tensor:
        points: Tensor = model.model.decoder.ref_point_head(model.model.query_position_embeddings.weight)
        return points.sigmoid()

    def own_queries(self, model: Any, memory: Memory) -> Queries:
        return Queries(embedding=model.model.query_position_embeddings.weight[None])

    def decode(self, model: Any, memory: Memory, queries: Queries) -> Any:
        return decode_one_map(model, memory, queries)

    def exchanged(self, model: Any, outputs: Any, states: Sequence[Tensor], before: Sequence[Tensor]) -> Any:
        last = model.model.decoder.layernorm(states[-1])
        return SimpleNamespace(last_hidden_state=last, asked=outputs.asked)

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        return ConditionalDetrConfig(**detr_sizes(config, backbone, labels))

    def initialise(self, model: Any) -> None:
        inner = model.model
        for part in (inner.input_projection, inner.encoder, inner.decoder.layers, inner.decoder.query_scale):
            xavier(part)
        set_class_prior(model.class_labels_classifier)
        zero_box_head(model.bbox_predictor.layers[-1])
        embedding = model.model.query_position_embeddings.weight
        fit_points(embedding, model.model.decoder.ref_point_head, grid_points(embedding.shape[0]))

    def place_queries(self, model: Any, first: int) -> None:
        embedding = model.model.query_position_embeddings.weight
        added = torch.nn.Parameter(embedding.detach()[first:].clone())
        fit_points(added, model.model.decoder.ref_point_head, grid_points(len(added)), head_too=False)
        embedding.detach()[first:] = added.detach()

    def prepare_student(self, model: Any) -> None:
        if len(model.model.decoder.layers) == 1:  # read from the second layer on
            model.model.decoder.query_scale.requires_grad_(False)
