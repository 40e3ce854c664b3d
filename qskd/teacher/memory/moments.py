"""The first two moments of a teacher's memory, and the directions in which it varies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Directions:
    """Of one memory map of C channels: vectors float32 [C, C], a column each, of length 1 and orthogonal to one another; variances
    float32 [C], of the memory along each. sensitivities: float32 [C], how far what the teacher's decoder says moves along each;
    None where that was not asked. The sensitivities, or else the variances, go from the largest down."""

    variances: NDArray[np.float32]
    vectors: NDArray[np.float32]
    sensitivities: NDArray[np.float32] | None = None


class Moments:
    """Sums over cells, by map: float64, so that a million cells are added without loss."""

    def __init__(self, widths: Sequence[int]) -> None:
        import torch

        self._sums = [(0, torch.zeros(width).double(), torch.zeros(width, width).double()) for width in widths]

    def add(self, level: int, cells: Tensor) -> None:
        """cells: [N, C], of one map."""
        cells = cells.double().cpu()
        count, total, squares = self._sums[level]
        self._sums[level] = count + len(cells), total + cells.sum(0), squares + cells.T @ cells

    def add_maps(self, maps: Sequence[Tensor], valid: Sequence[Tensor]) -> None:
        """maps: [B, C, H, W] each; valid: [B, H, W], the cells that count."""
        for level, (map_, part) in enumerate(zip(maps, valid, strict=True)):
            self.add(level, map_.float().movedim(1, -1)[part])

    def means(self) -> list[NDArray[np.float32]]:
        """By map: [C]."""
        return [(total / max(count, 1)).float().numpy() for count, total, _ in self._sums]

    def covariances(self) -> list[Tensor]:
        """By map: float64 [C, C]; zeros where no cell was seen."""
        import torch

        means = [total / max(count, 1) for count, total, _ in self._sums]
        return [
            squares / max(count, 1) - torch.outer(mean, mean)
            for (count, _, squares), mean in zip(self._sums, means, strict=True)
        ]

    def directions(self) -> tuple[Directions, ...]:
        """By map: the eigenvectors of the covariance."""
        return tuple(Directions(*principal(each)) for each in self.covariances())


def principal(matrix: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A symmetric float64 matrix without negative eigenvalues -> these, the largest first, and the eigenvectors, a column each."""
    import torch

    values, vectors = torch.linalg.eigh(matrix)  # the smallest first
    both = values.flip(0).clamp(min=0).float(), vectors.flip(1).float()
    return both[0].contiguous().numpy(), both[1].contiguous().numpy()


def fewest(variances: NDArray[np.float32], share: float) -> int:
    """How many of the first directions are as few as hold `share` of the variance; none of which the variance is rounding."""
    exact = variances.astype(np.float64)
    whole = float(exact.sum())
    if not whole > 0:
        return len(exact)
    kept = int((exact.cumsum() < share * whole * (1 - 1e-9)).sum()) + 1
    return min(kept, int((exact > 1e-9 * exact[0]).sum()))


def evenly(ends: NDArray[np.int64], images: int) -> list[tuple[int, list[int]]]:
    """(shard, its rows): as many images, or all, that lie evenly over the shards. ends: the number of rows up to each one's end."""
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(images, int(ends[-1]))).round().astype(int))
    shards = np.searchsorted(ends, chosen, side="right")
    return [
        (shard, (chosen[shards == shard] - (ends[shard - 1] if shard else 0)).tolist())
        for shard in np.unique(shards).tolist()
    ]
