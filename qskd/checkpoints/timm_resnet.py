"""timm's ResNet in a checkpoint, read as transformers' own: the same network under other names.

The published DETR, Conditional DETR, Deformable DETR and DAB-DETR were trained on it. Its sizes are read from the shapes of
the weights, so that neither timm nor torchvision is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import ResNetConfig

from qskd.errors import QskdError
from qskd.families.facts import FACTS

NOT_DILATED = 32  # the stride of a ResNet's last stage
# Other names are other networks, some of them with the very same weights' names (anti-aliased ones, say).
_NAME = re.compile(r"(?:tv_)?resnet(?P<layers>\d+)(?:\..+)?")
_DEPTHS = {"18": [2, 2, 2, 2], "34": [3, 4, 6, 3], "50": [3, 4, 6, 3], "101": [3, 4, 23, 3], "152": [3, 8, 36, 3]}
_KEY = re.compile(r"(?P<place>(?:.*\.)?backbone\.(?:conv_encoder\.)?model\.)(?:_backbone\.)?(?P<rest>.+)")
_LAYER = re.compile(
    r"layer(?P<stage>\d)\.(?P<layer>\d+)\.(?:(?P<kind>conv|bn)(?P<part>\d)|downsample\.(?P<down>[01]))\."
)


@dataclass(frozen=True)
class TimmResNet:
    """What a configuration says of a timm backbone. out_indices: its stages that are read, 1 to 4."""

    name: str
    out_indices: tuple[int, ...]
    output_stride: int


def spell_out(said: dict[str, Any]) -> dict[str, Any]:
    """A configuration (as read from JSON) that means a timm backbone, with that backbone in its `backbone_config`.

    Checkpoints saved before transformers 5 name it in fields of its own; transformers 5.23 asks the Hub for a repository of
    that name when `backbone_kwargs` is among them, and fails when it is null.
    """
    facts = FACTS.get(str(said.get("model_type")))
    if facts is None or not facts.means_timm or said.get("backbone_config"):
        return said
    if said.get("use_timm_backbone", True) is False:
        return said
    gone = ("use_timm_backbone", "backbone", "backbone_kwargs", "use_pretrained_backbone")
    given = said.get("backbone_kwargs") or {}
    deformable = said["model_type"] == "deformable_detr"
    stages = [1, 2, 3, 4] if not deformable else [2, 3, 4] if said.get("num_feature_levels", 4) > 1 else [4]
    backbone = {
        "model_type": "timm_backbone",
        "backbone": said.get("backbone") or "resnet50",
        "num_channels": given.get("in_chans", 3),
        "features_only": True,
        "out_indices": list(given.get("out_indices", stages)),
        "output_stride": given.get("output_stride", 16 if said.get("dilation") else None),
    }
    return {key: value for key, value in said.items() if key not in gone} | {"backbone_config": backbone}


def find_timm(config: Any) -> TimmResNet | None:
    """The timm ResNet that transformers' configuration names; None for another backbone, timm's or not."""
    backbone: Any = getattr(config, "backbone_config", None)
    if getattr(backbone, "model_type", "") != "timm_backbone" or not _NAME.fullmatch(backbone.backbone or ""):
        return None
    indices = tuple(index if index >= 0 else index + 5 for index in backbone.out_indices)  # timm counts the stem as 0
    stride = backbone.output_stride or (16 if getattr(config, "dilation", False) else NOT_DILATED)
    return TimmResNet(backbone.backbone, indices, stride)


def _renamed(rest: str) -> str | None:
    """A weight of timm's ResNet -> its name in transformers' ResNet; None for what an ordinary ResNet has not."""
    for module, ours in (("conv1.", "convolution."), ("bn1.", "normalization.")):
        if rest.startswith(module) and rest.count(".") == 1:
            return f"embedder.embedder.{ours}{rest.removeprefix(module)}"
    found = _LAYER.match(rest)
    if found is None:
        return None
    place, leaf = f"encoder.stages.{int(found['stage']) - 1}.layers.{found['layer']}.", rest[found.end() :]
    if found["down"]:
        return f"{place}shortcut.{'convolution' if found['down'] == '0' else 'normalization'}.{leaf}"
    return (
        f"{place}layer.{int(found['part']) - 1}.{'convolution' if found['kind'] == 'conv' else 'normalization'}.{leaf}"
    )


def rename(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights of a checkpoint with its backbone's named as in transformers' ResNet; batch counters are left out.

    QskdError names what an ordinary ResNet has no place for (a deep stem, squeeze-and-excitation, ...).
    """
    renamed, unknown = {}, []
    for name, value in state.items():
        found = _KEY.fullmatch(name)
        if found is None:
            renamed[name] = value
        elif not name.endswith(".num_batches_tracked"):
            ours = _renamed(found["rest"])
            if ours is None:
                unknown.append(name)
            else:
                renamed[found["place"] + ours] = value
    if unknown:
        raise QskdError(
            where,
            f"a timm backbone with {len(unknown)} weights that an ordinary ResNet has not: {', '.join(unknown[:3])}",
            "timm's ResNet-18, 34, 50, 101 or 152",
            "save the checkpoint on a transformers backbone, or choose another",
        )
    return renamed


