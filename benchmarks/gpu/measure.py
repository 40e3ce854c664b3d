"""Seconds, kernels, waits and memory of one step, on a GPU; on a CPU, operators in place of kernels."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# What makes the host wait until the device has come as far, by the names of CUDA's runtime calls.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Cost:
    """Of one step. step_ms: median by the clock, the device having finished. device_ms: the sum of its kernels' times, 0 on a CPU.
    kernels: launched, without copies; on a CPU the operators dispatched. casts: of them, those that only change a number's
    format. waits: times that the host waited for the device. peak_gib: most memory in use, weights included."""

    step_ms: float
    device_ms: float
    kernels: int
    casts: int
    waits: int
    peak_gib: float
    longest_kernels: list[tuple[str, int, float]] = field(default_factory=list)  # name, how many, ms in all

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def step_ms(step: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Median over three rounds of `steps` steps; the clock is read when the device has finished a round, so that the host may
    run ahead within one, as in training. On a CPU, where its time says nothing, a single round, not warmed up."""
    on_gpu = device.type == "cuda"
    for _ in range(3 if on_gpu else 0):
        step()
    rounds = []
    for _ in range(3 if on_gpu else 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        rounds.append(1000 * (time.perf_counter() - started) / steps)
    return statistics.median(rounds)


class _Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def measure(step: Callable[[], Any], device: torch.device, steps: int) -> Cost:
    """step: takes one whole training step, copies to the device included."""
    free_memory(device)
    clock = step_ms(step, device, steps)
    if device.type != "cuda":
        with _Operators() as operators:
            step()
        seen = operators.seen
        return Cost(clock, 0.0, seen.total(), seen["aten._to_copy"], 0, 0.0)
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen_by:
        step()
        synchronize(device)
    kernels: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    waits = casts = 0
    for event in seen_by.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not event.name.startswith(_COPIES) and not getattr(event, "is_user_annotation", False):
                kernels[event.name] += 1
                spent[event.name] += event.device_time_total
        elif event.name in _WAITS:
            waits += 1
        elif event.name == "aten::_to_copy":
            casts += 1
    longest = [(name[:120], kernels[name], us / 1000) for name, us in spent.most_common(25)]
    own = 1  # the synchronisation at the end of the profile
    return Cost(clock, spent.total() / 1000, kernels.total(), casts, max(waits - own, 0), peak, longest)
