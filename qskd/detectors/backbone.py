"""A student's backbone: its configuration, its starting weights, its norm, and whether it learns."""

from __future__ import annotations

import logging
from collections.abc import Collection
from itertools import accumulate
from math import gcd
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_BACKBONE_MAPPING

from qskd.checkpoints.clean_config import backbone_config_of
from qskd.checkpoints.json_files import shown
from qskd.checkpoints.weights import check_keys, check_path, load_model, read_said
from qskd.config import BackboneConfig
from qskd.config.backbone import NO_TIMM, TIMM
from qskd.detectors.norms import EPS, is_frozen_norm
from qskd.errors import QskdError

log = logging.getLogger(__name__)

_PUBLISHED = (
    (3, 2, 1, 4),
    [0, 1, 3, 6, 7, 9],
)  # LW-DETR small to xlarge: their tenth layer has windows, their ninth has not


_NEW = (
    "hidden_states_norms.",
)  # norms of the maps, which a classifier's checkpoint has not: they begin as they are made
_LEFT_OUT = ("classifier.", "layernorm.", "layer_norm.", "head.", "fc.")  # of a classifier


def _class_of(kind: str) -> Any:
    return MODEL_FOR_BACKBONE_MAPPING[CONFIG_MAPPING[kind]]


def _heads(width: int) -> int:
    """Of 64 channels each, as DINOv2 and DINOv3 have them; 6, as their small ones have, or what divides a narrower one."""
    return width // 64 if width % 64 == 0 else gcd(width, 6)


def _rotary_heads(width: int) -> int:
    """Of DINOv3's: as `_heads`, but that its embeddings of places need heads of a multiple of 4 channels."""
    return next(count for count in (_heads(width), *range(6, 0, -1)) if width % (4 * count) == 0)


def _sizes(config: BackboneConfig) -> dict[str, Any]:
    """What of the recipe's sizes transformers' configuration of this type has, under its names; and what all have that can be
    built."""
    return {"num_channels": 3, **_sizes_of(config)}


def _sizes_of(config: BackboneConfig) -> dict[str, Any]:
    widths, depths, kind = list(config.hidden_sizes), list(config.depths), config.type
    if kind in ("resnet", "rt_detr_resnet"):
        stem = {"layer_type": config.layer_type, "embedding_size": config.embedding_size}
        return stem | {"hidden_sizes": widths, "depths": depths}
    if kind == "hgnet_v2":
        stages = {"stage_out_channels": widths, "stage_num_blocks": depths, "hidden_sizes": widths, "depths": depths}
        return stages | {"embedding_size": config.embedding_size}
    if not config.is_vit:
        stem = {} if kind == "dinov3_convnext" else {"patch_size": 4}
        return {"hidden_sizes": widths, "depths": depths, **stem}
    (width,), ends = widths, list(accumulate(depths))
    layers = {"hidden_size": width, "num_hidden_layers": ends[-1]}
    if kind == "lw_detr_vit":
        windows = [layer for layer in range(ends[-1]) if layer + 1 not in ends]
        layers["num_attention_heads"] = gcd(width, 12)  # 12, as published, where they divide the width
        return layers | {"window_block_indices": _PUBLISHED[1] if config.depths == _PUBLISHED[0] else windows}
    heads = _rotary_heads(width) if kind == "dinov3_vit" else _heads(width)
    layers |= {"num_attention_heads": heads, "patch_size": config.kind.patch}
    return layers | ({"num_windows": config.kind.windows} if kind == "rf_detr_dinov2" else {})