def resnet_config(state: Mapping[str, Tensor], timm: TimmResNet, where: str) -> ResNetConfig:
    """transformers' configuration of the ResNet whose (renamed) weights these are.

    QskdError when they are not what the configuration's name says, or none of a ResNet are there.
    """
    inner = {
        name.split("backbone.", 1)[1].split("model.", 1)[1]: v for name, v in state.items() if _KEY.fullmatch(name)
    }
    depths: dict[int, int] = {}
    for name in inner:
        if layer := re.match(r"encoder\.stages\.(\d)\.layers\.(\d+)\.", name):
            depths[int(layer[1])] = max(depths.get(int(layer[1]), 0), int(layer[2]) + 1)
    stem = inner.get("embedder.embedder.convolution.weight")
    last = 2 if "encoder.stages.0.layers.0.layer.2.convolution.weight" in inner else 1
    widths = [inner.get(f"encoder.stages.{stage}.layers.0.layer.{last}.convolution.weight") for stage in range(4)]
    found = [depths.get(stage, 0) for stage in range(4)]
    expected = _DEPTHS.get(_NAME.fullmatch(timm.name)["layers"], found)  # type: ignore[index]
    if stem is None or any(width is None for width in widths) or found != expected:
        raise QskdError(
            where,
            f"a backbone of {found} layers in its weights",
            f"{timm.name}, as its config.json says: {expected}",
            "config.json and model.safetensors are of different models: save them again together",
        )
    return ResNetConfig(
        layer_type="bottleneck" if last == 2 else "basic",
        embedding_size=len(stem),
        hidden_sizes=[len(width) for width in widths if width is not None],
        depths=found,
        out_features=[f"stage{index}" for index in timm.out_indices],
    )


def dilate(resnet: nn.Module, output_stride: int, where: str) -> None:
    """Trade the strides of the last stages for dilation (in place), as timm does: "DC5" is an output stride of 16.

    A stage's first 3 x 3 convolution still looks as those of the stage before it did; its others look twice as far apart.
    """
    if output_stride not in (8, 16, NOT_DILATED):
        raise QskdError(where, f"a backbone of output stride {output_stride}", "8, 16 or 32")
    if output_stride == NOT_DILATED:
        return
    resnet.dilated = True  # type: ignore[assignment]
    stages: Sequence[Any] = resnet.encoder.stages  # type: ignore[union-attr, assignment]
    stride, dilation = 4, 1
    for number, stage in enumerate(stages):
        before = dilation
        if number and stride >= output_stride:
            dilation *= 2
        elif number:
            stride *= 2
        if dilation == 1:
            continue
        convolutions = [module for module in stage.modules() if isinstance(module, nn.Conv2d)]
        first = next(convolution for convolution in convolutions if convolution.kernel_size == (3, 3))
        for convolution in convolutions:
            convolution.stride = (1, 1)
            if convolution.kernel_size == (3, 3):
                apart = before if convolution is first else dilation
                convolution.dilation = convolution.padding = (apart, apart)


def is_dilated(model: nn.Module) -> bool:
    """Whether `dilate` has changed a part of it into what transformers can't describe."""
    return any(hasattr(module, "dilated") for module in model.modules())
