"""Which device a process computes on. Where a program asks for a GPU here, it also allows it TF32."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Mapping

import torch

from qskd.config import Config
from qskd.precision import allow_tf32


def gpus_are_ours() -> bool:
    """Whether this process may use the machine's GPUs: a worker of Ray that holds none may not, though Ray hides none from it."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return True
    return bool(ray.get_gpu_ids())


def check_own_gpu() -> None:
    """OSError where Ray gave this worker a GPU and CUDA finds none, as after a fault of the card or its driver: the work would
    begin on the CPU, in silence."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return
    if ray.get_gpu_ids() and not torch.cuda.is_available():
        raise OSError(errno.ENODEV, f"Ray gave this process GPU {ray.get_gpu_ids()[0]}, and CUDA finds none here")


def device_of(name: str) -> torch.device:
    """Of auto, cpu and cuda: a GPU where there is one that this process may use, unless the CPU is asked for."""
    wanted = name != "cpu" and torch.cuda.is_available() and gpus_are_ours()
    return _ready(torch.device("cuda" if wanted else "cpu"))


def _ready(device: torch.device) -> torch.device:
    allow_tf32(device)
    return device


def device_here(config: Config) -> torch.device:
    """For a process that holds one model: a GPU where this machine has one, unless the recipe asks for the CPU. A cluster's
    head may have none though its workers do: what it tries out, it tries on its CPU."""
    return device_of(config.compute.device)


log = logging.getLogger("qskd")


def say_if_gpus_are_idle(config: Config, resources: Mapping[str, float]) -> None:
    """`auto` is all or none: some workers on GPUs would wait for those on CPUs in every step."""
    gpus, compute = int(resources.get("GPU", 0)), config.compute
    if compute.device == "auto" and gpus:
        log.warning(
            "%d GPU(s) for %d workers: ALL OF THEM TRAIN ON CPUS. Set compute.workers=%d, or compute.device=cuda to wait for "
            "more GPUs; compute.device=cpu silences this",
            *(gpus, compute.min_workers or compute.workers, gpus),
        )


def uses_gpu(config: Config, resources: Mapping[str, float]) -> bool:
    """Whether a training of this recipe has a GPU for each worker that it must have, on a cluster of these resources."""
    compute = config.compute
    least = compute.min_workers or compute.workers
    return compute.device == "cuda" or (compute.device == "auto" and resources.get("GPU", 0) >= least)


def pick_device(name: str) -> torch.device:
    """A worker's of Ray Train. auto: the GPU that the driver reserved for it, if it did; never one that it merely sees."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and gpus_are_ours() else "cpu"
    if name == "cuda":
        import ray.train.torch

        return _ready(ray.train.torch.get_device())
    return torch.device(name)
