"""Fake quantisers: values and gradients against slow loops, where they begin, and what the recipe says of bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qskd.config import FACTS, StudentConfig
from qskd.config.quantization import QuantizationConfig
from qskd.config.recipe import apply_overrides, build, to_tree
from qskd.errors import QskdError
from qskd.quantization import attention
from qskd.quantization.calibration import BINS, Seen, best_range, best_steps
from qskd.quantization.quantiser import ActivationQuantiser, WeightQuantiser, counts_of, levels_of

BITS = (8, 4, 3, 2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(x: float, step: float, zero_point: int, low: int, high: int) -> tuple[float, float, float, float]:
    """LSQ's and LSQ+'s equations for one number: its quantised value, and that value's gradient by the number itself, the step
    and the zero point."""
    level = round(x / step) + zero_point
    if low <= level <= high:
        value = (level - zero_point) * step
        return value, 1.0, (value - x) / step, 0.0
    level = low if level < low else high
    return (level - zero_point) * step, 0.0, float(level - zero_point), -step


@pytest.mark.parametrize("bits", BITS)
def test_an_activation_s_values_and_gradients_are_those_of_the_equations(bits: int) -> None:
    x, weight = drawn(3, 5, 4).requires_grad_(), drawn(3, 5, 4, seed=1)
    quantiser = ActivationQuantiser(bits, torch.device("cpu"))
    low, high = counts_of(bits)
    with torch.no_grad():
        quantiser.log_step.fill_(math.log(2.0 / (high - low)))  # much is clipped on both sides
        quantiser.zero.fill_(0.35)
        quantiser.get_buffer("factor").fill_(0.125)
    quantiser.mode = "on"
    found = quantiser(x)
    (found * weight).sum().backward()
    step, zero_point = math.exp(quantiser.log_step.item()), round(low + 0.35 * (high - low))
    assert zero_point == quantiser.zero_point.item()
    by_step = by_zero = 0.0
    for number, value, gradient, times in zip(
        x.flatten().tolist(), found.flatten().tolist(), x.grad.flatten().tolist(), weight.flatten().tolist(), strict=True
    ):  # fmt: skip
        expected = slow(number, step, zero_point, low, high)
        assert value == pytest.approx(expected[0], abs=1e-6)
        assert gradient == pytest.approx(expected[1] * times)
        by_step, by_zero = by_step + expected[2] * times, by_zero + expected[3] * times
    assert by_zero  # something was clipped
    assert quantiser.log_step.grad.item() == pytest.approx(0.125 * by_step * step, rel=1e-4)
    assert quantiser.zero.grad.item() == pytest.approx(0.125 * by_zero * (high - low), rel=1e-4)
    with torch.no_grad():  # evaluation goes another way
        assert torch.equal(quantiser(x), found)


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_s_values_and_gradients_are_those_of_the_equations(bits: int) -> None:
    weight, times = drawn(3, 2, 4).requires_grad_(), drawn(3, 2, 4, seed=1)
    quantiser = WeightQuantiser(weight.detach(), bits)
    low, high = levels_of(bits)
    quantiser.mode = "on"
    with torch.no_grad():
        quantiser.log_step.copy_(torch.tensor([0.4, 0.7, 1.3]).log() - math.log(high))
    found = quantiser(weight)
    (found * times).sum().backward()
    for channel in range(3):
        step, by_step = math.exp(quantiser.log_step[channel].item()), 0.0
        for number, value, each in zip(
            weight[channel].flatten().tolist(), found[channel].flatten().tolist(), times[channel].flatten().tolist(), strict=True
        ):  # fmt: skip
            expected = slow(number, step, 0, low, high)
            assert value == pytest.approx(expected[0], abs=1e-6)
            by_step += expected[2] * each
        lsq = by_step * step / math.sqrt(8 * high)  # eight numbers a channel
        assert quantiser.log_step.grad[channel].item() == pytest.approx(lsq, rel=1e-4, abs=1e-7)
    with torch.no_grad():
        assert torch.equal(quantiser(weight), found)
        assert torch.equal(quantiser(found), found)  # what is saved and loaded again stays


def test_where_all_is_clipped_the_step_s_gradient_is_that_of_the_function_itself() -> None:
    """Rounding has no slope; where it plays no part, a difference tells."""
    x = torch.tensor([5.0, -7.0, 9.0])
    quantiser = ActivationQuantiser(4, torch.device("cpu"))
    quantiser.mode = "on"
    with torch.no_grad():
        quantiser.log_step.fill_(math.log(0.1))

    def total(by: float) -> Tensor:
        with torch.no_grad():
            quantiser.log_step.add_(by)
        value = (quantiser(x) * torch.tensor([1.0, 2.0, 3.0])).sum()
        with torch.no_grad():
            quantiser.log_step.sub_(by)
        return value

    total(0.0).backward()
    assert quantiser.log_step.grad.item() == pytest.approx((total(1e-2) - total(-1e-2)).item() / 2e-2, rel=1e-3)


def test_what_is_watched_is_left_as_it_is_and_only_in_training() -> None:
    quantiser = ActivationQuantiser(4, torch.device("cpu"))
    x = drawn(2, 6)
    quantiser.mode = "observing"
    quantiser.seen = Seen(torch.device("cpu"))
    quantiser.eval()
    assert quantiser(x) is x
    assert not quantiser.seen.anything
    quantiser.train()
    assert quantiser(x) is x
    assert quantiser.seen.counts[:BINS].sum() == 12
    assert quantiser.seen.numbers_of_one == 6


def error_of(x: Tensor, low: float, high: float, steps: int) -> float:
    step = (high - low) / steps
    zero = round(-low / step)
    quantised = ((x / step).round() + zero).clamp(0, steps).sub(zero) * step
    return float((quantised - x).square().mean())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["both signs", "one sign", "outliers", "attention"])
def test_the_range_that_is_begun_with_loses_about_as_little_as_any(kind: str, bits: int) -> None:
    x = drawn(4, 2000)
    if kind == "one sign":
        x = x.relu()
    elif kind == "outliers":
        x[0, 0] = 40.0
    elif kind == "attention":
        x = (3 * x.view(40, 200)).softmax(-1)
    seen = Seen(torch.device("cpu"))
    seen.count(x)
    steps = 2**bits - 1
    low, high = best_range(seen, steps)
    assert low <= 0 < high
    assert (low == 0) == (kind in ("one sign", "attention"))
    tried = [
        error_of(x, float(x.min()) * first, float(x.max()) * second, steps)
        for first in torch.linspace(0.02, 1, 40).tolist()
        for second in torch.linspace(0.02, 1, 40).tolist()
    ]
    assert error_of(x, low, high, steps) < 1.3 * min(tried)


def test_what_two_have_seen_adds_up_to_what_one_sees_of_all() -> None:
    x = drawn(6, 3, 40, 300)
    whole, parts = Seen(torch.device("cpu")), [Seen(torch.device("cpu")) for _ in range(2)]
    whole.count(x)
    for part, share in zip(parts, x.split([2, 4]), strict=True):
        part.count(share)
    assert torch.equal(parts[0].counts + parts[1].counts, whole.counts)
    assert whole.numbers_of_one == 36_000


def test_every_channel_is_looked_at_though_not_every_number() -> None:
    x = torch.zeros(1, 64, 96, 64)
    x[..., 1::2] = 2.0  # tokens with their channels last: an even stride would see half of them
    seen = Seen(torch.device("cpu"))
    seen.count(x)
    counts = seen.counts[:BINS]
    assert counts.sum() < x.numel() // 10
    assert 0.4 < float(counts[BINS // 2] / counts.sum()) < 0.6


@pytest.mark.parametrize("bits", BITS)
def test_the_steps_of_a_weight_lose_about_as_little_as_any(bits: int) -> None:
    weight = drawn(5, 3, 7, 7) * torch.tensor([1.0, 0.01, 100.0, 1.0, 0.0]).view(5, 1, 1, 1)
    low, high = levels_of(bits)
    found = best_steps(weight, low, high)
    assert found[4] == 1  # a channel of zeros
    for channel in range(4):
        flat = weight[channel].flatten()

        def error(step: float, flat: Tensor = flat) -> float:
            return float(((flat / step).round().clamp(low, high) * step - flat).square().sum())

        tried = min(error(float(flat.abs().max()) * share / high) for share in torch.linspace(0.01, 1, 200).tolist())
        assert error(float(found[channel])) < 1.1 * tried


# ---- the recipe


def test_a_short_word_and_a_section_say_the_same() -> None:
    short = StudentConfig.model_validate({"quantization": "w4a3-attn8"}).quantization
    long = StudentConfig.model_validate({"quantization": {"bits": "w4a3-attn8"}}).quantization
    assert short == long
    assert short is not None
    assert (short.weight_bits, short.activation_bits, short.attention_bits) == (4, 3, 8)
    assert QuantizationConfig.model_validate("w2a2").attention_bits == 8
    assert StudentConfig().quantization is None
    tree = apply_overrides({}, ["student.quantization=w8a8", "student.family=detr"])
    assert to_tree(build(tree))["student"]["quantization"]["bits"] == "w8a8"
    assert build(to_tree(build(tree))) == build(tree)


@pytest.mark.parametrize("word", ["w5a8", "w8", "8-8-8", "w8a8-attn1", "", "w44a4", 8])
def test_bits_that_there_are_not_are_refused_by_field(word: object) -> None:
    with pytest.raises(QskdError, match="quantization") as said:
        build({"student": {"quantization": word}})
    assert "say w8a8, or w4a4-attn8" in str(said.value)


@pytest.mark.parametrize("family", [name for name, facts in FACTS.items() if facts.in_float])
def test_a_family_that_does_not_quantise_is_refused_by_name_with_why(family: str) -> None:
    size = {"mode": "square", "size": 128}
    tree = {"student": {"family": family, "quantization": "w8a8", "resize": size, "queries": 10}}
    with pytest.raises(QskdError, match=f"students of {family} can't be quantised: .{{20}}"):
        build(tree)


def test_a_step_is_a_share_or_a_number() -> None:
    def begins(**fields: object) -> int:
        return QuantizationConfig.model_validate({"bits": "w4a4", **fields}).rest_step(200)

    assert [begins(), begins(rest_from=0.25), begins(rest_from=30)] == [0, 50, 30]
    assert begins(rest_from=0.25, parts=["decoder"]) == 0  # nothing to wait for
    with pytest.raises(ValueError, match="whole number"):
        begins(rest_from=1.5)


# ---- attention


@pytest.mark.parametrize("masked", ["not", "said", "added"])
def test_attention_multiplies_what_is_quantised(masked: str) -> None:
    module = torch.nn.Module().eval()
    tables = {name: {number: number / 7 for number in range(-40, 41)} for name in attention.DENSE}

    class Rounding(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 7).round() / 7

    module.quantisers = attention.AttentionQuantisers({name: Rounding() for name in attention.DENSE})
    query, key, value = drawn(2, 2, 3, 4), drawn(2, 2, 5, 4, seed=1), drawn(2, 2, 5, 4, seed=2)
    allowed = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    allowed[0, :, :, 3:] = False
    mask = {"not": None, "said": allowed, "added": (~allowed).float() * torch.finfo(torch.float32).min}[masked]
    found, shares = attention.quantised_attention(module, query, key, value, mask, scaling=0.5)
    for batch in range(2):
        for head in range(2):
            for row in range(3):
                scores = [
                    0.5 * sum(tables["query"][round(7 * a)] * tables["key"][round(7 * b)] for a, b in zip(one, other, strict=True))
                    for one, other in [(query[batch, head, row].tolist(), k) for k in key[batch, head].tolist()]
                ]  # fmt: skip
                seen = [masked == "not" or bool(allowed[batch, 0, row, place]) for place in range(5)]
                powers = [math.exp(score) * looks for score, looks in zip(scores, seen, strict=True)]
                quantised = [round(7 * power / sum(powers)) / 7 for power in powers]
                assert shares[batch, head, row].tolist() == pytest.approx(quantised, abs=1e-6)
                for channel, numbers in enumerate(value[batch, head].t().tolist()):
                    expected = sum(share * round(7 * v) / 7 for share, v in zip(quantised, numbers, strict=True))
                    assert found[batch, row, head, channel].item() == pytest.approx(expected, abs=1e-5)
