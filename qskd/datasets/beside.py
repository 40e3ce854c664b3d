"""What comes beside the images of a batch: rows of a second reader, the teacher's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qskd.config import ViewConfig
from qskd.datasets.views import View, derived_crop, is_mirrored


class BesideRow(Protocol):
    """What a second reader has for one view of one image."""

    @property
    def image_id(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class RowReader(Protocol):
    """A second reader of rows, one for each row of the image shards and view: the teacher's outputs are read by such a one.

    rows_read: of all rows asked for, those that were not in a spool. num_bytes: of all it can read. remedy: for messages, where a
    row is of another image. mirrored: a row -> that of the same view mirrored left and right. collate: rows -> arrays of one batch.
    """

    remedy: str

    @property
    def rows_read(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def where(self, shard: int, view: int) -> str: ...
    def group_rows(self, shard: int, view: int, row: int) -> range: ...
    def read(self, shard: int, view: int, rows: Sequence[int]) -> Sequence[BesideRow]: ...
    def mirrored(self, row: Any) -> BesideRow: ...
    def collate(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]]: ...


def derivations(
    config: ViewConfig, views: NDArray[np.integer[Any]], image_ids: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """What remains to be done to the rows of these views, which are mirrored already, and to which of them anything was done."""
    if config.derived_taken == "none":
        return {}
    places = list(zip(image_ids.tolist(), views.tolist(), strict=True))
    crops = np.array([derived_crop(config, *place) for place in places], np.float32).reshape(-1, 4)
    whole = np.array(View.IDENTITY.crop_xyxy, np.float32)
    mirrored = np.array([is_mirrored(config, *place) for place in places], bool)
    found = {"teacher_derived": mirrored | (crops != whole).any(1)}
    return found | ({"teacher_crops_xyxy": crops} if config.derived_taken == "flip_and_crop" else {})
