"""Importing: what may not be there, and much at once."""

from __future__ import annotations

import atexit
import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qskd.errors import QskdError


def need(package: str, where: str = "qskd export") -> Any:
    """A package of ONNX, which is optional; QskdError when it is not installed. where: what needs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        remedy = "in the project's folder: pip install -e '.[export]'"
        raise QskdError(where, f"no {package}", "onnx, onnxruntime", remedy) from None


@contextmanager
def without_collecting() -> Iterator[None]:
    """Python's garbage collector waits. An import leaves nothing to collect, yet looking for it takes a fifth of the time that
    transformers' takes; each of Ray's processes pays that."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            if not gc.get_freeze_count():  # else someone wants theirs frozen
                gc.freeze()
                gc.unfreeze()  # all is among the oldest now: the next collections of the young don't look at each of them
            gc.enable()


# A process that ends leaves nothing to collect either, yet Python looks through all of torch and transformers for it: as long as
# a third of importing them took. What is frozen is passed over; each object's own end still comes.
atexit.register(gc.freeze)
