"""Which sizes of images a family takes: sides of whole units, and enough cells where queries are chosen among them."""

from __future__ import annotations

from collections.abc import Sequence

from qskd.errors import QskdError


def other_size(side: int, unit: int) -> str:
    """What to do about images of such a side, where sides are multiples of `unit`: the nearest, wherever a size can be given."""
    nearest = max(unit, round(side / unit) * unit)
    return f"set resize: {{mode: square, size: {nearest}}} of this model; where the verb has it, --size {nearest}"


def check_cells(name: str, height: int, width: int, unit: int, strides: Sequence[int], queries: int) -> None:
    """QskdError for images whose sides are no multiples of `unit` pixels, or whose maps of `strides` have fewer cells than the
    queries that are chosen among them."""
    tokens = sum((height // stride) * (width // stride) for stride in strides)
    if height % unit or width % unit:
        raise QskdError(
            f"{name} images",
            f"{height} x {width} pixels",
            f"height and width divisible by {unit}",
            other_size(height, unit),
        )
    if tokens < queries:
        raise too_few_cells(name, height, width, tokens, strides, queries)


def too_few_cells(name: str, height: int, width: int, cells: int, strides: Sequence[int], queries: int) -> QskdError:
    """What is said where queries are chosen among the cells of maps, and there are fewer of these."""
    return QskdError(
        f"{name} images",
        f"{height} x {width} pixels: {cells} cells on maps of strides {sorted(strides)}",
        f"at least {queries}: each query is one of these cells",
        "larger images, or fewer queries",
    )
