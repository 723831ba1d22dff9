"""How fast training goes: floating-point operations, throughput, utilisation, time left."""

import dataclasses
import math
import re
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from nha_jax.models import ModelConfig, matmul_parameters

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' data sheets, by the `device_kind`
# that JAX reports; the first match counts.
_PEAK_FLOPS = (
    (r"GB200|GB300|B300", 2.5e15),
    (r"B200", 2.25e15),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100|H200|H800|GH200", 989.4e12),
    (r"A100|A800", 312e12),
    (r"A40\b", 149.7e12),
    (r"A30\b", 165e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"L40S", 362e12),
    (r"L40\b", 181e12),
    (r"L4\b", 121e12),
    (r"RTX 5090", 209.5e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71e12),
    (r"TPU v7", 2307e12),
    (r"TPU v6", 918e12),
    (r"TPU v5 ?lite|TPU v5e", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4", 275e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v2", 22.5e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one JAX device in FLOP/s.

    Args:
      device_kind: `jax.Device.device_kind`, such as "NVIDIA H100 80GB HBM3".

    Returns:
      The peak, or None where none is known: a CPU, an unknown accelerator.
    """
    for pattern, flops in _PEAK_FLOPS:
        if re.search(pattern, device_kind):
            return flops
    return None


def attention_reads(
    segment_lengths: Int64[np.ndarray, " lengths"],
    *,
    window: int | str,
    num_slots: int,
    slot_lag: int | None = None,
    empty_slots: str = "mask",
) -> float:
    """Keys that one query head reads per token on average: of the window, and slots.

    The token at position t of its segment reads `min(t + 1, W)` keys of the window, and M slots
    once a token has retired into them, which is from `t = lag` on (`operator.md`, "Definition").

    Args:
      segment_lengths: number of segments of each length, from 0 on; `Split.segment_lengths`.
      window: W, or "full": the whole segment, so that nothing retires.
      num_slots: M; 0: no slots.
      slot_lag: None: W.
      empty_slots: "sink": slots are read from the first token on, even while they are empty.
    """
    length = np.arange(len(segment_lengths), dtype=np.float64)
    tokens = float(segment_lengths @ length)
    if not tokens:
        return 0.0
    width = length if window == "full" else np.minimum(length, int(window))
    window_reads = float(segment_lengths @ (width * (width + 1) / 2 + (length - width) * width))
    lag: float
    if empty_slots == "sink":
        lag = 0
    elif window == "full":
        lag = math.inf
    else:
        lag = int(window) if slot_lag is None else slot_lag
    slot_reads = float(segment_lengths @ np.maximum(length - lag, 0)) * num_slots
    return (window_reads + slot_reads) / tokens


def training_flops_per_token(
    config: ModelConfig, segment_lengths: Int64[np.ndarray, " lengths"]
) -> float:
    """Floating-point operations that training spends on one token, forward and backward.

        6 * parameters in matrix products + 3 * sum over layers of 4 * N * K * reads

    A parameter in a matrix product is multiplied and added once a token, 2 operations; a key that a
    query head reads costs K multiply-adds for its score and K for its value, 4 K. The backward pass
    costs twice the forward, hence the 3. `reads` counts what is really read (`attention_reads`):
    the part of the window that exists and the slots that are not empty, given the segments' true
    lengths. Not counted: embedding look-ups, norms, softmax, the slots' update, and anything
    recomputed to save memory.

    Args:
      config: the model.
      segment_lengths: number of segments of each length, from 0 on; `Split.segment_lengths`.
    """
    reads = 0.0
    for layer in config.layers():
        reads += attention_reads(
            segment_lengths,
            window=layer.window,
            num_slots=0 if layer.kind in ("full", "swa") else config.num_slots,
            slot_lag=config.slot_lag if layer.kind == "nha" and layer.window != 0 else None,
            empty_slots=config.empty_slots,
        )
    attention = 4 * config.num_heads * config.key_size * reads
    return 3.0 * (2.0 * matmul_parameters(config) + attention)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Speed over some steps.

    Attributes:
      seconds_per_step: time a step took.
      tokens_per_second: targets with a loss per second, over all devices; padding is not counted.
      data_wait_share: share of the time spent waiting for data, from 0 to 1.
      mfu: model FLOP/s utilisation, from 0 to 1: `tokens_per_second * flops_per_token` over the
        devices' bfloat16 peak; None where the peak is not known.
    """

    seconds_per_step: float
    tokens_per_second: float
    data_wait_share: float
    mfu: float | None


class Meter:
    """Measures throughput between finished steps.

    The clock runs from one `step` to the next. Call `pause` before, or `restart` after, anything
    that is not training: the time up to the next `step` then starts at `restart`.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts with the clock stopped.

        Args:
          flops_per_token: from `training_flops_per_token`.
          peak_flops: of all devices together in FLOP/s; None where not known.
          clock: seconds; for tests.
        """
        self._flops_per_token, self._peak, self._clock = flops_per_token, peak_flops, clock
        self._since: float | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets the measured steps; the clock runs on."""
        self._steps, self._tokens, self._seconds, self._waited = 0, 0.0, 0.0, 0.0

    def restart(self) -> None:
        """Leaves the time since the last `step` out."""
        self._since = self._clock()

    def step(
        self, num_tokens: float, waited_seconds: float, finished_at: float | None = None
    ) -> Throughput | None:
        """Counts a finished step.

        Args:
          num_tokens: targets with a loss in the global batch.
          waited_seconds: how long the step waited for its data.
          finished_at: when, by the meter's clock; None: now.

        Returns:
          The step's own throughput; None for the first, whose beginning is not known.
        """
        now = self._clock() if finished_at is None else finished_at
        since = self._since
        self._since = now
        if since is None:
            return None
        seconds = max(now - since, 1e-9)
        # The wait of a step that began before the clock restarted may exceed the interval.
        waited = min(waited_seconds, seconds)
        self._steps += 1
        self._tokens += num_tokens
        self._seconds += seconds
        self._waited += waited
        return self._throughput(1, num_tokens, seconds, waited)

    def average(self) -> Throughput | None:
        """Over the steps since the last `clear`; None if there are none."""
        if not self._steps:
            return None
        return self._throughput(self._steps, self._tokens, self._seconds, self._waited)

    def _throughput(self, steps: int, tokens: float, seconds: float, waited: float) -> Throughput:
        tokens_per_second = tokens / seconds
        mfu = None if self._peak is None else tokens_per_second * self._flops_per_token / self._peak
        return Throughput(seconds / steps, tokens_per_second, waited / seconds, mfu)


def format_duration(seconds: float | None) -> str:
    """Hours, minutes and seconds: "1:02:03" or "2:03"; "?" for None."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
