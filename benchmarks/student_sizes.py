"""What `student.size` comes to, for every family, and what a backbone adds: the tables of docs/students.md.

    python -m benchmarks.student_sizes

Parameters and operations are counted, not timed (`qskd.detectors.cost`: a multiply-add is two operations; the sampling of
deformable attention is left out), for one image of the size's own resolution and COCO's 80 classes.
"""

from __future__ import annotations

import warnings

from qskd.config import StudentConfig
from qskd.config.backbone import FREE, KINDS
from qskd.config.student_sizes import SIZES
from qskd.detectors import FAMILIES, student_cost

CLASSES = 80  # COCO's


def cell(size: str, family: str) -> str:
    count, operations = student_cost(StudentConfig.model_validate({"size": size, "family": family}), CLASSES)
    return f"{count:.1f} M, {operations:.1f} G"


def on(backbone: str, family: str) -> str:
    """Size small on a backbone of its type's default sizes, at the number of its patches' sides nearest to 512 pixels."""
    kind = KINDS[backbone]
    side = kind.patch * round(512 / kind.patch) if kind.patch else 512
    made = {
        "size": "small",
        "family": family,
        "backbone": {"type": backbone},
        "resize": {"mode": "square", "size": side},
    }
    if kind.patch and family == "d_fine":
        return "needs stages"
    count, operations = student_cost(StudentConfig.model_validate(made), CLASSES)
    return f"{count:.1f} M, {operations:.1f} G"


def main() -> None:
    print(f"| `student.family` | {' | '.join(SIZES)} |\n| --- |{' ---: |' * len(SIZES)}")
    for family in FAMILIES:
        print(f"| `{family}` | {' | '.join(cell(size, family) for size in SIZES)} |", flush=True)
    families = ("conditional_detr", "d_fine")
    print(f"\n| `student.backbone.type` | {' | '.join(families)} |\n| --- |{' ---: |' * len(families)}")
    for backbone in FREE:
        print(f"| `{backbone}` | {' | '.join(on(backbone, family) for family in families)} |", flush=True)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
