"""What a family of detectors has to say for itself to stand behind `Detector`: one subclass in one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qskd.config import StudentConfig


@dataclass(frozen=True)
class Predictions:
    """logits: [L, B, Q, K]; boxes_cxcywh: [L, B, Q, 4]; query_states: [B, Q, D] of the last layer, after its norm."""

    logits: Tensor
    boxes_cxcywh: Tensor
    query_states: Tensor


class Family(ABC):
    """One family of transformers' detectors. Stateless; `model` is always its `...ForObjectDetection`."""

    name: ClassVar[str]  # config.model_type
    model_class: ClassVar[Any]
    processor_class: ClassVar[Any]  # the image processor that works without torchvision
    many_maps: ClassVar[bool] = False  # reads `feature_levels` maps, not one

    # --- where things are -------------------------------------------------------------------------------------------
    @abstractmethod
    def projections(self, model: Any) -> list[nn.Module]:
        """The modules that project backbone maps to the encoder's width, finest map first."""

    @abstractmethod
    def class_heads(self, model: Any) -> list[nn.Linear]:
        """Every linear layer that gives class logits (modules may share parameters)."""

    def encoder(self, model: Any) -> nn.Module:
        """The encoder; called with `attention_mask` [B, N] bool over its N tokens."""
        encoder: nn.Module = model.model.encoder
        return encoder

    def backbone(self, model: Any) -> nn.Module:
        backbone: nn.Module = model.model.backbone
        return backbone

    def decoder_layers(self, model: Any) -> list[nn.Module]:
        return list(model.model.decoder.layers)

    def cross_attentions(self, model: Any) -> list[nn.Module]:
        """One module a decoder layer; called with keyword arguments, which `attention` receives."""
        return [layer.encoder_attn for layer in model.model.decoder.layers]

    # --- what it computes -------------------------------------------------------------------------------------------
    @abstractmethod
    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        """The heads on every decoder layer, given the base model's outputs and each layer's own [B, Q, D]."""

    @abstractmethod
    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        """Cross-attention [B, S, N] float32, mean over heads, of query indices `queries` [B, S] (all >= 0).

        module, given: a cross-attention module and the keyword arguments of its last call. shapes: (H, W) of each map,
        N = sum of H * W. valid: [B, N] bool, False on padding.
        """

    @abstractmethod
    def reference_points(self, model: Any) -> Tensor:
        """[Q, 2] x, y in 0..1 where queries first look; before any image."""

    def num_queries(self, config: Any) -> int:
        return int(config.num_queries)

    # --- making a student -------------------------------------------------------------------------------------------
    @abstractmethod
    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        """transformers' configuration for a student; `backbone` is a ResNetConfig whose out_features are set."""

    @abstractmethod
    def initialise(self, model: Any) -> None:
        """Start the detection parts of a random model where training gets going (in place)."""

    def sizes(self, config: Any) -> dict[str, Any]:
        """StudentConfig field -> its value in a configuration of transformers, to tell a contradiction."""
        return {
            "family": config.model_type,
            "width": config.d_model,
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers,
            "heads": config.encoder_attention_heads,
            "ffn_width": config.encoder_ffn_dim,
            "queries": self.num_queries(config),
        }


def detr_sizes(config: StudentConfig, backbone: Any, labels: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments that the configurations of all DETR families share."""
    return {
        "backbone_config": backbone,
        "d_model": config.width,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn_width,
        "decoder_ffn_dim": config.ffn_width,
        "num_queries": config.queries,
        "dropout": config.dropout,
        "auxiliary_loss": False,  # True would change the forward pass of Conditional DETR
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)), bounded as transformers bounds it."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def shift_boxes(delta: Tensor, reference: Tensor) -> Tensor:
    """Box logits [..., 4] moved by reference points [..., 2] or boxes [..., 4] in 0..1 -> boxes in 0..1."""
    moved = inverse_sigmoid(reference)
    if moved.shape[-1] == 4:
        return (delta + moved).sigmoid()
    return torch.cat([delta[..., :2] + moved, delta[..., 2:]], dim=-1).sigmoid()


def linear32(module: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, whatever the precision of its weights and of `x`."""
    return F.linear(x.float(), module.weight.float(), None if module.bias is None else module.bias.float())


def take(states: Tensor, queries: Tensor) -> Tensor:
    """Rows of [B, Q, ...] by index [B, S] -> [B, S, ...]."""
    index = queries.reshape(*queries.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)
