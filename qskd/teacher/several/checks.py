"""What several teachers in one recipe can't do, found before anything starts."""

from __future__ import annotations

from qskd.config import BOXES_ALONE, Config
from qskd.detectors import read_config
from qskd.distillation.method import PREDICTIONS_ALONE, check_several, teacher_needs, unsaid
from qskd.errors import QskdError
from qskd.teacher.several.members import of_field, paths_of
from qskd.teacher.told.results import is_results


def check_several_teachers(config: Config) -> None:
    """QskdError where a recipe with `teacher.also` asks for what teachers together don't say. Reads no weights."""
    if not config.teacher.also or config.distillation.method == "none":
        return
    check_several(config.distillation)
    for field, path in paths_of(config).items():
        if is_results(path):
            raise QskdError(
                field,
                f"{path}, a file of detections, beside another teacher",
                "detectors that can be asked: a file's boxes are read from a cache alone",
                "join its labels to the dataset's instead (`qskd prepare`), or let it be the only teacher",
            )
    if config.teacher.cache.columns:
        raise QskdError(
            "teacher.cache.columns",
            f"{', '.join(config.teacher.cache.columns)}, and several teachers (teacher.also)",
            "none: no method that reads these learns from several",
            "take them out",
        )
    needs = teacher_needs(config.distillation)
    for field, path in paths_of(config).items():
        with of_field(field, path):
            kind = read_config(path).model_type
        if kind in BOXES_ALONE and (asked := unsaid(needs)):
            raise QskdError(
                field,
                f"{path}, which says boxes and classes alone, and distillation.method={config.distillation.method}, which "
                f"reads {' and '.join(asked)} of each teacher",
                "teachers that are DETRs, or a method that reads predictions alone",
                PREDICTIONS_ALONE,
            )
    if config.teacher.cache.all_layers or (needs is not None and needs.all_layers):
        _check_layers(config)


def _check_layers(config: Config) -> None:
    found = {path: _layers(path) for path in paths_of(config).values()}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{layers} of {path}" for path, layers in found.items())
        raise QskdError(
            "teacher.also",
            f"{said} decoder layers, and a recipe that reads every layer",
            "equally many, or the last one of each",
            "--set distillation.predictions.teacher_layers=last --set distillation.features.attention_layers=last "
            "--set teacher.cache.all_layers=false --set teacher.cache.attention_layers=last",
        )


def _layers(path: str) -> int:
    config = read_config(path)
    return 1 if config.model_type in BOXES_ALONE else int(config.decoder_layers)
