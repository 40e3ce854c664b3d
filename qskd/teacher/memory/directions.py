"""Along which directions a teacher's memory varies, and how much: computed from its cache, and kept beside it in one small file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qskd.errors import QskdError
from qskd.storage.stores import join
from qskd.structures import TeacherNeeds
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import columns_for, decode_batch
from qskd.teacher.manifest import CacheManifest
from qskd.teacher.memory.beside import load_beside, save_beside

if TYPE_CHECKING:
    from torch import Tensor

FILE = "directions.view-000.parquet"  # of the images' first view
IMAGES = 1000  # or all, where there are fewer: a thousand images have more cells than a covariance has numbers
_AT_ONCE = 16
_REMEDY = "delete this file, and run `qskd cache RECIPE`, which makes it again"


@dataclass(frozen=True, eq=False)
class Directions:
    """Of one memory map of C channels: variances float32 [C], largest first, and vectors float32 [C, C], a column each, of
    length 1 and orthogonal to one another."""

    variances: NDArray[np.float32]
    vectors: NDArray[np.float32]


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

    def means(self) -> list[NDArray[np.float32]]:
        """By map: [C]."""
        return [(total / max(count, 1)).float().numpy() for count, total, _ in self._sums]

    def directions(self) -> tuple[Directions, ...]:
        """By map: the eigenvectors of the covariance. All alike where no cell was seen."""
        import torch

        found = []
        for count, total, squares in self._sums:
            mean = total / max(count, 1)
            covariance = squares / max(count, 1) - torch.outer(mean, mean)
            values, vectors = torch.linalg.eigh(covariance)  # the smallest first
            both = values.flip(0).clamp(min=0).float(), vectors.flip(1).float()
            found.append(Directions(*(part.contiguous().numpy() for part in both)))
        return tuple(found)


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


def compute_directions(uri: str) -> tuple[Directions, ...]:
    """Of each map, finest first: the eigenvectors of the covariance over all cells that are kept and no padding, of `IMAGES` images
    that lie evenly over the cache. The same cache gives the same ones."""
    import torch

    from qskd.teacher.memory.basis import cached_basis

    reader = TeacherCacheReader(uri, columns_for(TeacherNeeds(memory=True)))
    manifest, basis = reader.manifest, cached_basis(uri, reader.manifest)
    moments = Moments(manifest.sizes.channels)
    for shard, rows in evenly(np.cumsum([rows for rows, _ in manifest.views[0]]), IMAGES):
        for start in range(0, len(rows), _AT_ONCE):
            arrays = reader.collate(reader.read(shard, 0, rows[start : start + _AT_ONCE]))
            record = decode_batch({name: torch.from_numpy(array) for name, array in arrays.items()})
            for level, (map_, valid) in enumerate(zip(record.memory, record.memory_valid, strict=True)):
                cells = map_.movedim(1, -1)[valid]
                if reader.attended:  # of the others nothing is kept
                    cells = cells[cells.any(1)]
                moments.add(level, basis[level].whole(cells) if basis else cells)
    return moments.directions()


def save_directions(uri: str, directions: Sequence[Directions], manifest: CacheManifest) -> None:
    """Written whole, beside the cache's other files."""
    rows = [{"variances": each.variances, "vectors": each.vectors} for each in directions]
    save_beside(uri, FILE, rows, manifest.fingerprint)


def load_directions(uri: str, manifest: CacheManifest) -> tuple[Directions, ...] | None:
    """What `save_directions` wrote; None where there is none. QskdError where it is damaged, or another cache's."""
    shapes = [{"variances": (width,), "vectors": (width, width)} for width in manifest.sizes.channels]
    rows = load_beside(uri, FILE, shapes, manifest.fingerprint, "the directions of this cache", _REMEDY)
    if rows is None:
        return None
    found = tuple(Directions(row["variances"], row["vectors"]) for row in rows)
    if any(each.variances.min() < 0 for each in found):
        raise QskdError(join(uri, FILE), "a variance below 0", "what `qskd cache` writes", _REMEDY)
    return found


def flat_directions(widths: Sequence[int]) -> tuple[Directions, ...]:
    """As if every direction varied alike: where only the cost of a step is asked."""
    return tuple(Directions(np.ones(width, np.float32), np.eye(width, dtype=np.float32)) for width in widths)
