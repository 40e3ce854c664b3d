"""One trial of a sweep, in a process of its own: what Ray Tune calls the trainable.

A trial of one worker trains right here, with its reader in a thread beside it: no Ray Train, no Ray Data, so that it begins
within a second. A trial of several workers is a TorchTrainer like any training's; its controller hands every evaluation on.
Both leave checkpoints in the trial's own folder and go on from the last one, whoever began it.
"""

from __future__ import annotations

import platform
import re

import torch

from pipelines.cluster.devices import check_own_gpu, device_here
from pipelines.cluster.start import give_back_memory
from pipelines.run.folder import Folder
from pipelines.run.guards import check_is_the_drivers
from pipelines.run.history import read_history, rows_until
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import make_plan
from pipelines.tuning.trial.alone import _train_here
from pipelines.tuning.trial.costs import costs
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.reports import Send, catch_up, epochs_of, evaluated
from pipelines.tuning.trial.workers import _train_with_workers
from qskd.config.recipe import build
from qskd.errors import QskdError, of_machine

# What torch says of a GPU or a driver that is not there. "Out of memory" is none of them: it is the trial that is too large.
_NO_CUDA = re.compile(
    r"No CUDA GPUs|no CUDA-capable|NVIDIA driver|CUDA driver|CUDA unknown error|not compiled with CUDA"
)


def machine_failed(error: BaseException) -> bool:
    """Whether the trial may succeed in another process, or on another machine: the GPU's own error (an assert on the device, a bad
    address, ECC), after which its process can do nothing more there; no GPU; no room on the disk; a store that is out of reach from
    there; a package that is not installed."""
    if isinstance(error, torch.AcceleratorError) or of_machine(error) or _NO_CUDA.search(str(error)):
        return True
    # Ray's errors hold those of its workers: all of them, the one of a task, the one that a function raised.
    of_workers = getattr(error, "worker_failures", None) or {}
    others = [error.__cause__, getattr(error, "cause", None), getattr(error, "_base_exc", None)]
    causes = [each for each in (*of_workers.values(), *others) if isinstance(each, BaseException)]
    return any(machine_failed(each) for each in causes if each is not error)


def run_trial(job: Job, send: Send) -> None:
    """Train, and `send` every evaluation. What goes wrong is sent too. As {"failed": reason} it ends the trial, for it would come
    again. As {"broken": reason} it is raised as well, where the machine is to blame: Tune takes that for a lost process, and tries
    the trial again, as often as the recipe allows."""
    try:
        check_own_gpu()
        config = ResolvedConfig(build(job.config))
        plan = make_plan(config, "distill", known_cache=job.known_cache)
        folder = Folder(config)
        check_is_the_drivers(folder)
        if config.compute.threads_per_worker:
            torch.set_num_threads(config.compute.threads_per_worker)
        if job.recipe is not None:
            recipe = build(job.recipe)
            measured = costs(config, plan.train.labels, device_here(config), recipe, job.recipe_latency_ms)
            send({"costs": measured})
        if config.compute.workers > 1:
            catch_up(folder)
        history = read_history(folder)
        for entry in history:  # the driver was killed before it heard of these
            if entry["evaluation"] and epochs_of(entry, plan) > job.seen:
                send(evaluated(entry, plan, rows_until(history, entry["step"]), 0.0))
        if config.compute.workers == 1:
            _train_here(job, plan, folder, send)
        else:
            _train_with_workers(plan, folder)
    except Exception as error:
        reason = str(error) if isinstance(error, QskdError) else f"{type(error).__name__}: {error}"
        if machine_failed(error):
            send({"broken": f"on {platform.node()}: {reason}"})
            raise
        send({"failed": reason})
    finally:
        give_back_memory()  # the process trains the next trial
