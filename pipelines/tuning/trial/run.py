"""One trial of a sweep, in a process of its own: what Ray Tune calls the trainable.

A trial of one worker trains right here, with its reader in a thread beside it: no Ray Train, no Ray Data, so that it begins
within a second. A trial of several workers is a TorchTrainer like any training's; its controller hands every evaluation on.
Both leave checkpoints in the trial's own folder and go on from the last one, whoever began it.
"""

from __future__ import annotations

import torch

from pipelines.cluster.devices import device_here
from pipelines.cluster.start import give_back_memory
from pipelines.run.folder import Folder
from pipelines.run.history import read_history, rows_until
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import make_plan
from pipelines.tuning.trial.alone import _train_here
from pipelines.tuning.trial.costs import costs
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.reports import Send, catch_up, epochs_of, evaluated
from pipelines.tuning.trial.workers import _train_with_workers
from qskd.config.recipe import build
from qskd.errors import QskdError

_BROKEN_DEVICE: tuple[type[Exception], ...] = (
    torch.AcceleratorError,
)  # an assert on the device, a bad address, ECC; not "out of memory"


def run_trial(job: Job, send: Send) -> None:
    """Train, and `send` every evaluation. What goes wrong is sent too, as {"failed": reason}: an error that is raised would
    be taken for a lost machine, and tried again. That is right for a GPU's own error alone, after which its process can do nothing
    more there: the next trial in it would fail too."""
    try:
        config = ResolvedConfig(build(job.config))
        plan = make_plan(config, "distill", known_cache=job.known_cache)
        if config.compute.threads_per_worker:
            torch.set_num_threads(config.compute.threads_per_worker)
        if job.recipe is not None:
            recipe = build(job.recipe)
            measured = costs(config, plan.train.labels, device_here(config), recipe, job.recipe_latency_ms)
            send({"costs": measured})
        folder = Folder(config)
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
    except _BROKEN_DEVICE:
        raise
    except Exception as error:
        send({"failed": str(error) if isinstance(error, QskdError) else f"{type(error).__name__}: {error}"})
    finally:
        give_back_memory()  # the process trains the next trial
