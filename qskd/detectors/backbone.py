"""A student's backbone: its configuration, its starting weights, its norm, and whether it learns."""

from __future__ import annotations

import logging
from collections.abc import Collection
from itertools import accumulate
from math import gcd
from typing import Any

import torch
from torch import nn
from transformers import (
    LwDetrViTBackbone,
    LwDetrViTConfig,
    ResNetBackbone,
    ResNetConfig,
    RfDetrDinov2Backbone,
    RfDetrDinov2Config,
    RTDetrResNetBackbone,
    RTDetrResNetConfig,
)

from qskd.checkpoints.clean_config import backbone_config_of
from qskd.checkpoints.json_files import shown
from qskd.checkpoints.weights import check_keys, check_path, load_model, read_said
from qskd.config import BackboneConfig
from qskd.config.student import VIT_PATCH, VIT_WINDOWS
from qskd.detectors.norms import EPS, is_frozen_norm
from qskd.errors import QskdError

log = logging.getLogger(__name__)

_TYPES: dict[str, tuple[Any, Any]] = {
    "resnet": (ResNetConfig, ResNetBackbone),
    "rt_detr_resnet": (RTDetrResNetConfig, RTDetrResNetBackbone),
    "lw_detr_vit": (LwDetrViTConfig, LwDetrViTBackbone),
    "rf_detr_dinov2": (RfDetrDinov2Config, RfDetrDinov2Backbone),
}
_PUBLISHED = (
    (3, 2, 1, 4),
    [0, 1, 3, 6, 7, 9],
)  # LW-DETR small to xlarge: their tenth layer has windows, their ninth has not


def _vit_sizes(config: BackboneConfig) -> dict[str, Any]:
    (width,), ends = config.hidden_sizes, list(accumulate(config.depths))
    if config.type == "rf_detr_dinov2":
        heads = width // 64 if width % 64 == 0 else gcd(width, 6)  # 6, as DINOv2 small has
        layers = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": ends[-1]}
        return layers | {"patch_size": VIT_PATCH, "num_windows": VIT_WINDOWS[config.type]}
    windows = [layer for layer in range(ends[-1]) if layer + 1 not in ends]
    return {
        "hidden_size": width,
        "num_attention_heads": gcd(width, 12),  # 12, as published, where they divide the width
        "num_hidden_layers": ends[-1],
        "window_block_indices": _PUBLISHED[1] if config.depths == _PUBLISHED[0] else windows,
    }


def backbone_config(config: BackboneConfig, levels: int) -> Any:
    """transformers' configuration of a ResNet that gives its last `levels` stages (as many as there are), or of a ViT.

    With `config.init` the checkpoint's own configuration is used, and must have the sizes that `config` has.
    """
    sizes = {
        "layer_type": config.layer_type,
        "embedding_size": config.embedding_size,
        "hidden_sizes": list(config.hidden_sizes),
        "depths": list(config.depths),
    }
    if config.is_vit:
        sizes = _vit_sizes(config)
    if config.init:
        path = check_path(config.init)
        said, where = read_said(path)
        if said.get("model_type") != config.type:
            raise QskdError(
                config.init,
                f"a model of type {shown(said.get('model_type'))}",
                f"a backbone of model type {config.type!r} (student.backbone.type)",
            )
        resnet = backbone_config_of(said, _TYPES[config.type][0], where)
        found = {name: getattr(resnet, name) for name in sizes}
        if found != sizes:
            differing = [name for name in sizes if found[name] != sizes[name]]
            raise QskdError(
                config.init,
                "; ".join(f"{name} {found[name]}" for name in differing),
                "; ".join(f"{'' if config.is_vit else 'student.backbone.'}{name} {sizes[name]}" for name in differing),
                "give student.backbone the checkpoint's sizes, or leave student.backbone.init empty",
            )
    else:
        resnet = _TYPES[config.type][0](**sizes)
    if config.is_vit:
        ends = list(accumulate(config.depths))
        resnet.out_features = [f"stage{end}" for end in ends]
        if config.type == "rf_detr_dinov2":  # its class makes them of the maps that it is built with
            resnet.window_block_indexes = [layer for layer in range(ends[-1]) if layer not in ends]
        return resnet
    stages = len(config.depths)
    resnet.out_features = [f"stage{stage}" for stage in range(stages - min(levels, stages, 3) + 1, stages + 1)]
    return resnet


def load_backbone(backbone: nn.Module, path: str, config: Any) -> None:
    """Copy a backbone's checkpoint (a ResNet's with or without its classifier) into a detector's backbone."""
    folder = check_path(path)
    source, info = load_model(_TYPES[config.model_type][1], config, folder)
    dropped = check_keys(path, info, ignore=("classifier.",))
    backbone.load_state_dict(source.state_dict())  # a frozen norm drops num_batches_tracked by itself
    log.info("backbone: %d tensors from %s; left out: %s", len(source.state_dict()), path, dropped or "nothing")


class ThawedBatchNorm2d(nn.BatchNorm2d):
    """Stands where transformers builds a frozen norm, which counts no batches: the count is not saved with a detector."""


def first_stages(resnet: nn.Module, count: int) -> list[nn.Module]:
    """The stem and so many stages of it. QskdError for a backbone that is not made of them."""
    try:
        stem, stages = resnet.get_submodule("embedder"), resnet.get_submodule("encoder.stages")
    except AttributeError:
        kind = type(resnet).__name__
        raise QskdError("student.frozen_stages", f"{count} of a {kind}", "a ResNet's stages", "set it to 0") from None
    return [stem, *list(stages.children())[:count]]


def thaw_norms(module: nn.Module, kept: Collection[nn.Module] = ()) -> None:
    """Outside the modules in `kept`, replace, in place, transformers' FrozenBatchNorm2d by a BatchNorm2d with the same values.

    The names and the eps are the same, so a saved student loads into the frozen norm and evaluates alike.
    """
    for name, child in list(module.named_children()):
        if child in kept:
            continue
        if is_frozen_norm(child):
            frozen: Any = child
            norm = ThawedBatchNorm2d(frozen.weight.shape[0], eps=EPS)
            norm.load_state_dict(
                {**frozen.state_dict(), "num_batches_tracked": torch.tensor(0)},
            )
            setattr(module, name, norm.to(frozen.weight.device))
        else:
            thaw_norms(child, kept)
