"""Two workers train as one does: the same losses and weights at the same global batch, and none waits for ever."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from taught_by_two import CACHED_ROWS, from_cache_of_two, make_cache_of_two, two_teachers
from tiny import FAMILIES, LABELS, SIZE, arrays, make_training, random_teacher, recipe, silent_student
from torch import Tensor
from transformers.models.d_fine.modeling_d_fine import replace_batch_norm

from qskd.config import Config
from qskd.datasets.batch import TrainBatch, parts_of, train_batch
from qskd.datasets.order.schedule import split
from qskd.errors import QskdError
from qskd.teacher.online import OnlineTeacher
from qskd.training.patience import Patience
from qskd.training.step import Training

WORKERS = 2
# What takes seconds to import: once in the server, of which both workers are forks. It runs nothing before that a fork can't bear.
PRELOADED = ["qskd.training.step", "qskd.teacher.online", "transformers.models.d_fine.modeling_d_fine"]
TIMEOUT_S = 300  # for the workers together; one collective may take a third of it

# Objects of each image of each global batch, and what the split into two makes of it.
BATCHES: tuple[tuple[int, ...], ...] = (
    (2, 0, 1, 3),  # an image without objects beside one with
    (0, 0, 2, 1),  # the first worker's whole share has no object
    (1, 2, 3),  # an odd number of images: shares of 1 and 2
    (1, 0),  # a single object: on average each worker has half a one
    (2,),  # the first worker's share is empty
    (0, 0),  # no object at all
    (3, 1, 1, 2),
)
DENSE = "detection.dense_weight=1.0"
SEEN = ("augmentation.preset=rtdetr", "augmentation.blur_probability=0.5")  # what the student sees, and at what size
GROUPS = "detection.query_groups=3"
SCENARIOS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "refined": ("refined", (DENSE,)),
    "conditional": (
        "conditional",
        (DENSE, "training.ema_decay=0.9", "distillation.predictions.pairing=hungarian", GROUPS, *SEEN),
    ),
    "unsupervised layers": ("refined", ("distillation.method=none", "detection.auxiliary=false")),
    "statistics of all": ("refined", ("student.backbone_norm=sync", "training.ema_decay=0.9")),
    "outside the backbone too": (
        "conditional",
        ("student.family=rt_detr", "student.feature_levels=2", "student.queries=20", "student.backbone_norm=sync"),
    ),
    "two teachers": ("refined", ()),
    "labels completed by two": ("refined", ("data.completed=true", "distillation.predictions.pairing=global")),
}


def configured(name: str) -> Config:
    family, options = SCENARIOS[name]
    return recipe({**FAMILIES[family], "backbone_norm": "frozen"}, *options)


def share_of(counts: tuple[int, ...], seed: int, world_size: int, rank: int) -> TrainBatch:
    """A worker's part of the global batch, padded to its own largest number of objects as the loader does."""
    own = {name: split(array, world_size, rank) for name, array in arrays(counts, seed).items()}
    most = int(own["counts"].max(initial=0))
    return train_batch(own | {"boxes_cxcywh": own["boxes_cxcywh"][:, :most], "labels": own["labels"][:, :most]})


@functools.cache
def the_teacher() -> OnlineTeacher:
    """Which no training changes (test_training), and which takes longer to build than to ask for all batches."""
    return random_teacher("conditional")


def start(config: Config, taught_by_two: bool = False) -> Training:
    asked = two_teachers if taught_by_two else the_teacher
    return make_training(config, asked() if config.distillation.method != "none" else None, len(BATCHES))


@functools.cache
def train(name: str, world_size: int, rank: int) -> dict[str, Tensor]:
    """Every step's terms as "step.TERM", and the weights after each step of the first half and the last."""
    training = start(configured(name), "two" in name)
    results: dict[str, Tensor] = {}
    for step, counts in enumerate(BATCHES):
        values = training.train_step(share_of(counts, step, world_size, rank))
        results |= {f"{step}.{term}": value.reshape(1).clone() for term, value in values.items()}
        if step == 0:
            results |= {f"first/{key}": value for key, value in training.state().items()}
    return results | {f"last/{key}": value for key, value in training.state().items()}


