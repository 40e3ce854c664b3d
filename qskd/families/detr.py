"""DETR (Carion et al., ECCV 2020): one map, dense cross-attention, classes in one softmax with "no object"."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessorPil

from qskd.config import StudentConfig
from qskd.families.family import (
    Family,
    Memory,
    Predictions,
    dense_attention,
    detr_sizes,
    head_scores,
    linear32,
    take,
)
from qskd.families.initialisation import xavier
from qskd.families.one_map import decode_one_map
from qskd.structures import Queries


def from_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [..., K + 1] of a softmax whose last slot is "no object" -> logits z [..., K] and log p_none [...].

        z_k = log(p_k / (1 - p_k)) = l_k - log(sum over j other than k of exp l_j),   so that sigmoid(z_k) = p_k

    float32. Exact to rounding at both ends: of the largest logit the others are summed without it, and every other
    probability is at most 1/2, where 1 - p loses nothing.
    """
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    largest = logits.argmax(-1, keepdim=True)
    is_largest = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, largest, True)
    others = logits.masked_fill(is_largest, float("-inf")).logsumexp(-1, keepdim=True)
    p = log_p.masked_fill(is_largest, -1.0).exp()  # any value below 1: no gradient of infinity is multiplied by 0
    return torch.where(is_largest, logits - others, log_p - torch.log1p(-p))[..., :-1], log_p[..., -1]


class Detr(Family):
    name = "detr"
    model_class = DetrForObjectDetection
    processor_class = DetrImageProcessorPil
    classification = "softmax"
    no_object_rows = 1

    def projections(self, model: Any) -> list[nn.Module]:
        return [model.model.input_projection]

    def class_heads(self, model: Any) -> list[nn.Linear]:
        return [model.class_labels_classifier]

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        # As in Conditional DETR: raw outputs go on to the next layer, only a copy is normed for the heads.
        layernorm = model.model.decoder.layernorm
        states = [layernorm(state).float() for state in layer_states[:-1]] + [outputs.last_hidden_state.float()]
        logits, no_object = from_softmax(torch.stack([model.class_labels_classifier(state) for state in states]))
        boxes = torch.stack([model.bbox_predictor(state).sigmoid() for state in states])
        return Predictions(logits, boxes, states[-1], no_object=no_object)

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        query = take(given["hidden_states"] + given["position_embeddings"], queries)
        key = given["key_value_states"] + given["encoder_position_embeddings"]
        heads = module.q_proj.out_features // module.head_dim
        scores = head_scores(linear32(module.q_proj, query), linear32(module.k_proj, key), heads)
        return dense_attention(scores * module.scaling, valid)

    def own_queries(self, model: Any, memory: Memory) -> Queries:
        return Queries(embedding=model.model.query_position_embeddings.weight[None])

    def decode(self, model: Any, memory: Memory, queries: Queries) -> Any:
        return decode_one_map(model, memory, queries)

    def exchanged(self, model: Any, outputs: Any, states: Sequence[Tensor], before: Sequence[Tensor]) -> Any:
        return SimpleNamespace(last_hidden_state=model.model.decoder.layernorm(states[-1]))

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        return DetrConfig(**detr_sizes(config, backbone, labels))

    def initialise(self, model: Any) -> None:
        for part in (model.model.input_projection, model.model.encoder, model.model.decoder.layers):
            xavier(part)
        xavier(model.bbox_predictor)
        # Queries have no place to start from; as with DETR's authors it is their spread that tells them apart. No class
        # prior either: the loss weighs "no object" by a tenth, and a softmax of few classes has no small prior.
        nn.init.normal_(model.model.query_position_embeddings.weight)
