"""A cache of few numbers a cell: memory along the directions in which it varies most (`teacher.cache.memory_share`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_teacher_cache import (  # noqa: F401  (fixtures)
    ASPECT,
    EVERYTHING,
    LABELS,
    cache,
    cache_config,
    data,
    decoded,
    losses,
    stream_of,
    teacher,
)
from test_whitening import MEMORY
from tiny import train_batch

from benchmarks.local_cache import make_cache
from qskd.config import Config
from qskd.datasets.loader import BatchLoader
from qskd.datasets.shards import ShardReader
from qskd.distillation.crosskd import CrossKD
from qskd.distillation.crosskd import Settings as CrossSettings
from qskd.distillation.qskd.agfd import AttentionGuidedFeatureDistillation
from qskd.distillation.qskd.settings import FeatureDistillationConfig
from qskd.distillation.shared.maps import Meeting, Projector
from qskd.errors import QskdError
from qskd.from_recipe import teacher_for_training
from qskd.structures import TeacherNeeds, TeacherRecord
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import collate, decode_batch, mirrored
from qskd.teacher.joined import JoinedCaches
from qskd.teacher.manifest import BASIS, CacheManifest, save_cache_manifest
from qskd.teacher.memory.basis import FILE, Basis, cached_basis, in_parts, made_whole, sampled, save_bases
from qskd.teacher.memory.directions import compute_directions
from qskd.teacher.memory.moments import fewest
from qskd.teacher.online import OnlineTeacher

torch.set_num_threads(1)
SHARE = 0.8


@pytest.fixture(scope="module")
def small(data: str, teacher: OnlineTeacher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, CacheManifest]:  # noqa: F811
    config = cache_config(data, str(tmp_path_factory.mktemp("small")), memory_share=SHARE)
    return config, make_cache(config, teacher, ASPECT)


def cells_asked(config: Config, teacher: OnlineTeacher) -> list[np.ndarray]:  # noqa: F811
    """Of each map, [N, C]: what the teacher says of the images that a basis is found from."""
    loader = BatchLoader(config.data.train, "", config.data.views, ASPECT)
    found: list[list[np.ndarray]] = [[], []]
    for rows in sampled(ShardReader(config.data.train), config.teacher.cache.batch_size):
        batch = train_batch(loader.load("train", rows))
        record = teacher(batch.teacher_images, batch.teacher_sizes, TeacherNeeds(memory=True))
        for level, (map_, valid) in enumerate(zip(record.memory, record.memory_valid, strict=True)):
            found[level] += [map_[i, :, y, x].double().numpy() for i, y, x in np.argwhere(valid.numpy())]
    return [np.stack(cells) for cells in found]


def whole(cache: str, rows: list[int], columns: tuple[str, ...] = EVERYTHING) -> TeacherRecord:  # noqa: F811
    """As a training has them, of the first shard's first view."""
    reader = TeacherCacheReader(cache, columns)
    record = decoded(reader.read(0, 0, rows), reader.manifest.sizes, columns)
    return made_whole(record, cached_basis(cache, reader.manifest))


def test_memory_comes_back_as_its_projection_on_the_fewest_directions_that_hold_the_share(
    cache: str,  # noqa: F811
    teacher: OnlineTeacher,  # noqa: F811
    small: tuple[Config, CacheManifest],
) -> None:
    config, manifest = small
    path, sizes = config.teacher.cache.path, manifest.sizes
    found, full, bases = whole(path, list(range(8))), whole(cache, list(range(8))), cached_basis(path, manifest)
    for level, cells in enumerate(cells_asked(config, teacher)):
        values = np.linalg.eigvalsh(np.cov(cells.T, bias=True))[::-1]
        assert sizes.kept[level] == int((values.cumsum() < SHARE * values.sum()).sum()) + 1 < sizes.channels[level]
        vectors, mean = bases[level].vectors.double().numpy(), bases[level].mean.double().numpy()
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-5)
        np.testing.assert_allclose(mean, cells.mean(0), atol=1e-4)
        held = np.square((cells - mean) @ vectors).mean(0)
        np.testing.assert_allclose(held, values[: len(held)], rtol=1e-3)
        onto = vectors @ vectors.T
        valid = full.memory_valid[level]
        shown = full.memory[level].movedim(1, -1)[valid].double().numpy()
        mine = found.memory[level].movedim(1, -1)[valid].double().numpy()
        # Two roundings to int8, each of at most 1/254 of a channel's largest value; nothing else.
        np.testing.assert_allclose(mine, (shown - mean) @ onto + mean, atol=0.03 * np.abs(shown).max())
        assert (found.memory[level].movedim(1, -1)[~valid] == 0).all()
    for name in ("logits", "boxes_cxcywh", "attention_queries"):  # all else is that of any other cache
        assert torch.equal(getattr(found, name), getattr(full, name))
    for mine, theirs in zip(found.attention, full.attention, strict=True):
        assert torch.equal(mine, theirs)


