"""Several teachers in one recipe, each for classes of its own: seen by the whole house as one, and learnt from as each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loader import Pictures
from test_teacher_cache import cache_config, losses, make_cache, stream_of
from test_unlabeled import A as PLACE
from test_unlabeled import B as ELSEWHERE
from test_unlabeled import nobody_s, said
from tiny import FAMILIES, arrays, make_training, random_teacher, recipe, silent_student
from torch import Tensor

from pipelines.reporting.cards import card_of_run
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from qskd.checks import check_cache
from qskd.config import Config, ResizeConfig, StudentConfig
from qskd.config.recipe import apply_overrides, build, to_tree
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.datasets.classes import NOBODY
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.deploy.model_card import render
from qskd.detectors import load_detector, save_detector, to_pixels
from qskd.distillation.method import Lesson
from qskd.distillation.qskd.lapd import terms_together
from qskd.distillation.qskd.pairing import Side
from qskd.distillation.qskd.query_selection import none_selected
from qskd.distillation.qskd.settings import PredictionDistillationConfig
from qskd.distillation.shared.apart import apart, deaf, matched, matches_apart, prediction
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher, start_student
from qskd.losses.matching import assign
from qskd.pictures.explain import Subject, explain
from qskd.structures import SILENT_LOGIT, TeacherNeeds, TeacherRecord
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.identity import cache_identity, cache_names
from qskd.teacher.manifest import load_cache_manifest, save_cache_manifest
from qskd.teacher.online import OnlineTeacher, queries_above
from qskd.teacher.pseudo import with_pseudo_objects
from qskd.teacher.several.members import members_of
from qskd.teacher.several.together import TeachersTogether

NEEDS = TeacherNeeds(memory=True, attention=True, attention_giou_floor=-1.0)
FIRST, SECOND = (3, 5, NOBODY), (NOBODY, NOBODY, 1)  # of LABELS in TEACHER_LABELS: cat and dog, owl
MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OTHER = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}


def two() -> tuple[OnlineTeacher, OnlineTeacher]:
    """Of one map and of two, of other normalisations."""
    first, second = random_teacher("conditional", seed=3), random_teacher("refined", seed=4)
    other = replace(second.preprocessing, **OTHER)
    return OnlineTeacher(first.detector, FIRST, first.preprocessing), OnlineTeacher(second.detector, SECOND, other)


def of_classes(labels: list[list[int]], seed: int = 0, side: int = 64) -> TrainBatch:
    """Images with objects of these classes. side: of those that the teachers see."""
    batch = train_batch(arrays([len(each) for each in labels], seed, teacher_size=side))
    given = batch.targets.labels.clone()
    for image, each in enumerate(labels):
        given[image, : len(each)] = torch.tensor(each, dtype=torch.int64)
    return replace(batch, targets=replace(batch.targets, labels=given))


def test_each_part_of_the_record_is_what_its_teacher_says_alone() -> None:
    members = two()
    batch, together = of_classes([[0, 2], [1]]), TeachersTogether(members)
    record = together.record(batch, NEEDS)
    assert record.parts == tuple((one.facts.queries, len(one.facts.channels)) for one in members)
    assert together.facts.channels == members[0].facts.channels + members[1].facts.channels
    for part, alone in zip(apart(record), (one.record(batch, NEEDS) for one in members), strict=True):
        assert torch.equal(part.logits, alone.logits)
        assert torch.equal(part.boxes_cxcywh, alone.boxes_cxcywh)
        assert part.attention_queries is not None
        known = part.attention_queries[0] >= 0
        assert alone.attention_queries is not None
        assert torch.equal(part.attention_queries[:, known], alone.attention_queries)
        for mine, theirs in zip((*part.memory, *part.memory_valid), (*alone.memory, *alone.memory_valid), strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(part.attention, alone.attention, strict=True):
            assert torch.equal(mine[:, known], theirs)
            assert not mine[:, ~known].any()
    total = sum(level.sum((-1, -2)) for level in record.attention)
    torch.testing.assert_close(total, torch.ones_like(total))
    first = record.parts[0][0]
    assert deaf(record)[:first].tolist() == [[False, False, True]] * first
    assert deaf(record)[first:].tolist() == [[True, True, False]] * record.parts[1][0]


def test_attention_of_every_layer_is_found_under_its_teacher_s_numbers() -> None:
    members = two()
    batch, needs = of_classes([[0]]), replace(NEEDS, attention_layers="all", all_layers=True)
    record = TeachersTogether(members).record(batch, needs)
    for part, alone in zip(apart(record), (one.record(batch, needs) for one in members), strict=True):
        assert part.attention_queries is not None
        known = part.attention_queries[0] >= 0
        assert part.attention_queries[0, known].tolist() == list(range(int(known.sum())))
        for mine, theirs in zip(part.attention, alone.attention, strict=True):
            assert torch.equal(mine[:, known], theirs)


def terms_of(
    teacher: Any, batch: TrainBatch, record: TeacherRecord | None = None, weights: Any = (), *overrides: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Total and count of each of the method's terms. weights: of the projectors of other trainings' features, one a teacher."""
    training = make_training(recipe(FAMILIES["refined"], *overrides), teacher)
    method = training.module.eval().method
    assert method is not None
    for own, given in zip([method.features, *method.further_features], weights, strict=False):
        own.load_state_dict(given)
    record = record or teacher.record(batch, method.needs)
    terms = training.module(batch.images, batch.sizes, batch.targets, record)
    return {name: (terms[name].total.detach(), terms[name].count) for name in method.weights}


