"""What is said for a detector that is no DETR: it has boxes and classes, and none of what else a family tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from qskd.config import StudentConfig
from qskd.errors import QskdError
from qskd.families.family import Family, Predictions


class BoxesAlone(Family):
    masks_padding = False
    boxes_alone = True

    def projections(self, model: Any) -> list[nn.Module]:
        return []

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        self._refuse()

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        self._refuse()

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        self._refuse()

    def initialise(self, model: Any) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise QskdError(self.name, "asked for what only a DETR has", "its boxes and classes, which is all that it says")
