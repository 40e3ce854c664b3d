"""Whitened AGFD: an error counts by how seldom the teacher's memory varies in its direction. Ours (equations.md 1.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qskd.teacher.memory.moments import fewest

if TYPE_CHECKING:
    from qskd.teacher.memory.moments import Directions


def metric(directions: Directions, alpha: float, share: float) -> Tensor:
    """[C, K] float32: what an error [..., C] is multiplied by before it is squared and summed over K.

    Column k is s_k v_k, s_k^2 = c * variance_k^-alpha, for the K first directions, which are as few as hold `share` of the
    variance; of directions of the decoder's, s_k^2 = c * sensitivity_k^alpha, and K hold that share of the sensitivity. c is
    such that an error like the memory itself counts what it counts without: sum_k s_k^2 variance_k = the sum of all variances.
    Where that can't be, for the memory varies nowhere, or nowhere where the decoder looks, every direction counts alike.
    """
    variances = torch.tensor(directions.variances).double()
    vectors = torch.tensor(directions.vectors).double()
    whole = variances.sum()
    if directions.sensitivities is None:
        kept = fewest(directions.variances, share)
        scale = variances[:kept] ** -alpha
    else:
        kept = fewest(directions.sensitivities, share)
        scale = torch.tensor(directions.sensitivities[:kept]).double() ** alpha
    counted = (scale * variances[:kept]).sum()
    if not (whole > 0 and counted > 0):
        return vectors.float()
    return (vectors[:, :kept] * (scale * whole / counted).sqrt()).float()
