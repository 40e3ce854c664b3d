"""Group Query Selection: how many GIoU bands, where they begin, how each weighs, and how many queries an object keeps.

Boundaries ascend by construction: each is a share of the room that the ones before it have left, with a gap between any
two. None is below the floor of the cache (`teacher.cache.attention_giou_floor`), with which it was or will be made.
What lies under the lowest boundary is dropped; positives keep the recipe's weight, which the bands' are relative to.
"""

from __future__ import annotations

from typing import Any

from qskd.config import Config
from qskd.distillation.qskd.settings import Settings
from qskd.errors import QskdError
from search_spaces._trials import Trial

SELECTION = "distillation.selection"
WHY_NOT_WHILE_TRAINING = "PBT moves each number by itself, and can't move a trial from two bands to three"
HIGHEST = 0.95  # a band above it would hold next to nothing
GAP = 0.05  # the narrowest band
LEAST_WEIGHT, MOST_WEIGHT = 0.05, 5.0
NOTHING_READS = (
    "nothing reads the groups: distillation.features.weight is 0 or features.background 1, and distillation.predictions has "
    "weights of 0 or pairing: global"
)


def FIELDS(config: Config) -> tuple[str, ...]:
    _settings(config)
    return f"{SELECTION}.boundaries", f"{SELECTION}.band_weights", f"{SELECTION}.max_per_object"


def recipe_point(config: Config) -> dict[str, Any]:
    """Nearest to the recipe where it has a weight for the lowest band, or boundaries that aren't offered."""
    selection, (low, most) = _settings(config).selection, _room(config)
    boundaries = (selection.boundaries or (low,))[:most]
    point: dict[str, Any] = {"bands": len(boundaries), "max_per_object": selection.max_per_object or 1}
    point["limited"] = selection.max_per_object > 0
    start = low
    for band, boundary in enumerate(boundaries, start=1):
        room = HIGHEST - start - GAP * (len(boundaries) - band)
        share = (boundary - start) / room if room > 1e-9 else 0.0
        share = min(max(share, 0.0), 1.0)
        point[f"boundary_{band}"] = 1 - (1 - share) ** (len(boundaries) - band + 1)
        start += share * room + GAP
        weight = (*selection.band_weights, 1.0)[band]
        point[f"weight_{band}"] = min(max(weight, LEAST_WEIGHT), max(MOST_WEIGHT, weight))
    return point


def suggest(trial: Trial, config: Config) -> dict[str, Any]:
    selection, (low, most) = _settings(config).selection, _room(config)
    bands = trial.suggest_int("bands", 1, most)
    boundaries: list[float] = []
    weights = [0.0]
    start = low
    for band in range(1, bands + 1):
        room = HIGHEST - start - GAP * (bands - band)
        # The least of so many even draws: random trials have evenly spread boundaries, not most of them near the top.
        drawn = trial.suggest_float(f"boundary_{band}", 0.0, 1.0)
        boundary = start + room * (1 - (1 - drawn) ** (1 / (bands - band + 1)))
        boundaries.append(max(low, round(boundary, 3)))
        start = boundary + GAP
        highest = max(MOST_WEIGHT, *selection.band_weights)
        weights.append(float(f"{trial.suggest_float(f'weight_{band}', LEAST_WEIGHT, highest, log=True):.4g}"))
    return {
        f"{SELECTION}.boundaries": boundaries,
        f"{SELECTION}.band_weights": weights,
        f"{SELECTION}.max_per_object": _cap(trial, selection.max_per_object),
    }


def _cap(trial: Trial, own: int) -> int:
    """Queries an object keeps; without a limit (0) only where the recipe has none, for all a teacher's queries cost."""
    if own == 0 and not trial.suggest_categorical("limited", (False, True)):
        return 0
    return trial.suggest_int("max_per_object", 1, max(20, 2 * own), log=True)


def _settings(config: Config) -> Settings:
    distillation = config.distillation
    if isinstance(distillation, Settings):
        return distillation
    found = f"distillation.method = {distillation.method}: nothing is selected, or not by the first method"
    raise QskdError("search space query_selection", found, "groups by GIoU", "change that, or leave this space out")


def _reads_groups(settings: Settings) -> bool:
    """Whether a loss depends on which queries are kept: else all trials would be the same training."""
    features, predictions = settings.features, settings.predictions
    parts = predictions.class_weight, predictions.l1_weight, predictions.giou_weight
    pairs = predictions.weight > 0 and any(parts) and predictions.pairing != "global"
    return pairs or (features.weight > 0 and features.background < 1)


def _room(config: Config) -> tuple[float, int]:
    """The lowest boundary and the most bands. QskdError where bands of absolute GIoU mean nothing, or have no room."""
    distillation, floor = _settings(config), config.teacher.cache.attention_giou_floor
    selection = distillation.selection
    for wrong, found in (
        (selection.relative, "distillation.selection.relative = true: these boundaries are absolute"),
        (selection.shuffled, "distillation.selection.shuffled = true: what is kept is random"),
        (not _reads_groups(distillation), NOTHING_READS),
    ):
        if wrong:
            raise QskdError(
                "search space query_selection", found, "groups by GIoU", "change that, or leave this space out"
            )
    if floor > HIGHEST - GAP + 1e-9:
        raise QskdError(
            "search space query_selection",
            f"teacher.cache.attention_giou_floor = {floor:g} leaves no room for boundaries",
            f"{HIGHEST - GAP:g} or less",
            "make a cache with a lower floor",
        )
    low = max(floor, min((0.0, *selection.boundaries)))
    fits = 1 + int((HIGHEST - low) / GAP + 1e-9)
    return low, min(max(3, len(selection.boundaries)), fits)
