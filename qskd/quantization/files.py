"""A quantised student's folder: plain Hugging Face weights that hold quantised values, and the quantisers beside them.

quantization.safetensors has a step (float32) of each weight's channel, and a step and a zero point (int32) of each activation; its
metadata have the recipe's section and the bits of each. config.json says that it is there, in a field that transformers keeps and
does nothing with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qskd.config.quantization import QuantizationConfig
from qskd.errors import QskdError
from qskd.quantization.layers import QuantisedConv2d, QuantisedLinear
from qskd.quantization.model import FIELD, belongs_to_quantiser, check_family, place_quantisers
from qskd.quantization.quantiser import ActivationQuantiser, SavedActivation, SavedWeight, WeightQuantiser
from qskd.untrusted import parse_large_json

FILE = "quantization.safetensors"
MOST_BYTES = 2**26
REMEDY = "copy the whole folder again, with {file}; or load it with transformers, which reads the weights alone"


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a detector as plain transformers has it: weights have their quantised values."""
    with torch.no_grad():
        made: dict[int, Tensor] = {}
        used: dict[str, Tensor] = {}
        for name, layer in model.named_modules(remove_duplicate=False):
            if isinstance(layer, QuantisedLinear | QuantisedConv2d):
                if id(layer.weight) not in made:
                    made[id(layer.weight)] = layer.used_weight().detach().to(layer.weight.dtype)
                used[f"{name}.weight"] = made[id(layer.weight)]
    state = {name: value for name, value in model.state_dict().items() if not belongs_to_quantiser(name)}
    return {name: used.get(name, value) for name, value in state.items()}


def quantisers_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Steps and zero points by name, and the bits of each quantiser that is on. Empty for a student in float."""
    tensors: dict[str, Tensor] = {}
    bits: dict[str, int] = {}
    for name, module in model.named_modules():
        kind = name.replace(".weight_quantiser", ".weight").replace(".input_quantiser", ".input")
        kind = kind.replace(".quantisers.", ".")
        if isinstance(module, SavedWeight | SavedActivation) or (
            isinstance(module, WeightQuantiser | ActivationQuantiser) and module.mode == "on"
        ):
            bits[kind] = module.bits
            tensors[f"{kind}.step"] = module.step.detach().float().cpu().reshape(-1).contiguous()
            if isinstance(module, SavedActivation | ActivationQuantiser):
                tensors[f"{kind}.zero_point"] = module.zero_point.detach().cpu().reshape(-1).contiguous()
    return tensors, bits


def save_quantisers(model: Any, folder: Path) -> None:
    """Write the quantisers that are on beside the weights; nothing of a model in float."""
    settings = getattr(model.config, FIELD, None)
    if settings is not None:
        tensors, bits = quantisers_of(model)
        said = {"bits": json.dumps(bits), "student.quantization": json.dumps(settings)}
        save_file(tensors, folder / FILE, metadata=said)


def read_quantisers(file: Path) -> tuple[dict[str, Tensor], dict[str, int], QuantizationConfig]:
    """What `save_quantisers` wrote; QskdError for any other file."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        with safe_open(file, "pt") as opened:
            said = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        bits = parse_large_json(said["bits"].encode(), str(file))
        config = QuantizationConfig.model_validate(parse_large_json(said["student.quantization"].encode(), str(file)))
        if not isinstance(bits, dict) or any(each not in (8, 4, 3, 2) for each in bits.values()):
            raise ValueError("bits of a quantiser that are not 8, 4, 3 or 2")
        return tensors, bits, config
    except (OSError, SafetensorError, KeyError, ValueError, ValidationError) as error:
        raise QskdError(
            str(file), f"can't be read: {error}", "what qskd wrote there", REMEDY.format(file=FILE)
        ) from None


def restore_quantisers(model: Any, file: str | Path) -> QuantizationConfig:
    """Put a saved student's quantisers back into what transformers loaded of its folder (in place); its outputs are then those
    of the student as it was trained.

    model: a `...ForObjectDetection`. file: the folder's quantization.safetensors. Raises QskdError for a file of another model.
    """
    file = Path(file)
    tensors, bits, config = read_quantisers(file)
    check_family(model.config.model_type)
    taken: set[str] = set()

    def find(name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        value = tensors.get(f"{name}.{kind}")
        if value is None or tuple(value.shape) != shape or value.dtype != dtype:
            found = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise QskdError(
                str(file),
                f"{name}.{kind}: {found}",
                f"{dtype} {list(shape)}, as this model has",
                REMEDY.format(file=FILE),
            )
        taken.add(f"{name}.{kind}")
        return value

    def weight(name: str, layer: Any, _: int) -> nn.Module:
        if name not in bits:  # it was off
            return nn.Identity()
        return SavedWeight(bits[name], _usable(find(name, "step", (len(layer.weight),), torch.float32), file, name))

    def activation(name: str, _: Any, __: int) -> nn.Module:
        if name not in bits:
            return nn.Identity()
        zero_point = find(name, "zero_point", (1,), torch.int32)
        step = _usable(find(name, "step", (1,), torch.float32), file, name)
        made = SavedActivation(bits[name], step[0], zero_point[0])
        if not made.lowest <= int(zero_point) <= made.highest:
            raise QskdError(
                str(file),
                f"{name}.zero_point: {int(zero_point)}",
                f"{made.lowest} to {made.highest}",
                REMEDY.format(file=FILE),
            )
        return made

    place_quantisers(model, weight, activation, config)
    if left := sorted(tensors.keys() - taken):
        raise QskdError(
            str(file),
            f"{len(left)} quantisers of another model, {left[0]}",
            "those of this one",
            REMEDY.format(file=FILE),
        )
    model.to(next(model.parameters()).device)
    setattr(model.config, FIELD, config.model_dump(mode="json"))
    return config


def _usable(step: Tensor, file: Path, name: str) -> Tensor:
    if not bool((step.isfinite() & (step > 0)).all()):
        raise QskdError(
            str(file), f"{name}.step: a step that is no number above 0", "steps above 0", REMEDY.format(file=FILE)
        )
    return step
