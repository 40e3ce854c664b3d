"""What a distillation method is: what it needs of the teacher, its loss terms and their weights, what it shows of itself.

A method is one file beside this one (`mimic.py` is the one to copy), or a folder where it is large; docs/methods.md has one
written from nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from qskd.config import DetectionLossConfig
from qskd.config.distillation import NONE, MethodSettings, parts_of
from qskd.distillation.find import CONTRACT, module_of
from qskd.distillation.shared.ramp import distillation_factor
from qskd.distillation.shared.unfaded import boosted
from qskd.errors import QskdError
from qskd.structures import DetectorOutput, LossTerm, Queries, Targets, TeacherNeeds, TeacherRecord

if TYPE_CHECKING:
    from qskd.pictures.panels import Panel
    from qskd.teacher.decoder import TeacherDecoder
    from qskd.teacher.memory.basis import Basis
    from qskd.teacher.memory.moments import Directions
    from qskd.teacher.online import OnlineTeacher


@dataclass(frozen=True)
class Facts:
    """What is known of a network before it has seen an image.

    channels: the width of each encoder memory map, finest first. cells: of each map, in an image of the usual size; empty
    where a cache does not say. layers: of its decoder that are there to learn, or to learn from. chooses_queries: query i is
    another one in each image. None: not known. directions: in which each map varies, where a method asks for them (a teacher's;
    its cache knows). query_kind, query_width: what the `Queries` of its decoder are, "embedding" or "boxes", and the width of the
    embedding or of the states beside the boxes (0: there are none); of a cached teacher known only where a method asks for its
    decoder. reads_raw_memory: of a student, as a `Detector` has it. attended: of a teacher whose cache has the memory of attended
    cells alone. bases: of a teacher whose cache has the memory along few directions, in which, one a map. parts: of several
    teachers, as `TeacherRecord` has it (`qskd.distillation.shared.apart`).
    """

    channels: tuple[int, ...]
    cells: tuple[float, ...] = ()
    family: str = ""
    layers: int | None = None
    queries: int | None = None
    classes: int | None = None
    chooses_queries: bool = False
    directions: tuple[Directions, ...] = field(default=(), compare=False, repr=False)
    query_kind: str = ""
    query_width: int = 0
    reads_raw_memory: bool = False
    attended: bool = False
    bases: tuple[Basis, ...] = field(default=(), compare=False, repr=False)
    parts: tuple[tuple[int, int], ...] = ()

    def basis(self, level: int) -> Basis | None:
        """In which the map is known; None: as it is."""
        return self.bases[level] if self.bases else None


@dataclass(frozen=True)
class Online:
    """The teacher itself, and the pixels of this batch as it wants them (`OnlineTeacher.forward`). least: height and width
    that each image has at least, where the host knows them: a device is then spared a question."""

    teacher: OnlineTeacher
    images: Tensor
    sizes: Tensor
    least: tuple[int, int] | None = None

    def ask(self, needs: TeacherNeeds, choose: Callable[[TeacherRecord], Tensor] | None = None) -> TeacherRecord:
        """The teacher's record of this batch. choose: the queries whose attention is wanted, as of `OnlineTeacher.forward`."""
        record: TeacherRecord = self.teacher(self.images, self.sizes, needs, choose, self.least)
        return record


@dataclass(frozen=True)
class Lesson:
    """One worker's share of a batch, as a method sees it.

    student_assignment [L, B, M], teacher_assignment [L', B, M]: the query of each object, by bipartite matching
    (`qskd.losses.matching.assign`), -1 = none. online, decoder: only where `needs` asked for them. ask_student: what the student's
    own decoder says of its memory when it is asked other queries, which see none of its own; with gradient. boosts: for each
    method of the recipe, in their order, [B]: what each image's gradient is multiplied by (`qskd.distillation.shared.unfaded`).
    costs: of the matchings.
    """

    student: DetectorOutput
    teacher: TeacherRecord
    targets: Targets
    student_assignment: Tensor
    teacher_assignment: Tensor
    online: Online | None = None
    decoder: TeacherDecoder | None = None
    ask_student: Callable[[Queries], DetectorOutput] | None = None
    boosts: tuple[Tensor, ...] = ()
    costs: DetectionLossConfig = field(default_factory=DetectionLossConfig)

    def of_method(self, number: int = 0) -> Lesson:
        """As the recipe's method of this number is given it."""
        if not self.boosts:
            return self
        by, asked = self.boosts[number], self.ask_student
        ask = None if asked is None else lambda queries: boosted(asked(queries), by)
        return replace(self, student=boosted(self.student, by), ask_student=ask, boosts=())


