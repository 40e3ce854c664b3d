"""Methods that ask the teacher's decoder: CrossKD and KD-DETR equal slow loops, and run on every share that a worker may have."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import cache, partial
from math import exp, log
from typing import Any

import pytest
import tiny
import torch
from test_feature_methods import mixed, settings_of
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou
from qskd.config import DetectionLossConfig
from qskd.datasets.batch import train_batch
from qskd.datasets.classes import NOBODY
from qskd.detectors import Detector, to_pixels
from qskd.detectors.decoding import decode, through_layers
from qskd.distillation.method import Facts, Lesson, Method, build_method
from qskd.distillation.shared.apart import prediction
from qskd.errors import QskdError
from qskd.losses.matching import assign
from qskd.structures import SILENT_LOGIT, DetectorOutput, LossTerm, Queries, Targets, TeacherNeeds
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import collate, columns_for, encode
from qskd.teacher.online import OnlineTeacher, facts_of
from qskd.training.step import Training

COUNTS = (2, 0, 1)
NEEDS = TeacherNeeds(memory=True, decoder=True)
KD = {"method": "kd-detr", "general_points": 7}
SETTINGS: list[dict[str, Any]] = [
    {"method": "crosskd"},
    {"method": "crosskd", "class_gamma": 0.0, "teacher_forcing": False},
    KD,
    {**KD, "points": "general", "temperature": 2.0},
    {**KD, "points": "specific"},
]
PAIR = {"crosskd": ("deformable", "conditional"), "kd-detr": ("conditional", "conditional")}  # student, teacher


@cache
def networks(student: str, teacher: str) -> tuple[Detector, OnlineTeacher]:
    """The teacher is wider, with other numbers of queries, layers and classes."""
    config = tiny.recipe(tiny.FAMILIES[student]).student
    detector = tiny.silent_student(config, tiny.LABELS, 0)
    tiny.shake(detector, 5)
    return detector.eval(), tiny.random_teacher(teacher)


def built(student: Detector, teacher: OnlineTeacher, **given: Any) -> Any:
    torch.manual_seed(0)
    method = build_method(settings_of(**given), facts_of(student, teacher.resize), teacher.facts)
    assert method is not None
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return method


def lesson_of(student: Detector, teacher: OnlineTeacher, images: slice = slice(None)) -> Lesson:
    """What a worker with these images of the batch has."""
    batch = train_batch({name: array[images] for name, array in tiny.arrays(COUNTS).items()})
    pixels, mask = to_pixels(batch.images, batch.sizes, student.mean, student.std)
    output = student(pixels, mask, with_attention=False)
    record = teacher(batch.images, batch.sizes, NEEDS)
    none = torch.zeros(len(output.logits), len(batch.images), 2, dtype=torch.int64)

    def ask(queries: Queries) -> DetectorOutput:
        return decode(student, output.memory, output.memory_valid, queries, masked=False).output

    return Lesson(output, record, batch.targets, none, none[:1], decoder=teacher.decoder, ask_student=ask)


@pytest.mark.parametrize(
    "given", [{"method": "d3etr", "attention_weight": 0}, {"method": "detrdistill", "feature_weight": 0}]
)
def test_the_teacher_s_own_queries_teach_what_its_decoder_says_to_them(given: dict[str, Any]) -> None:
    """Whatever the record has at their places: a teacher may choose its queries from memory, and others from int8."""
    student, teacher = networks("refined", "refined")
    method, lesson, batch = built(student, teacher, **given), lesson_of(student, teacher), tiny.batch_of(*COUNTS)
    record = teacher(batch.images, batch.sizes, method.needs)
    turned = replace(record, logits=record.logits.flip(2), boxes_cxcywh=record.boxes_cxcywh.flip(2))
    found, other = (
        method(
            replace(
                lesson,
                teacher=said,
                teacher_assignment=assign([prediction(said)], batch.targets, DetectionLossConfig())[0],
            )
        )
        for said in (record, turned)
    )
    for name in {"d3_fixed_class", "d3_fixed_l1", "d3_fixed_giou", "dd_prior"} & method.weights.keys():
        assert found[name].total.item() > 0
        torch.testing.assert_close(found[name].total, other[name].total, msg=name)


@pytest.mark.parametrize(
    "given", [{"method": "d3etr", "attention_weight": 0}, {"method": "detrdistill", "feature_weight": 0}, KD]
)
def test_of_a_class_that_the_teacher_knows_nothing_of_no_asked_query_learns(given: dict[str, Any]) -> None:
    """Not that it is background either, where the student's own queries learn from its objects."""
    student, whole = networks("conditional", "conditional")
    slots = whole.get_buffer("class_slots").tolist()
    teacher = OnlineTeacher(whole.detector, (slots[0], NOBODY, *slots[2:]), whole.preprocessing)
    method, lesson, batch = built(student, teacher, **given), lesson_of(student, teacher), tiny.batch_of(*COUNTS)
    record, asked = teacher(batch.images, batch.sizes, method.needs), []
    assert lesson.ask_student is not None
    ask = lesson.ask_student

    def heard(queries: Queries) -> DetectorOutput:
        said = ask(queries)
        said.logits.retain_grad()
        asked.append(said.logits)
        return said

    (theirs,) = assign([prediction(record)], batch.targets, DetectionLossConfig())
    terms = method(replace(lesson, teacher=record, teacher_assignment=theirs, ask_student=heard))
    sum(term.total for term in terms.values()).backward()
    assert asked
    for logits in asked:
        assert logits.grad is not None
        assert logits.grad[..., [0, 2]].any()
        assert not logits.grad[..., 1].any()


