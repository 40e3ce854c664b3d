"""Layers with quantised weights and inputs: the same modules, parameters and names, of a class that quantises."""

from __future__ import annotations

from torch import Tensor, nn


class QuantisedLinear(nn.Linear):
    """weight_quantiser, input_quantiser: of the weight, and of what comes in."""

    weight_quantiser: nn.Module
    input_quantiser: nn.Module

    def used_weight(self) -> Tensor:
        """As the forward pass has it."""
        quantised: Tensor = self.weight_quantiser(self.weight)
        return quantised

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.input_quantiser(x), self.used_weight(), self.bias)


class QuantisedConv2d(nn.Conv2d):
    """weight_quantiser, input_quantiser: of the weight, and of what comes in."""

    weight_quantiser: nn.Module
    input_quantiser: nn.Module

    def used_weight(self) -> Tensor:
        """As the forward pass has it."""
        quantised: Tensor = self.weight_quantiser(self.weight)
        return quantised

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantiser(x), self.used_weight(), self.bias)


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QuantisedLinear, nn.Conv2d: QuantisedConv2d}


def quantise_layer(layer: nn.Module, weight: nn.Module, inputs: nn.Module) -> None:
    """Let a linear layer or a convolution quantise (in place)."""
    layer.__class__ = KINDS[type(layer)]
    assert isinstance(layer, QuantisedLinear | QuantisedConv2d)
    layer.weight_quantiser, layer.input_quantiser = weight, inputs
