"""What a sweep was asked for, checked against what can be done, and its defaults resolved. Knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from qskd.config import Config
from qskd.errors import QskdError
from search_spaces import SearchSpace, Space

Algorithm = Literal["tpe", "random", "pbt"]
Mode = Literal["max", "min"]
MODES: Mapping[str, Mode] = {"AP": "max", "latency_ms": "min", "parameters_m": "min", "size_mb": "min"}
COSTS = tuple(name for name, mode in MODES.items() if mode == "min")
# What says how many steps an epoch has, and a training: members of a population have these in common.
OF_THE_LENGTH = (
    "data",
    "training.epochs",
    "training.max_steps",
    "training.batch_size",
    "training.evaluate_every_epochs",
)
REDUCTION = 3  # of so many trials at a rung, one goes on


@dataclass(frozen=True)
class SearchRequest:
    """As the command line has it. asha None: where it helps. grace_epochs 0: a ninth of the epochs."""

    spaces: tuple[str, ...]
    trials: int = 20
    algorithm: str = "tpe"
    objectives: tuple[str, ...] = ("AP",)
    asha: bool | None = None
    grace_epochs: int = 0


@dataclass(frozen=True)
class Search:
    """A request that can be carried out. modes: of each objective. grace_epochs: before any trial is stopped."""

    space: SearchSpace
    trials: int
    algorithm: Algorithm
    objectives: tuple[str, ...]
    asha: bool
    grace_epochs: int
    reduction: int = REDUCTION

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(MODES[name] for name in self.objectives)

    def describe(self) -> str:
        spaces = " + ".join(space.name for space in self.space.spaces)
        goal = " against ".join(self.objectives)
        stopping = f"ASHA after {self.grace_epochs} epoch(s)" if self.asha else "no early stopping"
        if self.algorithm == "pbt":
            stopping = "the worst go on from the best"
        return f"{spaces}: {self.trials} trials by {self.algorithm} for {goal}, {stopping}; the first is the recipe"


def evaluations(config: Config) -> int:
    """How often a trial of full length is evaluated."""
    return -(-config.training.epochs // config.training.evaluate_every_epochs)


def check_request(request: SearchRequest, config: Config) -> Search:
    """The search that was asked for, its spaces read and tried on the recipe. QskdError when it can't be done."""
    if request.algorithm not in get_args(Algorithm):
        raise QskdError("--algorithm", request.algorithm, ", ".join(get_args(Algorithm)))
    least = 2 if request.algorithm == "pbt" else 1
    if request.trials < least:
        raise QskdError("--trials", str(request.trials), f"{least} or more" + (", a population" if least > 1 else ""))
    _check_objectives(request.objectives)
    space = SearchSpace(request.spaces, config)
    if request.algorithm == "tpe" and space.changing_choices:  # Optuna would refuse them, in the middle of the sweep
        found = f"offers other choices at one time than at another: {', '.join(space.changing_choices)}"
        remedy = "give the parameter another name where its choices are others, or use --algorithm random"
        raise QskdError("--algorithm tpe", found, "the same choices whenever a parameter is asked for", remedy)
    if len(request.objectives) > 1:
        _check_cost_varies(request, space)
    if request.algorithm == "pbt":
        _check_population(request, space, config)
    asha = _early_stopping(request, config)
    grace = _grace_epochs(request, config) if asha else 0
    return Search(space, request.trials, request.algorithm, request.objectives, asha, grace)  # type: ignore[arg-type]


def _check_objectives(objectives: tuple[str, ...]) -> None:
    allowed = [("AP",), *(("AP", cost) for cost in COSTS)]
    if objectives not in allowed:
        expected = "AP alone, or AP against one of: " + ", ".join(COSTS)
        raise QskdError(
            "--objective", ", ".join(objectives) or "none", expected, f"--objective AP --objective {COSTS[0]}"
        )


def _check_cost_varies(request: SearchRequest, space: SearchSpace) -> None:
    """A cost that is the same for all trials is no objective: the front would be a single point."""
    if not space.changes_student(bits=request.objectives[1] == "size_mb"):
        names = ", ".join(each.name for each in space.spaces)
        raise QskdError(
            f"--objective {request.objectives[1]}",
            f"{names} leaves what decides it as it is: the cost is the same for all trials",
            "a space that sets fields of student",
            "add --space student_architecture, or search for AP alone (bits alone change size_mb)",
        )


def _check_population(request: SearchRequest, space: SearchSpace, config: Config) -> None:
    where = "--algorithm pbt"
    if len(request.objectives) > 1:
        remedy = "--algorithm tpe, or --objective AP alone"
        raise QskdError(
            where, f"objectives {', '.join(request.objectives)}", "AP alone: it ranks by one number", remedy
        )
    if request.asha:
        raise QskdError(where, "with --asha", "one of the two: both decide which trials go on", "leave --asha out")
    refused = [each for each in space.spaces if not each.may_change_while_training]
    if refused:
        reasons = "; ".join(f"{each.name}: {_why_not(each)}" for each in refused)
        raise QskdError(
            where,
            f"changes fields in the middle of a training, and {reasons}",
            "spaces that can bear it: loss_weights",
            f"leave out --space {' --space '.join(each.source for each in refused)}, or use --algorithm tpe",
        )
    if lengths := space.sets(OF_THE_LENGTH):  # a member goes on at the step that another came to
        found = f"{', '.join(lengths)} would give members steps and epochs of their own"
        raise QskdError(where, found, "members that train alike long", "leave the field out, or use --algorithm tpe")
    if config.compute.workers > 1:  # a generation ends, and weights are taken over, inside a trial's own process
        found = f"compute.workers = {config.compute.workers}"
        raise QskdError(where, found, "one worker a member", "--set compute.workers=1, or --algorithm tpe")
    if config.training.patience:
        found = f"training.patience = {config.training.patience}"
        raise QskdError(
            where, found, "members that all train to the end", "--set training.patience=0, or --algorithm tpe"
        )
    if evaluations(config) < 2:
        raise _no_early_ap(where, config)


def _why_not(space: Space) -> str:
    return space.why_not or "it does not say MAY_CHANGE_WHILE_TRAINING = True"


def _no_early_ap(where: str, config: Config) -> QskdError:
    settings = config.training
    return QskdError(
        where,
        f"{settings.epochs} epoch(s), evaluated every {settings.evaluate_every_epochs}: the first AP comes at the end",
        "an AP before the end, to compare trials by",
        "--set training.evaluate_every_epochs=1, or more epochs",
    )


def _early_stopping(request: SearchRequest, config: Config) -> bool:
    """By default on; not for two objectives, where stopping by AP would thin out the cheap end of the front."""
    possible = evaluations(config) > 1
    if request.asha and not possible:
        raise _no_early_ap("--asha", config)
    if request.asha is None:
        return possible and request.algorithm != "pbt" and len(request.objectives) == 1 and request.trials > 1
    return request.asha


def _grace_epochs(request: SearchRequest, config: Config) -> int:
    """Epochs that every trial gets: no fewer than it takes to the first AP."""
    settings = config.training
    if request.grace_epochs < 0 or request.grace_epochs >= settings.epochs:
        raise QskdError(
            "--grace-epochs", str(request.grace_epochs), f"1 to {settings.epochs - 1}, or 0 for a ninth of the epochs"
        )
    wanted = request.grace_epochs or -(-settings.epochs // REDUCTION**2)
    return max(wanted, settings.evaluate_every_epochs)
