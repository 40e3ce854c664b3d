"""Batch norms in training: over the images of all workers, and torch's own put right for a batch of one on a CPU.

`student.backbone_norm: sync` is for students of which each worker sees few images. torch.nn.SyncBatchNorm has no form for CPUs, and
on a GPU every one of its forward passes waits for the device. The one here is one collective forward and one backward on either,
and takes part for a worker whose share is empty: the others wait for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from qskd.detectors.backbone import ThawedBatchNorm2d


def _summed(values: Tensor) -> Tensor:
    """Over all workers, in place."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def _in_order(x: Tensor, pattern: Tensor) -> Tensor:
    """`x` with the strides that a new tensor in the order of `pattern` has.

    Of a batch of one whose strides come from a transposed tensor, torch 2.13 computes wrong gradients on a CPU (whole gradients
    of an RT-DETR were off by two thirds): a size of 1 leaves its stride open, and the kernel takes it at its word.
    """
    last = pattern.is_contiguous(memory_format=torch.channels_last) and not pattern.is_contiguous()
    made = torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format, device="meta")
    return (
        x
        if x.stride() == made.stride()
        else torch.empty_strided(made.shape, made.stride(), dtype=x.dtype, device=x.device).copy_(x)
    )


class _Normalise(torch.autograd.Function):
    """x [B, C, H, W] -> x normalised by all workers' mean and variance; both [C], and the number of cells they are of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _in_order(x, x)
        channels, cells = x.shape[1], x.numel() // x.shape[1]
        if cells:
            variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        else:
            variance = mean = x.new_zeros(channels, dtype=torch.float32)
        # In float64, where E[x^2] - E[x]^2 loses nothing that float32 had.
        mean, variance = mean.double(), variance.double()
        own = torch.cat([mean.new_full((1,), cells), cells * mean, cells * (variance + mean * mean)])
        count, sums, squares = _summed(own).split([1, channels, channels])
        count = count.clone()
        mean = sums / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean * mean).clamp(min=0)
        mean, variance = mean.float(), variance.float()
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        # Of no cells it would divide by their number.
        normalised = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps) if cells else x.clone()
        return normalised, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # As if the statistics were constants: the whole gradient of weight and bias, and the direct part of that of x.
        gradient = _in_order(gradient, x)
        if x.numel():
            direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            direct, of_weight, of_bias = gradient, torch.zeros_like(weight), torch.zeros_like(weight)
        both = _summed(torch.stack([of_weight, of_bias]).float()) / count.clamp(min=1).float()
        # The rest of it, by way of mean and variance: along the normalised x, and constant; here as s * x + t.
        deviation = (variance + ctx.eps).rsqrt()
        slope = weight * deviation * deviation * both[0]
        shift = weight * deviation * both[1] - slope * mean
        slope, shift = slope.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
        return (direct - (x * slope + shift)).to(x.dtype), of_weight, of_bias, None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """As `nn.BatchNorm2d` on one worker that has the images of all. absent: this worker has none of them in this step."""

    absent = False

    @torch.compiler.disable  # it waits for other workers
    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.absent):
            return super().forward(x)
        normalised, mean, variance, count = _Normalise.apply(
            x[:0] if self.absent else x, self.weight, self.bias, self.eps
        )
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1)).float()
            share = (self.momentum or 0.0) * (count > 0).float()
            for running, found in ((self.running_mean, mean), (self.running_var, unbiased)):
                assert running is not None
                running.lerp_(found, share)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
        if not self.absent:
            shared: Tensor = normalised
            return shared
        # What a stand-in shows counts for nothing; it is attached to the collectives, which its backward must take part in too.
        alone = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return alone + normalised.sum()


class _LaidOutBack(torch.autograd.Function):
    """output, as it is; its gradient with the strides of x."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _in_order(gradient, x), None


def _laid_out_back(output: Tensor, x: Tensor) -> Tensor:
    found: Tensor = _LaidOutBack.apply(output, x)
    return found


def put_right(module: nn.Module, traced: bool = False) -> None:
    """Give torch's own batch norms in `module` a batch of one on a CPU in order (`_in_order`), and its gradient.
    traced: torch.compile may go through it, to which a gradient's strides are unknown where it meets them in a hook."""
    if traced:
        torch.compiler.allow_in_graph(_laid_out_back)

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        (x,) = args
        return (_in_order(x, x),) if len(x) == 1 and x.device.type == "cpu" else None

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not (len(output) == 1 and output.device.type == "cpu" and output.requires_grad):
            return None
        (x,) = args
        if torch.compiler.is_compiling():
            return _laid_out_back(output, x)
        output.register_hook(lambda gradient: _in_order(gradient, x))
        return None

    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and not isinstance(norm, SharedBatchNorm2d):
            norm.register_forward_pre_hook(before)
            norm.register_forward_hook(after)


class _SharedThawed(SharedBatchNorm2d, ThawedBatchNorm2d):
    """Of a backbone: saved as a frozen one."""


def share_statistics(module: nn.Module) -> list[SharedBatchNorm2d]:
    """Put a `SharedBatchNorm2d` in the place of each batch norm (in place), with the same parameters and buffers; all of them."""
    made = []
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.BatchNorm2d):
            made += share_statistics(child)
            continue
        kind = _SharedThawed if isinstance(child, ThawedBatchNorm2d) else SharedBatchNorm2d
        norm = kind(child.num_features, eps=child.eps, momentum=child.momentum)
        norm.weight, norm.bias = child.weight, child.bias
        norm.running_mean, norm.running_var = child.running_mean, child.running_var
        norm.num_batches_tracked = child.num_batches_tracked
        setattr(module, name, norm.train(child.training))
        made.append(norm)
    return made
