"""The train loop of one worker: batches in, reports and checkpoints out, exact resume from the last one."""

from __future__ import annotations

import collections
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pipelines.cluster.devices import pick_device
from pipelines.cluster.room import reader_cpus, readers_each
from pipelines.feed.hunger import Hunger
from pipelines.feed.on_device import ReadyShare, ready_shares
from pipelines.feed.readers import Readers, open_stream
from pipelines.feed.stream import Share, StreamConfig
from pipelines.reporting.meter import Gauges, Meter
from pipelines.reporting.pace import Pace
from pipelines.run.folder import DETAILS, Folder, record_failure
from pipelines.run.guards import check_is_the_drivers
from pipelines.run.logs import as_json, start_logs
from pipelines.training.checkpoints import restore, write_checkpoint
from qskd.config import Config
from qskd.config.distillation import NONE
from qskd.config.recipe import build
from qskd.datasets.manifest import load_manifest
from qskd.datasets.splits import evaluated
from qskd.datasets.unlabeled.joined import training_manifest
from qskd.errors import QskdError
from qskd.evaluation.average_precision import CocoResult, evaluate_coco
from qskd.evaluation.details import Evaluation, evaluate_in_detail
from qskd.evaluation.detections import Detections
from qskd.evaluation.inference import predict_pairs
from qskd.evaluation.pairs import Pairs, pairs_of_transformers
from qskd.from_recipe import ground_truth, make_student, teacher_for_training
from qskd.storage.scratch import scratch_folder
from qskd.training.patience import Patience
from qskd.training.step import Training

log = logging.getLogger("qskd")
NOTICE_EVERY_STEPS = 10  # each asking is a rendezvous of all workers: some milliseconds


def gather_detections(own: Detections, world_size: int) -> Detections | None:
    """All workers' detections on rank 0, None elsewhere."""
    if world_size == 1:
        return own
    import torch.distributed as dist

    parts: list[Detections] | None = [Detections.empty()] * world_size if dist.get_rank() == 0 else None
    dist.gather_object(own, parts, dst=0)
    return Detections.concatenate(parts) if parts is not None else None


# What trying again can't mend. Ray Train would restart the workers for these as for a machine that was lost.
NOT_WORTH_RETRYING = (
    QskdError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, ImportError, NotImplementedError,
)  # fmt: skip


def train_worker(payload: dict[str, Any]) -> None:
    """The function TorchTrainer runs on every worker. payload: "config" (nested dict), "stream" (StreamConfig), "run_id"
    (MLflow's, for the logs) and "preemptible" (whether a node may be taken away after a notice)."""
    import ray.train

    config, stream = build(payload["config"]), payload["stream"]
    folder = Folder(config)
    context = ray.train.get_context()
    start_logs(
        run=config.name,
        run_id=payload.get("run_id", ""),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
    )
    if config.compute.threads_per_worker:
        torch.set_num_threads(config.compute.threads_per_worker)
    # Before an epoch is trained whose checkpoint nobody else would see. What is recorded there nobody else would see either.
    check_is_the_drivers(folder)
    try:
        world_size, rank = context.get_world_size(), context.get_world_rank()
        worker = Worker(config, stream, world_size, rank, preemptible=payload.get("preemptible", True))
        checkpoint = ray.train.get_checkpoint()
        worker.run(restore(worker.training, checkpoint, worker.patience) if checkpoint else 0)
    except NOT_WORTH_RETRYING as error:
        record_failure(folder, error)
        raise


