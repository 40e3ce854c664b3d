"""The check for machines with a GPU runs without one, at toy size: its parts, what they call wrong, and what they keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import exact, measure


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run `make gpu-check`, which measures")
def test_without_a_gpu_it_says_so_and_every_part_but_the_compiler_and_rays_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--parts", "abde", "--out", str(tmp_path / "gpu.json")]) == 0
    printed = capsys.readouterr().out
    assert "NO GPU HERE" in printed
    assert "FAILED" not in printed
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {(row["case"].split()[0], row["kind"]) for row in found["b"]} == {
        (family, kind) for family in ("conditional_detr", "rt_detr") for kind in ("plain", "cached", "online")
    }
    operators = {(row["case"], row["kind"]): row["kernels"] for row in found["b"]}
    assert all(
        operators[case, "plain"] < operators[case, "cached"] < operators[case, "online"] for case, _ in operators
    )
    assert all(row["resumed"] == row["again"] == 0 for row in found["e"])
    # On a CPU both sides of the first comparison are the same computation.
    assert all(row["found"] == 0 for row in found["a"] if "device and CPU" in row["name"])
    assert any(row["found"] > 0 for row in found["a"] if "bfloat16" in row["name"])


def test_a_part_that_fails_is_told_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(exact, "differences", breaks)
    monkeypatch.setattr(exact, "resumed", lambda *_: iter([("case", 0.0, 0.25)]))
    assert gpu.main(["--parts", "ae", "--out", str(tmp_path / "gpu.json")]) == 1
    printed = capsys.readouterr().out
    assert "a: FAILED" in printed
    assert "0.2 off" in printed
    assert "no memory" in json.loads((tmp_path / "gpu.json").read_text())["a"]["failed"]


def test_a_strangers_file_or_no_folder_for_the_findings_is_told_before_the_first_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "differences", lambda *_: pytest.fail("ran"))
    (notes := tmp_path / "notes.json").write_text('{"mine": 1}')
    for out, said in ((notes, "is no record of this benchmark"), (tmp_path / "none/gpu.json", "its folder")):
        with pytest.raises(SystemExit):
            gpu.main(["--parts", "a", "--out", str(out)])
        assert said in capsys.readouterr().err
    assert notes.read_text() == '{"mine": 1}'
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "az"])
    assert "no z, of abdefc" in capsys.readouterr().err


def test_a_box_has_moved_when_none_lies_within_a_thousandth_of_it() -> None:
    boxes = torch.tensor([[[[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.7, 0.7, 0.1, 0.1], [0.3, 0.3, 0.1, 0.1]]]])
    found = boxes[:, :, [2, 0, 3, 1]].clone()
    assert exact._moved(found, boxes) == 0.0  # another order is no move
    found[0, 0, 0, 0] += 0.002
    found[0, 0, 1, 1] += 0.0005
    assert exact._moved(found, boxes) == 0.25


def test_a_steps_operators_are_counted_without_views() -> None:
    weights = torch.ones(4, 4)
    cost = measure.measure(lambda: (weights.t() @ weights.view(16)[:4]).double(), torch.device("cpu"), 1)
    assert (cost.kernels, cost.casts, cost.waits) == (2, 1, 0)
    assert cost.step_ms > 0
