"""What a model costs: parameters, floating point operations, milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Number of parameters: frozen ones too, shared ones once, buffers (batch statistics, frozen norms) not."""
    return sum(parameter.numel() for parameter in model.parameters())


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


def latency_ms(
    call: Callable[[], object], warmup: int = 5, repeats: int = 30, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Milliseconds of one `call()`: {"median", "p90"} over `repeats`, after `warmup` calls that are not timed.

    On cuda the device is waited for around every call, so that work is timed and not its submission. Raises ValueError
    for repeats < 1.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is {repeats} and warmup {warmup}: at least 1 and 0 are needed")
    device = torch.device(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warmup):
        call()
    times = np.empty(repeats)
    for i in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times[i] = time.perf_counter() - start
    return {"median": float(np.median(times)) * 1e3, "p90": float(np.percentile(times, 90)) * 1e3}
