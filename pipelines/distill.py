"""Train a student, with a teacher (`qskd distill`) or without (`qskd train`): one driver for both.

python -m pipelines.distill configs/coco_conditional_r18.yaml --set teacher.path=TEACHER
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipelines.checkpoint_files import read_state
from pipelines.cluster import in_a_job, say_if_on_cpus, start_ray
from pipelines.curves import PATIENCE_S, end_run, fill_in, is_complete
from pipelines.job_folder import check_job_folder
from pipelines.logs import start_logs
from pipelines.models import check_teacher, make_teacher, start_student
from pipelines.notices import notices
from pipelines.ownership import check_ours, claim, delete_run
from pipelines.places import check_places
from pipelines.plan_checks import check_cache, check_classes, check_data
from pipelines.ray_checkpoints import delete_unlisted, mend_list
from pipelines.stopping import was_stopped
from pipelines.storage import (
    FAILURE,
    SWEEP,
    Folder,
    alone_on,
    check_no_trial,
    check_same_data,
    check_same_run,
    raise_failure,
)
from pipelines.streaming import StreamConfig, keep_bytes_for
from pipelines.tracking import Tracker, open_for, tracking_uri
from pipelines.trainer import make_trainer
from qskd.cache_identity import check_enough, teacher_preprocessing
from qskd.cache_manifest import load_cache_manifest
from qskd.config import Config
from qskd.detectors import describe_student, read_preprocessing, uri_refused
from qskd.distillation import teacher_needs
from qskd.errors import QskdError
from qskd.manifest import Manifest, load_manifest
from qskd.recipe import to_yaml
from qskd.redaction import redacted
from qskd.schedule import Schedule
from qskd.scratch import scratch_folder
from qskd.teacher_cache import columns_for

log = logging.getLogger("qskd")
SLOW_PATH = "run in every training step: the slow path (`qskd cache` runs it once, for all trainings)"


@dataclass(frozen=True)
class RunResult:
    """student: the plain Hugging Face folder. metrics: the last evaluation's. seconds: of this command."""

    folder: str
    student: str
    metrics: dict[str, float]
    run_id: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """All a training needs to know before it starts."""

    config: Config
    train: Manifest
    val: Manifest
    stream: StreamConfig
    kind: str
    cache_is_missing: bool = False  # of a dry run alone

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"data.train": self.train.fingerprint, "data.val": self.val.fingerprint}

    @property
    def notices(self) -> list[str]:
        return notices(self.config, self.stream.schedule.total_steps / self.stream.schedule.steps_per_epoch)

    def describe(self, cache_command: str = "qskd cache RECIPE") -> str:
        """What `--dry-run` prints below the configuration. cache_command: makes the cache that is missing."""
        schedule, _training, compute = self.stream.schedule, self.config.training, self.config.compute
        workers = f"{compute.min_workers} to {compute.workers}" if compute.min_workers else f"{compute.workers}"
        lines = [
            f"student: {describe_student(self.config.student, len(self.train.labels))}",
            f"train: {self.train.num_images} images, {self.train.num_objects} objects, {len(self.train.labels)} classes",
            f"val:   {self.val.num_images} images, {self.val.num_objects} objects",
            f"{schedule.total_steps} steps = {schedule.total_steps / schedule.steps_per_epoch:g} epochs of "
            f"{schedule.steps_per_epoch} batches of {schedule.batch_size}",
            f"{workers} worker(s), {compute.loader_workers} loader process(es), device {compute.device}",
            f"output: {Folder(self.config).path}",
            f"MLflow: {tracking_uri(self.config)}",
        ]
        if self.kind == "distill":
            cache = self.config.teacher.cache.path
            how = f"its outputs from {cache}" if self.stream.teacher_cache else SLOW_PATH
            if self.cache_is_missing:
                how = f"its outputs from {cache}, where no cache is yet. To be made first: {cache_command}"
            lines.insert(0, f"teacher: {self.config.teacher.path}, {how}")
        lines += [f"notice: {notice}" for notice in self.notices]
        if self.config.student.inherit:
            lines.append(start_student(self.config, self.train.labels)[1])
        return redacted("\n".join(lines))