def test_a_row_has_so_many_bytes_fewer(cache: str, small: tuple[Config, CacheManifest]) -> None:  # noqa: F811
    config, manifest = small
    (mine,), (theirs,) = (TeacherCacheReader(path).read(0, 0, [3]) for path in (config.teacher.cache.path, cache))
    cells = theirs.memory_shapes.prod(1)
    assert theirs.memory.nbytes == (cells * manifest.sizes.channels).sum()
    assert mine.memory.nbytes == (cells * manifest.sizes.kept).sum()
    assert len(mine.memory_scale) == sum(manifest.sizes.kept)
    assert mine.nbytes < theirs.nbytes


def test_a_share_that_loses_nothing_gives_the_losses_of_a_whole_cache(
    data: str,  # noqa: F811
    teacher: OnlineTeacher,  # noqa: F811
    tmp_path: Path,
) -> None:
    stream = stream_of(data, "", None)
    both = []
    for name, share in (("whole", 1.0), ("nearly", 1 - 1e-12), ("little", 0.3)):
        config = cache_config(data, str(tmp_path / name), "float32", memory_share=share)
        make_cache(config, teacher, ASPECT)
        told = teacher_for_training(config, LABELS, None)
        assert isinstance(told, CachedTeacher)
        both.append(
            losses(config, told, replace(stream, teacher_cache=str(tmp_path / name), teacher_columns=EVERYTHING))
        )
    for mine, theirs in zip(
        *([dict(step) for step in each] for each in both[1::-1]), strict=True
    ):  # along what varies not at all, students are not compared
        for name in ("agfd", "total"):
            assert mine.pop(name, 0.0) == pytest.approx(theirs.pop(name, 0.0), rel=0.03)
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert both[2][0]["agfd"] != pytest.approx(both[0][0]["agfd"], rel=0.02)
    assert both[2][0]["lapd_class"] == pytest.approx(both[0][0]["lapd_class"], rel=1e-4)


def test_a_mirrored_row_is_made_whole_as_the_mirror_image(small: tuple[Config, CacheManifest]) -> None:
    config, manifest = small
    reader, bases = TeacherCacheReader(config.teacher.cache.path), cached_basis(config.teacher.cache.path, manifest)
    rows = reader.read(0, 0, [1])
    turned = collate([mirrored(row, manifest.sizes, EVERYTHING) for row in rows], manifest.sizes, EVERYTHING)
    record = made_whole(decode_batch({name: torch.from_numpy(value) for name, value in turned.items()}), bases)
    for mine, theirs in zip(record.memory, whole(config.teacher.cache.path, [1]).memory, strict=True):
        torch.testing.assert_close(mine, theirs.flip(-1))


def test_attended_cells_are_kept_along_few_directions_too(
    data: str,  # noqa: F811
    teacher: OnlineTeacher,  # noqa: F811
    small: tuple[Config, CacheManifest],
    tmp_path: Path,
) -> None:
    config = cache_config(data, str(tmp_path), memory_share=SHARE, cells="attended")
    manifest = make_cache(config, teacher, ASPECT)
    assert manifest.sizes.kept == small[1].sizes.kept
    found, full = whole(str(tmp_path), [0, 1, 2, 3]), whole(small[0].teacher.cache.path, [0, 1, 2, 3])
    for mine, theirs, shown in zip(found.memory, full.memory, full.attention, strict=True):
        attended = (shown > 0).any(1)[:, None].expand_as(mine)
        assert attended.any()
        torch.testing.assert_close(mine[attended], theirs[attended])
    directions = compute_directions(str(tmp_path))
    assert [fewest(each.variances, 1.0) for each in directions] == list(manifest.sizes.kept)


def test_directions_are_those_of_what_is_kept(cache: str, small: tuple[Config, CacheManifest]) -> None:  # noqa: F811
    config, manifest = small
    mine, theirs = compute_directions(config.teacher.cache.path), compute_directions(cache)
    for few, many, kept in zip(mine, theirs, manifest.sizes.kept, strict=True):
        assert fewest(few.variances, 1.0) == kept
        np.testing.assert_allclose(few.variances[:kept], many.variances[:kept], rtol=0.05)
        assert few.vectors.shape == many.vectors.shape


