"""Where quantisers stand in a detector: which layer is of which part, which keep 8 bits, and which families have all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from qskd.config.quantization import Part, QuantizationConfig
from qskd.errors import QskdError
from qskd.families.facts import FACTS
from qskd.quantization.attention import DENSE, SAMPLED, is_dense, is_sampled, quantise_attention
from qskd.quantization.layers import quantise_layer
from qskd.quantization.quantiser import ActivationQuantiser, Mode, WeightQuantiser

_HEADS = {"class_labels_classifier", "bbox_predictor", "class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head"}
_DECODERS = {"decoder", "reference_points", "enc_output", "pos_trans"}
_PLACES = {"ref_point_head", "reference_points", "sampling_offsets"}  # what comes out of them is where something is
FIELD = "qskd_quantization"  # of a model's configuration: the recipe's section; transformers keeps it and does nothing with it
LEAST_LOSS = 8  # bits of the first and the last layers


def check_family(family: str) -> None:
    """QskdError for one whose students can't be quantised."""
    if why := FACTS[family].in_float:
        raise QskdError(
            "student.quantization",
            f"a student of {family}: {why}",
            f"one of {', '.join(name for name, facts in FACTS.items() if not facts.in_float)}",
            "set student.family to one of these, or student.quantization: null",
        )


def part_of(name: str) -> Part:
    """The part that a module of a detector of transformers belongs to, by its name."""
    path = name.split(".")
    if path[:2] == ["model", "backbone"]:
        return "backbone"
    if _HEADS & set(path):
        return "heads"
    return "decoder" if len(path) > 1 and path[1] in _DECODERS else "encoder"


def _is_last(name: str, model: nn.Module) -> bool:
    """Whether what comes out of a layer is a class, a box, or where something is."""
    path = name.split(".")
    if not ({*_PLACES, *_HEADS} & set(path)):
        return False
    owner, _, number = name.rpartition(".")
    if owner.endswith(".layers"):  # of a network of some layers
        return int(number) == len(list(model.get_submodule(owner).children())) - 1
    return True


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Every layer that can be quantised, by its name in the model; one that is there twice once."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module


def _attentions_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, module) for name, module in model.named_modules() if is_dense(module) or is_sampled(module))


Quantisers = Callable[[str, nn.Module], nn.Module | None]


def place_quantisers(
    model: Any,
    weight: Callable[[str, Any, int], nn.Module],
    activation: Callable[[str, Any, int], nn.Module],
    config: QuantizationConfig,
) -> None:
    """Put quantisers into a detector of transformers (in place), before anything else holds on to its layers' forward.

    weight, activation: (name, its layer, bits) -> the quantiser. Layers that share a weight share both: they are one, for a model's
    forward and for its loss (Deformable DETR's box heads).
    """
    shared: dict[int, tuple[nn.Module, nn.Module]] = {}
    first = next(name for name, layer in layers_of(model) if isinstance(layer, nn.Conv2d))
    attentions = list(_attentions_of(model))
    for name, layer in list(layers_of(model)):
        if part_of(name) not in config.parts:
            continue
        bits = config.weight_bits, config.activation_bits
        if name == first or _is_last(name, model):
            bits = (LEAST_LOSS, LEAST_LOSS)
        key = id(layer.weight)
        if key not in shared:
            shared[key] = weight(f"{name}.weight", layer, bits[0]), activation(f"{name}.input", layer, bits[1])
        quantise_layer(layer, *shared[key])
    for name, attention in attentions:
        if part_of(name) in config.parts:
            kinds = SAMPLED if is_sampled(attention) else DENSE
            made = {kind: activation(f"{name}.{kind}", attention, config.attention_bits) for kind in kinds}
            quantise_attention(attention, made)


def quantise(model: Any, family: str, config: QuantizationConfig) -> None:
    """Give a detector of transformers (in place) quantisers that learn; they are off. QskdError for a family that has no place
    for all of them."""
    check_family(family)
    device = next(model.parameters()).device

    def learns(owner: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in owner.parameters())

    def weight(_: str, layer: Any, bits: int) -> nn.Module:
        return WeightQuantiser(layer.weight.detach(), bits).requires_grad_(layer.weight.requires_grad)

    def activation(_: str, owner: Any, bits: int) -> nn.Module:
        around = owner if any(True for _ in owner.parameters()) else None
        return ActivationQuantiser(bits, device).requires_grad_(around is None or learns(around))

    place_quantisers(model, weight, activation, config)
    setattr(model.config, FIELD, config.model_dump(mode="json"))


def weight_quantisers(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """ "LAYER.weight" -> (layer, quantiser) of those that learn, each quantiser once."""
    found: dict[int, tuple[str, Any, Any]] = {}
    for name, layer in layers_of(model):
        quantiser = getattr(layer, "weight_quantiser", None)
        if isinstance(quantiser, WeightQuantiser) and id(quantiser) not in found:
            found[id(quantiser)] = (f"{name}.weight", layer, quantiser)
    return {name: (layer, quantiser) for name, layer, quantiser in found.values()}


def activation_quantisers(model: nn.Module) -> dict[str, ActivationQuantiser]:
    """ "LAYER.input" or "ATTENTION.query" (key, value, attention) -> quantiser, of those that learn."""
    return {
        name.replace(".input_quantiser", ".input").replace(".quantisers.", "."): module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantiser)
    }


def notice_of(model: Any) -> str:
    """What to say of a model that was loaded with its quantisers; empty of one in float."""
    settings = getattr(model.config, FIELD, None)
    return f"a student of {settings['bits']}: it runs with its quantisers, as it was trained" if settings else ""


def belongs_to_quantiser(name: str) -> bool:
    """Whether a name of a state is a quantiser's: plain transformers has none such."""
    return bool({"weight_quantiser", "input_quantiser", "quantisers"} & set(name.split(".")))


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Of all quantisers that learn."""
    for module in model.modules():
        if isinstance(module, WeightQuantiser | ActivationQuantiser):
            module.mode = mode