def make_plan(config: Config, kind: str, dry: bool = False) -> Plan:
    """Read the manifests and check what can be checked before anything is started. Raises QskdError. dry: nothing will be
    started, so that a cache may be missing."""
    check_data(config, ("train", "val"))
    if kind == "distill":
        check_teacher(config)
    train, val = load_manifest(config.data.train), load_manifest(config.data.val)
    if train.categories != val.categories:
        raise QskdError(
            config.data.val,
            f"categories {[c.name for c in val.categories]}",
            f"those of {config.data.train}: {[c.name for c in train.categories]}",
            "prepare both splits from JSON files with the same categories",
        )
    if not val.num_images:
        raise QskdError(config.data.val, "no images", "at least one, to evaluate on")
    workers = config.compute.workers
    if config.training.batch_size < workers:
        raise QskdError(
            "training.batch_size", str(config.training.batch_size), f"at least one image a worker ({workers})"
        )
    schedule = Schedule(
        train_shard_rows=train.shard_rows,
        val_shard_rows=val.shard_rows,
        seed=config.seed,
        epochs=config.training.epochs,
        batch_size=config.training.batch_size,
        window_images=config.data.shuffle_window_images,
        views=config.data.views.count,
        evaluate_every_epochs=config.training.evaluate_every_epochs,
        max_steps=config.training.max_steps,
    )
    cache, missing = None, False
    if kind == "distill":
        path = config.teacher.cache.path
        missing = dry and bool(path) and load_cache_manifest(path) is None
        if missing:
            check_enough(config)
        elif path:
            cache = check_cache(config, train)
        if cache is None:  # else its identity was compared, classes included
            check_classes(config, train)
    own = teacher_preprocessing(config).resize if kind == "distill" and not cache else config.student.resize
    stream = StreamConfig(
        train_uri=config.data.train,
        val_uri=config.data.val,
        schedule=schedule,
        views=config.data.views,
        student_resize=config.student.resize,
        teacher_resize=own if own != config.student.resize else None,
    )
    needs = teacher_needs(config.distillation)
    if cache is not None and needs is not None:
        stream = replace(
            stream,
            teacher_cache=config.teacher.cache.path,
            teacher_columns=columns_for(needs.memory, needs.attention),
            teacher_row_bytes=cache.num_bytes // (train.num_images * len(cache.views)),
        )
    row_bytes = sum(shard.bytes for shard in train.shards) / train.num_images + stream.teacher_row_bytes
    stream = replace(stream, keep_bytes=keep_bytes_for(schedule.window_images, row_bytes))
    return Plan(config, train, val, stream, kind, missing)


def prepare_config(config: Config, kind: str) -> Config:
    """Resolve what the verb implies (`kind`: cache, distill or train): `train` has no teacher; paths become absolute, since
    workers run elsewhere, those that a job would lose are told first. A student that starts from a detector sees images of
    that one's size, unless the recipe says another."""
    check_job_folder(config, kind)
    if kind != "cache":
        tracking_uri(config)  # refuses one with a password before anything is written

    def absolute(path: str) -> str:
        return path if not path or "://" in path else str(Path(path).expanduser().resolve())

    def model(field: str, path: str) -> str:
        if "://" in path:
            raise uri_refused(path, field)
        path = os.path.expanduser(path)
        # A job's working folder is a copy, in the same place for every worker but in another for the next job: a path in
        # it is left relative, or a run could not be continued.
        return absolute(path) if os.path.isdir(path) and not (in_a_job() and not os.path.isabs(path)) else path

    data = config.data.model_copy(update={"train": absolute(config.data.train), "val": absolute(config.data.val)})
    update: dict[str, Any] = {"data": data}
    cache = config.teacher.cache.model_copy(update={"path": absolute(config.teacher.cache.path)})
    teacher = {"cache": cache, "path": model("teacher.path", config.teacher.path)}
    update["teacher"] = config.teacher.model_copy(update=teacher)
    backbone = config.student.backbone
    start = backbone.model_copy(update={"init": model("student.backbone.init", backbone.init)})
    student: dict[str, Any] = {"init": model("student.init", config.student.init), "backbone": start}
    if student["init"] and "resize" not in config.student.model_fields_set:
        student["resize"] = read_preprocessing(student["init"]).resize
    update["student"] = config.student.model_copy(update=student)
    if kind == "train":
        update["distillation"] = config.distillation.model_copy(update={"method": "none"})
    config = config.model_copy(update=update)
    check_places(config, kind)
    return config


def read_result(folder: Folder) -> RunResult:
    """Of a finished run."""
    remedy = f"rm {folder.where('result.json')}: the same command makes it again from the last checkpoint"
    return RunResult(**folder.read_record("result.json", remedy=remedy))