def evaluate(rank: int) -> dict[str, Tensor]:
    """With batch statistics that differ, and an average of them: what each worker evaluates, and one that saves alone."""
    training = start(recipe(None, "training.ema_decay=0.9"))
    for step in range(2):
        training.train_step(share_of((2, 1, 1, 3), step, WORKERS, rank))
    own = {f"own/{key}": value.clone() for key, value in training.student.state_dict().items()}
    averages = {f"average/{key}": value.clone() for key, value in training.average.items()}
    with training.evaluation_weights() as student:
        evaluated = {f"evaluated/{key}": value.clone() for key, value in student.state_dict().items()}
    if rank == 0:
        with training.evaluation_weights() as student:
            evaluated |= {f"saved/{key}": value.clone() for key, value in student.state_dict().items()}
    training.train_step(share_of((2, 1, 1, 3), 2, WORKERS, rank))
    training.check_finite()
    return {key: value.contiguous() for key, value in (own | averages | evaluated).items()}


def resume(rank: int, taught_by_two: bool) -> dict[str, Tensor]:
    """A run with everything random, whole and stopped after two steps; rank 0's state is what all go on from."""
    options = (DENSE, "student.dropout=0.1", "training.ema_decay=0.9")
    results: dict[str, Tensor] = {}
    whole = start(recipe(FAMILIES["refined"], *options), taught_by_two)
    for step, counts in enumerate(BATCHES[:4]):
        whole.train_step(share_of(counts, step, WORKERS, rank))
        if step == 1:
            saved: list[Any] = [whole.state()]
            dist.broadcast_object_list(saved, src=0)
    results |= {f"whole/{key}": value for key, value in whole.state().items()}
    again = start(recipe(FAMILIES["refined"], *options), taught_by_two)
    again.load_state(saved[0], 2)
    for step, counts in enumerate(BATCHES[2:4], start=2):
        again.train_step(share_of(counts, step, WORKERS, rank))
    return results | {f"again/{key}": value for key, value in again.state().items()}


def go_on(saved: Mapping[str, Tensor], world_size: int, rank: int) -> dict[str, Tensor]:
    """The scenario "refined" from its state after one step (as `train` gives it) to its end."""
    training = start(configured("refined"))
    training.load_state(part(saved, "first/"), 1)
    for step, counts in enumerate(BATCHES[1:], start=1):
        training.train_step(share_of(counts, step, world_size, rank))
    return {f"last/{key}": value for key, value in training.state().items()}


def waiting(rank: int) -> dict[str, Tensor]:
    """Evaluations without a better AP after each of some, of which rank 0 alone knows the AP."""
    patience, waited = Patience(2, WORKERS), []
    for ap in (0.2, 0.1, -1.0, 0.3, 0.3, 0.1):
        patience.heard(SimpleNamespace(metrics={"AP": ap}) if rank == 0 else None)  # type: ignore[arg-type]
        waited.append(patience.waited)
    return {"waited": torch.tensor([*waited, int(patience.exhausted)])}


def broken(rank: int) -> dict[str, Tensor]:
    """Worker 1's gradient alone is not finite, at the second step; its loss is. What each worker says of it, as bytes."""
    training = start(configured("refined"))
    training.train_step(share_of(BATCHES[0], 0, WORKERS, rank))
    weight = next(p for name, p in training.student.named_parameters() if name.endswith("bbox_embed.0.layers.0.weight"))
    hook = weight.register_hook(lambda gradient: gradient * (float("nan") if rank == 1 else 1.0))
    training.train_step(share_of(BATCHES[2], 7, WORKERS, rank))
    hook.remove()
    try:
        training.state()
        said = ""
    except QskdError as error:
        said = str(error)
    return {"said": torch.tensor(list(said.encode()), dtype=torch.uint8)}


