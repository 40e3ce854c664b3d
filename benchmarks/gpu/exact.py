"""(a) and (e): the same numbers on the device as on the CPU, in bfloat16 as in float32, and after a resume."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from benchmarks.gpu.cases import Case
from benchmarks.timing import Difference
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.batch import train_batch
from qskd.datasets.loader import pad
from qskd.datasets.pictures.cuts import placed, planned
from qskd.datasets.pictures.resample import make_pixels
from qskd.datasets.views import make_view, view_image
from qskd.detectors import to_pixels
from qskd.precision import autocast
from qskd.training.step import Training

CPU = torch.device("cpu")
GOAL = "(goal)"  # in a difference's name: told when it is missed, and no error


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 products with all their bits: TF32 is a choice of speed, and not what is compared."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


@dataclass(frozen=True)
class Seen:
    """One training step: its terms, gradients and weights after it; and what the student said before it."""

    terms: dict[str, Tensor]
    gradient: Tensor  # all of them, flat
    weights: Tensor
    boxes: Tensor  # of all layers, and of the first proposals
    early: Tensor | None
    logits: Tensor


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])


def see(case: Case, device: torch.device, precision: str) -> Seen:
    """The same student, batch and teacher's record on another device, or in another precision."""
    here = Case(case.family, case.edge, case.batch, device, case.toy, overrides=(f"compute.precision={precision}",))
    here.__dict__["teacher"] = copy.deepcopy(case.teacher).to(device)
    here.__dict__["arrays"] = case.arrays
    training = here.training("cached", "student.dropout=0", "training.clip_norm=0")
    arrays = here.arrays_of("cached", case.batch)
    batch = train_batch(arrays, device)
    with torch.no_grad(), autocast(precision, device):
        student = training.student.eval()
        pixels, mask = to_pixels(batch.images, batch.sizes, student.mean, student.std)
        said = student(pixels, mask, with_attention=False)
    terms = training.train_step(batch)
    training.check_finite()
    trained = [parameter for parameter in training.module.parameters() if parameter.grad is not None]
    early = said.early_boxes_cxcywh
    return Seen(
        {name: value.detach().float().cpu() for name, value in terms.items()},
        _flat(parameter.grad for parameter in trained),
        _flat(trained),
        said.boxes_cxcywh.float().cpu(),
        None if early is None else early.float().cpu(),
        said.logits.float().cpu(),
    )


def _terms(found: Seen, expected: Seen) -> float:
    """The largest difference of a term, relative to its value."""
    gaps = [abs(found.terms[n] - v) / v.abs().clamp(min=1e-3) for n, v in expected.terms.items()]
    return float(torch.stack(gaps).max())


def _gradient(found: Seen, expected: Seen) -> float:
    return float((found.gradient - expected.gradient).norm() / expected.gradient.norm())


def differences(device: torch.device, families: Sequence[str], edge: int, toy: bool) -> list[Difference]:
    """Of the device against the CPU, both float32; and of bfloat16 against float32, both on the device.

    The tolerances of bfloat16 are what its 8 bits allow: it is told whether the two are the same computation, not that they are
    equal. Of the proposals that RT-DETR chooses among thousands it is told how many are the same.
    """
    found = [
        Difference("pixels, made on the device and by Pillow: values that differ", pixels_differing(device, toy), 0)
    ]
    for family in families:
        case = Case(family, edge, 2, device, toy)
        with full_float32():
            on_cpu, on_device = see(case, CPU, "float32"), see(case, device, "float32")
            half = see(case, device, "bfloat16")
        name = case.name
        found += [
            Difference(f"{name}: loss terms, device and CPU (relative)", _terms(on_device, on_cpu), 1e-3),
            Difference(f"{name}: boxes", float((on_device.boxes - on_cpu.boxes).abs().max()), 1e-4),
            Difference(f"{name}: gradient (relative)", _gradient(on_device, on_cpu), 1e-2),
            Difference(f"{name}: weights after a step", float((on_device.weights - on_cpu.weights).abs().max()), 3e-5),
            Difference(f"{name}: loss terms, bfloat16 and float32 (relative)", _terms(half, on_device), 0.1),
            Difference(f"{name}: gradient, bfloat16 (relative)", _gradient(half, on_device), 0.3),
        ]
        if on_device.early is not None and half.early is not None:
            moved = _moved(half.early, on_device.early)
            found.append(Difference(f"{name}: {GOAL} early boxes, bfloat16 (share that moved)", moved, 0.05))
    return found


def pixels_differing(device: torch.device, toy: bool) -> int:
    """Of a batch of noise, of several sizes, cropped and mirrored, made smaller and larger, by both orders of sides."""
    random, views = np.random.default_rng(0), ViewConfig(crop_probability=0.5)
    shapes = [(48, 64), (64, 42), (20, 90), (90, 20)] if toy else [(480, 640), (640, 427), (333, 500), (150, 1200)]
    pictures = [Image.fromarray(random.integers(0, 256, (*shape, 3)).astype(np.uint8)) for shape in shapes]
    differing = 0
    for size in (32, 80) if toy else (320, 800):
        for resize in (ResizeConfig(mode="square", size=size), ResizeConfig(mode="shortest_edge", size=size)):
            seen = [make_view(views, number, size) for number in range(len(shapes))]
            plans = [planned(shape, view, [resize], finish=False) for shape, view in zip(shapes, seen, strict=True)]
            parts = [np.empty(plan.nbytes, np.uint8) for plan in plans]
            for plan, picture, part in zip(plans, pictures, parts, strict=True):
                plan.fill_from(picture, part)
            images, _ = make_pixels(torch.from_numpy(np.concatenate(parts)).to(device), placed(plans)[0])
            wanted, _ = pad([view_image(*each, resize) for each in zip(pictures, seen, strict=True)])
            differing += int((images.cpu().numpy() != wanted).sum())
    return differing


def _moved(found: Tensor, expected: Tensor) -> float:
    """The share of boxes [E, B, Q, 4] that have none within 1e-3 among those found: moved by rounding, or not chosen."""
    apart = (expected.unsqueeze(-2) - found.unsqueeze(-3)).abs().amax(-1)  # [E, B, Q, Q]
    return float((apart.amin(-1) > 1e-3).float().mean())


@contextlib.contextmanager
def one_process_group(device: torch.device) -> Iterator[str]:
    """A process group of this process alone: NCCL on a GPU, gloo on a CPU."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield backend
    finally:
        dist.destroy_process_group()


def _steps(training: Training, case: Case, first: int, last: int) -> Tensor:
    for step in range(first, last):
        training.train_step(train_batch(case.arrays_of("cached", 1 + step % case.batch), case.device))
    return _flat(training.module.state_dict().values())


def resumed(device: torch.device, families: Sequence[str], edge: int, toy: bool) -> Iterator[tuple[str, float, float]]:
    """(case, the largest difference of a weight between a run and the same run again, and between a run and one that was stopped
    in the middle and gone on with from its saved state). With collectives over one process."""
    for family in families:
        case = Case(family, edge, 2, device, toy)
        with one_process_group(device):
            check = torch.ones(4, device=device)
            dist.all_reduce(check)
            if not bool((check == 1).all()):
                raise RuntimeError(f"a sum over one process is {check.tolist()}, not the value itself")
            whole, again = (_steps(case.training("cached"), case, 0, 6) for _ in range(2))
            first = case.training("cached")
            _steps(first, case, 0, 3)
            second = case.training("cached")
            second.load_state(first.state(), 3)
            gone_on = _steps(second, case, 3, 6)
        yield case.name, float((again - whole).abs().max()), float((gone_on - whole).abs().max())
