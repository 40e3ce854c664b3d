"""Cost: operations against counts by hand, latencies against a clock that is known."""

from __future__ import annotations

import time

import pytest
import torch
from tiny import FAMILIES, LABELS, SIZE, STUDENT, silent_student
from torch import Tensor, nn

from qskd.config import StudentConfig
from qskd.detectors import cost
from qskd.detectors.cost import gflops, latency_ms, parameters

WIDTH, SIDE, CLASSES = 16, 6, 5
TOKENS = SIDE * SIDE


class Tiny(nn.Module):
    """A strided convolution, one attention over its positions, a linear head."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.attention = attention
        self.multihead = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.dropout = nn.Dropout(0.5)
        self.seen_mask = False

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        self.seen_mask = pixel_mask is not None
        x = self.convolution(pixel_values).flatten(2).transpose(1, 2)
        if self.attention == "sdpa":
            heads = x.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
            x = nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        elif self.attention == "multihead":
            x = self.multihead(x, x, x, need_weights=False)[0]
        return self.head(self.dropout(x))


CONVOLUTION = 2 * TOKENS * WIDTH * 3 * 3 * 3
HEAD = 2 * TOKENS * WIDTH * CLASSES
SCORES_AND_MIX = 2 * (2 * TOKENS * TOKENS * WIDTH)  # queries x keys, weights x values; all heads together
PROJECTIONS = 4 * (2 * TOKENS * WIDTH * WIDTH)  # query, key, value, output


@pytest.mark.parametrize(
    ("attention", "operations"),
    [
        ("none", CONVOLUTION + HEAD),
        ("sdpa", CONVOLUTION + HEAD + SCORES_AND_MIX),
        ("multihead", CONVOLUTION + HEAD + SCORES_AND_MIX + PROJECTIONS),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_operations_equal_a_count_by_hand(attention: str, operations: int, batch: int) -> None:
    pixels = torch.rand(batch, 3, 2 * SIDE, 2 * SIDE)
    assert gflops(Tiny(attention), pixels) * 1e9 == pytest.approx(batch * operations, rel=1e-12)


def test_counting_leaves_mode_gradients_and_fast_path_as_they_were() -> None:
    model = Tiny("multihead")
    pixels = torch.rand(1, 3, 12, 12)
    assert torch.backends.mha.get_fastpath_enabled()
    for training in (True, False):
        model.train(training)
        model.dropout.eval()
        gflops(model, pixels, torch.ones(1, 12, 12))
        assert model.training is model.head.training is training
        assert not model.dropout.training
        assert model.seen_mask
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.backends.mha.get_fastpath_enabled()


def test_a_transformers_detector_counts_the_same_with_fused_and_plain_attention() -> None:
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = ConditionalDetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=10,
        num_labels=4,
    )
    model = ConditionalDetrForObjectDetection(config)
    pixels, mask = torch.rand(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.long)
    fused = gflops(model, pixels, mask)
    model.set_attn_implementation("eager")
    assert fused == pytest.approx(gflops(model, pixels, mask), rel=1e-12)
    assert fused > 0


def test_parameters_count_frozen_ones_and_shared_ones_once() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    model[0].requires_grad_(False)
    assert parameters(model) == 3 * 5 + 5 + 2 * 5
    first = nn.Linear(4, 4, bias=False)
    assert parameters(nn.Sequential(first, first)) == 16


def test_latency_is_the_median_and_ninth_decile_of_the_timed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def call() -> None:
        nonlocal now, calls
        calls += 1
        now += 100.0 if calls <= 2 else (calls - 2) * 1e-3  # the warm-up is slow; then 1, 2, … 11 ms

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    result = latency_ms(call, warmup=2, repeats=11)
    assert calls == 13
    assert result == pytest.approx({"median": 6.0, "p90": 10.0})


def test_cuda_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(events.append("clock") or 0))
    latency_ms(lambda: events.append("call"), warmup=0, repeats=2, device="cuda")
    assert events == ["wait", "clock", "call", "wait", "clock"] * 2
    events.clear()
    latency_ms(lambda: events.append("call"), warmup=1, repeats=1, device="cpu")
    assert events == ["call", "clock", "call", "clock"]


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 2)
    for load, said in ((0.5, ""), (3.0, ""), (7.6, "load average 8 on 2 cores")):
        monkeypatch.setattr(cost.os, "getloadavg", lambda load=load: (load, 0, 0))
        assert said in cost.busy_note()
        assert bool(cost.busy_note()) == bool(said)


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        latency_ms(lambda: None, 0, 0, "cpu")


@pytest.mark.parametrize("family", ["conditional", "deformable"])
def test_every_family_can_be_counted(family: str) -> None:
    student = silent_student(StudentConfig.model_validate({**STUDENT, **FAMILIES[family]}), LABELS, 0)
    trained = [parameter.requires_grad for parameter in student.parameters()]
    assert gflops(student, torch.zeros(1, 3, SIZE, SIZE), torch.ones(1, SIZE, SIZE, dtype=torch.bool)) > 0.001
    assert [parameter.requires_grad for parameter in student.parameters()] == trained
