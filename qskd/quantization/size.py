"""How many bytes a student's numbers have at the bits that it learns with."""

from __future__ import annotations

from torch import nn

from qskd.quantization.layers import QuantisedConv2d, QuantisedLinear
from qskd.quantization.model import belongs_to_quantiser
from qskd.quantization.quantiser import ActivationQuantiser, SavedActivation, SavedWeight, WeightQuantiser


def megabytes(model: nn.Module) -> float:
    """10^6 bytes of all that is saved of a model, quantised weights at their bits, with what quantisers need: a step for each
    channel of a weight, a step and a zero point for each activation. What is shared counts once. Of a student in float: what its
    weights' file has."""
    bits: dict[int, int] = {}
    total, seen = 0, set[int]()
    for module in model.modules():
        if isinstance(module, QuantisedLinear | QuantisedConv2d) and id(module.weight) not in bits:
            quantiser = module.weight_quantiser
            if isinstance(quantiser, WeightQuantiser | SavedWeight):
                bits[id(module.weight)] = quantiser.bits
                total += 4 * len(module.weight)
        total += 8 * isinstance(module, ActivationQuantiser | SavedActivation)  # `modules` names each once
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not belongs_to_quantiser(name) and id(tensor) not in seen:
            seen.add(id(tensor))
            total += -(-tensor.numel() * bits.get(id(tensor), 8 * tensor.element_size()) // 8)
    return total / 1e6
