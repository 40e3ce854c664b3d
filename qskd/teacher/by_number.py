"""Methods that learn query by query, or ask both the same: whether this student and this teacher can be compared so."""

from __future__ import annotations

from qskd.config import Config
from qskd.config.distillation import NONE, MethodSettings, parts_of
from qskd.detectors import read_config
from qskd.detectors.student import queries_of
from qskd.distillation.method import Facts, find_method
from qskd.distillation.qskd.pairing import unequal
from qskd.distillation.shared.asked import check_pair
from qskd.errors import QskdError
from qskd.families.table import find_family
from qskd.teacher.told.results import is_results


def why_not_derived(settings: MethodSettings) -> tuple[str, str] | None:
    """Why what is derived of a record is not what a method would learn from it, and what else would do; None where it is."""
    for path, part in parts_of(settings).items() if settings.method != NONE else ():
        method = f"distillation.{path}method: {part.method}, which"
        if find_method(part.method).needs_of(part).decoder:
            why = "asks the teacher's decoder: of memory that is mirrored or cropped it says other things than of such an image"
            return f"{method} {why}", "another method"
        if part.keeps_queries():
            why = "learns query by query: of a mirrored image the teacher's query i says other things than what is derived"
            return f"{method} {why}", "pairing: rank"
    return None


def check_derived(config: Config) -> None:
    """QskdError where derived views were asked for and a method can't learn from them."""
    taken = config.data.views.derived_taken
    if taken != "none" and (reason := why_not_derived(config.distillation)):
        remedy = f"--set data.views.derived=none, with data.views.count for more views; or {reason[1]}"
        raise QskdError(
            "data.views.derived", f"{taken}, and {reason[0]}", "views that the teacher was asked about", remedy
        )


def check_numbers(config: Config) -> None:
    """QskdError where query i is to learn from query i of a teacher that has not as many queries, or others in each image. Reads no
    weights."""
    for path, part in parts_of(config.distillation).items():
        if not part.keeps_queries():
            continue
        if not _keeps_numbers(config.teacher.path):
            raise QskdError(
                f"distillation.{path}predictions.pairing = index",
                f"a teacher ({config.teacher.path}) whose query i is another one in each image",
                "queries that are the same in every image",
                "use pairing: rank",
            )
        known = read_config(config.teacher.path)
        mine, theirs = queries_of(config.student), find_family(known.model_type, config.teacher.path).num_queries(known)
        if mine != theirs:
            raise unequal(mine, theirs)


def check_asked(config: Config) -> None:
    """QskdError where a method puts the same queries to student and teacher, which can't be asked the same. Reads no weights."""
    for part in parts_of(config.distillation).values():
        where, remedy = find_method(part.method).asks_both(part) if part.method != NONE else ("", "")
        if where:
            student = config.student
            kind = find_family(student.family, "student.family").query_kind
            own = _facts_of(student.init) if student.init else Facts((), family=student.family, query_kind=kind)
            check_pair(where, own, _facts_of(config.teacher.path), remedy)


def _facts_of(checkpoint: str) -> Facts:
    known = read_config(checkpoint)
    kind = find_family(known.model_type, checkpoint).kind_of_queries(known)
    return Facts((), family=known.model_type, query_kind=kind)


def _keeps_numbers(teacher: str) -> bool:
    if is_results(teacher):
        return False
    known = read_config(teacher)
    return not find_family(known.model_type, teacher).chooses_queries(known)
