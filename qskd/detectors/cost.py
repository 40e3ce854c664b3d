"""What a model costs: parameters, floating point operations, milliseconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qskd.quantization.model import belongs_to_quantiser

Side = Callable[[], object]


def parameters(model: nn.Module) -> int:
    """Number of parameters: frozen ones too, shared ones once, buffers (batch statistics, frozen norms) and the steps of quantisers
    not."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not belongs_to_quantiser(name))


@contextmanager
def _countable_attention() -> Iterator[None]:
    # PyTorch's counter has no rule for the CPU's fused attention kernel, nor for the fast path of nn.MultiheadAttention
    # and nn.TransformerEncoderLayer: it would silently count 0. Their plain forms are matrix products, which it knows.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def gflops(model: nn.Module, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> float:
    """10^9 floating point operations of one forward pass in evaluation mode, for the whole batch given.

    A multiply-add is **2** operations (papers that say "FLOPs" and mean multiply-adds have half this number). Matrix
    products, convolutions and attention are counted; element-wise work, norms, softmax and the bilinear sampling of
    deformable attention are not. pixel_values [B, 3, H, W] float; pixel_mask [B, H, W], 1 where there is image.
    """
    modes = [
        (module, module.training) for module in model.modules()
    ]  # frozen parts may stay in eval while others train
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counter = FlopCounterMode(display=False)
    inputs = {"pixel_values": pixel_values} | ({} if pixel_mask is None else {"pixel_mask": pixel_mask})
    try:
        # The counter asks for the gradient of what requires one, which nothing has here: it fails where a parameter is
        # the input of a module, as Deformable DETR's queries are.
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.no_grad(), _countable_attention(), counter:
            model.eval()(**inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
    return float(counter.get_total_flops()) / 1e9


def seconds(side: Side, device: torch.device | str = "cpu") -> float:
    """How long one call takes, in seconds of wall clock.

    On cuda the device is waited for around the call, so that work is timed and not its submission.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    side()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def alternate(
    sides: Mapping[str, Side],
    rounds: int,
    warm_up: int = 1,
    device: torch.device | str = "cpu",
    limit_s: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of each side in each round. Every second round runs backwards, so that no side always follows the same.

    A machine's speed drifts, and others work on it: sides that take turns share a slow minute, and the ratio of two sides
    within a round is worth more than the ratio of two medians of different minutes. limit_s: no round begins after so
    many seconds of timing, but three at least are run.
    """
    for _ in range(warm_up):
        for side in sides.values():
            side()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    spent_s = 0.0
    for number in range(rounds):
        if spent_s > limit_s and number >= 3:
            break
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            taken[name].append(seconds(sides[name], device))
            spent_s += taken[name][-1]
    return taken


def busy_note() -> str:
    """A sentence when more wants to run here than there are cores, which no timing on the CPU survives; else empty."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= 1.5 * cores:
        return ""
    return f"The machine was busy (load average {load:.0f} on {cores} cores): its milliseconds mean little."


def latency_ms(call: Side, warmup: int = 5, repeats: int = 30, device: torch.device | str = "cpu") -> dict[str, float]:
    """Milliseconds of one `call()`: {"median", "p90"} over `repeats`, after `warmup` calls that are not timed.

    Raises ValueError for repeats < 1. To compare two models, `alternate` them.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is {repeats} and warmup {warmup}: at least 1 and 0 are needed")
    times = alternate({"": call}, repeats, warmup, device)[""]
    return {"median": float(np.median(times)) * 1e3, "p90": float(np.percentile(times, 90)) * 1e3}
