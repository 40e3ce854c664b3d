"""Arrays as one buffer, for the way through Ray's object store."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays of any shapes -> one buffer: header length, JSON header, the raw bytes, each at a multiple of 64."""
    header: dict[str, tuple[str, list[int], int]] = {}
    offset = 0
    for name, array in arrays.items():
        header[name] = (array.dtype.str, list(array.shape), offset)
        offset += -(-array.nbytes // 64) * 64
    text = json.dumps(header).encode()
    start = -(-(8 + len(text)) // 64) * 64
    buffer = bytearray(start + offset)
    buffer[:8] = len(text).to_bytes(8, "little")
    buffer[8 : 8 + len(text)] = text
    for name, array in arrays.items():
        at = start + header[name][2]
        buffer[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return bytes(buffer)


def unpack(buffer: np.ndarray) -> Arrays:
    """The arrays of `pack`, as views into the buffer (uint8 [n])."""
    length = int.from_bytes(buffer[:8].tobytes(), "little")
    header = json.loads(buffer[8 : 8 + length].tobytes())
    start = -(-(8 + length) // 64) * 64
    arrays = {}
    for name, (dtype, shape, offset) in header.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays[name] = buffer[start + offset : start + offset + size].view(dtype).reshape(shape)
    return arrays
