"""Methods that learn query by query: where the teacher's query i is not the one that they take it for."""

from __future__ import annotations

from qskd.config import Config
from qskd.config.distillation import parts_of
from qskd.detectors import read_config
from qskd.distillation.method import find_method
from qskd.errors import QskdError
from qskd.families.table import find_family
from qskd.teacher.told.results import is_results


def check_derived(config: Config) -> None:
    """QskdError where what is derived of a record is not what a method would learn from it."""
    taken = config.data.views.derived_taken
    for path, part in parts_of(config.distillation).items() if taken != "none" else ():
        why, other = "", "another method"
        if find_method(part.method).needs_of(part).decoder:
            why = "asks the teacher's decoder: of memory that is mirrored or cropped it says other things than of such an image"
        elif part.keeps_queries():
            why = "learns query by query: of a mirrored image the teacher's query i says other things than what is derived"
            other = "pairing: rank"
        if why:
            found = f"{taken}, and distillation.{path}method: {part.method}, which {why}"
            remedy = f"--set data.views.derived=none, with data.views.count for more views; or {other}"
            raise QskdError("data.views.derived", found, "views that the teacher was asked about", remedy)


def check_numbers(config: Config) -> None:
    """QskdError where query i is to learn from query i of a teacher whose queries are others in each image. Reads no weights."""
    for path, part in parts_of(config.distillation).items():
        if not part.keeps_queries() or _keeps_numbers(config.teacher.path):
            continue
        raise QskdError(
            f"distillation.{path}predictions.pairing = index",
            f"a teacher ({config.teacher.path}) whose query i is another one in each image",
            "queries that are the same in every image",
            "use pairing: rank",
        )


def _keeps_numbers(teacher: str) -> bool:
    if is_results(teacher):
        return False
    known = read_config(teacher)
    return not find_family(known.model_type, teacher).chooses_queries(known)
