"""Whitened AGFD: directions from the cache, the metric they make, the loss in it; and a cache that has none is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_teacher_cache import cache, cache_config, data, decoded, teacher  # noqa: F401  (fixtures)
from test_unlabeled import cached, config, work  # noqa: F401  (a fixture)
from tiny import EASY_SELECTION, arrays, batch_of, make_training, random_teacher, recipe, train_batch

from pipelines.caching.directions import add_directions
from pipelines.caching.plan import clean
from qskd.checks import check_decoder, lacks_directions
from qskd.config.sections import FurtherTeacherConfig
from qskd.datasets.unlabeled.joined import source_manifest
from qskd.distillation.method import teacher_needs
from qskd.distillation.qskd.agfd import AttentionGuidedFeatureDistillation
from qskd.distillation.qskd.settings import FeatureDistillationConfig
from qskd.distillation.qskd.whitening import metric
from qskd.errors import QskdError
from qskd.from_recipe import teacher_for_training
from qskd.structures import TeacherNeeds, TeacherRecord
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import columns_for
from qskd.teacher.decoder import TeacherDecoder
from qskd.teacher.manifest import load_cache_manifest
from qskd.teacher.memory import directions as module
from qskd.teacher.memory.directions import compute_directions, compute_sensitivities, load_directions, save_directions
from qskd.teacher.memory.moments import Directions
from qskd.teacher.online import OnlineTeacher

MEMORY = columns_for(TeacherNeeds(memory=True))


def cells_of(cache: str) -> list[np.ndarray]:  # noqa: F811
    """Of each map: the cells that are no padding, of every image's first view, [N, C]."""
    reader = TeacherCacheReader(cache, MEMORY)
    found: list[list[np.ndarray]] = [[] for _ in reader.manifest.sizes.channels]
    for shard, (rows, _) in enumerate(reader.manifest.views[0]):
        for row in range(rows):
            record = decoded(reader.read(shard, 0, [row]), reader.manifest.sizes, MEMORY)
            for level, (map_, valid) in enumerate(zip(record.memory, record.memory_valid, strict=True)):
                found[level] += [map_[0, :, y, x].numpy() for y, x in np.argwhere(valid[0].numpy())]
    return [np.stack(cells).astype(np.float64) for cells in found]


def test_directions_are_the_eigenvectors_of_the_covariance_of_all_cells_and_come_back(
    cache: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, manifest = compute_directions(cache), load_cache_manifest(cache)
    assert manifest is not None
    assert len(found) == len(manifest.sizes.channels) == 2
    for each, cells in zip(found, cells_of(cache), strict=True):
        covariance = np.cov(cells.T, bias=True)
        vectors = each.vectors.astype(np.float64)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(vectors)), atol=1e-5)
        np.testing.assert_allclose(vectors * each.variances @ vectors.T, covariance, atol=1e-5)
        assert (np.diff(each.variances) <= 0).all()
    Path(cache, module.FILES["variance"]).unlink(missing_ok=True)
    assert load_directions(cache, manifest) is None
    save_directions(cache, found, manifest)
    again = load_directions(cache, manifest)
    assert again is not None
    for mine, theirs in zip(again, found, strict=True):
        assert np.array_equal(mine.variances, theirs.variances)
        assert np.array_equal(mine.vectors, theirs.vectors)
    monkeypatch.setattr(module, "IMAGES", 5)  # a sample of them: much the same
    fewer = compute_directions(cache)
    assert 0.5 < fewer[0].variances.sum() / found[0].variances.sum() < 2
    save_directions(cache, found, manifest)


