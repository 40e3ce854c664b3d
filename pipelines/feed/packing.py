"""Arrays as one buffer, for the way through Ray's object store."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, np.ndarray]


class Packer:
    """Arrays of any shapes -> one buffer: the raw bytes, each at a multiple of 64, a JSON header, and the header's length.

    What is large is made in its place: `room` gives memory of the buffer, and `add` of an array there copies nothing. memory: uint8
    [n], as much as is expected to be needed.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._buffer, self._end = memory, 0
        self._header: dict[str, tuple[str, list[int], int]] = {}

    def room(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory of the buffer, uint8 [nbytes], for an array that will be added. It moves when a later one does not fit."""
        start, self._end = self._end, self._end + -(-nbytes // 64) * 64
        if self._end > len(self._buffer):
            larger = np.empty(max(self._end, 2 * len(self._buffer)), np.uint8)
            larger[:start] = self._buffer[:start]
            self._buffer = larger
        self._buffer[start + nbytes : self._end] = 0
        return self._buffer[start : start + nbytes]

    def add(self, name: str, array: np.ndarray) -> None:
        start = array.ctypes.data - self._buffer.ctypes.data
        if array.nbytes == 0 or not (array.flags.c_contiguous and 0 <= start <= self._end - array.nbytes):
            start = self._end
            self.room(array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._header[name] = array.dtype.str, list(array.shape), start

    @property
    def memory(self) -> NDArray[np.uint8]:
        """All of the buffer's."""
        return self._buffer

    def packed(self) -> NDArray[np.uint8]:
        """The buffer, uint8 [n]. Nothing more can be added."""
        text = json.dumps(self._header).encode()
        tail = text + len(text).to_bytes(8, "little")
        start = self._end
        self.room(len(tail))[:] = np.frombuffer(tail, np.uint8)
        return self._buffer[: start + len(tail)]


def pack(arrays: Mapping[str, np.ndarray]) -> NDArray[np.uint8]:
    """Arrays of any shapes -> one buffer, uint8 [n]."""
    packer = Packer(np.empty(sum(array.nbytes + 64 for array in arrays.values()) + 1024, np.uint8))
    for name, array in arrays.items():
        packer.add(name, array)
    return packer.packed()


def unpack(buffer: np.ndarray) -> Arrays:
    """The arrays of `pack`, as views into the buffer (uint8 [n])."""
    length = int.from_bytes(buffer[-8:].tobytes(), "little")
    header = json.loads(buffer[-8 - length : -8].tobytes())
    arrays = {}
    for name, (dtype, shape, offset) in header.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays[name] = buffer[offset : offset + size].view(dtype).reshape(shape)
    return arrays