def case(given: dict[str, Any]) -> tuple[Any, Lesson]:
    student, teacher = networks(*PAIR[given["method"]])
    return built(student, teacher, **given), lesson_of(student, teacher)


def sigmoid(value: float) -> float:
    return 1 / (1 + exp(-value))


def box_losses(mine: Tensor, theirs: Tensor) -> tuple[float, float]:
    distance = sum(abs(a - b) for a, b in zip(mine.tolist(), theirs.tolist(), strict=True))
    return distance, 1 - giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs)).item()


def slow_crosskd(method: Any, lesson: Lesson) -> dict[str, tuple[float, float]]:
    decoder, settings = lesson.decoder, method.settings
    assert decoder is not None
    (weight, bias), memory = method.projectors[0].parameters(), lesson.student.memory[0]
    shown = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], memory) + bias[:, None, None]
    assert shown.shape == lesson.teacher.memory[0].shape  # else it would be resampled
    slots = [tiny.TEACHER_LABELS.index(label) for label in tiny.LABELS]
    own = decode(decoder.detector, lesson.teacher.memory, lesson.teacher.memory_valid)
    if settings.teacher_forcing:
        crossed = through_layers(decoder.detector, own, (shown,))
    else:
        crossed = decode(decoder.detector, (shown,), lesson.teacher.memory_valid).output
    totals, weights = [0.0, 0.0, 0.0], 0.0
    layers, images, queries = own.output.logits.shape[:3]
    for layer, image, query in itertools.product(range(layers), range(images), range(queries)):
        at = (layer, image, query)
        wanted = [sigmoid(own.output.logits[at][slot].item()) for slot in slots]
        for slot, goal in zip(slots, wanted, strict=True):
            found = sigmoid(crossed.logits[at][slot].item())
            entropy = -goal * log(found) - (1 - goal) * log(1 - found)
            totals[0] += abs(goal - found) ** settings.class_gamma * entropy
        weights += max(wanted)
        for part, loss in enumerate(box_losses(crossed.boxes_cxcywh[at], own.output.boxes_cxcywh[at])):
            totals[1 + part] += max(wanted) * loss
    counts = [images * queries, weights / layers, weights / layers]
    return dict(zip(("cross_class", "cross_l1", "cross_giou"), zip(totals, counts, strict=True), strict=True))


