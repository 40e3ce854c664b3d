"""One trial of a sweep, in a process of its own: what Ray Tune calls the trainable.

A trial of one worker trains right here, with its reader in a thread beside it: no Ray Train, no Ray Data, so that it begins
within a second. A trial of several workers is a TorchTrainer like any training's; its controller hands every evaluation on.
Both leave checkpoints in the trial's own folder and go on from the last one, whoever began it.
"""

from __future__ import annotations

import itertools
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipelines.checkpoint_files import damage, nothing_whole
from pipelines.distill import Plan, make_plan
from pipelines.history import Rows, add_trial_report, best_ap, last_step, read_history, rows_until
from pipelines.models import device_here
from pipelines.progress import mean_rows
from pipelines.ray_checkpoints import keep_list, last_report
from pipelines.run_files import delete_checkpoint
from pipelines.storage import FAILURE, Folder, raise_failure
from pipelines.streaming import Share, local_stream
from pipelines.student_costs import costs
from pipelines.trainer import make_trainer
from pipelines.trial_job import Job
from pipelines.workers import Worker, restore, write_checkpoint
from qskd.errors import QskdError
from qskd.evaluation import CocoResult
from qskd.recipe import build
from qskd.scratch import scratch_folder
from qskd.stores import patiently

log = logging.getLogger("qskd")
POINTER = "checkpoint.json"
READ_AHEAD = 2  # batches
Send = Callable[[dict[str, Any]], None]


def run_trial(job: Job, send: Send) -> None:
    """Train, and `send` every evaluation. What goes wrong is sent too, as {"failed": reason}: an error that is raised would
    be taken for a lost machine, and tried again."""
    try:
        config = build(job.config)
        plan = make_plan(config, "distill")
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
    except Exception as error:
        send({"failed": str(error) if isinstance(error, QskdError) else f"{type(error).__name__}: {error}"})


def epochs_of(entry: dict[str, Any], plan: Plan) -> float:
    """Epochs trained at an entry of the history; the last may end within one."""
    return float(entry["step"] / plan.stream.schedule.steps_per_epoch)


def evaluated(entry: dict[str, Any], plan: Plan, rows: Rows, seconds: float) -> dict[str, Any]:
    """The report of an evaluation. rows: the loss terms since the one before."""
    return {
        "epochs": epochs_of(entry, plan),
        "step": entry["step"],
        "last": entry["step"] >= plan.stream.schedule.total_steps,
        "metrics": entry["evaluation"],
        "rows": rows,
        "seconds": seconds,
    }


def _train_here(job: Job, plan: Plan, folder: Folder, send: Send) -> None:
    worker = TrialWorker(job, plan, folder, send)
    start = worker.start()
    if start < worker.last_step:
        worker.run(start)


class TrialWorker(Worker):
    """The house's worker, without Ray Train around it: it keeps its own checkpoints and sends its evaluations."""

    def __init__(self, job: Job, plan: Plan, folder: Folder, send: Send) -> None:
        # Not preemptible: only Ray Train's workers are told; a trial whose node goes is begun again from its checkpoint.
        super().__init__(plan.config, plan.stream, 1, 0, device_here(plan.config), preemptible=False)
        self.job, self.plan, self.folder, self.send = job, plan, folder, send
        schedule = plan.stream.schedule
        self.last_step = min(schedule.total_steps, round((job.until or schedule.epochs) * schedule.steps_per_epoch))
        self.begun_at, self.since = 0, time.perf_counter()

    def start(self) -> int:
        """Load the weights to go on from; the number of steps they have had."""
        pointer = self.folder.read_record(POINTER) if self.folder.exists(POINTER) else None
        mine = pointer is not None and pointer["generation"] == self.job.generation
        if self.job.donor is not None and not mine:
            source = Folder(self.config.model_copy(update={"name": f"{self.job.donor:04d}"}))
            self.begun_at = restore(self.training, _checkpoint(source, _name(self.job.donor_step)))
        elif pointer is not None:
            begun_at = pointer.get("begun_at", 0) if mine else pointer["step"]
            step = last_whole(self.folder, pointer["step"], begun_at)
            start = restore(self.training, _checkpoint(self.folder, _name(step)))
            self.begun_at = pointer.get("begun_at", start) if mine else start
            return start
        return self.begun_at

    def shares(self, start_step: int) -> Iterator[Share]:
        last = self.last_step / self.stream.schedule.steps_per_epoch
        return read_ahead(itertools.takewhile(lambda share: share.epoch < last, local_stream(self.stream, start_step)))

    def report(self, epoch: int, result: CocoResult | None) -> None:
        step, rows = self.training.step, self.meter.flush()
        evaluation = result.metrics if result else {}
        with scratch_folder("trial") as scratch:
            write_checkpoint(scratch, self.training, self.config, result)
            if evaluation and evaluation["AP"] > best_ap(read_history(self.folder), step):
                self.folder.upload(scratch / "student", "student")
            self.folder.upload(scratch, _name(step))
        history = add_trial_report(self.folder, step, epoch + 1, evaluation, rows)
        self.folder.write_record(
            POINTER, json.dumps({"step": step, "generation": self.job.generation, "begun_at": self.begun_at})
        )
        # In a population another may still begin from where this one began. Elsewhere the one before is there to go back to
        # when this one turns out damaged, until the last is made.
        earlier = max((at for at in steps_of(self.folder) if at < step), default=step)
        if self.job.until and self.begun_at:
            earlier = self.begun_at
        _keep(self.folder, {step} if step >= self.last_step and not self.job.until else {step, earlier})
        if evaluation:
            now = time.perf_counter()
            self.send(evaluated(history[-1], self.plan, rows_until(history, step), now - self.since))
            self.since = time.perf_counter()


