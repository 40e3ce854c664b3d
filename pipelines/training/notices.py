"""What a recipe makes of a training without saying so: told when it begins, and by `--dry-run`."""

from __future__ import annotations

from qskd.config import FACTS, Config
from qskd.config.backbone import KINDS
from qskd.detectors import read_config
from qskd.detectors.student import family_of
from qskd.teacher.by_number import why_not_derived
from qskd.training.compiling import compiles_whole

RANDOM_BACKBONE = (
    "starts from random weights, which a detection loss alone hardly trains: student.backbone.init names pretrained ones; "
    "detection.dense_weight=1 trains random ones"
)
FLIPS = "; data.views.derived=flip mirrors them anew in each epoch, from one view"
FEW_EPOCHS = 4  # a fixed view is no loss to a training that shows each image a few times


def notices(config: Config, epochs: float) -> list[str]:
    """A sentence each. epochs: of this training."""
    found = []
    views, family = config.data.views, family_of(config.student)
    facts = FACTS[family]
    fresh_flips = views.derived_taken != "none" and 0 < views.flip_probability < 1
    fresh_crops = views.derived_taken == "flip_and_crop"
    shares = {
        "flipped": 0.0 if fresh_flips else views.flip_probability,
        "cropped": 0.0 if fresh_crops else views.crop_probability,
    }
    if views.count == 1 and epochs > FEW_EPOCHS and any(shares.values()):
        how = " and ".join(said for said, share in shares.items() if share)
        price = "in a cache N times as large" if config.teacher.cache.path else "at no cost, since nothing is cached"
        reason = why_not_derived(config.distillation) if config.teacher.cache.path else None
        flips = f"; a flip anew in each epoch is not derived from it for {reason[0]}" if reason else FLIPS
        found.append(
            f"data.views.count = 1: each image is {how} in one way, the same in all {epochs:g} epochs. "
            f"data.views.count=N shows N ways, {price}{flips if shares['flipped'] % 1 else ''}"
        )
    if facts.missing and not config.student.init:
        found.append(
            f"student.family = {family} trains without {facts.missing}: with and without a teacher it will be behind "
            "what its authors published (docs/families.md)"
        )
    student = config.student
    if not (student.init or student.inherit or student.backbone.init or config.detection.dense_weight):
        found.append(f"student.backbone {RANDOM_BACKBONE}")
    decay = config.training.backbone_layer_decay
    if decay not in (None, 1.0):
        backbone = read_config(student.init).backbone_config.model_type if student.init else student.backbone.type
        if backbone in KINDS and not KINDS[backbone].patch:
            found.append(f"training.backbone_layer_decay = {decay:g} has no effect: a {backbone} is no ViT")
    if facts.hybrid and facts.batch_norms and config.compute.workers > 1:
        found.append(
            f"a {family} has batch normalisation outside its backbone: each of the {config.compute.workers} workers "
            f"normalises its own {max(1, config.training.batch_size // config.compute.workers)} images of a batch"
        )
    if config.compute.compile and not compiles_whole(config):
        found.append(
            "compute.compile compiles the backbone and the losses alone, the backbone a few times for other sizes. To compile the "
            "whole student it takes images of one size (student.resize.mode=square, no augmentation.scales) and "
            "detection.query_groups=1"
        )
    if config.augmentation.changes_sizes:
        found += _of_sizes(config, facts.hybrid)
    return found


def _of_sizes(config: Config, hybrid: bool) -> list[str]:
    """What a student of changing size costs. In steps of 32 pixels, where a checkpoint does not say its stride here."""
    student = config.student
    base, unit = student.resize.size, 1
    if hybrid or student.backbone.is_vit:
        unit = 32 if student.init else student.backbone.unit
    sizes = config.augmentation.sizes(base, unit)
    pixels = [(size / base) ** 2 for size in sizes]
    return [
        f"augmentation.scales: the student sees {min(sizes)} to {max(sizes)} pixels, {sum(pixels) / len(pixels):.3g} times those "
        f"of student.resize on average and {max(pixels):.3g} times in the largest steps, which must fit into memory; "
        f"evaluation, and the saved student, are at {base}"
    ]
