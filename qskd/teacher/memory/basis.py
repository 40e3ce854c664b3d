"""Memory in few numbers a cell (`teacher.cache.memory_share`): its parts along the directions in which it varies most.

A map of C channels is kept as z = V^T (F - mean), K numbers for C; V: the K first eigenvectors of the covariance of some of the
images' cells, K as few as hold the share of the variance. Who reads the cache gets V z + mean, which has lost what varied along
the other directions. Ours; what it costs a student is in docs/cache.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qskd.datasets.shards import ShardReader
from qskd.errors import QskdError
from qskd.storage.stores import join
from qskd.structures import TeacherRecord
from qskd.teacher.manifest import BASIS, REMEDY, CacheManifest
from qskd.teacher.memory.beside import load_beside, save_beside
from qskd.teacher.memory.moments import Moments, evenly, fewest

FILE = "basis.view-000.parquet"  # named as a cache's files are, of the images' first view
IMAGES = 256  # that the teacher is asked about before the cache is begun: of each there are hundreds of cells


@dataclass(frozen=True, eq=False)
class Basis:
    """Of one map: mean float32 [C], vectors float32 [C, K], of length 1 and orthogonal to one another."""

    mean: Tensor
    vectors: Tensor

    def parts(self, cells: Tensor) -> Tensor:
        """[..., C] -> [..., K]."""
        return (cells - self.mean) @ self.vectors

    def whole(self, parts: Tensor) -> Tensor:
        """[..., K] -> [..., C]: what `parts` was given, but for what lies along no vector."""
        return parts @ self.vectors.T + self.mean

    @property
    def kept(self) -> int:
        """K, the numbers that a cell is kept in."""
        return self.vectors.shape[1]

    def to(self, device: torch.device) -> Basis:
        return Basis(self.mean.to(device), self.vectors.to(device))


Bases = tuple[Basis, ...]  # one a map; none: memory is kept as it is


def kept_of(bases: Bases) -> tuple[int, ...]:
    """As `CacheSizes.kept`."""
    return tuple(basis.kept for basis in bases)


def find_bases(records: Iterable[TeacherRecord], widths: Sequence[int], share: float) -> Bases:
    """From what a teacher said of some images."""
    moments = Moments(widths)
    for record in records:
        moments.add_maps(record.memory, record.memory_valid)
    found = []
    for mean, directions in zip(moments.means(), moments.directions(), strict=True):
        vectors = directions.vectors[:, : fewest(directions.variances, share)]
        found.append(Basis(torch.from_numpy(mean), torch.from_numpy(vectors).contiguous()))
    return tuple(found)


def in_parts(record: TeacherRecord, bases: Bases) -> TeacherRecord:
    """With memory [B, K, H, W], 0 on padding, for [B, C, H, W]."""
    return _changed(record, [basis.parts for basis in bases]) if bases else record


def made_whole(record: TeacherRecord, bases: Bases) -> TeacherRecord:
    """`in_parts` undone, but for what is lost; memory is 0 on padding."""
    return _changed(record, [basis.whole for basis in bases]) if bases and record.memory else record


def _changed(record: TeacherRecord, changes: Sequence[Callable[[Tensor], Tensor]]) -> TeacherRecord:
    with torch.autocast(record.memory[0].device.type, enabled=False):
        memory = tuple(
            change(map_.float().movedim(1, -1)).movedim(-1, 1) * valid[:, None]
            for map_, valid, change in zip(record.memory, record.memory_valid, changes, strict=True)
        )
    return replace(record, memory=memory)


def sampled(reader: ShardReader, batch_size: int) -> Iterator[NDArray[np.int32]]:
    """Batches [n, 3] of (shard, row, view): the images that a basis is found from, `IMAGES` that lie evenly over the shards."""
    for shard, rows in evenly(np.cumsum(reader.manifest.shard_rows), IMAGES):
        for start in range(0, len(rows), batch_size):
            yield np.array([(shard, row, 0) for row in rows[start : start + batch_size]], np.int32)


def in_basis(manifest: CacheManifest, bases: Bases) -> CacheManifest:
    """Of a cache that is begun with its memory in `bases`; as it is where there are none."""
    if not bases:
        return manifest
    identity = {**manifest.identity, BASIS: digest_of(bases)}
    return replace(manifest, identity=identity, sizes=replace(manifest.sizes, kept=kept_of(bases)))


def digest_of(bases: Bases) -> str:
    """sha256 of all numbers: part of the cache's identity, for rows of another basis would be read as nonsense."""
    found = hashlib.sha256()
    for basis in bases:
        for part in (basis.mean, basis.vectors):
            found.update(part.numpy().astype("<f4").tobytes())
    return found.hexdigest()


def check_one_basis(caches: Mapping[str, CacheManifest]) -> None:
    """QskdError unless a recipe's caches, by folder, the first one first, have memory in one basis: one batch has rows of all."""
    for path, manifest in caches.items():
        first, of_first = next(iter(caches.items()))
        found, expected = (str(each.identity.get(BASIS, "none"))[:12] for each in (manifest, of_first))
        if found != expected:
            raise QskdError(
                path,
                f"memory in the basis {found} (teacher.cache.memory_share)",
                f"{expected}, as {first} has it: one batch has rows of both",
                "delete this folder: `qskd cache RECIPE` then makes it again, in the other's basis",
            )


def save_bases(uri: str, bases: Bases, manifest: CacheManifest) -> None:
    """Beside the cache's other files."""
    rows = [{"mean": basis.mean.numpy(), "vectors": basis.vectors.numpy()} for basis in bases]
    save_beside(uri, FILE, rows, manifest.fingerprint)


def cached_basis(uri: str, manifest: CacheManifest) -> Bases:
    """Of a cache; none where memory is kept as it is. QskdError where its file is lost, damaged or another's."""
    sizes = manifest.sizes
    if not sizes.kept:
        return ()
    both = zip(sizes.channels, sizes.kept, strict=True)
    shapes = [{"mean": (width,), "vectors": (width, kept)} for width, kept in both]
    rows = load_beside(uri, FILE, shapes, manifest.fingerprint, "the basis of this cache's memory", REMEDY)
    if rows is None:
        raise QskdError(join(uri, FILE), "not there", "the basis in which the cache's memory is written", REMEDY)
    found = tuple(Basis(*(torch.tensor(row[name]) for name in ("mean", "vectors"))) for row in rows)
    if (digest := digest_of(found)) != manifest.identity.get(BASIS):
        raise QskdError(join(uri, FILE), f"sha256 {digest[:12]}", f"{str(manifest.identity.get(BASIS))[:12]}", REMEDY)
    return found
