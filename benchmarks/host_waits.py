"""Counting, on a CPU, the points at which the same code on a GPU would make the host wait for the device.

A device runs ahead of the host only while the host asks for no value. Whatever asks is counted here, with the line that
asked: values read as Python numbers, copies to the host, results whose size depends on values (nonzero, boolean masks), and
copies from the host that are not asynchronous. Waiting behind an event for what was copied earlier (`qskd.structures.OnItsWay`)
is counted apart: it takes as long as what the device was given before that copy, and nothing that was given since.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qskd.structures import OnItsWay

aten = torch.ops.aten
BEHIND_AN_EVENT = "waits behind an event"
# Each of them ends in a copy of a value or of a size to the host.
_WAITING = {
    aten._local_scalar_dense: "reads a value",  # item, bool, float, int
    aten.equal: "reads a value",
    aten.nonzero: "size from values",
    aten.masked_select: "size from values",
    aten._unique2: "size from values",
    aten.unique_dim: "size from values",
    aten.unique_consecutive: "size from values",
    aten.repeat_interleave: "size from values",
    aten.bincount: "size from values",
}
_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
_ROOT = Path(__file__).resolve().parents[1]
_OURSELVES = (str(Path(torch.__file__).parent), __file__)


class HostWaits(TorchDispatchMode):
    """While open, counts in `found` by (what, "file:line function").

    Tensors that are on the host in a run on a GPU too are left out: what `.cpu()` gave, and what was made of Python
    numbers or arrays without naming a device. Such a tensor's way to the device counts when it is not `non_blocking`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self._host: dict[int, Tensor] = {}  # by id; held, so that no other tensor gets the same id
        self._undo: list[Callable[[], None]] = []

    def _note(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURSELVES):
            frame = frame.f_back
        file = Path(frame.f_code.co_filename)
        parts = file.relative_to(_ROOT).parts if file.is_relative_to(_ROOT) else file.parts
        if "site-packages" in parts:
            parts = parts[parts.index("site-packages") + 1 :]
        self.found[what, f"{'/'.join(parts)}:{frame.f_lineno} {frame.f_code.co_name}"] += 1

    def _keep(self, tensor: Tensor) -> Tensor:
        self._host[id(tensor)] = tensor
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        if packet in _WAITING and id(args[0]) not in self._host:
            if packet is not aten.repeat_interleave or kwargs.get("output_size") is None:
                self._note(_WAITING[packet])
        elif packet in _INDEXING:
            by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            filled = len(args) > 2 and args[2].ndim == 0  # x[mask] = number is a masked_fill
            if by_mask and not filled:
                self._note("size from values")
        return func(*args, **kwargs)

    def __enter__(self) -> HostWaits:
        self._patch(torch.Tensor, "cpu", self._to_host)
        self._patch(torch.Tensor, "tolist", self._to_host)
        self._patch(torch.Tensor, "to", self._moved)
        self._patch(OnItsWay, "read", self._arrived)
        for owner, name in (
            (torch, "tensor"),
            (torch, "as_tensor"),
            (torch, "from_numpy"),
            (torch.Tensor, "new_tensor"),
        ):
            self._patch(owner, name, self._made)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        while self._undo:
            self._undo.pop()()
        self._host.clear()

    def _patch(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        before, own = getattr(owner, name), name in vars(owner)
        setattr(owner, name, lambda *args, **kwargs: around(before, *args, **kwargs))
        self._undo.append(lambda: setattr(owner, name, before) if own else delattr(owner, name))

    def _to_host(self, before: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if id(tensor) not in self._host:
            self._note("copies to the host")
        result = before(tensor, *args, **kwargs)
        return self._keep(result) if isinstance(result, Tensor) else result

    def _arrived(self, before: Callable[..., Any], coming: OnItsWay) -> Tensor:
        self._note(BEHIND_AN_EVENT)
        return self._keep(before(coming))

    def _made(self, before: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = before(*args, **kwargs)
        if before.__name__ == "as_tensor" and args and isinstance(args[0], Tensor):
            return result  # as it was
        if before.__name__ != "new_tensor" and kwargs.get("device") is None:
            return self._keep(result)
        self._note("copies from the host, waiting")
        return result

    def _moved(self, before: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places = (*args, kwargs.get("device"))
        to_device = any(isinstance(place, (str, torch.device, Tensor)) for place in places)
        if to_device and id(tensor) in self._host and not kwargs.get("non_blocking", False):
            self._note("copies from the host, waiting")
        result: Tensor = before(tensor, *args, **kwargs)
        if to_device and id(result) in self._host:
            return result.view_as(result)  # another object, which counts as the device's
        return result
