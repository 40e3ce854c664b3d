"""Comparing classes: the cross-entropy with a teacher's probabilities, and how much a query counts by its confidence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, wanted: Tensor, gamma: float) -> Tensor:
    """Binary cross-entropy of logits and wanted probabilities, of one shape, element by element; with `gamma` times
    |wanted - sigmoid(logits)|^gamma, the modulation of quality focal loss (Li et al., NeurIPS 2020)."""
    found = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if gamma:
        # Below 1 a power's gradient is infinite at 0, where both agree.
        found = found * (wanted - logits.sigmoid()).abs().clamp(min=1e-6) ** gamma
    return found


def shares_by_confidence(logits: Tensor) -> Tensor:
    """[B, Q] of an image's queries with logits [B, Q, K]: the largest probabilities, over their sum."""
    confidence = logits.float().sigmoid().amax(-1)
    return confidence / confidence.sum(-1, keepdim=True).clamp(min=1e-8)