def _made_up(config: BackboneConfig) -> dict[str, Any]:
    """What else a backbone of random weights is made of, where transformers' own defaults are of another size."""
    if config.type == "hgnet_v2":  # by B0's proportions
        widths, stem, count = list(config.hidden_sizes), config.embedding_size, len(config.depths)
        return {
            "stem_channels": [3, stem, stem],
            "stage_in_channels": [stem, *widths[:-1]],
            "stage_mid_channels": [max(1, width // (8 if stage else 4)) for stage, width in enumerate(widths)],
            "stage_downsample": [stage > 0 for stage in range(count)],
            "stage_downsample_strides": [2] * count,
            "stage_light_block": [stage > 1 for stage in range(count)],
            "stage_kernel_size": [5 if stage > 1 else 3 for stage in range(count)],
            "stage_numb_of_layers": [3] * count,
            "use_learnable_affine_block": True,
        }
    if config.type in ("convnext", "convnextv2", "dinov3_convnext"):
        return {"num_stages": len(config.depths)} if config.type != "dinov3_convnext" else {}
    if config.type == "dinov3_vit":
        (width,) = config.hidden_sizes
        return {"intermediate_size": 4 * width, "num_register_tokens": 4}
    return {}


def _of_checkpoint(config: BackboneConfig) -> tuple[BackboneConfig, Any]:
    """`sized_by_init`, and the checkpoint's configuration. QskdError for another type of backbone."""
    path = check_path(config.init, weights=False)
    said, where = read_said(path)
    if said.get("model_type") in TIMM or (
        "architecture" in said and "model_type" not in said
    ):  # timm's own config.json
        raise QskdError(config.init, "a checkpoint of timm", f"a backbone of model type {config.type!r}", NO_TIMM)
    if said.get("model_type") != config.type:
        raise QskdError(
            config.init,
            f"a model of type {shown(said.get('model_type'))}",
            f"a backbone of model type {config.type!r} (student.backbone.type)",
        )
    made = backbone_config_of(said, CONFIG_MAPPING[config.type], where)
    if config.type == "hgnet_v2":  # it is built of its stage_... fields; many leave the others as another size has them
        made.hidden_sizes, made.depths = list(made.stage_out_channels), list(made.stage_num_blocks)
        made.embedding_size = made.stem_channels[-1]
        made.stage_names = ["stem", *(f"stage{number}" for number in range(1, 1 + len(made.depths)))]
    usual = BackboneConfig.model_validate({"type": config.type, "init": config.init})
    if config != usual or config.kind.family:  # a size was given
        return config, made
    names = ("hidden_sizes", "depths", *(("embedding_size",) if config.kind.embeds else ()))
    if "resnet" in config.type:
        names = (*names, "layer_type")
    found = {name: getattr(made, name) for name in names if hasattr(made, name)}
    if config.is_vit:
        found = {"hidden_sizes": (made.hidden_size,), "depths": (made.num_hidden_layers,)}
    if len(found["depths"]) != len(config.depths):
        return config, made  # of other strides than the recipe was checked with
    return BackboneConfig.model_validate({"type": config.type, "init": config.init, **found}), made


def sized_by_init(config: BackboneConfig) -> BackboneConfig:
    """With its checkpoint's sizes, where the recipe gives none (all are the type's own defaults). Reads config.json alone."""
    return _of_checkpoint(config)[0] if config.init else config


def backbone_config(config: BackboneConfig, levels: int) -> Any:
    """transformers' configuration of a backbone that gives its last `levels` stages (as many as there are), or of a ViT.

    With `config.init` the checkpoint's own configuration is used, and must have the sizes that `config` has (`sized_by_init`).
    """
    if config.init:
        config, made = _of_checkpoint(config)
        sizes = _sizes(config)
        found = {name: getattr(made, name) for name in sizes}
        if found != sizes:
            differing = [name for name in sizes if found[name] != sizes[name]]
            known = BackboneConfig.model_fields
            raise QskdError(
                config.init,
                "; ".join(f"{name} {found[name]}" for name in differing),
                "; ".join(f"{'student.backbone.' if name in known else ''}{name} {sizes[name]}" for name in differing),
                "give student.backbone the checkpoint's sizes, or leave student.backbone.init empty",
            )
    else:
        made = CONFIG_MAPPING[config.type](**_sizes(config) | _made_up(config))
    if hasattr(made, "drop_path_rate"):
        made.drop_path_rate = 0.0  # drawn by each worker for itself: two would not be as one
    if config.is_vit:
        ends = list(accumulate(config.depths))
        made.out_features = [f"stage{end}" for end in ends]
        if config.type == "rf_detr_dinov2":  # its class makes them of the maps that it is built with
            made.window_block_indexes = [layer for layer in range(ends[-1]) if layer not in ends]
        return made
    stages = len(config.depths)
    made.out_features = [f"stage{stage}" for stage in range(stages - min(levels, stages, 3) + 1, stages + 1)]
    return made


def load_backbone(backbone: nn.Module, path: str, config: Any) -> None:
    """Copy a backbone's checkpoint (with or without its classifier) into a detector's backbone."""
    folder, kind = check_path(path), config.model_type
    source, info = load_model(_class_of(kind), config, folder)
    begun = [key for key in info["missing_keys"] if key.startswith(_NEW)]
    info = {**info, "missing_keys": [key for key in info["missing_keys"] if key not in begun]}
    dropped = check_keys(path, info, ignore=(*_LEFT_OUT, *(f"{kind}.{name}" for name in _LEFT_OUT)))
    backbone.load_state_dict(source.state_dict())  # a frozen norm drops num_batches_tracked by itself
    taken = len(source.state_dict()) - len(begun)
    log.info("backbone: %d tensors from %s; left out: %s", taken, path, dropped or "nothing")


class ThawedBatchNorm2d(nn.BatchNorm2d):
    """Stands where transformers builds a frozen norm, which counts no batches: the count is not saved with a detector."""


def first_stages(trunk: nn.Module, count: int) -> list[nn.Module]:
    """The stem and so many stages of it. QskdError for a backbone that is not made of them."""
    parts = dict(trunk.named_modules())
    stages = parts.get("encoder.stages") or parts.get("model.stages")  # DINOv3 ConvNeXt's stem is in its first stage
    if not isinstance(stages, nn.ModuleList):
        kind = type(trunk).__name__
        raise QskdError("student.frozen_stages", f"{count} of a {kind}", "a network of stages", "set it to 0")
    stem = [parts[name] for name in ("embedder", "embeddings") if name in parts]
    return [*stem, *list(stages.children())[:count]]


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