def projectors(teacher: OnlineTeacher) -> dict[str, Tensor]:
    method = make_training(recipe(FAMILIES["refined"]), teacher).module.method
    assert method is not None
    return dict(method.features.state_dict())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("layers", ["last", "all"])
def test_of_objects_of_one_teacher_s_classes_that_teacher_alone_is_learnt_from(layers: str) -> None:
    """As if the other were not there: whatever it takes these objects for is not taught."""
    members = two()
    together = TeachersTogether(members)
    fields = (f"distillation.features.attention_layers={layers}", "distillation.features.background=0")
    given = [projectors(one) for one in members]
    batches = [of_classes([[0, 1], [], [1]]), of_classes([[2, 2], [], [2]])]
    for number, (member, batch) in enumerate(zip(members, batches, strict=True)):
        alone = terms_of(member, batch, None, given[number : number + 1], *fields)
        assert alone["lapd_class"][0] > 0
        assert alone["agfd"][0] > 0
        found = terms_of(together, batch, None, given, *fields)
        assert found.keys() == alone.keys()
        for name, (total, count) in alone.items():
            torch.testing.assert_close(found[name][0], total, msg=name)
            torch.testing.assert_close(found[name][1], count, msg=name)
        needs = replace(NEEDS, attention_layers=layers, all_layers=layers == "all")
        record = together.record(batch, needs)
        first = record.parts[0][0]
        other = (
            torch.arange(record.logits.shape[2]) < first if number else torch.arange(record.logits.shape[2]) >= first
        )
        moved = record.logits + torch.where(other[:, None] & ~deaf(record), 1.5, 0.0)
        again = terms_of(together, batch, replace(record, logits=moved), given, *fields)
        assert all(torch.equal(again[name][0], total) for name, (total, _) in found.items())


def share(whole: TrainBatch, rows: slice) -> TrainBatch:
    """A worker's part of a batch."""
    counts = whole.targets.counts[rows]
    targets = replace(
        whole.targets,
        **{name: getattr(whole.targets, name)[rows, : max(counts)] for name in ("boxes_cxcywh", "labels", "valid")},
        image_ids=whole.targets.image_ids[rows],
        counts=counts,
    )
    parts = {name: getattr(whole, name)[rows] for name in ("images", "sizes", "teacher_images", "teacher_sizes")}
    return replace(whole, **parts, targets=targets)