@dataclass(frozen=True, eq=False)
class Sight:
    """One image for `Method.seen`. ask: the teacher's record for what it needs; `choose`, from a record to the queries
    [B, A] whose attention is wanted. targets: the image's objects (B = 1). width, height: of the picture, pixels."""

    ask: Callable[..., TeacherRecord]
    targets: Targets
    costs: Any
    width: int
    height: int


class Seen(ABC):
    """What a method shows of one image: panels for the picture, and words for the terminal."""

    @abstractmethod
    def panels(self, shown: Any) -> Sequence[Panel]:
        """shown: the `qskd.pictures.explain.Explanation` they are part of."""

    def summary(self) -> list[str]:
        return []


class Method(nn.Module, ABC):
    """A distillation method. `forward` maps a lesson to named, unweighted loss terms; a subclass sets `weights`, by term.

    Modules that it makes (projectors) are trained beside the student and belong to the method: they are never exported.
    """

    title: ClassVar[str] = ""  # what the model card says the student was taught with
    citation: ClassVar[str] = ""  # a sentence of the model card: whose method it is, where it is published
    reads_attention: bool = False  # whether it asks the student's `attend`; it then has a gradient
    # Whether `forward` may be traced by torch.compile: it asks no tensor for a value, and of the targets reads tensors alone.
    traceable: bool = False

    def __init__(self, settings: MethodSettings, student: Facts, teacher: Facts) -> None:
        """QskdError where this student can't learn from this teacher in this way."""
        super().__init__()
        self.settings = settings
        self.weights: dict[str, float] = {}
        self.needs = self.needs_of(settings)

    @classmethod
    @abstractmethod
    def needs_of(cls, settings: Any) -> TeacherNeeds:
        """What the teacher's record must hold, known before anything is built."""

    @classmethod
    def one_teacher(cls, settings: Any) -> str:
        """Why it can learn from one teacher alone, in words; empty: several may teach (`TeacherRecord.parts`)."""
        return f"{settings.method}, which compares the student with what one teacher says"

    @classmethod
    def asks_both(cls, settings: Any) -> tuple[str, str]:
        """Where it puts the same queries to both decoders: the field, and what to do where they can't be asked the same
        (`qskd.distillation.shared.asked.check_pair`). Empty: it does not."""
        return "", ""

    @abstractmethod
    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        """The terms that `weights` names."""

    def weights_at(self, step: int, total_steps: int) -> dict[str, float]:
        """Each term's weight at a step (0-based): all warm up and decay together."""
        factor = distillation_factor(step, total_steps, self.settings)
        return {name: factor * weight for name, weight in self.weights.items()}

    @classmethod
    def seen(cls, settings: Any, sight: Sight) -> Seen | None:
        """What `qskd explain` shows of an image beside the detections; None: nothing."""
        return None


def find_method(name: str) -> type[Method]:
    """The method's class: the one that its file defines. QskdError where it defines none, or several."""
    module = module_of(name, "method")
    found = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Method) and each.__module__ == module.__name__
    ]
    if len(found) != 1:
        named = ", ".join(each.__name__ for each in found) or "none"
        raise QskdError(
            f"distillation.method = {name}", f"its file defines {len(found)} methods: {named}", f"one: {CONTRACT}"
        )
    return found[0]


