"""Along which directions a teacher's memory varies, and how much: computed from its cache, and kept beside it in one small file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qskd.errors import QskdError
from qskd.storage.stores import join
from qskd.structures import TeacherNeeds
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import columns_for, decode_batch
from qskd.teacher.manifest import CacheManifest
from qskd.teacher.memory.basis import cached_basis, made_whole
from qskd.teacher.memory.beside import load_beside, save_beside
from qskd.teacher.memory.moments import Directions, Moments, evenly, principal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qskd.structures import DetectorOutput, TeacherRecord
    from qskd.teacher.decoder import TeacherDecoder

# By what the directions are found, of the images' first view.
FILES = {"variance": "directions.view-000.parquet", "decoder": "sensitivity.view-000.parquet"}
IMAGES = 1000  # or all, where there are fewer: a thousand images have more cells than a covariance has numbers
_AT_ONCE = 16
_REMEDY = "delete this file, and run `qskd cache RECIPE`, which makes it again"


def _memory_in(uri: str) -> TeacherCacheReader:
    return TeacherCacheReader(uri, columns_for(TeacherNeeds(memory=True)))


def known_of(reader: TeacherCacheReader) -> Iterator[tuple[TeacherRecord, tuple[Tensor, ...]]]:
    """Batches of `IMAGES` images that lie evenly over a cache's first view, and of each map which cells are kept and no padding."""
    import torch

    bases = cached_basis(reader.uri, reader.manifest)
    for shard, rows in evenly(np.cumsum([rows for rows, _ in reader.manifest.views[0]]), IMAGES):
        for start in range(0, len(rows), _AT_ONCE):
            arrays = reader.collate(reader.read(shard, 0, rows[start : start + _AT_ONCE]))
            record = decode_batch({name: torch.from_numpy(array) for name, array in arrays.items()})
            cells = record.memory_valid
            if reader.attended:  # of the others nothing is kept
                cells = tuple(valid & map_.any(1) for valid, map_ in zip(cells, record.memory, strict=True))
            yield made_whole(record, bases), cells


def compute_directions(uri: str) -> tuple[Directions, ...]:
    """Of each map, finest first: the eigenvectors of the memory's covariance. The same cache gives the same ones."""
    reader = _memory_in(uri)
    moments = Moments(reader.manifest.sizes.channels)
    for record, cells in known_of(reader):
        moments.add_maps(record.memory, cells)
    return moments.directions()


def compute_sensitivities(uri: str, decoder: TeacherDecoder) -> tuple[Directions, ...]:
    """Of each map, finest first: the eigenvectors of E[J^T J], J how far what the teacher's last decoder layer says moves with a
    cell's memory (equations.md 1.4). decoder: the teacher's. The same cache gives the same ones. QskdError where an answer or
    its gradient is not finite."""
    import torch

    reader, drawn = _memory_in(uri), torch.Generator().manual_seed(0)
    widths = reader.manifest.sizes.channels
    moments, sums = Moments(widths), [torch.zeros(width, width).double() for width in widths]
    for record, cells in known_of(reader):
        moments.add_maps(record.memory, cells)
        maps = [map_.requires_grad_() for map_ in record.memory]
        number = probe(decoder.read(maps, record.memory_valid), drawn)
        gradients = torch.autograd.grad(number, maps)
        if not all(part.isfinite().all() for part in (number, *gradients)):
            raise QskdError(
                "distillation.features.whitened_by",
                "decoder, and an answer of this teacher's decoder, or its gradient, that is not finite",
                "a decoder whose answers about the memory in its cache, and their gradients, are finite",
                "--set distillation.features.whitened_by=variance",
            )
        for level, gradient in enumerate(gradients):
            at = gradient.movedim(1, -1)[cells[level]].double()
            sums[level] += at.T @ at
    found = []
    for matrix, covariance in zip(sums, moments.covariances(), strict=True):
        whole = max(float(matrix.trace()), 1e-30)  # nothing but ratios is asked
        values, vectors = principal(matrix / whole)
        along = np.einsum("ck,cd,dk->k", vectors, covariance.numpy(), vectors).clip(min=0).astype(np.float32)
        found.append(Directions(along, vectors, values))
    return tuple(found)


def probe(said: DetectorOutput, drawn: torch.Generator) -> Tensor:
    """A number whose gradient g has E[g g^T] = J^T J, over random signs: J of the last layer's logits, each over its deviation as a
    Bernoulli's (their Fisher information), and of boxes in sides of the box, times the largest class probability."""
    import torch

    logits, boxes = said.logits[-1].float(), said.boxes_cxcywh[-1].float()
    likely = logits.detach().sigmoid()
    sides_wh = boxes.detach()[..., 2:].clamp(min=1e-3)
    moved = boxes / torch.cat([sides_wh, sides_wh], -1) * likely.amax(-1, keepdim=True)
    apart = logits * (likely * (1 - likely)).sqrt()
    return sum((part * (2.0 * torch.randint(2, part.shape, generator=drawn) - 1)).sum() for part in (apart, moved))  # type: ignore[return-value]


def save_directions(uri: str, directions: Sequence[Directions], manifest: CacheManifest) -> None:
    """Written whole, beside the cache's other files."""
    by_decoder = directions[0].sensitivities is not None
    rows = [{name: getattr(each, name) for name in _names(by_decoder)} for each in directions]
    save_beside(uri, FILES["decoder" if by_decoder else "variance"], rows, manifest.fingerprint)


def load_directions(uri: str, manifest: CacheManifest, kind: str = "variance") -> tuple[Directions, ...] | None:
    """What `save_directions` wrote; None where there is none. QskdError where it is damaged, or another cache's. kind: "variance",
    in which the memory varies; "decoder", along which what the decoder says moves."""
    names = _names(kind == "decoder")
    shapes = [
        {name: (width, width) if name == "vectors" else (width,) for name in names} for width in manifest.sizes.channels
    ]
    rows = load_beside(uri, FILES[kind], shapes, manifest.fingerprint, "the directions of this cache", _REMEDY)
    if rows is None:
        return None
    if any(row[name].min() < 0 for row in rows for name in names if name != "vectors"):
        raise QskdError(join(uri, FILES[kind]), "a variance below 0", "what `qskd cache` writes", _REMEDY)
    return tuple(Directions(**row) for row in rows)


def _names(by_decoder: bool) -> tuple[str, ...]:
    return ("variances", "vectors", *(("sensitivities",) if by_decoder else ()))


def flat_directions(widths: Sequence[int]) -> tuple[Directions, ...]:
    """As if every direction varied alike: where only the cost of a step is asked."""
    return tuple(Directions(np.ones(width, np.float32), np.eye(width, dtype=np.float32)) for width in widths)
