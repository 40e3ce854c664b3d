"""Search student architectures, GIoU boundaries and loss weights (`qskd tune`): Ray Tune, the teacher paid for once.

python -m pipelines.tune configs/sweep_quickstart.yaml --space loss_weights --trials 20
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.cluster.address import check_address
from pipelines.cluster.devices import uses_gpu
from pipelines.reporting.board import current, progress, stage
from pipelines.run.folder import Folder
from pipelines.run.guards import alone_on, as_begun, check_same_data, check_same_run
from pipelines.run.logs import tell
from pipelines.run.ownership import check_ours, claim, delete_run
from pipelines.run.resolve import ResolvedConfig, resolve
from pipelines.run.tracked import open_for
from pipelines.tracking.about import NOTE, command_note, dataset_inputs
from pipelines.tracking.answers import check_answers
from pipelines.tracking.store import tracking_uri
from pipelines.training.plan import SLOW_PATH, Plan, make_plan
from pipelines.tuning.finish import SweepResult, finish
from pipelines.tuning.records import ENDED, Records, check_no_training
from pipelines.tuning.search.request import SearchRequest, check_request
from pipelines.tuning.sweep import Sweep, is_done
from pipelines.tuning.tracking import SweepTracking
from pipelines.tuning.trial.costs import parameters_m, recipe_latency_ms, recipe_latency_there
from pipelines.tuning.watch import SweepWatch
from qskd.checks import check_objects
from qskd.config import Config
from qskd.config.recipe import replace_fields, to_tree, to_yaml
from qskd.errors import QskdError
from qskd.storage.scratch import scratch_folder
from qskd.teacher.manifest import load_cache_manifest
from search_spaces import SearchSpace

log = logging.getLogger("qskd")
CALIBRATED = 3  # students that a dry run tries, where a space changes them


@dataclass(frozen=True)
class TuneRequest:
    """As the command line has it. trial_epochs: of a trial; 0: the recipe's. at_most_parameters: millions, or "recipe" for
    the recipe's own student; empty: no limit. at_once: most trials at a time; 0: as many as fit."""

    search: SearchRequest
    trial_epochs: int = 0
    at_most_parameters: str = ""
    at_once: int = 0

    def settled(self, spaces: Sequence[str]) -> dict[str, Any]:
        """What may not change while the sweep lasts, and the number of trials, which may. spaces: with their whole paths."""
        asked = {**asdict(self.search), "spaces": list(spaces)}
        return {**asked, "trial_epochs": self.trial_epochs, "at_most_parameters": self.at_most_parameters}


def trial_recipe(config: ResolvedConfig, request: TuneRequest) -> ResolvedConfig:
    """The recipe at a trial's length."""
    if not request.trial_epochs:
        return config
    return replace_fields(config, {"training.epochs": request.trial_epochs}, "--trial-epochs")


def parameters_limit(text: str, config: Config, labels: Sequence[str], space: SearchSpace) -> float | None:
    """Millions of parameters, from the option's text."""
    if not text:
        return None
    where = "--at-most-parameters"
    if not space.changes_student(bits=False):
        log.warning("%s has no effect: no space changes the student's sizes", where)
        return None
    own = parameters_m(config, labels)
    if text == "recipe":
        return own
    try:
        limit = float(text)
    except ValueError:
        raise QskdError(where, text, 'a number of millions, or "recipe"') from None
    if not own <= limit:
        raise QskdError(
            where,
            f"{limit:g} M, and the recipe's own student has {own:.4g} M",
            f"{own:.4g} or more: the first trial is the recipe",
            "begin with a smaller student",
        )
    return limit


def check_folder(config: Config, restart: bool) -> Folder:
    """OUTPUT/NAME; QskdError where another thing is than a sweep of qskd's, or nothing."""
    folder = Folder(config)
    check_no_training(folder)
    check_ours(folder, restart)
    return folder


def run(config: Config, request: TuneRequest, restart: bool = False) -> SweepResult:
    """Search, or go on with a search that was stopped. Raises QskdError, also where too many trials in a row failed;
    KeyboardInterrupt after Ctrl-C and SIGTERM."""
    config = resolve(config, "distill")
    folder = check_folder(config, restart)
    config = config if restart else as_begun(folder, config)
    with alone_on(folder), progress(config.name, unit="step"):
        return _run(config, request, restart)