def test_a_basis_that_is_lost_damaged_or_of_another_cache_is_refused_by_name(
    small: tuple[Config, CacheManifest], tmp_path: Path
) -> None:
    config, manifest = small
    path, bases, uri = tmp_path / FILE, cached_basis(config.teacher.cache.path, manifest), str(tmp_path)
    other = tuple(Basis(each.mean + 1, each.vectors) for each in bases)
    nan = tuple(Basis(each.mean * torch.nan, each.vectors) for each in bases)

    def damage() -> None:
        save_bases(uri, bases, manifest)
        path.write_bytes(path.read_bytes()[:-20])

    for write, words in (
        (lambda: None, "not there"),
        (lambda: save_bases(uri, bases, replace(manifest, identity={})), "of another cache"),
        (lambda: save_bases(uri, bases[:1], manifest), "of other maps"),
        (lambda: save_bases(uri, nan, manifest), "not finite"),
        (lambda: save_bases(uri, other, manifest), "sha256"),
        (damage, "not the basis of this cache's memory"),
    ):
        write()
        with pytest.raises(QskdError, match=words) as caught:
            cached_basis(uri, manifest)
        assert FILE in str(caught.value)
        assert "qskd cache RECIPE --overwrite" in str(caught.value)


def test_a_cache_without_is_written_as_before_there_was_such_a_thing(small: tuple[Config, CacheManifest]) -> None:
    _, manifest = small
    assert CacheManifest.from_json(manifest.to_json(), "here") == manifest
    plain = replace(manifest, sizes=replace(manifest.sizes, kept=()))
    assert '"kept"' not in plain.to_json()
    assert plain.sizes.stored == manifest.sizes.channels


def test_caches_in_two_bases_are_not_read_together(small: tuple[Config, CacheManifest], tmp_path: Path) -> None:
    config, manifest = small
    path = config.teacher.cache.path
    assert JoinedCaches([path, path], MEMORY).num_bytes == 2 * manifest.num_bytes
    save_cache_manifest(str(tmp_path), replace(manifest, identity={**manifest.identity, BASIS: "another"}))
    with pytest.raises(QskdError, match="memory in another basis"):
        JoinedCaches([path, str(tmp_path)], MEMORY)


def test_a_basis_is_found_from_images_of_all_shards(data: str) -> None:  # noqa: F811
    rows = np.concatenate(list(sampled(ShardReader(data), 4)))
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 22
    assert set(rows[:, 0]) == {0, 1, 2}
    assert (rows[:, 2] == 0).all()
    assert all(len(batch) <= 4 for batch in sampled(ShardReader(data), 4))


@pytest.mark.parametrize("method", ["qskd", "mimic", "crosskd"])
def test_a_student_is_compared_along_what_is_known_alone(
    small: tuple[Config, CacheManifest],
    teacher: OnlineTeacher,  # noqa: F811
    method: str,
) -> None:
    """Who has the teacher's memory has nothing to learn from a part of it, though the part is not the whole."""
    config, manifest = small
    bases = cached_basis(config.teacher.cache.path, manifest)
    theirs = CachedTeacher(manifest.sizes, bases=bases).facts
    loader = BatchLoader(config.data.train, "", config.data.views, ASPECT)
    batch = train_batch(loader.load("train", np.array([(0, 0, 0), (0, 1, 0)], np.int32)))
    true = teacher(batch.teacher_images, batch.teacher_sizes, TeacherNeeds(memory=True))
    known = made_whole(in_parts(true, bases), bases)
    layers: list[Projector]
    if method == "qskd":
        settings = FeatureDistillationConfig(background=1.0)
        agfd = AttentionGuidedFeatureDistillation(theirs.channels, theirs.channels, settings, bases=theirs.bases)
        assert agfd(true.memory, true.memory_valid, known, None).total.item() == pytest.approx(0, abs=1e-8)
        apart = AttentionGuidedFeatureDistillation(theirs.channels, theirs.channels, settings)
        assert apart(true.memory, true.memory_valid, known, None).total.item() > 0.01
        layers = list(agfd.projectors.values())  # type: ignore[arg-type]
    elif method == "mimic":
        layers = list(Meeting(theirs, theirs))  # type: ignore[arg-type]
    else:
        layers = list(CrossKD(CrossSettings(), theirs, theirs).projectors)  # type: ignore[arg-type]
    for layer, map_, goal, valid in zip(layers, true.memory, known.memory, true.memory_valid, strict=True):
        torch.testing.assert_close(layer(map_)[valid], goal.movedim(1, -1)[valid], atol=1e-4, rtol=1e-4)
        assert set(layer.state_dict()) == {"weight", "bias"}  # the cache has the rest