def slow_points(method: Any, rows: Tensor, step: int) -> Tensor:
    """The embedding of the general queries of a step."""
    number, start, found = method.settings.general_points, mixed(mixed(int(method.seed)) + step), []
    for point in range(number):
        u = [(mixed(start + 3 * point + column) >> 8) / 2**24 for column in range(3)]
        one, other = (rows[int(each * len(rows))] for each in u[:2])
        found.append(one + u[2] * (other - one))
    return torch.stack(found)


def softmax(values: list[float]) -> list[float]:
    whole = sum(map(exp, values))
    return [exp(value) / whole for value in values]


def slow_kd_detr(method: Any, lesson: Lesson) -> dict[str, tuple[float, float]]:
    decoder, settings, heat = lesson.decoder, method.settings, method.settings.temperature
    assert decoder is not None
    assert lesson.ask_student is not None
    rows = decoder.detector.model.model.query_position_embeddings.weight
    groups = {"specific": [rows], "general": [slow_points(method, rows, 0)]}
    groups["both"] = groups["specific"] + groups["general"]
    slots, totals = [tiny.TEACHER_LABELS.index(label) for label in tiny.LABELS], [0.0, 0.0, 0.0]
    for asked in groups[settings.points]:
        theirs = decode(
            decoder.detector, lesson.teacher.memory, lesson.teacher.memory_valid, Queries(embedding=asked[None])
        ).output
        said = lesson.ask_student(Queries(embedding=(asked @ method.asked.adapter.weight.T)[None]))
        for image in range(len(said.logits[0])):
            logits = [[theirs.logits[-1, image, query, slot].item() for slot in slots] for query in range(len(asked))]
            weight = [max(map(sigmoid, each)) for each in logits]
            for layer, query in itertools.product(range(len(said.logits)), range(len(asked))):
                share = weight[query] / sum(weight)
                goal = softmax([each / heat for each in logits[query]])
                mine = softmax([each / heat for each in said.logits[layer, image, query].tolist()])
                totals[0] += share * heat**2 * sum(t * log(t / s) for t, s in zip(goal, mine, strict=True))
                pair = said.boxes_cxcywh[layer, image, query], theirs.boxes_cxcywh[-1, image, query]
                for part, loss in enumerate(box_losses(*pair)):
                    totals[1 + part] += share * loss
    count = float(len(lesson.targets.counts))
    return {name: (total, count) for name, total in zip(("kd_class", "kd_l1", "kd_giou"), totals, strict=True)}


SLOW = {"crosskd": slow_crosskd, "kd-detr": slow_kd_detr}


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_a_method_on_the_teacher_s_decoder_equals_the_loops(given: dict[str, Any]) -> None:
    if given["method"] == "crosskd":  # maps of one size, so that the loops need not resample
        student, teacher = networks("conditional", "conditional")
        method, lesson = built(student, teacher, **given), lesson_of(student, teacher)
    else:
        method, lesson = case(given)
    assert (method.needs.memory, method.needs.decoder, method.needs.online) == (True, True, False)
    with torch.no_grad():
        expected = SLOW[given["method"]](method, lesson)
    terms: dict[str, LossTerm] = method(lesson)
    assert terms.keys() == method.weights.keys() == method.settings.weight_fields().keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert terms[name].total.item() == pytest.approx(total, rel=1e-3), name
        assert terms[name].count.item() == pytest.approx(count, rel=1e-4), name
    sum(term.total for term in terms.values()).backward()  # type: ignore[union-attr]
    assert all(each.grad is not None and each.grad.isfinite().all() for each in method.parameters())


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_two_workers_shares_sum_to_the_batch_s_terms_at_every_step(given: dict[str, Any]) -> None:
    student, teacher = networks(*PAIR[given["method"]])
    method = built(student, teacher, **given)
    workers = [copy.deepcopy(method) for _ in range(2)]
    shares = [lesson_of(student, teacher, images) for images in (slice(0, 2), slice(2, 3))]
    whole = lesson_of(student, teacher)
    for _ in range(2):
        found = [worker(share) for worker, share in zip(workers, shares, strict=True)]
        for name, term in method(whole).items():
            assert sum(each[name].total.item() for each in found) == pytest.approx(term.total.item(), rel=1e-3), name
            assert sum(each[name].count.item() for each in found) == pytest.approx(term.count.item(), rel=1e-4), name