def check_folder(config: Config, restart: bool) -> Folder:
    """OUTPUT/NAME; QskdError where another thing is than a training of qskd's, or nothing."""
    folder = Folder(config)
    if folder.exists(SWEEP):
        raise QskdError(folder.path, "holds a sweep", "a training, or nothing", "choose another name: --set name=...")
    check_no_trial(folder)
    check_ours(folder, restart)
    return folder


def run(config: Config, kind: str, restart: bool = False) -> RunResult:
    """Train (or go on training, or report what is already done) and leave the student in OUTPUT/NAME/student."""
    config = prepare_config(config, kind)
    folder = check_folder(config, restart)
    plan = make_plan(config, kind)
    with alone_on(folder):
        return _run(plan, folder, restart)


def _run(plan: Plan, folder: Folder, restart: bool) -> RunResult:
    config, kind = plan.config, plan.kind
    if restart:
        delete_run(folder)
    claim(folder, kind, config.name)
    check_same_run(folder, config)
    check_same_data(folder, plan.fingerprints)
    if folder.exists("result.json"):
        log.warning("%s is finished already; nothing is trained (--restart does it again)", folder.path)
        done = read_result(folder)
        if not is_complete(folder):
            end_run(Tracker(tracking_uri(config), done.run_id), folder, config.name)
        return done
    if kind == "distill" and not plan.stream.teacher_cache:
        log.warning("%s: teacher %s", config.name, SLOW_PATH)
        make_teacher(config, plan.train.labels)  # its complaints belong here, not in a worker's log
    # Here too, so that complaints don't stay in a worker's log, and what was inherited is on record.
    inherited = start_student(config, plan.train.labels)[1] if config.student.inherit else ""
    folder.write_record("config.yaml", to_yaml(config))
    folder.delete(FAILURE)
    mend_list(folder)  # here too: what can't be mended is said before Ray starts
    tracker = open_for(folder, config, kind)
    start_logs(run=config.name, run_id=tracker.run_id)
    if inherited:
        folder.write("inheritance.txt", inherited)
        tracker.text("inheritance.txt", inherited)
    for notice in plan.notices:
        log.warning(notice)
    try:
        start_ray()
        say_if_on_cpus(config.compute.device)
        started = time.perf_counter()
        try:
            result = fit(plan, tracker, folder)
        finally:
            raise_failure(folder)  # says more than what Ray makes of it
        whole = fill_in(tracker, folder, config.name, PATIENCE_S)
        done = finish(plan, folder, tracker, result, time.perf_counter() - started)
    except BaseException as error:
        tracker.finish("KILLED" if was_stopped(error) else "FAILED")
        raise
    end_run(tracker, folder, config.name, 0.0, whole)
    return done


def fit(plan: Plan, tracker: Tracker, folder: Folder) -> Any:
    """Ray Train. Goes on from the last checkpoint when OUTPUT/NAME/train has one."""
    from pipelines.progress import ProgressPrinter, TrackingCallback

    tracking = TrackingCallback(tracker, folder)
    trainer = make_trainer(plan.config, plan.stream, folder, [tracking], tracker.run_id)
    tracking.catch_up(plan.config.compute.workers)
    fill_in(tracker, folder, plan.config.name)
    with ProgressPrinter(folder, plan.config.name, plan.stream.schedule.total_steps):
        return trainer.fit()


def finish(plan: Plan, folder: Folder, tracker: Tracker, result: Any, seconds: float) -> RunResult:
    """Copy the student out of the last checkpoint, log it, and write result.json: the mark of a finished run."""
    from pipelines.cards import card_of_run
    from pipelines.history import read_history
    from pipelines.report import write_report
    from qskd.model_card import write_card

    if result.error is not None or result.checkpoint is None:
        raise result.error or QskdError(folder.path, "training ended without a checkpoint")
    with scratch_folder("finish") as scratch, result.checkpoint.as_directory() as checkpoint:
        student = scratch / "student"
        student.mkdir()
        fs.copy_files(f"{checkpoint}/student", str(student))
        metrics = read_state(checkpoint)["metrics"]
        write_card(student, card_of_run(plan.config, plan.kind, plan.train, plan.val, student, metrics))
        write_report(plan.config, plan.val, read_history(folder), student, tracker)
        folder.upload(student, "student")
    delete_unlisted(folder)  # a lost worker may have written one until now
    done = RunResult(folder.path, folder.where("student"), metrics, tracker.run_id, round(seconds, 2))
    folder.write_record("result.json", json.dumps(done.__dict__, indent=2))
    return done


if __name__ == "__main__":
    from pipelines.cli import main_of

    main_of("distill")
