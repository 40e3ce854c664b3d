"""`qskd benchmark`: what is counted, that ratios are of rounds, that memory grows with the work, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_detectors
import test_families
import torch
from rich.console import Console
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.deployment.benchmark import (
    Benchmark,
    BenchmarkOptions,
    benchmark,
    foresee,
    graph_of,
    input_size,
    names_of,
)
from pipelines.deployment.export import ExportOptions, export
from pipelines.deployment.found import show
from qskd.config import ResizeConfig
from qskd.deploy.export import random_batches
from qskd.deploy.memory import peak_memory
from qskd.deploy.runtimes import run_of_torch
from qskd.deploy.speed import Size, compare_speed, cost_of, torch_runner
from qskd.detectors import Detector, cost, load_detector, save_detector
from qskd.detectors.cost import alternate, gflops, parameters
from qskd.errors import QskdError

torch.set_num_threads(1)

SIZE = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A square one, exported for any batch; and one whose images keep their shape."""
    root = tmp_path_factory.mktemp("models")
    save_detector(Detector(test_detectors.tiny_model("conditional")), root / "source", ResizeConfig(size=SIZE))
    export(str(root / "source"), root / "square", ExportOptions(dynamic_batch=True, rounds=0))
    long = ResizeConfig(mode="shortest_edge", size=SIZE, longest=80)
    save_detector(Detector(test_families.tiny_model("detr")), root / "long", long)
    return [str(root / "square"), str(root / "long")]


BATCHES = (1, 32)


@pytest.fixture(scope="module")
def at_a_uri(models: list[str]) -> Benchmark:
    """The first, whose memory a process of PyTorch says."""
    return benchmark([Path(models[0]).as_uri()], BenchmarkOptions(batches=BATCHES, rounds=1))


def test_a_model_at_a_uri_is_measured_as_its_folder_is(models: list[str], at_a_uri: Benchmark) -> None:
    here = benchmark(models[:1], BenchmarkOptions(batches=(1,), rounds=1, memory=False))
    assert here.models == at_a_uri.models  # sizes and counts, by the same short name
    (row,) = at_a_uri.rows
    assert (row.name, list(row.memory)) == (here.rows[0].name, list(BATCHES))  # another process reads the copy too
    uri = Path(models[0]).as_uri()
    said = CliRunner().invoke(app, ["benchmark", uri, "--dry-run"], catch_exceptions=False).output
    assert said.startswith(f"square: {uri}, images of 64 x 64")


def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now)
    return spend


def test_a_ratio_is_the_median_of_the_rounds_not_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is ten times as slow in half of the rounds: ratios of rounds don't notice."""
    spend, calls = clock(monkeypatch), {"a": 0, "b": 0}

    def runner(name: str, cost_s: float) -> Callable[[int], Callable[[], None]]:
        def make(batch: int) -> Callable[[], None]:
            def call() -> None:
                calls[name] += 1
                spend(batch * cost_s * (10 if calls[name] % 2 else 1))

            return call

        return make

    found = compare_speed({"a": runner("a", 0.01), "b": runner("b", 0.03)}, (1, 4), rounds=7)
    for name, times in (("a", 1.0), ("b", 3.0)):
        assert [timing.batch for timing in found[name]] == [1, 4]
        assert [timing.ratio for timing in found[name]] == pytest.approx([times, times])
    assert found["a"][1].ms_per_image == pytest.approx(found["a"][1].ms / 4)
    assert found["a"][1].images_per_s == pytest.approx(4000 / found["a"][1].ms)


def test_no_round_begins_after_the_limit_but_three_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spend = clock(monkeypatch)
    for limit_s, rounds in ((0.0, 3), (4.5, 5), (1e9, 20)):
        taken = alternate({"": lambda: spend(1.0)}, 20, limit_s=limit_s)
        assert len(taken[""]) == rounds


def test_counts_are_those_of_the_model_at_its_own_size(models: list[str]) -> None:
    assert [input_size(model, None) for model in models] == [Size(64, 64), Size(64, 80)]
    assert input_size(models[1], 96) == Size(96, 96)
    detector = load_detector(models[1])
    found = cost_of(detector, Size(64, 80))
    assert found.parameters == parameters(detector.model)
    assert found.gflops == gflops(detector.model, torch.zeros(1, 3, 64, 80))
    with pytest.raises(QskdError, match="divisible by 16"):
        cost_of(Detector(test_families.tiny_model("rt_detr")), Size(100, 100))


def test_what_is_timed_is_transformers_forward_without_gradients(models: list[str]) -> None:
    detector = load_detector(models[0]).train()
    seen: list[tuple[tuple[int, ...], bool, bool, torch.dtype]] = []
    head = detector.model.class_labels_classifier
    head.register_forward_hook(
        lambda module, given, out: seen.append((tuple(out.shape), torch.is_grad_enabled(), module.training, out.dtype))
    )
    for precision in ("float32", "bfloat16"):
        torch_runner(detector, Size(SIZE, SIZE), torch.device("cpu"), precision)(3)()
    assert seen == [((3, 9, 5), False, False, torch.float32), ((3, 9, 5), False, False, torch.bfloat16)]