def in_parts(world_size: int, rank: int) -> dict[str, Tensor]:
    """Each share in two parts. Part by part the two workers have images 0 and 2, then 1 and 3; alone they come in that order."""
    micro = 2 // world_size
    training = start(
        recipe(
            {**FAMILIES["refined"], "backbone_norm": "frozen"},
            DENSE,
            "training.batch_size=4",
            f"training.micro_batch_size={micro}",
        )
    )
    for step, counts in enumerate(((2, 0, 1, 3), (1, 1, 2, 1))):
        whole = arrays(counts, step)
        if world_size == 1:
            whole = {name: array[[0, 2, 1, 3]] for name, array in whole.items()}
        own = {name: split(array, world_size, rank) for name, array in whole.items()}
        parts = parts_of(own, training.config.training, world_size)
        assert len(parts) == 2
        training.train_step(*map(train_batch, parts))
    return training.state()


def denoised(world_size: int, rank: int) -> dict[str, Tensor]:
    """D-FINE with denoising queries: shares with fewer objects than the batch, without any, without images."""
    options = ("training.batch_size=4", "distillation.method=none", "detection.denoising_queries=8")
    own = {"family": "d_fine", "feature_levels": 2, "resize": {"mode": "square", "size": SIZE}}
    config = recipe(own, *options)
    student = silent_student(config.student, LABELS, config.seed)
    with torch.no_grad():
        replace_batch_norm(student.model.model)  # each worker has statistics of its own, outside the backbone too
    training = Training(config, student, None, 4, torch.device("cpu"))
    for step, counts in enumerate(((2, 0, 1, 3), (0, 0, 2, 1), (2,))):
        training.train_step(share_of(counts, step, world_size, rank))
    return training.state()