@pytest.mark.parametrize("whitening", [0.0, 1.0])
def test_importances_have_mean_1_begin_alike_and_come_to_count_less_what_fits_badly(whitening: float) -> None:
    config = FeatureDistillationConfig(whitening=whitening, importance=True, background=1.0, whitened_share=1.0)
    directions = (random_directions(6),)
    learned = AttentionGuidedFeatureDistillation([6], [6], config, directions=directions)
    plain = config.model_copy(update={"importance": False})
    alike = AttentionGuidedFeatureDistillation([6], [6], plain, directions=directions)
    g = torch.Generator().manual_seed(0)
    goal, error = torch.randn(2, 6, 3, 4, generator=g), torch.randn(2, 6, 3, 4, generator=g)
    errors = torch.tensor([0.1, 0.3, 0.5, 1.0, 1.5, 2.0]).view(1, 6, 1, 1)
    if whitening:  # along the directions, scaled as the metric will scale them
        found = torch.linalg.pinv(learned.get_buffer(learned.metrics[0]))  # [6, 6]
        error = torch.einsum("bkhw,kc->bchw", error * errors, found)
    else:
        error = error * errors
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    nothing = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 4)
    record = TeacherRecord(*nothing, (goal,), (valid,))
    terms = [module([goal + error], [valid], record, None) for module in (learned, alike)]
    torch.testing.assert_close(terms[0].total, terms[1].total)  # all count alike at first
    assert learned.preference().total == 0
    squares = error.movedim(1, -1)
    if whitening:
        squares = squares @ learned.get_buffer(learned.metrics[0])
    losses = squares.square().flatten(0, 2).mean(0)  # [6]
    optimizer = torch.optim.Adam(learned.leanings.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        term = learned([goal + error], [valid], record, None)
        (term.total / term.count + learned.preference().total).backward()
        optimizer.step()
    weights = learned.importance(0).detach()
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert learned.preference().total > 0
    # At the least, each weight is 1 / (its loss + what makes the mean 1).
    constant = 1 / weights - losses
    torch.testing.assert_close(constant, constant.mean().expand(6), rtol=0.02, atol=0.02)
    assert (weights.diff()[losses.diff() > 0] < 0).all()


def test_a_training_learns_importances_beside_its_student() -> None:
    tree = {"selection": EASY_SELECTION, "features": {"importance": True}}
    training = make_training(recipe(None, distillation=tree), random_teacher())
    values = [training.train_step(batch_of(2, 0))["agfd_importance"].item() for _ in range(3)]
    assert values[0] == 0
    assert values[1] > 0
    assert training.module.weights["agfd_importance"] == training.module.weights["agfd"]
    assert not [name for name in training.student.state_dict() if "leaning" in name]  # never exported


def random_directions(width: int, seed: int = 0) -> Directions:
    g = np.random.default_rng(seed)
    vectors = np.linalg.qr(g.normal(size=(width, width)))[0].astype(np.float32)
    return Directions((4.0 ** -np.arange(width)).astype(np.float32), vectors)


@pytest.mark.parametrize(("alpha", "share", "kept"), [(1.0, 0.97, 3), (0.5, 0.97, 3), (1.0, 1.0, 6), (2.0, 0.5, 1)])
def test_an_error_counts_by_its_direction_and_one_like_the_memory_as_without(
    alpha: float, share: float, kept: int
) -> None:
    directions = random_directions(6)
    found = metric(directions, alpha, share).double().numpy()
    assert found.shape == (6, kept)
    variances, vectors = directions.variances.astype(np.float64), directions.vectors.astype(np.float64)
    weights = [variances[k] ** -alpha for k in range(kept)]
    scale = variances.sum() / sum(w * variances[k] for k, w in enumerate(weights))
    for k in range(6):
        along = float(np.square(vectors[:, k] @ found).sum())
        assert along == pytest.approx(scale * weights[k] if k < kept else 0, rel=1e-4, abs=1e-6)
    memory = vectors * variances @ vectors.T
    assert np.trace(found.T @ memory @ found) == pytest.approx(variances.sum(), rel=1e-4)


def test_a_memory_without_any_variance_counts_every_direction_alike() -> None:
    eye = np.eye(4, dtype=np.float32)
    assert torch.equal(metric(Directions(np.zeros(4, np.float32), eye), 1.0, 0.97), torch.eye(4))


@pytest.mark.parametrize("weighting", ["normalised", "squared"])
def test_the_whitened_loss_equals_the_loops_on_several_maps_and_any_width(weighting: Any) -> None:
    g = torch.Generator().manual_seed(0)
    theirs = tuple(torch.randn(2, width, 3, 4, generator=g) for width in (6, 5))
    mine = [torch.randn(2, 3, 3, 4, generator=g) for _ in theirs]
    valid = (torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 3, 4, dtype=torch.bool))
    valid[0][1, 2:], valid[1][1, 2:] = False, False
    masks = [torch.rand(2, 3, 4, generator=g) * part for part in valid]
    record = TeacherRecord(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 4), theirs, valid)
    known = [random_directions(6), random_directions(5, seed=1)]
    config = FeatureDistillationConfig(whitening=1.0, mask_weighting=weighting)
    agfd = AttentionGuidedFeatureDistillation([3, 3], [6, 5], config, [(0, 0), (1, 1)], known)
    term = agfd(mine, valid, record, masks)
    total, count = 0.0, 0.0
    for image in range(2):
        above = below = 0.0
        for level, width in enumerate((6, 5)):
            weight, bias = (each.detach() for each in agfd.projectors[str(level)].parameters())
            along = metric(known[level], 1.0, 0.97)
            for y, x in np.argwhere(valid[level][image].numpy()):
                error = weight[:, :, 0, 0] @ mine[level][image, :, y, x] + bias - theirs[level][image, :, y, x]
                apart = sum(float(error @ along[:, k]) ** 2 for k in range(along.shape[1])) / width
                m = float(masks[level][image, y, x])
                above += (m**2 if weighting == "squared" else m) * apart
                below += 1 if weighting == "squared" else m
        total += above if weighting == "squared" else above / below
        count += below if weighting == "squared" else 1
    assert term.total.item() == pytest.approx(total, rel=1e-4)
    assert term.count == count
    term.total.backward()
    assert all(each.grad is not None for each in agfd.parameters())
    assert {name for name, _ in agfd.named_buffers()} == {"metric_0", "metric_1"}


