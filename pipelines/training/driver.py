"""The driver of a training, with a teacher (`qskd distill`) or without (`qskd train`)."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.cluster.address import check_address
from pipelines.cluster.room import say_if_on_cpus
from pipelines.cluster.start import start_ray
from pipelines.reporting.board import current, progress, stage, way_here
from pipelines.run.folder import FAILURE, SWEEP, Folder, raise_failure
from pipelines.run.guards import alone_on, as_begun, check_no_trial, check_same_data, check_same_run
from pipelines.run.logs import say, start_logs, tell
from pipelines.run.ownership import check_ours, claim, delete_run
from pipelines.run.resolve import resolve
from pipelines.run.stopping import was_stopped
from pipelines.run.tracked import open_for
from pipelines.tracking.about import (
    EARLY_TAG,
    NOTE,
    STUDENT_TAG,
    command_note,
    dataset_inputs,
    figure_metrics,
    result_note,
)
from pipelines.tracking.again import INHERITANCE
from pipelines.tracking.answers import check_answers
from pipelines.tracking.curves import PATIENCE_S, end_run, fill_in, is_complete, tell_result
from pipelines.tracking.store import how_to_look, tracking_uri
from pipelines.tracking.tracker import Tracker
from pipelines.training.at_stop import say_where_it_stopped
from pipelines.training.checkpoint_list import TRAIN, delete_unlisted, last_report, mend_list
from pipelines.training.checkpoints import read_state
from pipelines.training.estimate import foresee_time
from pipelines.training.plan import SLOW_PATH, Plan, make_plan
from pipelines.training.trainer import make_trainer
from qskd.config import Config
from qskd.config.recipe import load, shown_fields, to_yaml
from qskd.errors import QskdError
from qskd.evaluation.shown import measured, scores_text
from qskd.from_recipe import start_student, teacher_for_training
from qskd.storage.scratch import scratch_folder

log = logging.getLogger("qskd")


@dataclass(frozen=True)
class RunResult:
    """student: the plain Hugging Face folder. metrics: of its evaluation, -1 where nothing could be measured. seconds: of this
    command. which: "best" or "last", of the training's students that one is, and the training steps that it had; "" and 0 of a
    run of before, whose student is the last."""

    folder: str
    student: str
    metrics: dict[str, float]
    run_id: str
    seconds: float
    which: str = ""
    step: int = 0

    @property
    def ap(self) -> float | None:
        """COCO AP of the student, 0..1; None where nothing could be measured."""
        return measured(self.metrics).get("AP")


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


def start(
    verb: str,
    recipe: str | None,
    overrides: Sequence[str] | None,
    dry_run: bool = False,
    all_fields: bool = False,
    restart: bool = False,
) -> None:
    """What the command line does: load the recipe, train, and say where the student is."""
    config = load(recipe, overrides or ())
    if dry_run:
        config = resolve(config, verb)
        folder = check_folder(config, restart)
        config = config if restart else as_begun(folder, config)
        plan = make_plan(config, verb, dry=True)
        same = [*([recipe] if recipe else []), *(word for field in overrides or () for word in ("--set", field))]
        about = plan.describe(shlex.join(["qskd", "cache", *same]))
        tell(shown_fields(config, everything=all_fields), about, sep="\n")
        with progress(config.name, quiet=way_here() == "lines"):
            stage("trying a few steps")
            time_needed = foresee_time(plan)
        tell(time_needed)
        return
    result = run(config, verb, restart)
    tell(f"student: {result.student}")
    print(scores_text(result.metrics, ("AP", "AP50", "AP75")))
    tell(f"look at the run: {how_to_look(tracking_uri(config))}")


def run(config: Config, verb: str, restart: bool = False) -> RunResult:
    """Train (or go on training, or report what is already done) and leave the student in OUTPUT/NAME/student."""
    config = resolve(config, verb)
    folder = check_folder(config, restart)
    config = config if restart else as_begun(folder, config)
    plan = make_plan(config, verb)
    steps = plan.stream.schedule.total_steps
    with alone_on(folder), progress(config.name, steps, "step", subject=folder.path):
        return _run(plan, folder, restart)


def _run(plan: Plan, folder: Folder, restart: bool) -> RunResult:
    config, verb = plan.config, plan.verb
    if restart or not folder.exists("result.json"):
        check_address()
        check_answers(tracking_uri(config))
    if restart:
        delete_run(folder)
    claim(folder, verb, config.name)
    check_same_run(folder, config)
    check_same_data(folder, plan.fingerprints)
    if folder.exists("result.json"):
        log.warning("%s is finished already; nothing is trained (--restart deletes it and trains anew)", folder.path)
        done = read_result(folder)
        if not is_complete(folder):
            end_run(Tracker(tracking_uri(config), done.run_id), folder, config)
        return done
    if verb == "distill" and not plan.stream.teacher_cache:
        log.warning("%s: teacher %s", config.name, SLOW_PATH)
        stage("loading the teacher")
        teacher_for_training(config, plan.train.labels, None)  # its complaints belong here, not in a worker's log
    if config.student.inherit:
        stage("building the student")
    # Here too, so that complaints don't stay in a worker's log, and what was inherited is on record.
    inherited = start_student(config, plan.train.labels)[1] if config.student.inherit else ""
    folder.write_record("config.yaml", to_yaml(config))
    folder.delete(FAILURE)
    mend_list(folder)  # here too: what can't be mended is said before Ray starts
    stage("opening the run in MLflow")
    note = command_note()
    tracker = open_for(folder, config, verb, {NOTE: note})
    try:
        tracker.inputs(dataset_inputs(plan.inputs))
        start_logs(run=config.name, run_id=tracker.run_id)
        if inherited:
            folder.write(INHERITANCE, inherited)
            tracker.text(INHERITANCE, inherited)
        for notice in plan.notices:
            log.warning(notice)
        if last := last_report(folder):
            step, total = last[0]["step"], plan.stream.schedule.total_steps
            say(f"{config.name}: goes on from step {step} of {total}", run=config.name, step=step)
        stage("starting Ray")
        start_ray()
        say_if_on_cpus(config.compute.device)
        started = time.perf_counter()
        try:
            result = fit(plan, tracker, folder)
        finally:
            raise_failure(folder)  # says more than what Ray makes of it
        stage("telling MLflow")
        whole = fill_in(tracker, folder, config.name, PATIENCE_S)
        done = finish(plan, folder, tracker, result, time.perf_counter() - started)
    except BaseException as error:
        if was_stopped(error):
            say_where_it_stopped(folder, config.name, plan.stream.schedule.total_steps)
        tracker.finish("KILLED" if was_stopped(error) else "FAILED")
        raise
    end_run(tracker, folder, config, 0.0, whole, not tracker.complained)
    return done


def fit(plan: Plan, tracker: Tracker, folder: Folder) -> Any:
    """Ray Train. Goes on from the last checkpoint when OUTPUT/NAME/train has one."""
    from pipelines.reporting.progress import TrackingCallback
    from pipelines.reporting.watch import TrainingWatch

    stage("starting the workers")
    tracking = TrackingCallback(tracker, folder)
    trainer = make_trainer(plan.config, plan.stream, folder, [tracking], tracker.run_id)
    tracking.catch_up(plan.config.compute.workers)
    fill_in(tracker, folder, plan.config.name)
    with TrainingWatch(current(), folder, plan.stream.schedule):
        try:
            return trainer.fit()
        except Exception as error:
            if (told := told_by_a_worker(error)) is not None:
                raise told from None
            raise


def told_by_a_worker(error: BaseException) -> QskdError | None:
    """The error that is meant for the user, of those that Ray Train says its workers ended with."""
    failures = getattr(error, "worker_failures", {}).values()
    causes = (getattr(failure, "_base_exc", failure) for failure in failures)  # Ray wraps it, for its traceback's sake
    return next((cause for cause in causes if isinstance(cause, QskdError)), None)


def finish(plan: Plan, folder: Folder, tracker: Tracker, result: Any, seconds: float) -> RunResult:
    """Copy the student that the recipe asks for to its place, log it, and write result.json: the mark of a finished run."""
    from pipelines.reporting.cards import card_of_run
    from pipelines.reporting.choice import details_of, take_student
    from pipelines.reporting.details import write_details
    from pipelines.reporting.report import write_report
    from pipelines.run.best import Best
    from pipelines.run.history import last_step, read_history
    from qskd.deploy.model_card import write_card

    if result.error is not None or result.checkpoint is None:
        raise result.error or QskdError(folder.path, "training ended without a checkpoint")
    with scratch_folder("finish") as scratch, result.checkpoint.as_directory() as checkpoint:
        student = scratch / "student"
        student.mkdir()
        state, history = read_state(checkpoint), read_history(folder)
        last, total = Best(state["step"], state["metrics"]), plan.stream.schedule.total_steps
        chosen = take_student(plan.config, folder, checkpoint, last, history, total, student)
        if chosen.early:
            say(f"{plan.config.name}: {chosen.early}", run=plan.config.name, step=chosen.last_step)
        kept = folder.where(f"{TRAIN}/{Path(result.checkpoint.path).name}/student")
        evaluation = details_of(chosen, plan.config, folder, plan.train, plan.val, kept)
        stage("measuring parameters, FLOPs and latency")
        metrics = dict(chosen.metrics)
        card = replace(card_of_run(plan.config, plan.verb, plan.train, plan.val, student, metrics), chosen=chosen)
        if evaluation is not None:
            write_details(evaluation, folder, tracker, student, chosen.step)
            card = replace(card, evaluation=evaluation.without_curves())
        write_card(student, card)
        note = result_note(command_note(), folder.where("student"), metrics, card.rows[-1], chosen.text)
        for name, text in (
            (NOTE, note),
            (STUDENT_TAG, f"{chosen.which}, step {chosen.step}"),
            (EARLY_TAG, chosen.early),
        ):
            if text:
                tracker.tag(name, text)
        tell_result(tracker, folder, last_step(history), figure_metrics(card.rows[-1]))
        write_report(plan.config, plan.val, history, student, tracker)
        stage("writing the student")
        folder.upload(student, "student")
    delete_unlisted(folder)  # a lost worker may have written one until now
    which = chosen.which, chosen.step
    done = RunResult(folder.path, folder.where("student"), metrics, tracker.run_id, round(seconds, 2), *which)
    folder.write_record("result.json", json.dumps(done.__dict__, indent=2))
    return done
