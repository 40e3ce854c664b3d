"""What is known of one trial of a sweep: the line between the sweep's driver and all that reads its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the sweep's folder keeps it (JSON).

    number: 0 is the recipe itself. state: "stopped" is early, by the scheduler; "failed" has a `reason`.
    parameters: the spaces' answers by name, "space.parameter". overrides: the dotted fields of the recipe they set.
    curve: (epochs trained, AP in 0..1) of every evaluation, in order. metrics: the best evaluation's.
    latency_ms: of one image on this machine, measured, in float whatever its bits; parameters_m: millions; size_mb: 10^6 bytes,
    quantised weights at their bits; None where not measured yet.
    run_id: the MLflow run, a child of the sweep's. seconds: of training, all attempts together. logged: whether that run is known
    to have all rows of its curves.
    """

    number: int
    state: State = "waiting"
    parameters: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    parameters_m: float | None = None
    size_mb: float | None = None
    gflops: float | None = None
    reason: str = ""
    run_id: str = ""
    seconds: float = 0.0
    logged: bool = False

    @property
    def best_ap(self) -> float:
        """The largest AP of the curve; -1 when there is none."""
        return max((ap for _, ap in self.curve), default=-1.0)

    @property
    def epochs(self) -> float:
        """Trained so far."""
        return self.curve[-1][0] if self.curve else 0.0
