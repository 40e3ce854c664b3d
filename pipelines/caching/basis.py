"""In which directions a cache's memory is kept (`teacher.cache.memory_share`), found before the cache is begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.caching.actors import Source, decode
from pipelines.caching.plan import CachePlan
from pipelines.cluster.room import actors_that_fit
from pipelines.reporting.board import stage
from qskd.config.recipe import build, to_tree
from qskd.datasets.shards import ShardReader
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.teacher.identity import teacher_preprocessing
from qskd.teacher.making import CacheMaker
from qskd.teacher.memory.basis import Bases, Basis, cached_basis, sampled


def bases_for(plan: CachePlan, first: Bases, kind: str) -> Bases:
    """Of a cache that is to be begun. None: memory is kept as it is. first: those of another cache of the recipe, which all
    share, for one batch has rows of all; none where this is the first one made. kind: of device, "cpu" or "cuda"."""
    if plan.config.teacher.cache.memory_share == 1:
        return ()
    return first or _on_the_cluster(plan, kind)


def bases_there(plans: Sequence[CachePlan]) -> Bases:
    """Of whichever of a recipe's caches was begun, be it not the first: images that come before its own in the recipe later are
    cached in its basis. None: none is there, or memory is kept as it is."""
    return next((cached_basis(plan.path, plan.existing) for plan in plans if plan.existing is not None), ())


def told_of(bases: Bases, share: float) -> str:
    """One line for people."""
    kept = ", ".join(f"{basis.kept} of {len(basis.mean)}" for basis in bases)
    return f"cache: memory is kept along the directions that hold {share:g} of its variance: {kept} numbers a cell"


def _on_the_cluster(plan: CachePlan, kind: str) -> Bases:
    """Where the teacher's processes will be: the driver may have no GPU."""
    import ray

    stage("looking how the teacher's memory varies")
    config = plan.config.model_copy(update={"compute": plan.config.compute.model_copy(update={"device": kind})})
    _, cpus = actors_that_fit(1, max(1, config.compute.threads_per_worker))
    task = ray.remote(num_cpus=cpus, num_gpus=1 if kind == "cuda" else 0, max_retries=3)(_found)
    answer: str | list[Any] = ray.get(task.remote(to_tree(config), plan.data.labels, plan.batch_size))
    if isinstance(answer, str):
        raise QskdError.from_json(answer)
    import torch

    return tuple(Basis(*(torch.from_numpy(part.copy()) for part in parts)) for parts in answer)


def _found(tree: dict[str, Any], labels: Sequence[str], batch_size: int) -> str | list[Any]:
    """Arrays, for tensors would be shared by Ray's memory; or an error as text, for trying again would not help."""
    import torch

    from pipelines.cluster.devices import device_here

    config = build(tree)
    if config.compute.threads_per_worker:
        torch.set_num_threads(config.compute.threads_per_worker)
    try:
        teacher = make_teacher(config, labels)
        assert teacher is not None
        device = device_here(config)
        source: Source = (
            *(config.data.train, config.data.views, teacher_preprocessing(config).resize),
            device.type != "cuda",
        )
        batches = sampled(ShardReader(config.data.train), batch_size)
        bases = CacheMaker(config, teacher, device).bases_of(decode(source, [rows])[0] for rows in batches)
    except QskdError as error:
        return error.to_json()
    return [(basis.mean.numpy(), basis.vectors.numpy()) for basis in bases]
