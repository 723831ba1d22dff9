"""Floating-point operations counted by hand, and the meter with a clock of our own."""

import numpy as np
import pytest

from nha_jax.models import ModelConfig, matmul_parameters
from train.metrics import (
    Meter,
    attention_reads,
    format_duration,
    peak_flops,
    training_flops_per_token,
)

LENGTHS = [1, 1, 5, 8, 8, 12]


def histogram(lengths: list[int]) -> np.ndarray:
    return np.bincount(lengths, minlength=16).astype(np.int64)


def reads_by_hand(lengths, window, num_slots, lag, sink=False) -> float:
    """The definition, token by token."""
    reads = tokens = 0
    for length in lengths:
        for t in range(length):
            tokens += 1
            first = 0 if window == "full" else max(0, t - window + 1)
            reads += t - first + 1
            retired = window != "full" and t - lag >= 0
            reads += num_slots if retired or sink else 0
    return reads / tokens


@pytest.mark.parametrize("window", [0, 1, 3, 8, 40, "full"])
@pytest.mark.parametrize("num_slots", [0, 4])
@pytest.mark.parametrize("lag", [None, 0, 2])
@pytest.mark.parametrize("empty_slots", ["mask", "sink"])
def test_reads_are_those_of_the_definition(window, num_slots, lag, empty_slots) -> None:
    if lag is not None and window != "full" and lag > window:
        lag = 0
    found = attention_reads(
        histogram(LENGTHS),
        window=window,
        num_slots=num_slots,
        slot_lag=lag,
        empty_slots=empty_slots,
    )
    wanted = reads_by_hand(
        LENGTHS, window, num_slots, window if lag is None else lag, empty_slots == "sink"
    )
    assert found == pytest.approx(wanted, rel=1e-12)


def test_no_tokens_read_nothing() -> None:
    assert attention_reads(histogram([]), window=3, num_slots=2) == 0.0


def test_training_flops_per_token() -> None:
    config = ModelConfig(
        vocab_size=50,
        num_layers=5,
        width=16,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=24,
        num_slots=3,
        windows=(4,),
        layer_kinds=("nha", "full", "gsa", "swa", "fusion"),
    )
    kinds = [
        reads_by_hand(LENGTHS, 4, 3, 4),
        reads_by_hand(LENGTHS, "full", 0, 0),
        reads_by_hand(LENGTHS, 0, 3, 0),
        reads_by_hand(LENGTHS, 4, 0, 4),
        reads_by_hand(LENGTHS, 4, 3, 4),
    ]
    # Scores and values: 2 K operations each, for each of 4 heads with K = 4.
    attention = sum(kinds) * 4 * (2 * 4 + 2 * 4)
    wanted = 6 * matmul_parameters(config) + 3 * attention
    found = training_flops_per_token(config, histogram(LENGTHS))
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA B200", 2.25e15),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v4", 275e12),
        ("cpu", None),
        ("Some future device", None),
    ],
)
def test_peaks(kind: str, flops: float | None) -> None:
    assert peak_flops(kind) == flops


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_meter() -> None:
    clock = Clock()
    meter = Meter(flops_per_token=1e3, peak_flops=1e6, clock=clock)
    assert meter.average() is None
    assert meter.step(50.0, 0.0) is None  # Nobody knows when the first step began.
    clock.now += 2.0
    first = meter.step(100.0, 0.5)
    assert first is not None
    assert (first.seconds_per_step, first.tokens_per_second) == (2.0, 50.0)
    assert (first.data_wait_share, first.mfu) == (0.25, 0.05)
    clock.now += 1000.0  # A validation pass is not training.
    meter.restart()
    clock.now += 1.0
    meter.step(20.0, 0.4)
    average = meter.average()
    assert average is not None
    assert (average.seconds_per_step, average.tokens_per_second) == (1.5, 40.0)
    assert average.data_wait_share == pytest.approx(0.3)
    assert average.mfu == pytest.approx(0.04)
    meter.clear()
    assert meter.average() is None
    clock.now += 1.0
    again = meter.step(10.0, 7.0)
    assert again is not None and again.data_wait_share == 1.0
    assert meter.average() == again


def test_a_step_counts_until_it_finished_not_until_it_is_looked_at() -> None:
    clock = Clock()
    meter = Meter(flops_per_token=1e3, peak_flops=None, clock=clock)
    meter.restart()
    # Both are looked at when the second has ended.
    clock.now += 3.0
    ends = (clock.now - 2.0, clock.now)
    first, second = (meter.step(10.0, 0.0, finished_at=end) for end in ends)
    assert first is not None and second is not None
    assert (first.tokens_per_second, second.tokens_per_second) == (10.0, 5.0)


def test_no_peak_no_utilisation() -> None:
    clock = Clock()
    meter = Meter(flops_per_token=1e3, peak_flops=None, clock=clock)
    meter.restart()
    clock.now += 1.0
    found = meter.step(10.0, 0.0)
    assert found is not None and found.mfu is None and found.tokens_per_second == 10.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0:00"),
        (59.6, "1:00"),
        (125.0, "2:05"),
        (3725.0, "1:02:05"),
        (90061.0, "25:01:01"),
        (None, "?"),
    ],
)
def test_durations(seconds, text) -> None:
    assert format_duration(seconds) == text