def test_of_a_batch_of_both_each_teaches_its_own_objects() -> None:
    """Images of one teacher's objects each: the terms are sums of both, and so are their counts; as are those of two workers."""
    members = two()
    together, given = TeachersTogether(members), [projectors(one) for one in members]
    halves = [[[0, 1], [1]], [[2], [2, 2, 2]]]
    whole = train_batch(arrays([2, 1, 1, 3], teacher_size=64))
    labels = whole.targets.labels.clone()
    for image, each in enumerate([*halves[0], *halves[1]]):
        labels[image, : len(each)] = torch.tensor(each)
    whole = replace(whole, targets=replace(whole.targets, labels=labels))
    found = terms_of(together, whole, None, given)

    shares = [share(whole, slice(0, 2)), share(whole, slice(2, 4))]
    for teachers in ((together, together), members):
        apart_ = [
            terms_of(teacher, each, None, given if teacher is together else given[number : number + 1])
            for number, (teacher, each) in enumerate(zip(teachers, shares, strict=True))
        ]
        for name, (total, count) in found.items():
            torch.testing.assert_close(total, sum(each[name][0] for each in apart_), msg=name)
            torch.testing.assert_close(count, sum(each[name][1] for each in apart_), msg=name)


def test_an_object_is_matched_among_its_own_teacher_s_queries_and_with_none_where_these_are_too_few() -> None:
    batch = of_classes([[0, 2, 0, 1, 2]])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 8, 3, generator=generator)
    logits[:, :, :3, 2] = logits[:, :, 3:, :2] = SILENT_LOGIT
    boxes = batch.targets.boxes_cxcywh[:, [0, 1, 2, 0, 2, 3, 0, 2]].expand(2, -1, -1, -1)
    record = TeacherRecord(logits, boxes, parts=((3, 0), (5, 0)))
    (pairs,) = assign([prediction(record)], batch.targets, recipe().detection)
    first, second = matches_apart(record, matched(record, pairs, batch.targets))
    assert (first[..., [0, 2, 3]] >= 0).all()
    assert (first[..., [1, 4]] < 0).all()
    assert (second[..., [0, 2, 3]] < 0).all()
    assert (second[..., [1, 4]] >= 0).all()
    few = TeacherRecord(logits[:, :, 1:], boxes[:, :, 1:], parts=((2, 0), (5, 0)))
    (pairs,) = assign([prediction(few)], batch.targets, recipe().detection)
    own = matched(few, pairs, batch.targets)
    assert (own[..., [0, 2, 3]] >= 0).sum(-1).tolist() == [[2], [2]]
    assert (own[..., [0, 2, 3]] < 2).all()


def test_attention_is_kept_of_queries_at_objects_of_their_teacher_s_classes() -> None:
    batch = of_classes([[0, 2]])
    logits = torch.zeros(1, 1, 4, 3)
    logits[:, :, :2, 2] = logits[:, :, 2:, :2] = SILENT_LOGIT
    boxes = batch.targets.boxes_cxcywh[:, [0, 1, 0, 1]][None]
    record = TeacherRecord(logits, boxes, parts=((2, 0), (2, 0)))
    kept = queries_above(record, batch.targets, 0.99, recipe().detection)
    assert [query for query in kept[0].tolist() if query >= 0] == [0, 3]


def test_of_several_partners_a_query_learns_every_class_and_the_surest_s_box() -> None:
    own, first, second = (torch.tensor([[[[0.2 + n / 10, 0.5, 0.2, 0.2]]]]) for n in range(3))
    logits = torch.tensor([[[[0.5, -0.5]]]])
    none = none_selected(torch.Size((1, 1, 1)), logits.device)
    said_ = [torch.tensor([[[[-2.0, SILENT_LOGIT]]]]), torch.tensor([[[[SILENT_LOGIT, 1.5]]]])]
    mine = [logits.masked_fill(each <= SILENT_LOGIT / 2, SILENT_LOGIT) for each in said_]
    boxes = (first, second)
    sides = [(Side(mine[n], own, none), Side(said_[n], boxes[n], none)) for n in range(2)]
    config = PredictionDistillationConfig(pairing="global", pair_weight="uniform")
    nowhere = torch.zeros(1, 1, 1, dtype=torch.bool)
    terms = terms_together(sides, [nowhere, nowhere], 1, 1, config)
    goal = torch.tensor([-2.0, 1.5]).sigmoid()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits.flatten(), goal, reduction="sum")
    torch.testing.assert_close(terms["lapd_class"].total, expected)
    torch.testing.assert_close(terms["lapd_l1"].total, (own - second).abs().sum())
    assert [float(term.count) for term in terms.values()] == [1, 1, 1]
    at_first_s = terms_together(sides, [nowhere, ~nowhere], 1, 1, config)  # at an object that the second does not know
    torch.testing.assert_close(at_first_s["lapd_l1"].total, (own - first).abs().sum())
    alone = torch.nn.functional.binary_cross_entropy_with_logits(logits[..., 0], goal[:1].view(1, 1, 1))
    torch.testing.assert_close(at_first_s["lapd_class"].total, alone)