class Several(Method):
    """Methods at the same time. Each keeps its weights, warm-up and decay; terms of `also.NAME` are called after NAME."""

    def __init__(self, settings: MethodSettings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.names = [path.removeprefix("also.").rstrip(".") for path in parts_of(settings)]  # "" of the first one
        self.parts = nn.ModuleList(
            find_method(part.method)(part, student, teacher) for part in parts_of(settings).values()
        )
        for name, method in self._methods():
            for term, weight in method.weights.items():
                if _term(name, term) in self.weights:
                    found = f"two methods with a term called {_term(name, term)}"
                    raise QskdError(
                        f"distillation.also.{name}", found, "terms that can be told apart", "give it another name"
                    )
                self.weights[_term(name, term)] = weight

    @property
    def traceable(self) -> bool:  # type: ignore[override]
        return all(method.traceable for method in self.parts)

    @property
    def reads_attention(self) -> bool:  # type: ignore[override]
        return any(method.reads_attention for method in self.parts)

    def _methods(self) -> list[tuple[str, Method]]:
        return list(zip(self.names, self.parts, strict=True))  # type: ignore[arg-type]

    @classmethod
    def needs_of(cls, settings: MethodSettings) -> TeacherNeeds:
        found: TeacherNeeds | None = None
        for path, part in parts_of(settings).items():
            needs = find_method(part.method).needs_of(part)
            if needs.memory and not needs.attended:
                everywhere = ("method", f"{part.method}, which reads the memory of all cells")
                needs = replace(needs, reasons={"memory": everywhere, **needs.reasons})
            needs = replace(
                needs, reasons={need: (f"{path}{where}", asked) for need, (where, asked) in needs.reasons.items()}
            )
            found = needs if found is None else found.joined(needs)
        assert found is not None
        return found

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        return {
            _term(name, term): value
            for number, (name, method) in enumerate(self._methods())
            for term, value in method(lesson.of_method(number)).items()
        }

    def weights_at(self, step: int, total_steps: int) -> dict[str, float]:
        return {
            _term(name, term): weight
            for name, method in self._methods()
            for term, weight in method.weights_at(step, total_steps).items()
        }


def _term(name: str, term: str) -> str:
    """What a term of `also.NAME` is called in logs: after NAME, unless it is already. The first method's keep their names."""
    return term if not name or term == name or term.startswith(f"{name}_") else f"{name}_{term}"


def methods_of(settings: MethodSettings) -> list[tuple[type[Method], MethodSettings]]:
    """Every method of a recipe with its own section; none for "none"."""
    if settings.method == NONE:
        return []
    return [(find_method(part.method), part) for part in parts_of(settings).values()]


def build_method(settings: MethodSettings, student: Facts, teacher: Facts) -> Method | None:
    """The method, or methods, that the section names; None for "none". QskdError where this teacher does not say what they read."""
    if settings.method == NONE:
        return None
    kind = Several if settings.also else find_method(settings.method)
    needs = kind.needs_of(settings)
    if asked := unsaid(needs) if not teacher.channels else []:
        raise QskdError(
            "distillation.method",
            f"{settings.method}, which reads {' and '.join(asked)}, of a teacher that says boxes and classes alone",
            "a method that reads predictions alone, or a teacher that is a DETR",
            PREDICTIONS_ALONE,
        )
    if teacher.parts:
        check_several(settings)
    return kind(settings, student, teacher)


def check_several(settings: MethodSettings) -> None:
    """QskdError where one of the recipe's methods can't learn from several teachers."""
    for path, part in parts_of(settings).items():
        kind = find_method(part.method)
        needs = kind.needs_of(part)
        why = f"{part.method}, which asks the teacher itself" if needs.online else ""
        why = why or (f"{part.method}, which asks the teacher's decoder" if needs.decoder else kind.one_teacher(part))
        if why:
            raise QskdError(
                f"distillation.{path}method",
                f"{why}, and several teachers (teacher.also)",
                "a method that learns from each teacher by itself: qskd, qskd-tprd",
                "--set distillation.method=qskd; or label with one of the detectors (`qskd label --onto`) and learn from the other",
            )


# What to do about a teacher that says boxes and classes alone.
PREDICTIONS_ALONE = (
    "--set distillation.features.weight=0: QSKD without AGFD learns from the last layer's predictions alone "
    "(docs/teachers.md)"
)


def unsaid(needs: TeacherNeeds | None) -> list[str]:
    """What of a method's needs a teacher of boxes and classes alone does not say."""
    if needs is None:
        return []
    asked = {
        "memory": needs.memory,
        "attention": needs.attention,
        "decoder": needs.decoder,
        "every layer": needs.all_layers,
    }
    return [name for name, is_asked in asked.items() if is_asked] + sorted(needs.columns)


def teacher_needs(settings: MethodSettings) -> TeacherNeeds | None:
    """What the recipe's methods read of the teacher's record; None without a method."""
    if settings.method == NONE:
        return None
    return (Several if settings.also else find_method(settings.method)).needs_of(settings)


def last_layer(teacher: TeacherRecord) -> TeacherRecord:
    """The record with the last decoder layer's predictions alone: it may hold more than a method reads."""
    absent = None if teacher.absent is None else teacher.absent[-1:]
    return replace(teacher, logits=teacher.logits[-1:], boxes_cxcywh=teacher.boxes_cxcywh[-1:], absent=absent)
