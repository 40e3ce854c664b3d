"""Which of a training's students a folder holds: the one of the best evaluation, or the one of the last step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qskd.evaluation.shown import measured, score_text


@dataclass(frozen=True)
class Chosen:
    """which: "last" also where the last evaluation was the best. step: that the student had, of the `last_step` that were made;
    the recipe has total_steps. metrics: of its evaluation. last_ap: of the last step's student. best_ap, best_step: of the best
    evaluation there was; kept: its student is in the run's best/ (a run that an older qskd began kept none)."""

    which: Literal["best", "last"]
    step: int
    last_step: int
    total_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    last_ap: float | None = None
    best_ap: float | None = None
    best_step: int = 0
    kept: bool = True
    stopped_early: bool = False

    @property
    def ap(self) -> float | None:
        """None where it was not measured."""
        return measured(self.metrics).get("AP")

    @property
    def early(self) -> str:
        """Where training ended before the recipe's last step, as a sentence; empty otherwise."""
        if not self.stopped_early:
            return ""
        return (
            f"Training stopped early, after step {self.last_step} of {self.total_steps}: AP had not risen above that of step "
            f"{self.best_step} (training.patience)."
        )

    @property
    def text(self) -> str:
        """Whole sentences: which it is, and what the other had."""
        if self.which == "best":
            said = [
                f"The student of the best AP on the validation images, after step {self.step} (AP {score_text(self.ap)}); that "
                f"of the last step, {self.last_step}, had {score_text(self.last_ap)}. The same images chose it and measured it, "
                "which flatters it a little."
            ]
        else:
            said = [f"The student of the last step, {self.last_step} (AP {score_text(self.ap)})."]
        if self.best_ap is not None and (self.ap is None or self.best_ap > self.ap):
            where = "is in best/ of the run's folder" if self.kept else "was not kept, by the qskd that was used then"
            said.append(
                f"The best AP on the way was {score_text(self.best_ap)}, after step {self.best_step}; that student {where}."
            )
        return " ".join([*said, *([self.early] if self.early else [])])