@pytest.mark.parametrize("pairing", ["rank", "hungarian", "image", "global"])
def test_a_student_s_query_at_an_object_learns_nothing_of_a_teacher_that_does_not_know_it(pairing: str) -> None:
    """Neither that it is background, nor what that teacher takes it for: the gradient in its classes is 0."""
    members = two()
    batch, together = of_classes([[2, 2]]), TeachersTogether(members)
    training = make_training(recipe(FAMILIES["refined"], f"distillation.predictions.pairing={pairing}"), together)
    method = training.module.method
    assert method is not None
    record = together.record(batch, method.needs)
    (own, theirs) = assign(
        [(torch.zeros(2, 1, 6, 3), torch.rand(2, 1, 6, 4) * 0.3 + 0.3), prediction(record)],
        batch.targets,
        recipe().detection,
    )
    at = torch.zeros(2, 1, 6, dtype=torch.bool).scatter(2, own, True)
    output = training.student(*to_pixels(batch.images, batch.sizes, *MEAN_STD), with_attention=False)
    logits = torch.zeros(2, 1, 6, 3, requires_grad=True)
    boxes = torch.rand(2, 1, 6, 4) * 0.3 + 0.3
    lesson = Lesson(replace(output, logits=logits, boxes_cxcywh=boxes), record, batch.targets, own, theirs)
    method(lesson)["lapd_class"].total.backward()
    assert logits.grad is not None
    assert logits.grad[at][:, :2].abs().max() == 0
    assert logits.grad[at][:, 2].abs().max() > 0


def test_of_two_pseudo_objects_at_one_place_the_surer_teacher_s_stays() -> None:
    """The first takes the second's object for one of its own, less surely; elsewhere each is believed."""
    batch = nobody_s([0, 1], [False, False])
    near = (PLACE[0], PLACE[1], PLACE[2], PLACE[3] - 0.01)
    queries = [(0.6, 0, PLACE), (0.7, 1, ELSEWHERE), (0.9, 2, near), (0.2, 2, ELSEWHERE)]
    record = said(queries, [(0.8, 0, PLACE), (0.0, 0, PLACE), (0.8, 2, PLACE), (0.0, 2, PLACE)])
    found = with_pseudo_objects(batch.targets, replace(record, parts=((2, 0), (2, 0))), 0.5)
    assert found.counts == (2, 1)
    assert sorted(found.labels[0].tolist()) == [1, 2]
    assert found.labels[1, 0] == 0  # as sure: the one that is named first
    assert found.unsure is not None
    assert not found.unsure.any()  # what is half seen there is an object
    assert with_pseudo_objects(batch.targets, record, 0.5).counts == (3, 2)  # of one teacher as ever


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(22), folder, rows_per_shard=8, rows_per_group=3)
    return folder


def make_folder(to: Path, family: str, names: tuple[str, ...], size: int = 64, **more: Any) -> Path:
    fields = {"width": 32, "queries": 9, **FAMILIES[family], **more}
    config = StudentConfig.model_validate({**recipe().student.model_dump(), **fields})
    save_detector(silent_student(config, names, 1).eval(), to, ResizeConfig(size=size), **OTHER)  # type: ignore[arg-type]
    return to


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {
        "first": make_folder(root / "first", "conditional", ("eight", "three")),
        "second": make_folder(root / "second", "refined", ("nine", "eight")),
        "large": make_folder(root / "large", "conditional", ("nine",), size=96),
        "deep": make_folder(root / "deep", "conditional", ("nine",), decoder_layers=3),
        "ten": make_folder(root / "ten", "conditional", ("ten",)),
    }


def config_of(shards: str, folders: dict[str, Path], *overrides: str, second: str = "second") -> Config:
    tree = {
        **to_tree(cache_config(shards, "")),
        "teacher": {"path": str(folders["first"]), "also": {"new": {"path": str(folders[second])}}},
    }
    tree["data"]["val"] = shards
    if any(each.startswith("distillation.method=") for each in overrides):
        tree["distillation"] = {}
    return build(apply_overrides(tree, ["name=several", *overrides]))