def test_general_points_are_others_at_every_step_and_the_same_in_a_resumed_run() -> None:
    method, lesson = case({**KD, "points": "general"})
    rows = lesson.decoder.detector.model.model.query_position_embeddings.weight  # type: ignore[union-attr]
    drawn = []
    for step in range(3):
        assert method.steps == step
        drawn.append(method._general(Queries(embedding=rows[None])).embedding)
        method(lesson)
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.isclose(one, other, atol=1e-4).all(-1).any()
    again, _ = case({**KD, "points": "general"})
    again.load_state_dict(method.state_dict())
    again.steps.fill_(1)
    assert torch.equal(again._general(Queries(embedding=rows[None])).embedding, drawn[1])
    boxes = method._general(Queries(places=torch.zeros(1, 2, 4))).places.sigmoid()
    assert boxes.shape == (1, 7, 4)
    assert 0 < boxes.min() < boxes.max() < 1


def test_what_nothing_is_asked_through_has_a_gradient_of_0_that_other_workers_wait_for() -> None:
    config = tiny.recipe(
        {"family": "rt_detr", "queries": 12, "feature_levels": 2}, distillation={**KD, "points": "general"}
    )
    config = config.model_copy(update={"distillation": config.distillation.model_copy(update={"class_weight": 0.0})})
    training = tiny.make_training(config, tiny.random_teacher("rt_detr"))
    training.train_step(tiny.batch_of(1, 0))
    assert torch.equal(training.module.method.asked.adapter.weight.grad, torch.zeros(32, 64))  # type: ignore[union-attr]


def test_no_group_of_the_student_sees_another() -> None:
    """Both groups together say the sum of what each says alone, and the student's own output is not what is taught."""
    terms = [case({**KD, "points": points})[0](case(KD)[1]) for points in ("both", "specific", "general")]
    for name, term in terms[0].items():
        assert term.total.item() == pytest.approx(sum(each[name].total.item() for each in terms[1:]), rel=1e-4)


@pytest.mark.parametrize("given", SETTINGS[:3:2], ids=str)
def test_a_class_that_the_teacher_knows_nothing_of_teaches_nothing(given: dict[str, Any]) -> None:
    student, teacher = copy.deepcopy(networks("conditional", "conditional"))
    method, decoder = built(student, teacher, **given), teacher.decoder
    decoder.class_slots, decoder.knows_all = torch.tensor([3, NOBODY, 1]), False
    terms = []
    for _ in range(2):
        lesson = lesson_of(student, teacher)
        logits = lesson.teacher.logits.clone()
        logits[..., 1] = SILENT_LOGIT
        silent = replace(lesson, decoder=decoder, teacher=replace(lesson.teacher, logits=logits))
        method.load_state_dict(method.state_dict() | ({"steps": torch.tensor(0)} if given is KD else {}))
        terms.append({name: (term.total.item(), term.count.item()) for name, term in method(silent).items()})
        with torch.no_grad():
            student.model.class_labels_classifier.bias[1] += 3
            teacher.detector.model.class_labels_classifier.bias[5] += 3  # a dog, to the teacher
    for name, (total, count) in terms[0].items():
        assert terms[1][name] == (pytest.approx(total, rel=1e-5), pytest.approx(count, rel=1e-5)), name


