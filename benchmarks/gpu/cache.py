"""(d) What the cache job adds to its teacher, without reading and writing: matching, attention, encoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.measure import free_memory, step_ms
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.detectors import to_pixels
from qskd.precision import autocast
from qskd.teacher.making import CacheMaker
from qskd.teacher.online import OnlineTeacher

PRECISIONS = ("bfloat16", "float32", "float32 with TF32")  # the last is what the job computes in


def speeds(
    device: torch.device, families: Sequence[str], batch: int, steps: int, toy: bool
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """(case, images/s of the making of a cache, of the bare teacher in each precision). The rest of the job (decoding, writing)
    runs in other processes."""
    for family in families:
        case = Case(family, 64 if toy else 640, batch, device, toy)
        teacher, maker = case.teacher, CacheMaker(case.config, case.teacher, device)
        arrays = case.arrays_of("online", batch)
        own = {name: array for name, array in arrays.items() if not name.startswith("teacher_")}
        own |= {"images": arrays["teacher_images"], "sizes": arrays["teacher_sizes"]}
        with _tf32(device.type == "cuda"):
            made = step_ms(partial(maker.rows, own), device, steps)
        given, bare = train_batch(own, device), {}
        for precision in PRECISIONS:
            with _tf32(device.type == "cuda" and precision.endswith("TF32")):
                taken = step_ms(partial(_ask, teacher, given, precision.split()[0], device), device, steps)
            bare[precision] = 1000 * batch / taken
        yield f"{family} R50, {teacher.resize.size} px, batch {batch}", 1000 * batch / made, bare
        free_memory(device)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _ask(teacher: OnlineTeacher, given: TrainBatch, precision: str, device: torch.device) -> None:
    with torch.inference_mode(), autocast(precision, device):
        seen_as = teacher.preprocessing
        pixels, mask = to_pixels(given.images, given.sizes, seen_as.mean, seen_as.std)
        teacher.detector(pixels, mask, with_attention=False)