def test_a_cache_without_directions_is_refused_given_them_and_then_taught_from(
    cache: str,  # noqa: F811
    data: str,  # noqa: F811
    teacher: OnlineTeacher,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = replace_features(cache_config(data, cache), whitening=0.0)
    config = replace_features(plain, whitening=1.0)
    manifest = load_cache_manifest(cache)
    assert manifest is not None
    Path(cache, module.FILES["variance"]).unlink(missing_ok=True)
    assert not lacks_directions(plain, manifest)
    assert lacks_directions(config, manifest)
    labels = ("three", "eight", "nine")
    with pytest.raises(QskdError, match=r"no directions are known\n.*\n.*qskd cache RECIPE"):
        make_training(config, teacher, labels=labels)
    add_directions([plain], quiet=False)
    assert not Path(cache, module.FILES["variance"]).exists()
    add_directions([config], quiet=False)
    add_directions([config], quiet=False)
    assert capsys.readouterr().out.count(module.FILES["variance"]) == 1
    assert not lacks_directions(config, manifest)
    training = make_training(config, teacher_for_training(config, labels, None), labels=labels)
    assert training.module.method is not None
    record = teacher(*pixels(), TeacherNeeds(memory=True, attention=True))
    batch = train_batch(arrays((2, 0)))
    whitened = training.module(batch.images, batch.sizes, batch.targets, record)["agfd"]
    usual = make_training(plain, teacher, labels=labels)
    not_whitened = usual.module(batch.images, batch.sizes, batch.targets, record)["agfd"]
    assert whitened.total.item() != not_whitened.total.item()
    unsaid = replace_features(plain, whitening=None)
    for of, expected in ((teacher, not_whitened), (teacher_for_training(unsaid, labels, None), whitened)):
        module_of = make_training(unsaid, of, labels=labels).module
        assert module_of(batch.images, batch.sizes, batch.targets, record)["agfd"].total.item() == expected.total.item()
    clean(cache)
    assert Path(cache, module.FILES["variance"]).exists()  # the end of a job leaves it
    shutil.copytree(cache, tmp_path / "copy")
    clean(str(tmp_path / "copy"), everything=True)  # --overwrite does not
    assert list((tmp_path / "copy").iterdir()) == []


def test_before_an_online_training_its_teacher_is_asked_how_its_memory_varies(work: Path) -> None:  # noqa: F811
    """The directions are those that a cache of as many images has, but for what int8 rounds; of a method that has no use for
    them, and where nothing will be trained, nobody is asked."""
    given = cached(work, "cache-online-whitened")
    online = config(work)
    cpu, labels = torch.device("cpu"), source_manifest(online.data).labels
    found = teacher_for_training(online, labels, cpu)
    of_cache = teacher_for_training(given, labels, cpu)
    assert found is not None
    assert of_cache is not None
    assert len(found.facts.directions) == len(of_cache.facts.directions) > 0
    for mine, theirs in zip(found.facts.directions, of_cache.facts.directions, strict=True):
        one, other = (each.vectors * each.variances @ each.vectors.T for each in (mine, theirs))
        np.testing.assert_allclose(one, other, atol=0.02 * np.abs(other).max())
    again = teacher_for_training(online, labels, cpu)
    assert again is not None
    for mine, theirs in zip(again.facts.directions, found.facts.directions, strict=True):
        assert np.array_equal(mine.vectors, theirs.vectors)
    for recipe_of, device in ((online, None), (replace_features(online, whitening=0.0), cpu)):
        unasked = teacher_for_training(recipe_of, labels, device)
        assert unasked is not None
        assert unasked.facts.directions == ()
    explicit = replace_features(online, whitening=1.0)
    metrics = [
        dict(make_training(each, of, labels=labels).module.method.named_buffers())
        for each, of in ((explicit, found), (online, found))
    ]
    assert metrics[0].keys() == metrics[1].keys() > set()
    assert all(torch.equal(metrics[0][name], metrics[1][name]) for name in metrics[0])


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    batch = train_batch(arrays((2, 0)))
    return batch.teacher_images, batch.teacher_sizes


def replace_features(config: Any, **changes: Any) -> Any:
    features = config.distillation.features.model_copy(update=changes)
    return config.model_copy(update={"distillation": config.distillation.model_copy(update={"features": features})})


def test_damaged_directions_and_those_of_another_cache_are_refused_by_name(cache: str) -> None:  # noqa: F811
    manifest, path = load_cache_manifest(cache), Path(cache, module.FILES["variance"])
    assert manifest is not None
    found = compute_directions(cache)
    other = replace(manifest, identity={**manifest.identity, "more": 1})
    nan = [Directions(found[0].variances * np.float32("nan"), found[0].vectors), *found[1:]]
    for write, words in (
        (lambda: save_directions(cache, found, other), "of another cache"),
        (lambda: save_directions(cache, found[:1], manifest), "of other maps"),
        (lambda: save_directions(cache, nan, manifest), "not finite"),
        (lambda: save_directions(cache, [found[0], found[0], found[0]], manifest), "of other maps"),
        (lambda: path.write_bytes(path.read_bytes()[:-20]), "not the directions of this cache"),
        (lambda: path.write_bytes(b""), "not the directions of this cache"),
    ):
        write()  # type: ignore[no-untyped-call]
        with pytest.raises(QskdError, match=words) as caught:
            load_directions(cache, manifest)
        assert module.FILES["variance"] in str(caught.value)
        assert "delete this file" in str(caught.value)
    save_directions(cache, found, manifest)


def test_whitening_asks_for_directions_and_nothing_else_does() -> None:
    for features, asked in (
        ({}, "variance"),
        ({"whitening": 0.0}, ""),
        ({"whitening": 0.5}, "variance"),
        ({"whitening": 0.5, "weight": 0.0}, ""),
        ({"weight": 0.0}, ""),
    ):
        config: Any = recipe(None, distillation={"features": features})
        needs = teacher_needs(config.distillation)
        assert needs is not None
        assert needs.directions == asked


# ---- by what moves the decoder


def decoder_of(teacher: OnlineTeacher) -> TeacherDecoder:  # noqa: F811
    square = teacher.preprocessing.resize.model_copy(update={"mode": "square"})
    return TeacherDecoder(teacher.detector, teacher.class_slots.tolist(), square)


def test_the_probe_s_gradient_has_on_average_the_jacobian_s_square(teacher: OnlineTeacher) -> None:  # noqa: F811
    """E[g g^T] = J^T J, J here one output after the other."""
    record = teacher(*pixels(), TeacherNeeds(memory=True))
    one = [map_[:1] for map_ in record.memory], [valid[:1] for valid in record.memory_valid]
    maps = [map_.clone().requires_grad_() for map_ in one[0]]
    said = decoder_of(teacher).read(maps, one[1])
    logits, boxes = said.logits[-1][0], said.boxes_cxcywh[-1][0]
    likely = logits.detach().sigmoid()
    exact = torch.zeros(64, 64, dtype=torch.double)
    for query in range(len(logits)):
        for slot in range(logits.shape[1]):
            by = (likely[query, slot] * (1 - likely[query, slot])).sqrt()
            exact += squared(logits[query, slot] * by, maps[0])
        for side in range(4):
            by = likely[query].max() / boxes[query, 2 + side % 2].detach()
            exact += squared(boxes[query, side] * by, maps[0])
    drawn, found, times = torch.Generator().manual_seed(0), torch.zeros(64, 64, dtype=torch.double), 400
    for _ in range(times):
        found += squared(module.probe(said, drawn), maps[0]) / times
    assert (found - exact).norm() < 0.15 * exact.norm()
    assert found.trace().item() == pytest.approx(exact.trace().item(), rel=0.1)


def squared(number: torch.Tensor, map_: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(number, [map_], retain_graph=True)
    at = gradient[0].flatten(1).T.double()
    return at.T @ at


def test_the_decoder_s_directions_come_back_and_weigh_an_error_by_what_it_moves(
    cache: str,  # noqa: F811
    teacher: OnlineTeacher,  # noqa: F811
) -> None:
    manifest = load_cache_manifest(cache)
    assert manifest is not None
    found = compute_sensitivities(cache, decoder_of(teacher))
    covariances = [np.cov(cells.T, bias=True) for cells in cells_of(cache)]
    for each, covariance in zip(found, covariances, strict=True):
        assert each.sensitivities is not None
        assert (np.diff(each.sensitivities) <= 0).all()
        assert each.sensitivities.sum() == pytest.approx(1, rel=1e-4)
        vectors = each.vectors.astype(np.float64)
        np.testing.assert_allclose(each.variances, np.diag(vectors.T @ covariance @ vectors), rtol=1e-3)
        along = metric(each, 1.0, 1.0).double().numpy()
        weights = np.square(each.vectors.astype(np.float64).T @ along).sum(1)
        kept = along.shape[1]
        ratio = weights[:kept] / each.sensitivities[:kept]
        np.testing.assert_allclose(ratio, ratio[0], rtol=0.02)
        assert np.trace(along.T @ covariance @ along) == pytest.approx(np.trace(covariance), rel=1e-3)
    assert load_directions(cache, manifest, "decoder") is None
    save_directions(cache, found, manifest)
    again = load_directions(cache, manifest, "decoder")
    assert again is not None
    for mine, theirs in zip(again, found, strict=True):
        assert np.array_equal(mine.sensitivities, theirs.sensitivities)  # type: ignore[arg-type]
        assert np.array_equal(mine.vectors, theirs.vectors)
    by_variance = load_directions(cache, manifest)  # is another file
    assert by_variance is not None
    assert by_variance[0].sensitivities is None
    Path(cache, module.FILES["decoder"]).unlink()


def test_two_methods_that_weigh_memory_otherwise_are_refused() -> None:
    both = [TeacherNeeds(directions=kind) for kind in ("variance", "decoder")]
    assert both[0].joined(TeacherNeeds()).directions == "variance"
    with pytest.raises(QskdError, match="by decoder and by variance"):
        both[0].joined(both[1])
    with pytest.raises(ValueError, match="nothing is whitened"):
        FeatureDistillationConfig(whitened_by="decoder")


def test_several_teachers_have_no_one_decoder_to_weigh_by(cache: str, data: str) -> None:  # noqa: F811
    config = replace_features(cache_config(data, cache), whitening=1.0, whitened_by="decoder")
    more = FurtherTeacherConfig(path="another")
    with pytest.raises(QskdError, match=r"teacher\.also[\s\S]*whitened_by: variance"):
        check_decoder(config.model_copy(update={"teacher": config.teacher.model_copy(update={"also": (more,)})}))
