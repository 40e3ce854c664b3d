"""What a trial is told to do, on its way from the sweep's driver to the process that trains it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """What a trial is to do; JSON on its way there.

    config: of the trial, as a tree; its output and name are the trial's folder. seen: the epochs that the sweep has
    results of. recipe: the sweep's, when costs are to be measured beside it, and recipe_latency_ms. generation, until: of
    population based training, and the epochs at which the generation ends (0: the whole training). donor, donor_step:
    the trial whose weights to take over, and of which step. known_cache: the fingerprint of the cache that the sweep found to
    be the recipe's: no trial reads the teacher's weights to compare it again.
    """

    number: int
    config: dict[str, Any]
    seen: float = 0.0
    recipe: dict[str, Any] | None = None
    recipe_latency_ms: float = 0.0
    generation: int = 0
    until: float = 0.0
    donor: int | None = None
    donor_step: int = 0
    known_cache: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        return Job(**json.loads(text))
