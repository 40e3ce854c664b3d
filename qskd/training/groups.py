"""Parameter groups of the optimizer: what learns at a rate of its own, and what weight decay leaves alone; the rate's schedule."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from qskd.config import FACTS, TrainingConfig
from qskd.quantization.model import belongs_to_quantiser
from qskd.training.module import StepModule

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_VIT_LAYER = re.compile(r"^(?!.*\bstages\.)(?:.*\.)?layer\.(\d+)\.")  # a ResNet's stages have parts of this name
SAMPLING = ("sampling_offsets", "reference_points")  # modules' names, in Deformable DETR's own code and in transformers


def learning_rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """What the learning rate is multiplied by at this step (0-based): linear warm-up, then the schedule. In 0..1."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if config.schedule == "step":
        return 0.1 if step >= config.step_at * total_steps else 1.0
    return 1.0


def parameter_groups(module: StepModule, config: TrainingConfig) -> list[dict[str, Any]]:
    """ "params", and "scale" of the learning rate, which is 1 in the first group; "weight_decay" where it is not the optimizer's.

    The backbone, sampling offsets and reference points, and what a student inherited, have rates of their own, a ViT's layers one
    each; norms and biases of the student, or its backbone's alone, may go without weight decay. What only training has
    (projectors, a dense head) is with the rest.
    """
    student, facts = module.student, FACTS[module.student.family]
    given = config.sampling_learning_rate_scale
    scale = facts.sampling_scale if given is None else given
    copied = config.inherited_learning_rate_scale
    scales = {
        id(p): (scale if any(part in name.split(".") for part in SAMPLING) else 1.0)
        * (copied if name in student.inherited else 1.0)
        for name, p in student.model.named_parameters(remove_duplicate=False)
    }
    scales |= _of_the_backbone(module, config)
    # A quantiser's step is learned as a logarithm, the place of zero as a share: both move in proportion, in whatever part.
    quantisers = {id(p) for name, p in student.named_parameters() if belongs_to_quantiser(name)}
    scales |= dict.fromkeys(quantisers, 1.0)
    undecayed = config.undecayed or facts.undecayed
    free: set[int] = set(quantisers)
    if undecayed in ("norms", "norms_and_biases"):
        free |= {id(p) for part in student.modules() if is_norm(part) for p in part.parameters(recurse=False)}
    if undecayed == "norms_and_biases":
        free |= {id(p) for name, p in student.named_parameters() if name.rpartition(".")[2].endswith("bias")}
    if undecayed == "backbone":  # by its authors' own rules, which differ in a ViT's scales of layers and what embeds
        every = list(student.backbone.named_parameters())
        if facts.vit == "rf_detr_dinov2":
            free |= {id(p) for name, p in every if any(part in name for part in ("embeddings", "norm", "bias"))}
        else:
            free |= {id(p) for name, p in every if p.dim() <= 1 or "position" in name}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list, {(1.0, True): []})
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups[scales.get(id(parameter), 1.0), id(parameter) not in free].append(parameter)
    return [
        {"params": parameters, "scale": own} | ({} if decayed else {"weight_decay": 0.0})
        for (own, decayed), parameters in groups.items()
        if parameters or (own, decayed) == (1.0, True)  # the first is there even if all was inherited
    ]


def is_norm(part: nn.Module) -> bool:
    """transformers gives each family an RMS norm of its own, with no class above it that all share."""
    return isinstance(part, NORMS) or type(part).__name__.endswith("RMSNorm")


def _of_the_backbone(module: StepModule, config: TrainingConfig) -> dict[int, float]:
    """Parameter -> what it learns at. Of a ViT of N layers: layer n (from 0) at decay^(N - n), what comes before them at
    decay^(N + 1), what comes after them at 1."""
    backbone, scale = module.student.backbone, config.backbone_learning_rate_scale
    facts, start, decay = FACTS[module.student.family], module.config.student, config.backbone_layer_decay
    if decay is None:
        decay = facts.layer_decay if start.init or start.backbone.init or start.inherit else 1.0
    named = dict(backbone.named_parameters())
    of_layers = {name: int(found[1]) for name in named if (found := _VIT_LAYER.search(name))}
    if not of_layers or decay == 1.0:
        return {id(parameter): scale for parameter in named.values()}
    layers = 1 + max(of_layers.values())
    return {
        id(parameter): scale * decay ** (layers - of_layers.get(name, -1 if "embeddings" in name else layers))
        for name, parameter in named.items()
    }