def _run(config: ResolvedConfig, request: TuneRequest, restart: bool) -> SweepResult:
    short = trial_recipe(config, request)
    plan = plan_without_cache(short)
    search = check_request(request.search, with_effective_epochs(short, plan))
    # Before anything is written down, or made: the cache may take hours.
    limit = parameters_limit(request.at_most_parameters, short, plan.train.labels, search.space)
    cached = bool(short.teacher.cache.path)
    folder = Folder(config)
    check_address()
    check_answers(tracking_uri(config))
    if restart:
        delete_run(folder)
    claim(folder, "tune", config.name)
    records = Records(config)
    check_same_run(folder, config)
    check_same_data(folder, plan.fingerprints)
    facts = records.settle(request.settled([space.source for space in search.space.spaces]))
    folder.write_record("config.yaml", to_yaml(config))
    stage("opening the run in MLflow")
    tracker = open_for(folder, config, "sweep", {NOTE: command_note(search.describe())})
    tracker.inputs(dataset_inputs(plan.inputs))
    tell(search.describe())
    for notice in plan.data_notices:
        log.warning(notice)
    schedule = plan.stream.schedule
    tracking = SweepTracking(tracker, schedule.steps_per_epoch, records)
    try:
        if is_done(search, records, config.seed):
            stage("writing the report, telling MLflow")
            tracking.settle(config.name)
            return finish(config, search.describe(), records, tracker)
        known_cache = _make_cache(short, cached)
        if "recipe_latency_ms" not in facts:
            from pipelines.cluster.start import give_back_memory

            stage("measuring the recipe's latency")
            facts["recipe_latency_ms"] = _time_recipe(short, plan.train.labels)
            give_back_memory()
            records.note(**facts)
        sweep = Sweep(
            short,
            search,
            records,
            tracking,
            plan.train.labels,
            _Slots(short, request.at_once),
            facts["recipe_latency_ms"],
            (schedule.total_steps, schedule.steps_per_epoch),
            limit,
            known_cache,
        )
        stage("starting the trials")
        with SweepWatch(current(), records, (schedule.total_steps, schedule.steps_per_epoch), search.trials):
            signalled = _search(sweep, plan, request.at_once)
    except KeyboardInterrupt:
        signalled = True
    except BaseException:
        tracking.interrupt()
        raise
    if not is_done(search, records, config.seed):
        tracking.interrupt()
        ended = sum(row.state in ENDED and number not in records.held for number, row in records.rows.items())
        so_far = f"{ended} of {search.trials} trials have ended, all is kept in {folder.path}"
        if not signalled:
            raise QskdError(
                f"{config.name}: Ray Tune ended the search",
                so_far,
                "an end of all trials, for no signal came",
                "the same command goes on with the others; QSKD_VERBOSE=1 shows what Ray says",
            )
        tell(f"\nstopped; {so_far}")
        raise KeyboardInterrupt
    stage("writing the report, telling MLflow")
    tracking.settle(config.name)
    return finish(config, search.describe(), records, tracker)


def _make_cache(config: ResolvedConfig, cached: bool) -> str:
    """One cache for all trials: what of it is missing is computed now. Its fingerprint; empty without one."""
    from pipelines.caching import driver as cache_teacher
    from pipelines.caching.plan import make_cache_plans
    from pipelines.cluster.room import forget_request, node_resources
    from pipelines.cluster.start import start_ray

    stage("starting Ray")
    start_ray()
    forget_request()
    if not cached:
        log.warning("%s: teacher %s", config.name, SLOW_PATH)
        return ""
    if cache_teacher.lacks_something(make_cache_plans(config)):
        actors = max(
            config.compute.workers, int(sum(node.get("GPU", 0) or node.get("CPU", 0) for node in node_resources()))
        )
        compute = config.compute.model_copy(update={"workers": actors})
        stage("making the teacher's cache")
        cache_teacher.run(config.model_copy(update={"compute": compute}))
    make_plan(config, "distill")  # checks that the cache is enough for the recipe
    manifest = load_cache_manifest(config.teacher.cache.path)
    return manifest.fingerprint if manifest else ""


