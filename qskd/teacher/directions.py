"""Along which directions a teacher's memory varies, and how much: computed from its cache, and kept beside it in one small file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qskd.errors import QskdError
from qskd.storage.files import publish_bytes, read_bytes
from qskd.storage.places import open_folder
from qskd.storage.stores import join
from qskd.structures import TeacherNeeds
from qskd.teacher.cache import FINGERPRINT_KEY, TeacherCacheReader
from qskd.teacher.columns.table import columns_for, decode_batch
from qskd.teacher.manifest import CacheManifest

FILE = (
    "directions.view-000.parquet"  # of the images' first view; it carries the cache's fingerprint as its other files do
)
IMAGES = 1000  # or all, where there are fewer: a thousand images have more cells than a covariance has numbers
_AT_ONCE = 16
_HEAD = 2**20  # bytes: more than a footer of so few rows takes
_REMEDY = "delete this file, and run `qskd cache RECIPE`, which makes it again"


@dataclass(frozen=True, eq=False)
class Directions:
    """Of one memory map of C channels: variances float32 [C], largest first, and vectors float32 [C, C], a column each, of
    length 1 and orthogonal to one another."""

    variances: NDArray[np.float32]
    vectors: NDArray[np.float32]


def compute_directions(uri: str) -> tuple[Directions, ...]:
    """Of each map, finest first: the eigenvectors of the covariance over all cells that are kept and no padding, of `IMAGES` images
    that lie evenly over the cache. The same cache gives the same ones."""
    import torch

    reader = TeacherCacheReader(uri, columns_for(TeacherNeeds(memory=True)))
    manifest = reader.manifest
    ends = np.cumsum([rows for rows, _ in manifest.views[0]])
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(IMAGES, int(ends[-1]))).round().astype(int))
    shards = np.searchsorted(ends, chosen, side="right")
    sums = [(0, torch.zeros(width).double(), torch.zeros(width, width).double()) for width in manifest.sizes.channels]
    for shard in np.unique(shards).tolist():
        rows = (chosen[shards == shard] - (ends[shard - 1] if shard else 0)).tolist()
        for start in range(0, len(rows), _AT_ONCE):
            arrays = reader.collate(reader.read(shard, 0, rows[start : start + _AT_ONCE]))
            record = decode_batch({name: torch.from_numpy(array) for name, array in arrays.items()})
            for level, (map_, valid) in enumerate(zip(record.memory, record.memory_valid, strict=True)):
                cells = map_.movedim(1, -1)[valid].double()
                if reader.attended:  # of the others nothing is kept
                    cells = cells[cells.any(1)]
                count, total, squares = sums[level]
                sums[level] = count + len(cells), total + cells.sum(0), squares + cells.T @ cells
    found = []
    for count, total, squares in sums:
        mean = total / count
        values, vectors = torch.linalg.eigh(squares / count - torch.outer(mean, mean))  # the smallest first
        both = values.flip(0).clamp(min=0).float(), vectors.flip(1).float()
        found.append(Directions(*(part.contiguous().numpy() for part in both)))
    return tuple(found)


def save_directions(uri: str, directions: Sequence[Directions], manifest: CacheManifest) -> None:
    """Written whole, beside the cache's other files."""
    schema = pa.schema([("variances", pa.binary()), ("vectors", pa.binary())])
    rows = {name: [getattr(each, name).astype("<f4").tobytes() for each in directions] for name in schema.names}
    table = pa.table(rows, schema=schema.with_metadata({FINGERPRINT_KEY: manifest.fingerprint.encode()}))
    content = io.BytesIO()
    pq.write_table(table, content, compression="NONE", use_dictionary=False, write_statistics=False)
    filesystem, root = open_folder(uri)
    publish_bytes(content.getvalue(), filesystem, f"{root}/{FILE}")


def load_directions(uri: str, manifest: CacheManifest) -> tuple[Directions, ...] | None:
    """What `save_directions` wrote; None where there is none. QskdError where it is damaged, or another cache's."""
    filesystem, root = open_folder(uri)
    where, widths = join(uri, FILE), manifest.sizes.channels
    most = _HEAD + sum(4 * width * (width + 1) for width in widths)
    try:
        content = read_bytes(filesystem, f"{root}/{FILE}", where, most)
    except FileNotFoundError:
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        metadata = file.metadata
        if (metadata.metadata or {}).get(FINGERPRINT_KEY) != manifest.fingerprint.encode():
            raise ValueError("of another cache")
        groups = range(metadata.num_row_groups)
        if metadata.num_rows != len(widths) or sum(metadata.row_group(n).total_byte_size for n in groups) > most:
            raise ValueError("of other maps")
        rows = file.read(["variances", "vectors"]).to_pylist()
        found = []
        for row, width in zip(rows, widths, strict=True):
            numbers = [np.frombuffer(row[name], "<f4") for name in ("variances", "vectors")]
            found.append(Directions(numbers[0].reshape(width), numbers[1].reshape(width, width)))
            if not all(np.isfinite(part).all() for part in numbers) or numbers[0].min() < 0:
                raise ValueError("not finite, or a variance below 0")
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise QskdError(
            where, f"not the directions of this cache: {error}", "what `qskd cache` writes", _REMEDY
        ) from None
    return tuple(found)


def flat_directions(widths: Sequence[int]) -> tuple[Directions, ...]:
    """As if every direction varied alike: where only the cost of a step is asked."""
    return tuple(Directions(np.ones(width, np.float32), np.eye(width, dtype=np.float32)) for width in widths)