class Worker:
    """One worker's training, its share of the evaluations, and its reports.

    preemptible: Ray is asked for notices that a node goes away; without it no time is spent on asking.
    """

    def __init__(
        self,
        config: Config,
        stream: StreamConfig,
        world_size: int,
        rank: int,
        device: torch.device | None = None,
        preemptible: bool = False,
    ) -> None:
        self.config, self.stream, self.world_size, self.rank = config, stream, world_size, rank
        self.preemptible = preemptible
        self.device = device or pick_device(config.compute.device)
        self.pace = Pace(Folder(config).path if rank == 0 else "", stream.schedule.batch_size)
        self.pace.doing("building the student")
        manifest = training_manifest(config.data)
        self.slots, self.category_ids = evaluated(manifest, load_manifest(stream.val_uri))
        student = make_student(config, manifest.labels)
        student.category_ids = tuple(
            category.id for category in manifest.categories
        )  # in its config.json, so that its results carry them
        if config.distillation.method != NONE:
            self.pace.doing("loading the teacher")
        teacher = teacher_for_training(config, manifest.labels, self.device)
        self.training = Training(config, student, teacher, stream.schedule.total_steps, self.device)
        self.truth = ground_truth(stream.val_uri) if rank == 0 else None
        self.meter = Meter(Gauges(config.name, rank))
        self.patience = Patience(config.training.patience, world_size)
        self.notice: Any = None
        self.hunger: Hunger | None = None
        self.details: Evaluation | None = None

    def run(self, start_step: int) -> None:
        """Go through the schedule from a training step on, to its end or to that of the recipe's patience."""
        if self.patience.exhausted:
            return  # a run that ended so, and was killed before it was finished
        self.pace.doing("reading the first batches")
        ready = ready_shares(self.shares(start_step), self.config.training, self.world_size, self.device)
        for (subset, epoch), part in itertools.groupby(ready, key=lambda each: (each.share.subset, each.share.epoch)):
            if subset == "train":
                self.train(part)
                continue
            if not self.training.whole:  # not yet quantised as planned: its AP is too good, and would win as the best
                collections.deque(part, maxlen=0)
                self.report(epoch, None)
                continue
            result = self.evaluate(each.share for each in part)
            self.patience.heard(result)
            self.report(epoch, result)
            if self.patience.exhausted:
                break
        self.training.check_finite()

    def shares(self, start_step: int) -> Iterator[Share]:
        """This worker's batches from a training step on."""
        import ray

        compute, gpu = self.config.compute, self.device.type == "cuda"
        cpus = ray.cluster_resources().get("CPU", 1.0)
        each = reader_cpus(compute, gpu, self.world_size, cpus)
        # Beside a GPU: its worker's Python has launches to make. On a CPU another process would cost more than it frees.
        readers = Readers(readers_each(compute, gpu, cpus), each, apart=gpu)
        self.hunger = Hunger(readers.processes, f"worker {self.rank}")
        stream = replace(self.stream, finish=not gpu)  # Pillow is the fastest on a CPU
        return open_stream(stream, start_step, self.world_size, self.rank, readers)

    def train(self, shares: Iterator[ReadyShare]) -> None:
        """One epoch, or the rest of one. Reports every so many steps, and at an end that no evaluation follows."""
        every, batch_size = self.config.training.checkpoint_every_steps, self.stream.schedule.batch_size
        self.meter.resume()
        waiting_since = time.perf_counter()
        for ready in shares:
            share, waited_s = ready.share, time.perf_counter() - waiting_since
            values = self.training.train_step(*ready.wait())
            asked, rate = ready.loader_rows, self.training.learning_rate
            self.meter.add(self.training.step, values, batch_size, waited_s, asked, rate)
            self.pace.step(self.training.step, values["total"], time.perf_counter() - waiting_since)
            if share.is_last:
                if not self.stream.schedule.evaluates_after(share.epoch):
                    self.report(share.epoch, None)
            elif (every and self.training.step % every == 0) or self.given_notice():
                self.report(share.epoch, None)
                self.meter.resume()
            waiting_since = time.perf_counter()
        self.meter.pause()

    def given_notice(self) -> bool:
        """Whether a worker's node is about to be taken away, once for each notice: a checkpoint is then due. Training goes on
        until it happens. Asked at the same steps everywhere, as Ray wants it, and answered the same."""
        import ray.train

        if not self.preemptible or self.training.step % NOTICE_EVERY_STEPS:
            return False
        notice = ray.train.get_preemption_info()
        if notice is None or notice == self.notice:
            return False
        self.notice = notice
        log.warning(
            "step %d: node(s) %s will be taken away: saving a checkpoint",
            self.training.step,
            ", ".join(node[:6] for node in notice.preempted_node_ids),
        )
        return True

    def evaluate(self, shares: Iterator[Share]) -> CocoResult | None:
        """COCO AP over the validation set; on rank 0, None elsewhere. After the last step all else that is said of the final
        student is kept too (`details`)."""
        is_last = self.training.step >= self.stream.schedule.total_steps
        with self.training.evaluation_weights() as student:
            seen_as = student.preprocessing(self.config.student.resize)
            rule = pairs_of_transformers(student.family, student.num_queries) if is_last else None
            choices = [Pairs(100, False), *([rule] if rule else [])]
            counted = self.pace.evaluating(shares, self.stream.batch_count("val", 0))
            beside = (
                seen_as,
                self.category_ids,
                choices,
                self.slots,
                self.device,
                self.config.compute.evaluation_precision,
            )
            found = [predict_pairs(student, share.arrays, *beside) for share in counted]
        parts = [Detections.concatenate([each[choice] for each in found]) for choice in range(len(choices))]
        everything, *plain = [gather_detections(part, self.world_size) for part in parts]
        if everything is None or self.truth is None:
            return None
        result = evaluate_coco(self.truth, everything)
        if is_last:
            self.details = evaluate_in_detail(self.truth, everything, result, plain[0] if plain else None, rule)
        return result

    def report(self, epoch: int, result: CocoResult | None) -> None:
        """Metrics to the controller; from rank 0 with a checkpoint, with a student folder in it after an evaluation.
        "placement_group": id of the placement group that a sweep releases if it kills this trial."""
        import ray.train
        import ray.util

        metrics: dict[str, Any] = {"epoch": epoch, "step": self.training.step, "rows": self.meter.flush()}
        if self.hunger and (said := self.hunger.look(metrics["rows"])):
            log.warning("%s: %s", self.config.name, said)
        group = ray.util.get_current_placement_group()
        metrics["placement_group"] = group.id.hex() if group is not None else ""
        if result is not None:
            metrics |= {"evaluation": result.metrics, "evaluations_since_best": self.patience.waited}
            metrics["ended"] = self.patience.exhausted
        for step, row in metrics["rows"] if as_json() else ():
            log.info("step %d", step, extra={"fields": {"step": step, "epoch": epoch} | row})
        if self.rank:
            ray.train.report(metrics)
            return
        if self.details is not None:  # before the checkpoint, after which nothing is evaluated again
            Folder(self.config).write(DETAILS, self.details.to_json())
        self.pace.doing("writing a checkpoint")
        with scratch_folder("checkpoint") as folder:
            write_checkpoint(folder, self.training, self.config, result, self.patience)
            ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder))
