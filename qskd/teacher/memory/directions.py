"""Along which directions a teacher's memory varies, and how much: computed from its cache, and kept beside it in one small file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qskd.errors import QskdError
from qskd.storage.stores import join
from qskd.structures import TeacherNeeds
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import columns_for, decode_batch
from qskd.teacher.manifest import CacheManifest
from qskd.teacher.memory.basis import cached_basis
from qskd.teacher.memory.beside import load_beside, save_beside
from qskd.teacher.memory.moments import Directions, Moments, evenly

FILE = "directions.view-000.parquet"  # of the images' first view
IMAGES = 1000  # or all, where there are fewer: a thousand images have more cells than a covariance has numbers
_AT_ONCE = 16
_REMEDY = "delete this file, and run `qskd cache RECIPE`, which makes it again"


def compute_directions(uri: str) -> tuple[Directions, ...]:
    """Of each map, finest first: the eigenvectors of the covariance over all cells that are kept and no padding, of `IMAGES` images
    that lie evenly over the cache. The same cache gives the same ones."""
    import torch

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
