"""The rows: what a variant sets otherwise than the shared recipe. Data about choices; nothing runs here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.selecting.job import By

_NO_FEATURES = "distillation.features.weight=0"
_NO_PREDICTIONS = "distillation.predictions.weight=0"
_WHITENED = "distillation.features.whitening=1.0"
_FLIPS = "data.views.derived=flip"
_CONSTANT = "distillation.decay=0"
_ALL_QUERIES = ("distillation.selection.band_weights=[1.0, 1.0]", "distillation.selection.max_per_object=0")


# Caches beside the shared one, each in a folder of its own: what is said of them otherwise.
SHARES = {"share97": 0.97, "share90": 0.9, "share80": 0.8}  # of the memory's variance
CACHES = {
    "states": ("teacher.cache.columns=[states]",),
    "sides": ("teacher.cache.columns=[sides]",),
    "levels1": ("teacher.levels=[1]",),
    "layers": ("teacher.cache.attention_layers=all",),
    **{name: (f"teacher.cache.memory_share={share}",) for name, share in SHARES.items()},
}


@dataclass(frozen=True)
class Variant:
    """overrides: of the shared recipe. kind: the verb. time_of: a variant whose wall-clock time it gets, instead of its
    steps (`benchmarks.evidence.clock` measured the ratio). unlabeled: further images, without labels, half of each batch. train: as
    many labelled images, where they are not the task's own; those are the first of them. selected: the --by of `qskd select`, which
    chooses the quarter of the labelled images (`SELECTED`) that are trained on, by the cell's seed where that way has chance in it.

    cache: a name in `CACHES`, where the shared one won't do. told: the teacher as a file that says boxes and classes alone,
    "onnx" or "json", with a cache of its own.
    after: the variant whose student, in float, is quantised once it is trained."""

    title: str
    overrides: tuple[str, ...] = ()
    kind: str = "distill"
    time_of: str = ""
    unlabeled: int = 0
    train: int = 0
    selected: By | None = None
    cache: str = ""
    told: str = ""
    after: str = ""


VARIANTS = {
    "none": Variant("no teacher", kind="train"),
    "none_equal_time": Variant("no teacher, as many seconds as QSKD took", kind="train", time_of="qskd"),
    "agfd": Variant("AGFD alone", (_NO_PREDICTIONS,)),
    "lapd": Variant("LAPD alone", (_NO_FEATURES,)),
    "qskd": Variant("QSKD, not whitened"),
    "whitened": Variant("QSKD, the default (whitened)", (_WHITENED,)),
    "qskd_constant": Variant("QSKD, its weights constant", (_CONSTANT,)),
    "agfd_constant": Variant("AGFD alone, its weight constant", (_NO_PREDICTIONS, _CONSTANT)),
    "none_flips": Variant("no teacher, fresh flips", (_FLIPS,), kind="train"),
    "qskd_flips": Variant("QSKD, fresh flips derived from the cached view", (_FLIPS,)),
    "qskd_flips_whitened": Variant("QSKD, the default (whitened), fresh flips", (_FLIPS, _WHITENED)),
    "qskd_flips_online": Variant("QSKD, fresh flips, teacher online", (_FLIPS, "teacher.cache.path=")),
    "qskd_online": Variant("QSKD, teacher online", ("teacher.cache.path=",)),
    "positives": Variant("positives only", ("distillation.selection.band_weights=[0.0, 0.0]",)),
    "hard_0.3": Variant("hard negatives from GIoU 0.3", ("distillation.selection.boundaries=[0.3]",)),
    "hard_0.7": Variant("hard negatives from GIoU 0.7", ("distillation.selection.boundaries=[0.7]",)),
    "all": Variant("all queries", _ALL_QUERIES),
    "random": Variant("as many queries, at random", ("distillation.selection.shuffled=true",)),
    "mimic": Variant("plain feature mimicking", (_NO_PREDICTIONS, "distillation.features.background=1.0")),
    "global": Variant(
        "global Hungarian predictions (DETRDistill's logits term)",
        (
            _NO_FEATURES,
            "distillation.predictions.pairing=global",
            "distillation.predictions.pair_weight=uniform",
            "distillation.predictions.teacher_layers=same_index",
        ),
    ),
}


MECHANISM = tuple(VARIANTS)  # what QSKD's parts do; the rest is what a student's own training does
# What is inherited learns at a tenth of the learning rate: best of 0.03, 0.1 and 1 for `near`, taught and not (seed 100, short).
GENTLE = ("none", "whitened", "none_flips", "qskd_flips_whitened")
VARIANTS |= {
    f"{name}_gentle": replace(
        VARIANTS[name],
        title=f"{VARIANTS[name].title}, inherited layers at a tenth of the learning rate",
        overrides=(*VARIANTS[name].overrides, "training.inherited_learning_rate_scale=0.1"),
    )
    for name in GENTLE
}
# Of a training with fresh flips, the default: one thing otherwise, without a teacher and with QSKD.
OTHERWISE = {
    "no_denoising": ("without denoising queries", "detection.denoising_queries=0"),
    "no_sides": ("without FGL and DDF", "detection.fgl_weight=0", "detection.ddf_weight=0"),
    "no_average": ("without the average of the weights", "training.ema_decay=0"),
    "light": ("augmentation preset light", "augmentation.preset=light"),
    "rtdetr": ("augmentation preset rtdetr", "augmentation.preset=rtdetr"),
}
VARIANTS |= {
    f"{name}_flips_{what}": Variant(f"{VARIANTS[name].title}, fresh flips, {title}", (_FLIPS, *fields), kind)
    for what, (title, *fields) in OTHERWISE.items()
    for name, kind in (("none", "train"), ("qskd", "distill"))
}
VARIANTS["qskd_flips_coarse"] = Variant(
    "QSKD, fresh flips, without the teacher's finest map", (_FLIPS,), cache="levels1"
)
# A teacher that can only be asked, or has been: its graph with the logits of every query, or its boxes of score 0.05 and up.
VARIANTS["told_onnx"] = Variant("LAPD alone, the teacher an ONNX file with all logits", (_NO_FEATURES,), told="onnx")
VARIANTS["told_json"] = Variant("LAPD alone, the teacher a file of detections", (_NO_FEATURES,), told="json")
# New images: what a teacher says of them, and what their true labels would have given.
NEW_IMAGES = (6_000, 18_000, 48_000)
VARIANTS |= {
    f"qskd_flips_unlabeled{count // 1000}": Variant(
        f"QSKD, fresh flips, and {count:,} images without labels", (_FLIPS,), unlabeled=count
    )
    for count in NEW_IMAGES
}
VARIANTS |= {
    f"qskd_flips_whitened_unlabeled{count // 1000}": Variant(
        f"QSKD, the default (whitened), fresh flips, and {count:,} images without labels",
        (_FLIPS, _WHITENED),
        unlabeled=count,
    )
    for count in NEW_IMAGES[1:]
}
# A quarter of the labelled images, at as many steps as all of them get.
SELECTED = 1_500
_CHOSEN: dict[By, str] = {
    "random": "at random",
    "classes": "by classes",
    "uncertainty": "by the teacher's uncertainty",
    "gradients": "by matched gradients",
}
BY_CHOICE = tuple(f"qskd_flips_whitened_{by}" for by in _CHOSEN)
VARIANTS |= {
    f"qskd_flips_whitened_{by}": Variant(
        f"QSKD, the default (whitened), fresh flips, of {SELECTED:,} images chosen {how}",
        (_FLIPS, _WHITENED),
        selected=by,
    )
    for by, how in _CHOSEN.items()
}
VARIANTS["none_flips_labelled24"] = Variant(
    "no teacher, fresh flips, 18,000 more images with their true labels", (_FLIPS,), "train", train=24_000
)


# Every method of docs/methods.md in the place of QSKD, with the weights that were released with it or stand in its paper, which are
# its defaults; what is ours and has none of a paper's stands beside QSKD.
def _method(name: str, *fields: str, title: str = "", cache: str = "") -> Variant:
    return Variant(title or name, (f"distillation.method={name}", *fields), cache=cache)


def _beside(name: str, title: str, cache: str = "") -> Variant:
    return Variant(f"QSKD and {title}", (f"distillation.also.{name}={{}}",), cache=cache)


METHODS = {
    "whitened_half": Variant("QSKD, whitened by half (alpha 0.5)", ("distillation.features.whitening=0.5",)),
    "whitened_decoder": Variant(
        "QSKD, AGFD weighed by what moves the decoder",
        (_WHITENED, "distillation.features.whitened_by=decoder"),
    ),
    "importance": Variant("QSKD, AGFD with learned importances", ("distillation.features.importance=true",)),
    "tprd": _method("qskd-tprd", title="QSKD as TPRD's re-implementation reads it", cache="layers"),
    "fitnets": _method("mimic", title="FitNets (plain mimicking, its own weights)"),
    "cwd": _method("cwd", title="CWD"),
    "pkd": _method("pkd", title="PKD"),
    "mgd": _method("mgd", title="MGD"),
    "crosskd": _method("crosskd", title="CrossKD"),
    "kd_detr": _method("kd-detr", title="KD-DETR, specific and 300 general points"),
    "detrdistill": _method("detrdistill", title="DETRDistill", cache="states"),
    "d3etr": _method("d3etr", title="D3ETR, without self-attention"),
    "tar": _method("tar", title="Task Adaptive Regularization"),
    "perturbed": _beside("perturbed", "answers to moved queries"),
    "adversarial": _beside("adversarial", "a critic on objects"),
    "relations": _beside("relations", "relations of query states", cache="states"),
}
# Where a search on seed 100 found a weight by 0.3 points better than the released one; docs/evidence.md has it whole.
SEARCHED = {
    "tar": ("Task Adaptive Regularization, features' weight 15 in place of 50", "distillation.feature_weight=15"),
    "pkd": ("PKD, weight 30 in place of 10", "distillation.weight=30"),
    "cwd": ("CWD, weight 100 in place of 1", "distillation.weight=100"),
    "crosskd": (
        "CrossKD, its weights ten times the released ones",
        *(f"distillation.{part}_weight=10" for part in ("class", "l1", "giou")),
    ),
    "d3etr": ("D3ETR, attention's weight 300 in place of 1,000", "distillation.attention_weight=300"),
}
# Chosen on seeds 100 and 101 (long budget): 10 gives nothing, 30 gives 0.6 and 0.3.
METHODS["whitened_pkd"] = Variant(
    "QSKD, the default (whitened), and PKD with weight 30", (_WHITENED, "distillation.also.pkd.weight=30")
)
VARIANTS["qskd_flips_whitened_pkd"] = replace(
    METHODS["whitened_pkd"],
    title=f"{METHODS['whitened_pkd'].title}, fresh flips",
    overrides=(_FLIPS, *METHODS["whitened_pkd"].overrides),
)
METHODS |= {
    f"{name}_searched": replace(METHODS[name], title=title, overrides=(*METHODS[name].overrides, *fields))
    for name, (title, *fields) in SEARCHED.items()
}
VARIANTS |= METHODS
# What a box's sides are thought to be, from a D-FINE to a D-FINE: alone, and beside the default.
_FLIPPED_SIDES = (_FLIPS, "distillation.method=localization")
VARIANTS["ld"] = Variant("localization distillation alone, fresh flips", _FLIPPED_SIDES, cache="sides")
VARIANTS["ld_main"] = Variant(
    "localization distillation alone, of positives alone, fresh flips",
    (*_FLIPPED_SIDES, "distillation.region_weight=0"),
    cache="sides",
)
VARIANTS["qskd_ld"] = Variant(
    "QSKD (whitened) and localization distillation, fresh flips",
    (_FLIPS, _WHITENED, "distillation.also.localization={}"),
    cache="sides",
)
# Memory in few numbers a cell.
VARIANTS |= {
    f"qskd_{name}": Variant(f"QSKD, of {share:.0%} of the memory's variance", cache=name)
    for name, share in SHARES.items()
}
VARIANTS |= {
    f"whitened_{name}": replace(
        VARIANTS["whitened"], title=f"QSKD, whitened, of {share:.0%} of the memory's variance", cache=name
    )
    for name, share in SHARES.items()
}
VARIANTS |= {
    f"qskd_flips_{name}": Variant(
        f"QSKD, fresh flips derived, of {share:.0%} of the memory's variance", (_FLIPS,), cache=name
    )
    for name, share in SHARES.items()
}

# Students of few bits: each number of bits, by each teaching. Recipe and float rows are those of `none` and `qskd`.
BITS = {"w8a8": "w8a8", "w4a4": "w4a4-attn8", "w3a3": "w3a3-attn8", "w2a2": "w2a2-attn8"}
# Chosen on seed 100: w4a4 29.2 with 0.1, 28.9 with 0.5, 26.2 with the paper's 2.5 (29.7 without Q-DETR); w2a2 15.5 with 0.1,
# 14.4 with 0.5 (15.4).
_QDETR_WEIGHT = 0.1


def _qdetr(alignment: str, threshold: float) -> tuple[str, ...]:
    fields = {"weight": _QDETR_WEIGHT, "alignment": alignment, "threshold": threshold}
    return tuple(f"distillation.also.qdetr.{name}={value}" for name, value in fields.items())


TAUGHT = {
    "after_none": Variant("post-training", kind="train", after="none"),
    "after_qskd": Variant("QSKD in float, then post-training", after="qskd"),
    "none": Variant("no teacher", kind="train"),
    "qskd": Variant("QSKD"),
    "matching": Variant("QSKD and Q-DETR, matching alone", _qdetr("false", 0.6), cache="states"),
    "alignment": Variant("QSKD and Q-DETR, alignment alone", _qdetr("true", 0.0), cache="states"),
    "qdetr": Variant("QSKD and Q-DETR, both", _qdetr("true", 0.6), cache="states"),
}
FEW_BITS = {
    f"{short}_{name}": replace(
        taught, title=f"{bits}: {taught.title}", overrides=(*taught.overrides, f"student.quantization={bits}")
    )
    for short, bits in BITS.items()
    for name, taught in TAUGHT.items()
}
VARIANTS |= FEW_BITS

# "QSKD" is a row's name for what it was when rows were begun: without whitening, which these rows made the default.
_NOT_WHITENED = "distillation.features.whitening=0"
_SAY_OTHERWISE = ("distillation.method=", "distillation.features.whitening=")
VARIANTS = {
    name: replace(variant, overrides=(_NOT_WHITENED, *variant.overrides))
    if variant.kind == "distill" and not any(field.startswith(_SAY_OTHERWISE) for field in variant.overrides)
    else variant
    for name, variant in VARIANTS.items()
}