@pytest.mark.parametrize("given", SETTINGS[:3:2], ids=str)
def test_a_cache_of_float32_teaches_what_the_teacher_itself_does(given: dict[str, Any]) -> None:
    """And an empty share's stand-in runs, as do images without objects."""
    config = tiny.recipe(tiny.FAMILIES["conditional"], distillation=given)
    teacher = tiny.random_teacher("conditional")
    arrays = tiny.arrays(COUNTS)
    online = tiny.make_training(config, teacher)
    batch = train_batch(arrays)
    rows = encode(teacher(batch.teacher_images, batch.teacher_sizes, NEEDS), range(3), "float32")
    sizes = teacher.sizes(all_layers=False)
    cached = arrays | collate(rows, sizes, columns_for(NEEDS))
    student = tiny.silent_student(config.student, tiny.LABELS, config.seed)
    memory = CachedTeacher(sizes, (), teacher.decoder)
    assert replace(memory.facts, cells=teacher.facts.cells, layers=3) == teacher.facts
    training = Training(config, student, memory, 10, torch.device("cpu"))
    expected, found = online.train_step(batch), training.train_step(train_batch(cached))
    assert found.keys() >= online.module.method.weights.keys()  # type: ignore[union-attr]
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-3), name
    for empty in (tiny.batch_of(0, 0), tiny.batch_of()):
        online.train_step(empty)
    training.train_step(replace(tiny.batch_of(), cached={}))
    for each in (online, training):
        each.check_finite()


def test_a_pair_that_can_not_be_asked_the_same_is_refused_with_the_reason() -> None:
    facts = {
        "conditional_detr": partial(Facts, (8,), family="conditional_detr", query_kind="embedding", query_width=8),
        "detr": partial(Facts, (8,), family="detr", query_kind="embedding", query_width=8),
        "dab-detr": partial(Facts, (8,), family="dab-detr", query_kind="boxes", query_width=0),
        "d_fine": partial(Facts, (8,), family="d_fine", query_kind="boxes", query_width=8),
    }
    adapters = {}
    for student, teacher in itertools.product(facts, facts):
        ask = partial(build_method, settings_of(**KD), facts[student](), facts[teacher]())
        if student == teacher or {student, teacher} == {"dab-detr", "d_fine"}:
            method: Any = ask()
            adapters[student, teacher] = method.asked.adapter is not None
            continue
        with pytest.raises(QskdError, match=f"a student of family {student}.* and a teacher of family {teacher}"):
            ask()
    assert [pair for pair, there in adapters.items() if there] == [(n, n) for n in facts if n != "dab-detr"]


@pytest.mark.parametrize("name", ["crosskd", "kd-detr"])
def test_weights_of_0_ask_for_nothing(name: str) -> None:
    none: Method | None = build_method(
        settings_of(method=name, class_weight=0, l1_weight=0, giou_weight=0), Facts((3,)), Facts((4, 4))
    )
    assert none is not None
    assert none.needs == TeacherNeeds()
    assert none(Lesson(None, None, Targets(*[torch.zeros(0)] * 3, (), ()), torch.zeros(0), torch.zeros(0))) == {}  # type: ignore[arg-type]


def test_every_map_of_the_teacher_takes_the_nearest_of_the_student() -> None:
    from qskd.distillation.crosskd import nearest_levels

    assert nearest_levels(Facts((8,), (64.0,)), Facts((4, 4, 4), (256.0, 64.0, 16.0))) == [0, 0, 0]
    assert nearest_levels(Facts((8, 8), (60.0, 15.0)), Facts((4, 4, 4), (256.0, 64.0, 16.0))) == [0, 0, 1]
    assert nearest_levels(Facts((8, 8), (900.0, 15.0)), Facts((4,), (16.0,))) == [1]
    assert nearest_levels(Facts((8, 8)), Facts((4, 4))) == [0, 1]
    with pytest.raises(QskdError, match="of unknown sizes"):
        nearest_levels(Facts((8, 8)), Facts((4,)))
