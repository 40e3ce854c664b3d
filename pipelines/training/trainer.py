"""Ray Train, as all trainings of several processes use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.cluster.devices import say_if_gpus_are_idle, uses_gpu
from pipelines.cluster.room import check_room, may_be_preempted, worker_resources
from pipelines.feed.stream import StreamConfig
from pipelines.run.folder import FAILURE, Folder
from pipelines.training.checkpoint_list import TRAIN, delete_unlisted, mend_list
from qskd.config import Config
from qskd.config.recipe import build, to_tree


def make_trainer(
    config: Config, stream: StreamConfig, folder: Folder, callbacks: Sequence[Any], run_id: str = ""
) -> Any:
    """The TorchTrainer of a recipe; its checkpoints go to OUTPUT/NAME/train. callbacks: Ray Train's, of the controller.
    run_id: the MLflow run's, for the workers' logs."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.cluster.rendezvous import torch_config

    def train(payload: dict[str, Any]) -> None:
        if Folder(build(payload["config"])).exists(FAILURE):
            return  # the workers were begun again in vain: the driver reads it and says why
        # Pickled by value, with its import inside: the controller then starts without importing transformers.
        from pipelines.training.worker import train_worker

        train_worker(payload)

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray's would end this process within the signal, with 0; `pipelines.run.stopping` has one that ends it in order."""

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
            # A relative output is the driver's, whose working folder is not the workers'.
            "config": to_tree(config.model_copy(update={"output": folder.storage_path})),
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