def _name(step: int) -> str:
    return f"checkpoints/{step:09d}"


def _checkpoint(folder: Folder, name: str) -> Any:
    import ray.train

    return ray.train.Checkpoint(f"{folder.root}/{name}", filesystem=folder.filesystem)


def steps_of(folder: Folder) -> list[int]:
    """Of a trial's checkpoints, in order."""
    from pyarrow import fs

    def look() -> list[int]:
        found = folder.filesystem.get_file_info(fs.FileSelector(f"{folder.root}/checkpoints", allow_not_found=True))
        return sorted(int(info.base_name) for info in found if info.base_name.isdigit())

    return patiently(folder.where("checkpoints"), folder.filesystem, look)


def last_whole(folder: Folder, step: int, first: int) -> int:
    """The step of the last whole checkpoint of a trial, from `step` back to `first`; QskdError where there is none."""
    wrong: list[str] = []
    for at in [step, *reversed([each for each in steps_of(folder) if first <= each < step])]:
        problems = damage(folder, _name(at))
        if not problems:
            if wrong:
                log.warning(
                    "A CHECKPOINT IS DAMAGED: %s. The trial goes on from %s", "; ".join(wrong), folder.where(_name(at))
                )
            return at
        wrong += problems
    raise nothing_whole(folder, wrong)


def _keep(folder: Folder, steps: set[int]) -> None:
    """Delete all other checkpoints, and nothing else that lies there."""
    from pyarrow import fs

    names = {Path(_name(step)).name for step in steps}

    def delete() -> None:
        for info in folder.filesystem.get_file_info(fs.FileSelector(f"{folder.root}/checkpoints")):
            mine = info.type == fs.FileType.Directory and re.fullmatch(r"\d{9}", info.base_name)
            if mine and info.base_name not in names:
                delete_checkpoint(folder, f"checkpoints/{info.base_name}")

    patiently(folder.where("checkpoints"), folder.filesystem, delete)


def read_ahead(shares: Iterator[Share]) -> Iterator[Share]:
    """The same, read by a thread that stays a few batches ahead; decoding leaves Python's lock to the training."""
    ready: queue.Queue[Any] = queue.Queue(READ_AHEAD)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for share in shares:
                if not put(share):
                    return
            put(end)
        except BaseException as error:
            put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


# --- several workers -----------------------------------------------------------------------------------------------------
def note_report(folder: Folder, report: dict[str, Any], rows: Rows, checkpoint: Any) -> list[dict[str, Any]]:
    """A report into the trial's folder, after its student if that is the best so far. The history, the new entry last."""
    step, evaluation = report["step"], report.get("evaluation", {})
    if evaluation and evaluation["AP"] > best_ap(read_history(folder), step):
        with checkpoint.as_directory() as local:
            folder.upload(Path(local) / "student", "student")
    return add_trial_report(folder, step, report["epoch"] + 1, evaluation, rows)


def catch_up(folder: Folder) -> None:
    """Note a report that Ray took and the trial did not: the controller died in between. Its losses are left out: Ray keeps
    rank 0's, not those of all workers."""
    last = last_report(folder)
    if last is not None and last[0]["step"] > last_step(read_history(folder)):
        note_report(folder, last[0], [], _checkpoint(folder, last[1]))


def _train_with_workers(plan: Plan, folder: Folder) -> None:
    import ray
    from ray.tune.integration.ray_train import TuneReportCallback

    class EveryEvaluation(TuneReportCallback):
        """In the controller: history and best student into the trial's folder, every evaluation to Tune."""

        def __init__(self) -> None:
            super().__init__()
            self.since = time.perf_counter()

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            first = metrics[0]
            keep_list(folder)
            history = note_report(folder, first, mean_rows([worker["rows"] for worker in metrics]), checkpoint)
            entry = history[-1]
            if not entry["evaluation"]:
                return
            rows = rows_until(history, entry["step"])
            report = evaluated(entry, plan, rows, time.perf_counter() - self.since)
            self.since = time.perf_counter()
            # Of what is to be ended and given back when the trial is stopped (`SweepScheduler._release`).
            controller = ray.cloudpickle.dumps(ray.get_runtime_context().current_actor)
            report["held"] = {"placement_group": first["placement_group"], "controller": controller.hex()}
            super().after_report(run_context, [{"report": json.dumps(report)}], None)

    folder.delete(FAILURE)
    try:
        make_trainer(plan.config, plan.stream, folder, [EveryEvaluation()]).fit()
    finally:
        raise_failure(folder)
