"""Ray Train, as all trainings of several processes use it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.cluster import check_room, may_be_preempted, worker_resources
from pipelines.ray_checkpoints import TRAIN, delete_unlisted, mend_list
from pipelines.storage import FAILURE, Folder
from pipelines.streaming import StreamConfig
from qskd.config import Config
from qskd.recipe import build, to_tree

log = logging.getLogger("qskd")


def make_trainer(
    config: Config, stream: StreamConfig, folder: Folder, callbacks: Sequence[Any], run_id: str = ""
) -> Any:
    """The TorchTrainer of a recipe; its checkpoints go to OUTPUT/NAME/train. callbacks: Ray Train's, of the controller.
    run_id: the MLflow run's, for the workers' logs."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.rendezvous import torch_config

    def train(payload: dict[str, Any]) -> None:
        if Folder(build(payload["config"])).exists(FAILURE):
            return  # the workers were begun again in vain: the driver reads it and says why
        # Pickled by value, with its import inside: the controller then starts without importing transformers.
        from pipelines.workers import train_worker

        train_worker(payload)

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray's would end this process within the signal, with 0; `pipelines.stopping` has one that ends it in order."""

    compute = config.compute
    gpu = uses_gpu(config, ray.cluster_resources())
    if not gpu:
        say_if_gpus_are_idle(config, ray.cluster_resources())
    check_room(compute, gpu)
    mend_list(folder)
    delete_unlisted(folder)
    return Trainer(
        train,
        train_loop_config={
            "config": to_tree(config),
            "stream": stream,
            "run_id": run_id,
            "preemptible": may_be_preempted(config),
        },
        torch_config=torch_config("nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(compute.min_workers, compute.workers) if compute.min_workers else compute.workers,
            use_gpu=gpu,
            resources_per_worker=worker_resources(compute, gpu),
        ),
        run_config=ray.train.RunConfig(
            name=TRAIN,
            **folder.for_ray(),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),  # one to go back to: `mend_list`
            failure_config=ray.train.FailureConfig(
                max_failures=compute.max_failures, max_preemption_failures=compute.max_preemptions
            ),
            callbacks=list(callbacks),
        ),
    )


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
