"""transformers' DETR families behind one `DetectorOutput`: load, build, run, look into and save them."""

from qskd.imports import without_collecting

with without_collecting():
    from qskd.checkpoints.preprocessing import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        Preprocessing,
        preprocessing_of,
        read_preprocessing,
        to_pixels,
    )
    from qskd.checkpoints.weights import read_config, uri_refused
    from qskd.detectors.checkpoint import (
        asked_in_words,
        check_classes,
        check_saveable,
        checkpoint_digests,
        classes_of,
        load_detector,
        prompt_of,
        replacing,
        save_detector,
    )
    from qskd.detectors.detector import Detector, labels_of
    from qskd.detectors.inherit import Inheritance, fitting_sizes, inherit
    from qskd.detectors.student import build_student, describe_student, student_cost
    from qskd.detectors.teachers.prompt import words_for
    from qskd.families.table import FAMILIES

__all__ = [
    "FAMILIES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Detector",
    "Inheritance",
    "Preprocessing",
    "asked_in_words",
    "build_student",
    "check_classes",
    "check_saveable",
    "checkpoint_digests",
    "classes_of",
    "describe_student",
    "fitting_sizes",
    "inherit",
    "labels_of",
    "load_detector",
    "preprocessing_of",
    "prompt_of",
    "read_config",
    "read_preprocessing",
    "replacing",
    "save_detector",
    "student_cost",
    "to_pixels",
    "uri_refused",
    "words_for",
]