def test_models_and_runtimes_stand_side_by_side(models: list[str]) -> None:
    options = BenchmarkOptions(batches=(1, 2), rounds=3, onnx=True, memory=False, size=SIZE)
    found = benchmark(models, options)
    assert [(row.name, row.runtime) for row in found.rows] == [
        *(("square", "PyTorch"), ("long", "PyTorch"), ("square", "onnxruntime"), ("long", "onnxruntime"))
    ]
    assert [timing.ratio for timing in found.rows[0].timings] == [1.0, 1.0]
    assert all(timing.rounds == 3 and timing.ms > 0 for row in found.rows for timing in row.timings)
    console = Console(width=100, record=True)
    show(found, console)
    text = console.export_text()
    assert "cpu, float32, 1 thread(s) of" in text
    assert "conditional_detr" in text
    assert "not measured" in text  # the memory


def test_an_exported_graph_of_free_batch_is_used_and_another_is_made(models: list[str], tmp_path: Path) -> None:
    own, size = graph_of(models[0], load_detector(models[0]), BenchmarkOptions(), tmp_path)
    assert (own, size) == (Path(models[0]) / "model.onnx", Size(SIZE, SIZE))
    made, size = graph_of(models[0], load_detector(models[0]), BenchmarkOptions(size=96), tmp_path)
    assert (made.parent, size) == (tmp_path, Size(96, 96))
    with pytest.raises(QskdError, match="one square size"):
        graph_of(models[1], load_detector(models[1]), BenchmarkOptions(), tmp_path)


def test_memory_is_the_models_and_grows_with_the_batch(models: list[str], at_a_uri: Benchmark) -> None:
    """A batch's pixels alone are 12 MB more for onnxruntime; it holds them at least once."""
    peaks = peak_memory(Path(models[0]) / "model.onnx", SIZE, SIZE, (1, 256))
    assert peaks[256] - peaks[1] > 255 * 3 * SIZE * SIZE * 4
    weights = sum(value.numel() * 4 for value in load_detector(models[0]).parameters())
    assert weights < peaks[1] < 2**28
    one, more = at_a_uri.rows[0].memory.values()
    assert more - one > 31 * 3 * SIZE * SIZE * 4
    assert weights < one < more < 2**30


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_text("no graph")
    with pytest.raises(QskdError, match=r"measuring its memory failed: .*\n.*--no-memory"):
        peak_memory(tmp_path / "broken.onnx", SIZE, SIZE, (1,))


def test_names_tell_models_apart() -> None:
    assert list(names_of(["runs/a/student", "runs/b/student"])) == ["a/student", "b/student"]
    assert list(names_of(["owner/large", "runs/b/student"])) == ["large", "student"]
    with pytest.raises(QskdError, match="named twice"):
        names_of(["a", "a"])


@pytest.mark.parametrize("ask", [foresee, benchmark])
def test_a_detector_that_can_only_teach_is_refused_where_it_can_not_be_timed(
    ask: Callable[..., object], models: list[str], tmp_path: Path
) -> None:
    config = YolosConfig(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32},
        **{"image_size": [64, 64], "num_detection_tokens": 9},
    )
    YolosForObjectDetection(config).save_pretrained(tmp_path / "yolos")
    YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / "yolos")
    with pytest.raises(QskdError, match="which is not exported\n  what to do: leave --onnx away"):
        ask([str(tmp_path / "yolos")], BenchmarkOptions(onnx=True, size=64, batches=(1,), rounds=1, memory=False))
    with pytest.raises(QskdError, match=r"model\.onnx: a detector in an ONNX file, which is not timed"):
        ask([f"{models[0]}/model.onnx"], BenchmarkOptions(batches=(1,), rounds=1, memory=False))


def test_a_precision_that_is_timed_is_the_one_that_ap_is_of(models: list[str]) -> None:
    detector, (_, pixels) = load_detector(models[0]), random_batches(SIZE, (1,))[0]
    exact, rounded = (run_of_torch(detector, how)(pixels.numpy()) for how in ("float32", "bfloat16"))
    assert all(each.dtype == np.float32 for each in (*exact, *rounded))
    assert 0 < np.abs(exact[0] - rounded[0]).max() < 0.5


def test_the_command_line_says_what_it_would_do_and_what_it_cannot(models: list[str]) -> None:
    result = CliRunner().invoke(app, ["benchmark", *models, "--onnx", "--batch", "8", "--batch", "2", "--dry-run"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "images of 64 x 80" in text
    assert "PyTorch and onnxruntime on cpu, batches of 2, 8, 1 thread(s)" in text
    for arguments, complaint in ((["--device", "tpu"], "auto or cpu or cuda"), (["--precision", "int4"], "bfloat16")):
        assert complaint in str(CliRunner().invoke(app, ["benchmark", models[0], *arguments]).exception)
    if not torch.cuda.is_available():
        with pytest.raises(QskdError, match="sees no CUDA device"):
            benchmark(models, BenchmarkOptions(device="cuda"))