def few_bits(world_size: int, rank: int) -> dict[str, Tensor]:
    """Quantisers that begin from what all have seen, the backbone's first; a share without images, too. The terms of each step,
    and the state after each."""
    bits = {"bits": "w4a4-attn8", "rest_from": 2}
    student = {**FAMILIES["refined"], "backbone_norm": "frozen", "quantization": bits}
    training = make_training(recipe(student, "distillation.method=none", "training.ema_decay=0.9"), None, 5)
    results: dict[str, Tensor] = {}
    for step, counts in enumerate(((2, 0, 1, 3), (2,), (1, 2, 3), (1, 2), (2, 1, 1))):
        training.train_step(share_of(counts, step, world_size, rank))
        results |= {f"{step}/{key}": value for key, value in training.state().items()}
    training.check_finite()
    return results


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT_S / 3)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", world_size=WORKERS, rank=rank, timeout=limit)
    for name in SCENARIOS:
        save_file(train(name, WORKERS, rank), f"{folder}/{name}-{rank}.safetensors")
    save_file(evaluate(rank), f"{folder}/evaluate-{rank}.safetensors")
    save_file(waiting(rank), f"{folder}/waiting-{rank}.safetensors")
    save_file(broken(rank), f"{folder}/broken-{rank}.safetensors")
    save_file(in_parts(WORKERS, rank), f"{folder}/parts-{rank}.safetensors")
    save_file(denoised(WORKERS, rank), f"{folder}/denoised-{rank}.safetensors")
    save_file(few_bits(WORKERS, rank), f"{folder}/bits-{rank}.safetensors")
    for taught_by_two in (False, True):
        save_file(resume(rank, taught_by_two), f"{folder}/resume-{taught_by_two}-{rank}.safetensors")
    save_file(from_cache_of_two(folder, WORKERS, rank), f"{folder}/cached-{rank}.safetensors")
    save_file(go_on(load_file(f"{folder}/alone.safetensors"), WORKERS, rank), f"{folder}/grown-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two workers wrote. Fails, and does not wait, when they hang."""
    path = tmp_path_factory.mktemp("workers")
    save_file(train("refined", 1, 0), path / "alone.safetensors")
    make_cache_of_two(path)
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = torch.multiprocessing.start_processes(
        worker, (str(path),), WORKERS, join=False, start_method="forkserver"
    )
    assert context is not None
    until = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < until, "the workers wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return path


def results(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(WORKERS)]


def part(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_terms_averaged_over_two_workers_equal_one_worker_s(folder: Path, name: str) -> None:
    one, two = train(name, 1, 0), results(folder, name)
    for step in range(len(BATCHES)):
        expected = part(one, f"{step}.")
        assert "total" in expected
        for term, value in expected.items():
            mean = np.mean([worker[f"{step}.{term}"].item() for worker in two])
            assert mean == pytest.approx(value.item(), rel=1e-4, abs=1e-7), (step, term)
    named = {key.split(".")[1] for key in one if key[0].isdigit()}
    if configured(name).distillation.method == "qskd":
        assert {"agfd", "lapd_class", "lapd_l1", "lapd_giou"} <= named
        assert all(one[f"0.{term}"] > 0 for term in ("agfd", "lapd_class", "lapd_l1", "lapd_giou"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_workers_end_with_one_worker_s_weights(folder: Path, name: str) -> None:
    one, two = train(name, 1, 0), results(folder, name)
    for moment in ("first/", "last/"):
        expected, *others = (part(values, f"{moment}module.") for values in (one, *two))
        for found in others:
            assert_near(found, expected)


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same weights but for rounding."""
    assert expected
    assert found.keys() == expected.keys()
    far = [
        key
        for key, value in expected.items()
        if not torch.allclose(found[key], value, atol=2e-6, rtol=1e-4) and not removed_by_norm(key)
    ]
    assert far == []


def test_a_run_whose_number_of_workers_changes_ends_with_the_same_weights(folder: Path) -> None:
    """Elastic training: global batch, learning rate and all averages are those of the run, not of its workers."""
    alone, two = train("refined", 1, 0), results(folder, "refined")[0]
    expected = part(alone, "last/module.")
    for grown in results(folder, "grown"):
        assert_near(part(grown, "last/module."), expected)
    assert_near(part(go_on(two, 1, 0), "last/module."), expected)


def removed_by_norm(key: str) -> bool:
    """What a norm of each channel by itself takes away again, or a softmax: the bias of a projection before it; in RT-DETR's
    encoder of its only layer, its keys and its finest map too, and the mean that follows them. Its gradient is rounding, nothing
    else."""
    ends = (
        "final_layer_norm.bias",
        "self_attn.k_proj.bias",
        "lateral_convs.0.norm.running_mean",
        "encoder_input_proj.0.1.bias",
    )
    in_encoder = "aifi" in key or "lateral_convs" in key or "encoder_input_proj" in key
    return ("input_proj" in key and key.endswith(".0.bias")) or (in_encoder and key.endswith(ends))


@pytest.mark.parametrize("name", SCENARIOS)
def test_workers_weights_are_each_other_s_bit_for_bit(folder: Path, name: str) -> None:
    first, second = (part(values, "last/") for values in results(folder, name))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_all_workers_evaluate_the_same_weights_and_statistics(folder: Path) -> None:
    first, second = results(folder, "evaluate")
    for name in ("own/", "average/"):
        differing = [key for key, value in part(first, name).items() if not torch.equal(value, second[name + key])]
        assert differing  # each worker has batch statistics of its own...
        assert all("running" in key for key in differing)
    evaluated = part(first, "evaluated/")
    assert [key for key, value in evaluated.items() if not torch.equal(value, second[f"evaluated/{key}"])] == []
    for key, value in part(first, "average/").items():  # ...and all evaluate rank 0's
        assert torch.equal(evaluated[key], value), key
    assert part(first, "saved/").keys() == evaluated.keys()
    assert [key for key, value in part(first, "saved/").items() if not torch.equal(value, evaluated[key])] == []


def test_quantisers_begin_with_what_both_workers_have_seen(folder: Path) -> None:
    """Later steps are alike, not equal: a number that lies between two levels to float's last bit goes to either."""
    one, two = few_bits(1, 0), results(folder, "bits")
    assert [key for key, value in two[0].items() if not torch.equal(value, two[1][key])] == []
    for step, begun in ((0, "backbone."), (2, "decoder.")):
        expected = {
            key: value for key, value in one.items() if key.startswith(f"{step}/module.student.model.model.{begun}")
        }
        own = {key: value for key, value in expected.items() if key.endswith((".log_step", ".zero", ".factor"))}
        assert len(own) > 10
        for key, value in own.items():
            torch.testing.assert_close(two[0][key], value, rtol=5e-2, atol=2e-2, msg=key)
    losses = [key for key in one if key.startswith("0/module") and not key.endswith(("log_step", "zero"))]
    assert_near({key: two[0][key] for key in losses}, {key: one[key] for key in losses})


def test_all_workers_lose_patience_at_the_same_evaluation(folder: Path) -> None:
    for values in results(folder, "waiting"):
        assert values["waited"].tolist() == [0, 1, 1, 0, 1, 2, 1]


def test_one_worker_s_broken_gradient_stops_them_all_before_a_checkpoint(folder: Path) -> None:
    for ids, values in zip(("[800]", "[801, 802]"), results(folder, "broken"), strict=True):
        said = bytes(values["said"].tolist()).decode()
        assert "training step 1: the gradient is not finite" in said
        assert "gradient norm nan" in said
        assert f"images {ids}" in said  # each names its own share of the batch


def test_shares_in_parts_are_one_worker_s_of_the_same_images(folder: Path) -> None:
    expected = part(in_parts(1, 0), "module.")
    first, second = results(folder, "parts")
    assert_near(part(first, "module."), expected)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_denoising_and_fine_grained_losses_of_two_workers_are_one_worker_s(folder: Path) -> None:
    expected = part(denoised(1, 0), "module.")
    assert "denoising.embedding.weight" in expected
    first, second = results(folder, "denoised")
    assert_near(part(first, "module."), expected)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_from_a_cache_of_two_teachers_two_workers_take_one_worker_s_steps(folder: Path) -> None:
    one, two = from_cache_of_two(folder, 1, 0), results(folder, "cached")
    for step in range(len(CACHED_ROWS)):
        for term, value in part(one, f"{step}.").items():
            mean = np.mean([worker[f"{step}.{term}"].item() for worker in two])
            assert mean == pytest.approx(value.item(), rel=1e-4, abs=1e-7), (step, term)
        assert all(one[f"{step}.{term}"] > 0 for term in ("agfd", "lapd_class", "lapd_l1", "lapd_giou"))
    assert_near(part(two[0], "first/module."), part(one, "first/module."))
    assert [key for key, value in part(two[0], "last/").items() if not torch.equal(two[1][f"last/{key}"], value)] == []


@pytest.mark.parametrize("taught_by_two", [False, True])
def test_two_workers_resume_exactly(folder: Path, taught_by_two: bool) -> None:
    for values in results(folder, f"resume-{taught_by_two}"):
        whole, again = part(values, "whole/"), part(values, "again/")
        differing = [key for key, value in whole.items() if not torch.equal(value, again[key])]
        # A worker's own running statistics are not kept: nothing reads them but rank 0's.
        assert [key for key in differing if "running" not in key] == []
    whole, again = (part(results(folder, f"resume-{taught_by_two}")[0], name) for name in ("whole/", "again/"))
    assert [key for key, value in whole.items() if not torch.equal(value, again[key])] == []