def _time_recipe(config: Config, labels: Sequence[str]) -> float:
    """On what the trials' own processes have, whose latencies are ratios of this: a GPU, but where workers of theirs hold the GPUs.
    A cluster's head may have none."""
    import ray
    import torch

    from pipelines.cluster import devices
    from pipelines.cluster.room import check_gpus

    gpu = config.compute.workers == 1 and uses_gpu(config, ray.cluster_resources())
    device = devices.device_here(config) if gpu else torch.device("cpu")
    if not gpu or device.type == "cuda":
        return recipe_latency_ms(config, labels, device)
    check_gpus(1)
    task: Any = ray.remote(num_gpus=1)(recipe_latency_there)
    return float(ray.get(task.remote(to_tree(config), tuple(labels))))


def plan_without_cache(config: ResolvedConfig) -> Plan:
    """Of a trial, whose cache is yet to be made. QskdError also where no AP can be measured, which trials are compared by."""
    plan = make_plan(replace_fields(config, {"teacher.cache.path": ""}, "qskd tune"), "distill")
    check_objects(config.data.val, plan.val, "for an AP to compare trials by")
    return plan


def with_effective_epochs(config: ResolvedConfig, plan: Plan) -> ResolvedConfig:
    """The same training, said with the epochs that `training.max_steps` leaves of it: what early stopping counts in."""
    return replace_fields(config, {"training.epochs": plan.stream.schedule.epochs_begun}, "qskd tune")


class _Slots:
    """How many trials fit now: asked again every few seconds, for a cluster grows and shrinks."""

    def __init__(self, config: Config, at_once: int, every_s: float = 5.0) -> None:
        self.config, self.at_once, self.every_s = config, at_once, every_s
        self.fits, self.asked_at = 0, -every_s

    def __call__(self) -> int:
        if time.monotonic() - self.asked_at >= self.every_s:
            from pipelines.cluster.room import node_resources
            from pipelines.tuning.engine import trials_at_once

            before, self.fits = self.fits, trials_at_once(self.config, node_resources())
            self.asked_at = time.monotonic()
            if self.fits != before:
                print(f"{min(self.fits, self.at_once or self.fits)} trial(s) at a time", flush=True)
        return min(self.fits, self.at_once or self.fits)


def _search(sweep: Sweep, plan: Plan, at_once: int) -> bool:
    """Whether a signal ended it."""
    import ray

    from pipelines.cluster.room import ask_for_nodes, check_gpus
    from pipelines.tuning.engine import run_tuner, trial_resources

    compute = sweep.config.compute
    gpu = uses_gpu(sweep.config, ray.cluster_resources())
    if gpu:
        check_gpus(compute.min_workers or compute.workers)
    one = trial_resources(sweep.config, gpu) if compute.workers == 1 else {"GPU" if gpu else "CPU": 1.0}
    schedule = plan.stream.schedule
    with (
        scratch_folder("tune") as scratch,
        ask_for_nodes(one) as request,
    ):
        sweep.ask = lambda trials: request(min(trials, at_once or trials) * compute.workers)
        signalled = run_tuner(
            sweep,
            sweep.config,
            sweep.search,
            schedule.total_steps / schedule.steps_per_epoch,
            sweep.records.in_order(),
            str(scratch),
        )
    sweep.settle()
    return signalled


def foresee(config: Config, request: TuneRequest, restart: bool = False) -> str:
    """What `--dry-run` prints: the plan, from a few steps of training tried here."""
    from pipelines.tuning.calibration import Calibration, calibrate
    from pipelines.tuning.plan import make_tune_plan

    config = resolve(config, "distill")
    check_folder(config, restart)
    short = trial_recipe(config, request)
    plan = plan_without_cache(short)
    search = check_request(request.search, with_effective_epochs(short, plan))
    parameters_limit(request.at_most_parameters, short, plan.train.labels, search.space)
    students = {to_yaml(short): short}
    if any(field.startswith("student") for field in search.space.fields):  # they cost more or less than the recipe's
        for overrides in search.space.samples(CALIBRATED - 1, short.seed):
            student = {name: value for name, value in overrides.items() if name.startswith("student")}
            other = ResolvedConfig(search.space.config(student))
            students[to_yaml(other)] = other
    budget_s = 2.0 / len(students)
    measured = Calibration.mean([calibrate(student, budget_s) for student in students.values()])
    return "\n".join(
        [make_tune_plan(short, search, measured).describe(), *(f"notice: {each}" for each in plan.data_notices)]
    )
