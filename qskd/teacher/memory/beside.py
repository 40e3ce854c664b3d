"""Small files of float32 arrays that lie beside a cache's rows, one row of arrays a memory map."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qskd.errors import QskdError
from qskd.storage.files import publish_bytes, read_bytes
from qskd.storage.places import open_folder
from qskd.storage.stores import join
from qskd.teacher.cache import FINGERPRINT_KEY

Arrays = Mapping[str, NDArray[np.float32]]
_HEAD = 2**20  # bytes: more than a footer of so few rows takes


def save_beside(uri: str, file: str, rows: Sequence[Arrays], fingerprint: str) -> None:
    """Written whole. It carries the cache's fingerprint as its other files do, so that it goes when the cache is replaced."""
    schema = pa.schema([(name, pa.binary()) for name in (rows[0] if rows else ())])
    columns = {name: [row[name].astype("<f4").tobytes() for row in rows] for name in schema.names}
    table = pa.table(columns, schema=schema.with_metadata({FINGERPRINT_KEY: fingerprint.encode()}))
    content = io.BytesIO()
    pq.write_table(table, content, compression="NONE", use_dictionary=False, write_statistics=False)
    filesystem, root = open_folder(uri)
    publish_bytes(content.getvalue(), filesystem, f"{root}/{file}")


def load_beside(
    uri: str, file: str, shapes: Sequence[Mapping[str, tuple[int, ...]]], fingerprint: str, what: str, remedy: str
) -> list[dict[str, NDArray[np.float32]]] | None:
    """What `save_beside` wrote; None where there is none. shapes: of each row's arrays. QskdError where it is damaged, another
    cache's, or has a number that is not finite. what: "the directions of this cache", for the message."""
    filesystem, root = open_folder(uri)
    where = join(uri, file)
    most = _HEAD + sum(4 * int(np.prod(shape)) for row in shapes for shape in row.values())
    try:
        content = read_bytes(filesystem, f"{root}/{file}", where, most)
    except FileNotFoundError:
        return None
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        metadata = parquet.metadata
        if (metadata.metadata or {}).get(FINGERPRINT_KEY) != fingerprint.encode():
            raise ValueError("of another cache")
        groups = range(metadata.num_row_groups)
        if metadata.num_rows != len(shapes) or sum(metadata.row_group(n).total_byte_size for n in groups) > most:
            raise ValueError("of other maps")
        found = [
            {name: np.frombuffer(row[name], "<f4").reshape(shape) for name, shape in wanted.items()}
            for row, wanted in zip(parquet.read().to_pylist(), shapes, strict=True)
        ]
        if not all(np.isfinite(part).all() for row in found for part in row.values()):
            raise ValueError("not finite")
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise QskdError(where, f"not {what}: {error}", "what `qskd cache` writes", remedy) from None
    return found
