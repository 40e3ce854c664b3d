"""What is compared: the students, the budgets, the seeds, and which rows each gets. Data about choices; nothing runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.evidence.teachers import FAMILY_DEFAULTS, MANY, MAPS, OWN, SIDES
from benchmarks.evidence.variants import (
    BITS,
    BY_CHOICE,
    FEW_BITS,
    GENTLE,
    MECHANISM,
    METHODS,
    NEW_IMAGES,
    OTHERWISE,
    SHARES,
)

# The recipe all cells share is the quickstart's own (pipelines/assets/quickstart.yaml): its defaults are judged here.
REPORT_SEEDS = (0, 1, 2, 3, 4)  # on the test split
SEARCH_SEEDS = (100, 101)  # on the validation split: every setting was chosen there
BUDGETS = {"short": 750, "long": 3000, "longest": 9000}  # training steps of 16 images


@dataclass(frozen=True)
class Student:
    """overrides: of the shared recipe. rows: the variants that are compared, by budget. teacher: a name in `teachers`.

    backbone: the name of its own pretrained one (`backbone.make_backbone`); the package's when empty. metrics: a table for each.
    """

    title: str
    overrides: tuple[str, ...] = ()
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    teacher: str = OWN
    backbone: str = ""
    metrics: tuple[str, ...] = ("AP",)


MAIN = ("none", "agfd", "lapd", "qskd")
LONG = (*MAIN, "qskd_constant", "agfd_constant", "none_equal_time", "positives", "all", "mimic", "global")
PAIR = ("none", "qskd")
FRESH = ("none_flips", "qskd_flips", "none_flips_labelled24", "qskd_flips_whitened", "qskd_flips_whitened_pkd")
UNLABELED = tuple(f"qskd_flips_whitened_unlabeled{count // 1000}" for count in NEW_IMAGES[1:])
LONG_BITS = (
    *(f"{short}_{name}" for short in BITS for name in ("after_none", "after_qskd", "none", "qskd")),
    "w4a4_qdetr",
)
# Other methods, each with the better of its weights after two epochs, and what joins the nearest.
RIVALS = (
    *("tprd", "tar", "pkd_searched", "whitened_pkd", "fitnets", "detrdistill", "d3etr_searched", "kd_detr"),
    *("crosskd_searched", "cwd_searched", "mgd"),
)
QUERIES = (*MAIN, "positives", "all", "random")
_WHOLE = ("student.encoder_layers=2", "student.decoder_layers=3")
_NEAR = (*_WHOLE, "student.backbone.embedding_size=48", "student.backbone.hidden_sizes=[48, 96]")
_CONDITIONAL = ("student.family=conditional_detr", "training.learning_rate=1.0e-3", "student.inherit=false")

_FLIPPED = ("none_flips", "qskd_flips")
_BY_DEFAULT = (*_FLIPPED, "qskd_flips_whitened")
_TRAINING = (*PAIR, *_BY_DEFAULT, *(f"{name}_flips_{what}" for what in OTHERWISE for name in PAIR))
# The families that choose their queries among the encoder's cells, as their own defaults train them.
_CHOOSING = (*("student.inherit=false", "student.feature_levels=2", *FAMILY_DEFAULTS),)
_RT_DETR = ("student.family=rt_detr", *_CHOOSING)
_D_FINE = ("student.family=d_fine", *_CHOOSING)

# Each row: what is varied, about which student, at which budgets.
STUDENTS = {
    "inherit": Student(
        "The quickstart's student, started from its teacher's layers",
        rows={
            "short": (
                *MECHANISM,
                *METHODS,
                *(f"{of}_{name}" for of in ("qskd", "whitened") for name in SHARES),
                *FEW_BITS,
                *("qskd_flips_unlabeled6", "qskd_flips_whitened", *BY_CHOICE),
            ),
            "long": (
                *LONG,
                "whitened",
                *RIVALS,
                "whitened_share90",
                *FRESH,
                "qskd_flips_unlabeled18",
                *UNLABELED,
                *BY_CHOICE,
                *LONG_BITS,
            ),
            "longest": (*PAIR, *FRESH, *UNLABELED),
        },
    ),
    "scratch": Student(
        "The same student with random layers (its backbone pretrained)",
        ("student.inherit=false",),
        {"short": (*MAIN, "whitened", "whitened_pkd", "told_onnx", "told_json"), "long": (*MAIN, "whitened")},
    ),
    "whole": Student("A second size: all of the teacher's layers, the small backbone", _WHOLE, {"short": PAIR}),
    "near": Student(
        "A third size: all of the teacher's layers, a backbone of twice the channels",
        _NEAR,
        {
            "short": (*MAIN, "whitened"),
            "long": (*MAIN, "whitened", "pkd_searched", *(f"{name}_gentle" for name in GENTLE)),
        },
        backbone="backbone48",
    ),
    "many": Student(
        "The quickstart's student with 100 queries, of a teacher with 300",
        ("student.queries=100",),
        {"short": QUERIES, "long": ("none", "agfd", "qskd", "positives", "all", "tprd")},
        MANY,
    ),
    "rtdetr": Student(
        "RT-DETR, random layers",
        _RT_DETR,
        {
            "short": (*(each for each in _TRAINING if "no_sides" not in each), "qskd_flips_whitened_pkd"),
            "long": _BY_DEFAULT,
        },
    ),
    "maps": Student(
        "RT-DETR, random layers, of an RT-DETR with two maps",
        (*_RT_DETR, "distillation.features.background=0"),
        {
            "short": (*_BY_DEFAULT, "qskd_flips_coarse", *(f"qskd_flips_{name}" for name in SHARES)),
            "long": _BY_DEFAULT,
        },
        MAPS,
    ),
    "dfine": Student("D-FINE, random layers", _D_FINE, {"short": _TRAINING, "long": _BY_DEFAULT}),
    "sides": Student(
        "D-FINE, random layers, of a D-FINE with two maps",
        _D_FINE,
        {"short": (*_BY_DEFAULT, "ld", "ld_main", "qskd_ld")},
        SIDES,
        metrics=("AP", "AP75", "AP90"),
    ),
    "conditional": Student(
        "A second family: Conditional DETR, random layers",
        _CONDITIONAL,
        {"short": MAIN, "long": (*MAIN, "whitened", "pkd_searched")},
    ),
}
