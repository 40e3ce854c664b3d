"""The parts of a step and of a report that only several workers have, measured by themselves under Ray Train; and a reader's
and a coordinator's time for what they give."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.feed.readers import Readers, build_dataset, read_stream
from pipelines.feed.stream import RANGE_BYTES, StepRange, StreamConfig
from pipelines.training.plan import Plan

SMALL_FLOATS = 32  # as many as a step's counts, about


def median_of(call: Callable[[], object], times: int) -> float:
    """Seconds of a call, after one that is not timed."""
    call()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def train_probe(payload: dict[str, Any]) -> None:
    """In each worker. Rank 0 writes what it measured to payload["result"]."""
    import ray.train
    import torch
    import torch.distributed as dist

    from pipelines.training.checkpoints import write_checkpoint
    from qskd.config.recipe import build
    from qskd.from_recipe import make_student, teacher_for_training
    from qskd.training.step import Training

    torch.set_num_threads(1)
    config, labels = build(payload["config"]), payload["labels"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    training = Training(
        config,
        make_student(config, labels),
        teacher_for_training(config, labels, torch.device("cpu")),
        100,
        torch.device("cpu"),
    )
    gradients = sum(p.numel() for p in training.module.parameters() if p.requires_grad)
    found: dict[str, float] = {"gradient_bytes": 4.0 * gradients}
    if context.get_world_size() > 1:
        for name, count, times in (("small", SMALL_FLOATS, 200), ("gradients", gradients, 60), ("large", 2**23, 8)):
            tensor = torch.zeros(count)
            found[f"{name}_s"] = median_of(lambda: dist.all_reduce(tensor), times)  # noqa: B023
        found["large_bytes"] = 4.0 * 2**23
    found["notice_s"] = median_of(ray.train.get_preemption_info, 30)

    def report() -> None:
        if rank:
            ray.train.report({})
            return
        with tempfile.TemporaryDirectory(prefix="qskd-scaling-") as folder:
            write_checkpoint(Path(folder), training, config, None)
            ray.train.report({}, ray.train.Checkpoint.from_directory(folder))

    found["report_s"] = median_of(report, 5)
    if rank == 0:
        Path(payload["result"]).write_text(json.dumps(found))


def probe(plan: Plan, workers: int, folder: Path) -> dict[str, float]:
    """gradient_bytes; report_s (the checkpoint's writing included), notice_s (asking whether a node goes away); with two
    workers or more the all-reduce's small_s, gradients_s and large_s (of large_bytes)."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.cluster.rendezvous import torch_config
    from qskd.config.recipe import to_tree

    def train(payload: dict[str, Any]) -> None:  # pickled by value, as the pipeline's own
        from benchmarks.scaling.probes import train_probe

        train_probe(payload)

    result = folder / f"probe-{workers}.json"
    TorchTrainer(
        train,
        train_loop_config={"config": to_tree(plan.config), "labels": plan.train.labels, "result": str(result)},
        torch_config=torch_config("gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(name=f"probe-{workers}", storage_path=str(folder)),
    ).fit()
    return dict(json.loads(result.read_text()))


def loader_image_seconds(plan: Plan, images: int) -> tuple[float, float]:
    """Of a reader, without Ray: an image that is decoded, and one whose view it has kept."""
    loader, batch_size = plan.stream.loader(), plan.stream.schedule.batch_size
    run = StepRange(subset="train", epoch=0, first=0, last=max(1, images // batch_size))
    batches = [batch.rows for batch in plan.stream.batches(run)]
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        for rows in batches:
            loader.load("train", rows)
        taken.append((time.perf_counter() - started) / sum(map(len, batches)))
    return taken[0], taken[1]


def block_seconds(stream: StreamConfig, workers: int, blocks: int) -> float:
    """Of a stream's coordinator, for one block that holds next to nothing, as one of so many workers: its own pace. Nothing of
    it is shared between workers."""
    schedule = replace(stream.schedule, batch_size=workers, epochs=10_000, evaluate_every_epochs=10_000)
    tiny = replace(stream, schedule=schedule, teacher_cache="", teacher_columns=(), teacher_row_bytes=RANGE_BYTES)
    ranges = list(islice(tiny.ranges(0, workers), 10 + blocks))
    assert {steps["last"] - steps["first"] for steps in ranges} == {1}
    part = build_dataset(tiny, ranges, workers, workers - 1, Readers()).iterator()
    arrivals = [time.perf_counter() for _ in read_stream(part, tiny, ranges, workers - 1)]
    return (arrivals[-1] - arrivals[9]) / blocks