def test_a_class_is_the_first_teacher_s_that_knows_it_and_the_others_are_silent(
    shards: str, folders: dict[str, Path]
) -> None:
    config, labels = config_of(shards, folders), load_manifest(shards).labels
    first, second = members_of(config, labels)
    assert first.classes(labels) == ["three", "eight"]
    assert second.classes(labels) == ["nine"]
    assert (first.slots, second.slots) == ((1, 0, NOBODY), (NOBODY, NOBODY, 0))
    assert second.shared == ("eight",)
    left = members_of(config_of(shards, folders, "teacher.class_map={eight: null}"), labels)
    assert [each.classes(labels) for each in left] == [["three"], ["eight", "nine"]]


def test_the_cache_of_several_is_known_by_each_of_them_and_its_losses_are_the_online_ones(
    shards: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path, data = str(tmp_path / "cache"), load_manifest(shards)
    cache = ("path=" + path, "precision=float32", "attention_giou_floor=-0.9", "cells=attended")
    fields = tuple(f"teacher.cache.{field}" for field in cache)
    config = config_of(shards, folders, *fields)
    teacher = make_teacher(config, data.labels)
    assert isinstance(teacher, TeachersTogether)
    online = losses(config, teacher, stream_of(shards, "", None))
    assert min(online[0]["agfd"], online[0]["lapd_class"], online[0]["lapd_giou"]) > 0
    assert all(np.isfinite(list(terms.values())).all() for terms in online)
    identity = cache_identity(config, data)
    manifest = make_cache(config, teacher, teacher.resize, identity)
    kept = load_cache_manifest(path)
    assert kept == manifest
    assert kept is not None
    assert kept.sizes.parts == ((9, 1), (9, 2))
    cached = losses(config, CachedTeacher(kept.sizes), stream_of(shards, path, None))
    for mine, theirs in zip(cached, online, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)

    training = make_training(config, CachedTeacher(kept.sizes))
    assert all(value == 0 for value in training.train_step(train_batch(arrays([]))).values())  # a worker's empty share

    check_cache(config, data)
    renamed = config_of(shards, folders, *fields).model_dump()
    renamed["teacher"]["also"] = {"other_name": renamed["teacher"]["also"]["new"]}
    assert cache_identity(build(renamed), data) == identity
    for other in (
        config_of(shards, folders, *fields, second="deep"),
        config_of(shards, folders, *fields, "teacher.class_map={eight: null}"),
        config_of(shards, folders, *fields, "teacher.also.new.levels=[1]"),
        config_of(shards, folders, *fields, "teacher.also={}", "teacher.class_map={nine: null}"),
    ):
        assert cache_identity(other, data) != identity
        with pytest.raises(QskdError, match=r"teacher\.also\.1\."):
            check_cache(other, data)
    assert cache_names(config)["teacher"] == f"{folders['first']} and {folders['second']}"
    save_cache_manifest(path, replace(kept, made_with=cache_names(config)))
    deep = config_of(shards, folders, *fields, second="deep")
    with pytest.raises(
        QskdError, match=r"made with teacher \S+first and \S+second, and the recipe's is \S+first and \S+deep"
    ):
        check_cache(deep, data)


def test_levels_are_of_each_teacher_s_own_maps(shards: str, folders: dict[str, Path]) -> None:
    teacher = make_teacher(config_of(shards, folders, "teacher.also.new.levels=[1]"), load_manifest(shards).labels)
    assert teacher is not None
    assert teacher.facts.parts == ((9, 1), (9, 1))


def test_a_dry_run_names_all_teachers_and_whose_each_class_is(shards: str, folders: dict[str, Path]) -> None:
    config = resolve(config_of(shards, folders), "distill")
    text = make_plan(config, "distill").describe()
    assert f"teachers: {folders['first']} and {folders['second']}, run in every training step" in text
    assert f"notice: {folders['first']} teaches [three, eight]" in text
    assert f"notice: {folders['second']} teaches [nine]" in text
    assert "taught by the one that is named first: [eight]" in text


def test_the_model_card_has_a_row_for_each_teacher(shards: str, folders: dict[str, Path]) -> None:
    config, data = config_of(shards, folders, "card.evaluate_teacher=false"), load_manifest(shards)
    card = card_of_run(config, "distill", data, data, folders["ten"], {"AP": 0.5})
    names = [row.name for row in card.rows]
    assert names[:2] == [f"teacher of 2 classes, `{folders['first']}`", f"teacher of 1 class, `{folders['second']}`"]
    assert all(row.parameters for row in card.rows[:2])
    assert card.teacher == f"{folders['first']} and {folders['second']}"
    text = render(card)
    assert "distilled from 2 teachers with QSKD" in text
    assert f"| teachers | {card.teacher} |" in text
    assert "distilled from a teacher with QSKD" in render(replace(card, teachers=1))


def test_an_image_is_explained_by_all_of_them(shards: str, folders: dict[str, Path]) -> None:
    config, labels = config_of(shards, folders), load_manifest(shards).labels
    image = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    boxes = np.array([[5, 5, 30, 30], [30, 20, 55, 50]], np.float32)
    subject = Subject("photo", image, boxes, np.array([1, 2]), np.zeros(2, bool))
    (seen,) = explain(subject, config, labels, make_teacher(config, labels), {}).seen
    assert "2 positive" in seen.summary()[0]
    assert len(seen.mask.levels) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("second", "overrides", "words"),
    [
        (
            "second",
            ("distillation.method=kd-detr",),
            r"kd-detr, which asks the teacher's decoder, and several teachers",
        ),
        ("second", ("distillation.method=crosskd",), "crosskd, which .* and several teachers"),
        ("second", ("distillation.method=mimic",), "mimic, which compares the student with what one teacher says"),
        ("second", ("distillation.predictions.pairing=index",), "pairing: index, by which query i learns"),
        ("second", ("distillation.also.mimic.weight=1.0",), r"distillation\.also\.mimic\.method: mimic"),
        ("second", ("teacher.cache.columns=[states]",), r"teacher\.cache\.columns: states, and several teachers"),
        ("second", ("teacher.path=found.json",), "found.json, a file of detections, beside another"),
        ("large", (), r"(?s)teacher\.also\.new\.path.*96.*square, size: 64}'"),
        ("deep", ("distillation.features.attention_layers=all",), r"2 of .*first, 3 of .*deep decoder layers"),
        ("ten", (), "knows no class of the dataset that is not another teacher's"),
        ("second", ("teacher.also.new.class_map={nine: null, three: seven}",), "no label seven"),
    ],
)
def test_what_several_teachers_can_t_do_is_refused_by_name(
    shards: str, folders: dict[str, Path], second: str, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(QskdError, match=words):
        make_plan(resolve(config_of(shards, folders, *overrides, second=second), "distill"), "distill")


def test_a_class_that_no_teacher_knows_is_left_to_nobody_in_words_or_refused(
    shards: str, folders: dict[str, Path]
) -> None:
    labels = ("eight", "nine", "twelve")
    config = config_of(shards, folders)
    with pytest.raises(QskdError, match=r"no teacher has a label for 1 dataset class\(es\): \[twelve\]") as told:
        members_of(config, labels)
    assert "class_map" in str(told.value)
    left = members_of(config_of(shards, folders, "teacher.class_map={twelve: null}"), labels)
    assert [each.classes(labels) for each in left] == [["eight"], ["nine"]]


def test_a_student_inherits_the_first_s_layers_and_its_own_classes_rows(shards: str, folders: dict[str, Path]) -> None:
    config, labels = config_of(shards, folders, "student.inherit=true", "student.queries=9"), ("nine", "three", "eight")
    student, told = start_student(config, labels)
    assert f"parts of {folders['first']}" in told
    first = load_detector(folders["first"]).model.state_dict()
    head = next(name for name in first if "class_label" in name and name.endswith("weight"))
    rows = student.model.state_dict()[head]
    assert torch.equal(rows[[2, 1]], first[head])
    assert not torch.equal(rows[0], first[head][0])


def test_teachers_of_two_sizes_teach_at_one_that_the_recipe_says(shards: str, folders: dict[str, Path]) -> None:
    config = config_of(shards, folders, "teacher.resize={mode: square, size: 64}", second="large")
    teacher = make_teacher(config, load_manifest(shards).labels)
    assert teacher is not None
    assert teacher.resize.size == 64
