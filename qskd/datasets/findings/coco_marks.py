"""What a COCO annotation says about itself that qskd does not act on, and that changes what its box means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qskd.datasets.findings.finding import Finding, Tally

_IGNORED = ("ignore", "ignored", "difficult")  # CrowdHuman's, VisDrone's and VOC's, as converters write them
_XYWH = 1  # detectron2's BoxMode.XYWH_ABS


class CocoMarks:
    """Counts annotations that ask to be ignored, that are turned, or whose box is of another kind."""

    def __init__(self) -> None:
        self._ignored, self._turned, self._modes = Tally(), Tally(), Tally()

    def add(self, entry: Mapping[str, Any], image_id: int, annotation_id: int) -> None:
        """entry: an annotation, as the file has it."""
        where = f"image {image_id}, annotation {annotation_id}"
        attributes = entry.get("attributes")
        attributes = attributes if isinstance(attributes, dict) else {}
        if any(_is_set(place.get(name)) for place in (entry, attributes) for name in _IGNORED):
            self._ignored.add(where)
        turned = next((value for value in (attributes.get("rotation"), entry.get("rotation")) if _is_set(value)), None)
        if turned is not None:
            self._turned.add(f"{where} (by {turned})")
        mode = entry.get("bbox_mode", _XYWH)
        if mode != _XYWH:
            self._modes.add(f"{where} ({mode})")

    def findings(self) -> list[Finding]:
        return [
            *self._ignored.finding(
                "marked-to-ignore",
                "{count} annotation(s) are marked to be ignored (`ignore` or `difficult`)",
                "qskd trains and evaluates on them like on all others; what is to count neither way is `iscrowd: 1`.",
                "take them out, or mark them `iscrowd: 1`",
            ),
            *self._turned.finding(
                "rotated-boxes",
                "{count} annotation(s) have a rotation other than 0",
                "A box has no angle here: `bbox` is the upright box before it was turned, and covers another area.",
                "write the box around the turned one (`bbox` of its four corners) and leave the rotation out",
            ),
            *self._modes.finding(
                "boxes-of-another-mode",
                "{count} annotation(s) have a `bbox_mode` other than 1, which is [x, y, width, height]",
                "qskd reads each `bbox` as [x, y, width, height] in pixels, whatever its `bbox_mode`.",
                "convert the boxes (detectron2's BoxMode.convert) and leave `bbox_mode` out",
            ),
        ]


def _is_set(value: Any) -> bool:
    """Whether a mark is there: not when it is 0, false, empty or "0"."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "0.0", "false", "no")
    return isinstance(value, (bool, int, float)) and bool(value)
