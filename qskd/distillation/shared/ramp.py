"""How much the teacher counts over a training: its terms' weights may rise at the start and fall at the end."""

from __future__ import annotations

from qskd.config.distillation import MethodSettings


def distillation_factor(step: int, total_steps: int, config: MethodSettings) -> float:
    """What the weights of the distillation terms are multiplied by at this step (0-based), in 0..1.

    A function of the step alone, so that a resumed run weighs as the first one would have. Above 0 at every step of the
    schedule, the first and the last among them.
    """
    rising = (step + 1) / (config.warmup * total_steps) if config.warmup else 1.0
    return max(0.0, min(1.0, rising, falling(step, total_steps, config.decay)))


def falling(step: int, total_steps: int, decay: float) -> float:
    """The end of it, in 0..1: 1, and over the last part `decay` of all steps linearly down to (almost) 0."""
    return min(1.0, (total_steps - step) / (decay * total_steps)) if decay else 1.0
