"""When a student's quantisers begin: watched for some steps, set to what loses the least of what they saw, then on and learning.

Which are on is a function of the training step, so that a resumed training has the same ones on.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qskd.config.quantization import QuantizationConfig
from qskd.errors import QskdError
from qskd.quantization.calibration import BINS, Seen
from qskd.quantization.model import activation_quantisers, part_of, weight_quantisers
from qskd.quantization.quantiser import ActivationQuantiser, Mode, WeightQuantiser

log = logging.getLogger("qskd")
CALIBRATION_STEPS = 8


class Stages:
    """The quantisers of one student in training.

    module: the student's model. Quantisers that are not on have no gradient: `advance` says when that changes, as whoever
    gathers gradients must know. Those whose layer never learns are set as the others are, and learn nothing.
    """

    def __init__(self, model: nn.Module, config: QuantizationConfig, total_steps: int) -> None:
        self.model = model
        self.watched = max(1, min(CALIBRATION_STEPS, total_steps // 10))
        rest = config.rest_step(total_steps)
        if rest + self.watched >= total_steps:
            raise QskdError(
                "student.quantization.rest_from",
                f"step {rest} of {total_steps}: with {self.watched} steps of watching nothing would be quantised",
                f"at most {max(total_steps - self.watched - 1, 0)}, and a training of 2 steps or more",
            )
        self.weights, self.activations = weight_quantisers(model), activation_quantisers(model)
        self.begins = {name: 0 if part_of(name) == "backbone" else rest for name in (*self.weights, *self.activations)}
        self.last = max(self.begins.values()) + self.watched  # the step from which all are on
        quantisers = [*(each for _, each in self.weights.values()), *self.activations.values()]
        self.learning = [p for each in quantisers for p in each.parameters() if p.requires_grad]
        self.advance(0)

    def mode_at(self, name: str, step: int) -> Mode:
        begins = self.begins[name]
        return "off" if step < begins else "observing" if step < begins + self.watched else "on"

    def advance(self, step: int, calibrate: bool = True) -> list[str]:
        """Set every quantiser to what it is at this step (the next to be taken). calibrate=False: those that are on have their
        steps already, from a checkpoint. Returns the names of the quantisers that changed; all workers call it together."""
        changed = [name for name in self.begins if self._of(name).mode != self.mode_at(name, step)]
        if not changed:
            return []
        begin = [name for name in changed if self.mode_at(name, step) == "on"]
        if begin and calibrate:
            self._calibrate(begin)
        for name in changed:
            quantiser, mode = self._of(name), self.mode_at(name, step)
            if isinstance(quantiser, ActivationQuantiser):
                quantiser.seen = Seen(quantiser.log_step.device) if mode == "observing" else None
            quantiser.mode = mode
        known = {id(parameter) for parameter in self.learning}
        for name in self.begins:
            quantiser = self._of(name)
            for parameter in quantiser.parameters():
                parameter.requires_grad_(quantiser.mode == "on" and id(parameter) in known)
        if begin:
            log.info("step %d: %d quantisers are on, %d of %d", step, len(begin), self._on(), len(self.begins))
        return changed

    def _of(self, name: str) -> WeightQuantiser | ActivationQuantiser:
        if name in self.activations:
            return self.activations[name]
        quantiser: WeightQuantiser = self.weights[name][1]
        return quantiser

    def _on(self) -> int:
        return sum(self._of(name).mode == "on" for name in self.begins)

    def _calibrate(self, names: list[str]) -> None:
        """From what all workers have seen together."""
        watched = [self.activations[name] for name in names if name in self.activations]
        seen = [each.seen for each in watched if each.seen is not None]
        if seen and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            together = torch.stack([each.counts for each in seen])
            dist.all_reduce(together)
            for each, counts in zip(seen, together.unbind(), strict=True):
                each.counts = counts
        known = {
            id(parameter) for parameter in self.learning
        }  # of another layer nothing need come: a model may not use it
        for name in names:
            if name in self.weights:
                layer, quantiser = self.weights[name]
                quantiser.calibrate(layer.weight.detach())
            elif not self.activations[name].calibrate() and id(self.activations[name].log_step) in known:
                raise QskdError(
                    f"student.quantization: {name}",
                    f"nothing came through it in {self.watched} steps",
                    "an activation in every step",
                    "leave its part out of student.quantization.parts",
                )

    def begin_average(self, average: Mapping[str, Tensor], names: Collection[str], prefix: str) -> None:
        """Let a moving average (in place; empty: there is none) have these quantisers' tensors as they are now, under each of the
        names that share one. prefix: of the model's names in it."""
        wanted = {id(self._of(name)) for name in names}
        for place, module in self.model.named_modules(remove_duplicate=False):
            if average and id(module) in wanted:
                for name, value in module.state_dict().items():
                    average[f"{prefix}{place}.{name}"].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """What was seen so far, by name, while some are watched."""
        return {name: each.seen.counts for name, each in self.activations.items() if each.seen is not None}

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on at this step, with what `state()` gave."""
        self.advance(step, calibrate=False)
        for name, counts in state.items():
            if name in self.activations and counts.shape == (BINS + 2,):
                self.activations[name].seen = Seen(self.activations[name].log_step.device, counts)
