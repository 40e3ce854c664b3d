"""`qskd select`: which images are chosen, against slow loops; and what a training draws of a selection."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from test_loader import Pictures
from test_unlabeled import cached, config, trained, work  # noqa: F401  (a fixture)
from test_unlabeled_shards import draw, shards
from tiny import trained_weights
from typer.testing import CliRunner

import qskd
from pipelines.cli import app
from pipelines.feed.stream import local_stream
from pipelines.run.resolve import resolve
from pipelines.selecting import job
from pipelines.selecting.job import Request, image_gradients, plan_of, run
from pipelines.training.plan import make_plan
from qskd.config.recipe import replace_fields, to_yaml
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.chosen import ChosenImage, ChosenRows, Selection, chosen_rows, load_selection
from qskd.datasets.order.schedule import Schedule, training_batches
from qskd.datasets.shards import ShardReader, write_shards
from qskd.distillation import mimic
from qskd.errors import QskdError
from qskd.from_recipe import make_student, teacher_for_training
from qskd.selection import gradients
from qskd.selection.distribution import BEGUN, choose_alike, likeness
from qskd.selection.matching import RIDGE, WHOLE, match, mismatch, pursue
from qskd.selection.report import CLASSES, class_table
from qskd.selection.uncertainty import CONFIDENT, choose_balanced, class_masses
from qskd.structures import SILENT_LOGIT, TeacherRecord
from qskd.teacher.pseudo import with_pseudo_objects
from qskd.training.step import Training

ROWS = (7, 5, 12, 1)


def chosen(places: list[tuple[int, int]], weights: list[float]) -> ChosenRows:
    return ChosenRows(len(ROWS), np.array(sorted(places), np.int32).tobytes(), np.array(weights, float).tobytes())


def schedule(**changes: object) -> Schedule:
    return replace(Schedule(ROWS, (), 3, 6, 4, 8), **changes)  # type: ignore[arg-type]


def drawn(plan: Schedule, epoch: int) -> list[tuple[int, int]]:
    return [(shard, row) for batch in training_batches(plan, epoch) for shard, row, _ in batch.rows.tolist()]


# --- what a training draws ------------------------------------------------------------------------------------------------
def test_a_selection_of_all_images_is_drawn_as_no_selection_is() -> None:
    everything = [(shard, row) for shard, rows in enumerate(ROWS) for row in range(rows)]
    part = schedule(train_chosen=chosen(everything, [1.0] * 25))
    assert [drawn(part, epoch) for epoch in range(3)] == [drawn(schedule(), epoch) for epoch in range(3)]


def test_of_equal_weights_each_epoch_draws_each_chosen_image_once_and_no_other() -> None:
    places = [(0, 3), (2, 0), (2, 11), (3, 0), (1, 1), (1, 4), (0, 6), (2, 7)]
    part = schedule(train_chosen=chosen(places, [1.0] * 8))
    assert part.steps_per_epoch == 2
    orders = [drawn(part, epoch) for epoch in range(4)]
    assert all(sorted(order) == sorted(places) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_an_image_is_drawn_as_often_as_its_weight_says_and_in_no_epoch_more_than_once_off() -> None:
    places, weights = [(0, 1), (1, 0), (1, 2), (2, 5), (2, 6), (3, 0)], [0.25, 2.5, 0.5, 0.75, 1.0, 1.0]
    rows, epochs = chosen(places, weights), 400
    expected = dict(zip(sorted(places), weights, strict=True))
    total = Counter[tuple[int, ...]]()
    for epoch in range(epochs):
        own = Counter(map(tuple, rows.drawn(5, epoch).tolist()))
        assert own.total() == 6
        assert all(math.floor(weight) <= own[place] <= math.ceil(weight) for place, weight in expected.items())
        total += own
    for place, weight in expected.items():
        assert abs(total[place] / epochs - weight) < 0.01
    rare = [epoch for epoch in range(40) if [0, 1] in rows.drawn(5, epoch).tolist()]
    assert max(np.diff(rare).tolist()) <= 5


def test_a_run_that_goes_on_and_one_of_chosen_images_without_labels_see_what_an_undisturbed_one_does() -> None:
    rows = chosen([(0, 1), (1, 0), (1, 2), (2, 5)], [0.5, 1.5, 1.0, 1.0])
    part = schedule(unlabeled_shard_rows=ROWS, unlabeled_in_batch=2, unlabeled_chosen=rows)
    whole = [batch.rows.tolist() for batch in training_batches(part, 1)]
    assert [batch.rows.tolist() for batch in training_batches(part, 1, 5)] == whole[5:]
    allowed = {(0, 1), (1, 0), (1, 2), (2, 5)}
    others = [(shard - len(ROWS), row) for rows in whole for shard, row, _ in rows if shard >= len(ROWS)]
    assert len(others) == 2 * len(whole)
    assert set(others) <= allowed


# --- uncertainty ----------------------------------------------------------------------------------------------------------
def test_an_images_worth_is_the_sum_over_its_confident_queries() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-0.5, 1.5, (20, 5))
    expected: dict[int, float] = {}
    for query in logits:
        p = [1 / (1 + math.exp(-value)) for value in query]
        if max(p) >= CONFIDENT:
            entropy = -sum(each / sum(p) * math.log(each / sum(p)) for each in p)
            label = p.index(max(p))
            expected[label] = expected.get(label, 0.0) + max(p) * (1 + entropy / math.log(5))
    found = class_masses(logits)
    assert found.keys() == expected.keys()
    assert len(found) > 2
    for label, value in expected.items():
        assert found[label] == pytest.approx(value)
    assert class_masses(np.full((4, 3), -9.0)) == {}
    silent = np.where([True, False, False, False, False], SILENT_LOGIT, logits).astype(np.float16)
    with np.errstate(all="raise"):
        assert 0 not in class_masses(silent)


def test_the_choice_is_balanced_over_classes_as_a_slow_loop_makes_it() -> None:
    rng = np.random.default_rng(1)
    masses = [
        {label: float(rng.integers(1, 9)) for label in range(4) if rng.random() < (0.7 if label == 0 else 0.2)}
        for _ in range(60)
    ]
    expected, taken = list[int](), dict.fromkeys(range(4), 0.0)
    while len(expected) < 25:
        left = [n for n in range(60) if n not in expected]
        label = min((one for one in taken if any(one in masses[n] for n in left)), key=lambda one: (taken[one], one))
        best = max((n for n in left if label in masses[n]), key=lambda n: (masses[n][label], -n))
        expected.append(best)
        for other, mass in masses[best].items():
            taken[other] += mass
    assert choose_balanced(masses, 25) == expected
    everything = choose_balanced(masses, 60)
    assert sorted(everything) == list(range(60))
    empty = [number for number, image in enumerate(masses) if not image]
    assert everything[-len(empty) :] == empty


def test_the_table_counts_what_is_in_all_and_in_the_chosen() -> None:
    names = [f"class {label}" for label in range(CLASSES + 3)]
    objects = [{0: 5}, {1: 2, 0: 1}, {}, dict.fromkeys(range(2, CLASSES + 3), 1)]
    lines = class_table(objects, [1, 3], names, "objects")
    assert (
        lines[0] == f"objects an image: {(8 + CLASSES + 1) / 4:.2f} of all, {(3 + CLASSES + 1) / 2:.2f} of the chosen"
    )
    assert lines[1].split() == [
        "class",
        "0",
        "6",
        f"{600 / (9 + CLASSES):.1f}",
        "%",
        "1",
        f"{100 / (4 + CLASSES):.1f}",
        "%",
    ]
    assert len(lines) == 1 + CLASSES + 1
    assert lines[-1] == "  3 more classes: 3 and 3"


def test_exemplars_have_the_distribution_of_all_as_a_slow_greedy_loop_finds_them() -> None:
    rng = np.random.default_rng(5)
    rates = [0.9, 0.5, 0.2, 0.1, 0.0]  # nothing of the last
    objects = [{label: int(n) for label, n in enumerate(rng.poisson(rates)) if n} for _ in range(80)]
    everything = np.array([sum(image.get(label, 0) for image in objects) for label in range(5)], np.float64)
    assert everything[3] > 0 == everything[4]

    def score(numbers: list[int]) -> float:
        own = [sum(objects[number].get(label, 0) for number in numbers) + BEGUN for label in range(4)]
        return sum(everything[c] / everything.sum() * math.log(own[c] / sum(own)) for c in range(4))

    expected: list[int] = []
    full = [number for number in range(80) if objects[number]]
    for _ in range(20):
        expected.append(
            max((n for n in full if n not in expected), key=lambda n: (round(score([*expected, n]), 12), -n))
        )
    numbers, scores = choose_alike(objects, 20)
    assert numbers == expected
    assert scores[-1] == pytest.approx(score(expected))
    assert scores[-1] == pytest.approx(likeness(everything, everything), abs=2e-3)
    by_chance = [score(rng.permutation(80)[:20].tolist()) for _ in range(20)]
    assert scores[-1] > max(by_chance)
    everyone, _ = choose_alike(objects, 80)
    assert sorted(everyone) == list(range(80))
    assert everyone[len(full) :] == [number for number in range(80) if not objects[number]]
    assert choose_alike([{}, {}], 1)[0] == [0]


# --- gradients ------------------------------------------------------------------------------------------------------------
def test_pursuit_is_what_a_slow_loop_with_another_solver_finds() -> None:
    rng = np.random.default_rng(2)
    given = rng.normal(0.4, 1.0, (14, 6))
    length = (given**2).sum(1).mean()
    taught = np.concatenate([given, np.full((14, 1), (WHOLE * length) ** 0.5)], 1)
    goal, ridge = taught.mean(0), RIDGE * length
    chosen: list[int] = []
    for _ in range(5):
        weights = _slow(taught[chosen], goal, ridge)
        rest = goal - sum((w * taught[n] for w, n in zip(weights, chosen, strict=True)), np.zeros(7))
        gains = {n: float(taught[n] @ rest) for n in range(14) if n not in chosen}
        chosen.append(max(gains, key=lambda n: gains[n]))
    expected = np.zeros(14)
    expected[chosen] = _slow(taught[chosen], goal, ridge)
    found = pursue(given, 5)
    assert (expected > 1e-4).sum() == 5
    np.testing.assert_allclose(found, expected, atol=1e-4)


def _slow(own: np.ndarray, goal: np.ndarray, ridge: float) -> np.ndarray:
    if not len(own):
        return np.zeros(0)

    def cost(w: np.ndarray) -> float:
        return float(((w @ own - goal) ** 2).sum() + ridge * (w**2).sum())

    found = minimize(cost, np.full(len(own), 0.1), bounds=[(0, None)] * len(own), tol=1e-14)
    return np.asarray(found.x)


def test_matched_images_are_nearer_to_all_than_as_many_by_chance_in_parts_too() -> None:
    rng = np.random.default_rng(3)
    taught = rng.normal(0.2, 1.0, (900, 30)) * rng.lognormal(0, 0.7, (900, 1))
    weights = match(taught, 150, seed=4)
    assert (weights >= 0).all()
    assert 140 <= (weights > 0).sum() <= 150
    assert weights.sum() == pytest.approx(1.0)
    assert pursue(taught, 40).sum() == pytest.approx(1.0, abs=0.05)
    even = [np.isin(np.arange(900), rng.permutation(900)[:150]).astype(float) for _ in range(20)]
    assert mismatch(taught, weights) < 0.7 * min(mismatch(taught, other) for other in even)
    np.testing.assert_array_equal(match(taught, 150, seed=4), weights)


def test_where_nothing_is_to_be_learnt_nothing_is_chosen() -> None:
    assert not pursue(np.zeros((5, 3)), 2).any()
    some = np.random.default_rng(0).normal(1.0, 1.0, (6, 3))
    some[[1, 4]] = 0
    assert np.flatnonzero(pursue(some, 6)).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("labelled", [True, False])
def test_an_images_gradient_is_that_of_a_batch_of_it_alone(
    labelled: bool,
    work: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "SIDE", 64)  # nothing is mixed
    shards = f"{work}/{'data' if labelled else 'free'}"
    given = cached(work, "cache-select")
    plan = plan_of(given, shards, load_manifest(shards))
    found = image_gradients(plan)
    labels = plan.train.labels
    training = Training(
        *(plan.config, make_student(plan.config, labels), teacher_for_training(plan.config, labels, None), 9),
        torch.device("cpu"),
    )
    module, teacher, loader = training.module.eval(), training.teacher, plan.stream.loader()
    assert module.method is not None
    assert teacher is not None
    projectors = [each for each in module.method.modules() if isinstance(each, torch.nn.Conv2d)]
    places = [(s, r) for s, rows in enumerate(plan.folder[1].shard_rows) for r in range(rows)]
    assert len(found) == len(places) > 8
    compared = 0
    for number in (0, 3, 7, 8):
        batch = train_batch(loader.load("train", np.array([(*places[number], 0)])))
        record = teacher.record(batch, module.method.needs)
        targets = with_pseudo_objects(batch.targets, record, plan.config.data.unlabeled_score)
        terms = module(batch.images, batch.sizes, targets, record, None, None, batch.least)
        total = sum(weight * terms[name].total for name, weight in module.method.weights.items())
        assert isinstance(total, torch.Tensor)
        weights = [each.weight for each in projectors]
        alone = torch.autograd.grad(total, weights, allow_unused=True)
        flat = torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, alone, strict=True)]
        )
        np.testing.assert_allclose(found[number], flat.numpy(), rtol=2e-3, atol=1e-5 * float(flat.abs().max()))
        compared += bool(flat.any())
    assert compared


@pytest.mark.parametrize(
    ("fields", "most"), [(("training.micro_batch_size=2",), 2), (("compute.workers=2",), 2), ((), 4)]
)
def test_gradients_are_asked_of_as_many_images_at_once_as_a_worker_of_the_training_has(
    fields: tuple[str, ...],
    most: int,
    work: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, sizes = gradients.GradientMaker.of, list[int]()

    def counting(self: gradients.GradientMaker, batch: TrainBatch, record: TeacherRecord) -> np.ndarray:
        sizes.append(len(batch.targets.counts))
        return of(self, batch, record)

    monkeypatch.setattr(gradients.GradientMaker, "of", counting)
    shards = f"{work}/data"
    found = image_gradients(plan_of(cached(work, "cache-select", *fields), shards, load_manifest(shards)))
    assert max(sizes) == most
    assert sum(sizes) == len(found)


def test_gradients_are_the_same_for_a_recipe_that_compiles(work: Path) -> None:  # noqa: F811
    given, shards = cached(work, "cache-select"), f"{work}/free"
    plans = [
        plan_of(replace_fields(given, {"compute.compile": compiles}, "the test"), shards, load_manifest(shards))
        for compiles in (False, True)
    ]
    plain, compiled = map(image_gradients, plans)
    assert plain.any()
    np.testing.assert_array_equal(compiled, plain)


def test_mixed_sides_keep_lengths_and_angles_about_as_they_are() -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 9, 256, generator=rng), torch.randn(40, 9, 200, generator=rng) + 0.5
    exact = torch.einsum("npo,npi->noi", left, right).flatten(1)
    few = [gradients._mixed(part, (0, name)) for part, name in ((left, "after"), (right, "before"))]
    mixed = torch.einsum("npo,npi->noi", *few).flatten(1)
    assert mixed.shape[1] == gradients.SIDE**2
    ratio = mixed.norm(dim=1) / exact.norm(dim=1)
    assert 0.85 < float(ratio.mean()) < 1.15
    pairs = [torch.nn.functional.cosine_similarity(part[:, None], part[None], dim=-1) for part in (exact, mixed)]
    assert float((pairs[0] - pairs[1]).abs().mean()) < 0.1
    assert torch.equal(gradients._mixed(left, (0, "after")), few[0])


# --- the command ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["random", "classes", "uncertainty", "gradients"])
def test_a_selection_is_written_shown_and_trained_on_from_the_cache_of_all(by: str, work: Path, tmp_path: Path) -> None:  # noqa: F811
    given = cached(work, "cache-select")
    (tmp_path / "recipe.yaml").write_text(to_yaml(given))
    said = list[str]()
    for folder in ("free", "data"):
        words = ["select", f"{work}/{folder}", f"{tmp_path}/{folder}.json", "--budget", "4", "--by", by]
        done = CliRunner().invoke(app, [*words, "--recipe", f"{tmp_path}/recipe.yaml"])
        assert done.exit_code == 0, done.output
        said.append(done.output)
        assert Image.open(tmp_path / f"{folder}.png").size[0] > 400
    assert "pseudo-objects an image" in said[0]
    assert f"{work}/data, by {by}" in said[1]
    assert "three" in said[1]
    one = load_selection(f"{tmp_path}/free.json")
    assert 1 <= len(one.images) <= 4
    for image in one.images:
        (sample,) = ShardReader(f"{work}/free").read(image.shard, [image.row])
        assert (sample.image_id, sample.file_name) == (image.image_id, image.file_name)
    fields = given.model_copy(
        update={"data": given.data.model_copy(update={"selection": (f"{tmp_path}/free.json", f"{tmp_path}/data.json")})}
    )
    plan = make_plan(resolve(fields, "distill"), "distill")
    assert f"; of these {len(one.images)} by data.selection, 2 of each batch" in plan.describe()
    names = {
        tuple(row)
        for share in local_stream(plan.stream)
        if share.subset == "train"
        for row in share.arrays["positions"].tolist()
    }
    first = len(plan.train.shards)
    allowed = {(image.shard, image.row) for image in load_selection(f"{tmp_path}/data.json").images}
    allowed |= {(image.shard + first, image.row) for image in one.images}
    assert names <= allowed
    assert trained(fields, 2).step == 2


def test_no_selection_changes_nothing(work: Path) -> None:  # noqa: F811
    """The weights of a run whose selection has all images are those of a run without one."""
    folder, manifest = f"{work}/data", load_manifest(f"{work}/data")
    images = tuple(
        ChosenImage(shard, row, 0, "x", 1.0, 0.0)
        for shard, rows in enumerate(manifest.shard_rows)
        for row in range(rows)
    )
    file = work / "all.json"
    file.write_text(Selection(folder, manifest.fingerprint, "random", 0, images).to_json())
    both = [trained(config(work, *more), 3) for more in ((), (f"data.selection=[{file}]",))]
    for name, weights in trained_weights(both[0]).items():
        assert torch.equal(weights, trained_weights(both[1])[name])


def test_what_can_not_be_drawn_from_is_refused_by_name(work: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "s.json"
    run(Request(f"{work}/free", file, 3), quiet=True)
    good = json.loads(file.read_text())
    data = [load_manifest(f"{work}/data")]
    assert chosen_rows([None], data) is None

    def refused(text: str, *words: str, fields: tuple[str, ...] = ()) -> None:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(QskdError, match=".*".join(words)):
            make_plan(resolve(config(work, f"data.selection=[{tmp_path}/bad.json]", *fields), "distill"), "distill")

    refused("{", "not a selection")
    refused(json.dumps(good | {"version": 9}), "qskd-selection 9")
    refused(json.dumps(good | {"images": []}), "no images")
    refused(json.dumps(good | {"images": [good["images"][0]] * 2}), "twice")
    for changed in ({"weight": 0.0}, {"weight": "1"}, {"shard": -1}):
        refused(json.dumps(good | {"images": [good["images"][0] | changed]}), "not a selection")
    refused(json.dumps(good | {"images": [good["images"][0] | {"row": 99}]}), "row 99 of shard")
    refused(json.dumps(good), "of no folder here", fields=("data.unlabeled=[]",))
    twice = resolve(config(work, f"data.selection=[{file}, {file}]"), "distill")
    with pytest.raises(QskdError, match="same shards as"):
        make_plan(twice, "distill")


def test_files_of_others_stay_and_other_selections_are_replaced_by_option_alone(work: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "s.json"
    asked = Request(f"{work}/free", file, 3)
    run(asked, quiet=True)
    before = file.read_text()
    run(asked, quiet=True)  # the same again
    assert file.read_text() == before
    with pytest.raises(QskdError, match="another selection"):
        run(replace(asked, seed=1), quiet=True)
    assert file.read_text() == before
    run(replace(asked, seed=1, overwrite=True), quiet=True)
    assert file.read_text() != before
    for name in ("s.json", "s.png"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(QskdError, match="already"):
            run(replace(asked, overwrite=True), quiet=True)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    for wrong in (replace(asked, budget=10), replace(asked, by="gradients"), replace(asked, out=tmp_path / "a.png")):
        with pytest.raises(QskdError):
            run(wrong, quiet=True)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_another_selection_is_refused_before_minutes_are_spent_on_choosing(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, given = tmp_path / "s.json", cached(work, "cache-select")
    run(Request(f"{work}/free", file, 4, "gradients", 0, given), quiet=True)
    before = file.read_text()
    monkeypatch.setattr(job, "_told", lambda *_: pytest.fail("it began to choose"))
    same = Request(f"{work}/free", file, 4, "gradients", 0, given)
    assert 1 <= len(load_selection(str(file)).images) <= 4
    others = (replace(same, budget=1), replace(same, by="uncertainty"), replace(same, seed=1))
    for other in (*others, replace(same, shards=f"{work}/data")):
        with pytest.raises(QskdError, match="another selection"):
            run(other, quiet=True)  # type: ignore[arg-type]
    assert file.read_text() == before
    job.check(same)


def test_images_without_labels_are_chosen_by_the_cache_of_the_training_classes_whatever_those_of_val_are(
    work: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pictures = Pictures(6)
    pictures.categories = tuple(pictures.categories[place] for place in (2, 0, 1))
    write_shards(pictures, str(tmp_path / "val"), rows_per_shard=6)
    given = cached(work, "cache-select", f"data.val={tmp_path}/val")
    for by in ("classes", "uncertainty", "gradients"):
        run(Request(f"{work}/free", tmp_path / f"{by}.json", 4, by, 0, given), quiet=True)  # type: ignore[arg-type]
    own = cached(work, "cache-select")
    run(Request(f"{work}/free", tmp_path / "own.json", 4, "gradients", 0, own), quiet=True)
    assert (tmp_path / "own.json").read_bytes() == (tmp_path / "gradients.json").read_bytes()


def test_what_a_run_would_refuse_the_dry_run_does_and_names_the_folder_that_has_no_cache(
    work: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = cached(work, "cache-select")
    (tmp_path / "recipe.yaml").write_text(to_yaml(given))
    shards(draw(tmp_path / "pool", 4, seed=7), tmp_path / "more")
    words = ["--budget", "3", "--by", "uncertainty", "--recipe", f"{tmp_path}/recipe.yaml", "--dry-run"]
    fine = CliRunner().invoke(app, ["select", f"{work}/free", f"{tmp_path}/s.json", *words])
    assert fine.exit_code == 0, fine.output
    for folder, field in ((tmp_path / "more", "data.unlabeled"), (work / "val", "data.train")):
        done = CliRunner().invoke(app, ["select", str(folder), f"{tmp_path}/s.json", *words])
        assert isinstance(done.exception, QskdError)
        assert f"does not name {folder}" in done.exception.found
        assert done.exception.remedy.startswith(f"name it in {field}")
    assert not (tmp_path / "s.json").exists()


def test_fields_without_a_recipe_are_an_error_and_a_method_of_ones_own_is_found(work: Path, tmp_path: Path) -> None:  # noqa: F811
    for choose in (
        lambda: CliRunner().invoke(
            app,
            ["select", f"{work}/free", f"{tmp_path}/s.json", "--budget", "3", "--set", "seed=3"],
            catch_exceptions=False,
        ),
        lambda: qskd.select(f"{work}/free", tmp_path / "s.json", 3, set={"seed": 3}),
    ):
        with pytest.raises(QskdError, match="no recipe"):
            choose()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own_mimic.py").write_text(Path(mimic.__file__).read_text())
    (tmp_path / "recipe.yaml").write_text(to_yaml(cached(work, "cache-select")))
    words = ["select", f"{work}/free", f"{tmp_path}/s.json", "--budget", "3", "--by", "uncertainty", "--dry-run"]
    words += ["--recipe", f"{tmp_path}/recipe.yaml", "--set", "distillation.method=own_mimic"]
    done = CliRunner().invoke(app, [*words, "--methods", str(tmp_path / "mine")])
    assert done.exit_code == 0, done.output


def test_a_selection_is_a_list_of_pictures_for_prepare(work: Path, tmp_path: Path) -> None:  # noqa: F811
    run(Request(f"{work}/free", tmp_path / "s.json", 3), quiet=True)
    words = ["prepare", "--unlabeled", f"{tmp_path}/s.json", f"{work}/pool", f"{tmp_path}/part"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    samples = ShardReader(f"{tmp_path}/part").read(0, [0, 1, 2])
    assert [one.file_name for one in samples] == [one.file_name for one in load_selection(f"{tmp_path}/s.json").images]
