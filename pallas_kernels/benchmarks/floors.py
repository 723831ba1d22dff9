"""The least that a case has to move and to multiply, whatever the implementation.

Bytes: each input read once, each output written once. FLOPs: the operator's own matrix products,
token by token; neither what a chunkwise form adds nor what a backward pass recomputes is counted.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.benchmarks.cases import Case

_WIDE = 4  # bytes of a float32 or an int32


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the device reaches, as measured in the same run.

    Attributes:
      copy_bandwidth: bytes per second of a large device-to-device copy, read plus written.
      matmul_rate: FLOP per second of a large bfloat16 matrix product.
    """

    copy_bandwidth: float
    matmul_rate: float


@dataclasses.dataclass(frozen=True)
class Floor:
    """Minimal bytes and FLOPs of one call, and the time they take on a machine (ms)."""

    bytes: int
    flops: int
    memory_ms: float
    compute_ms: float

    @property
    def ms(self) -> float:
        return max(self.memory_ms, self.compute_ms)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_ms >= self.compute_ms else "compute"


def floor(case: Case, machine: Machine, *, backward: bool) -> Floor:
    """The floor of one call of a case: forward, or forward + backward in one."""
    if case.decode:
        size, flops = decode_bytes(case), decode_flops(case)
    else:
        size, flops = minimal_bytes(case, backward=backward), minimal_flops(case, backward=backward)
    return Floor(
        size, flops, 1e3 * size / machine.copy_bandwidth, 1e3 * flops / machine.matmul_rate
    )


def minimal_bytes(case: Case, *, backward: bool) -> int:
    """Bytes of a call over whole sequences.

    Forward: q, k, v, log decays, rotary tables and document ids in, the output out. With the
    backward pass also the cotangent in and the four gradients out. Log decays that cannot matter
    (no token leaves the window) are not counted as read; their gradient, zero, is still written.
    """
    rows, narrow = case.batch * case.length, jnp.dtype(case.dtype).itemsize
    q = rows * case.num_heads * case.head_size * narrow  # the output and its cotangent too
    k = rows * case.num_kv_heads * case.head_size * narrow  # v too
    log_decay = rows * case.num_kv_heads * case.num_slots * _WIDE
    tables = case.length * case.head_size * _WIDE if case.rope else 0  # K/2 cosines, K/2 sines
    ids = rows * _WIDE if case.documents > 1 else 0
    total = q + 2 * k + (0 if case.is_full else log_decay) + tables + ids + q
    if backward:
        total += q + (q + 2 * k + log_decay)
    return total


def minimal_flops(case: Case, *, backward: bool) -> int:
    """FLOPs of a call over whole sequences.

    Forward, per query head: each (token, key in its window) pair costs 2K for the score and 2V for
    the value; each token with slots 2MK and 2MV; per key/value head a retirement costs 2MK and 2MV.
    Backward, per query head: twice the window's products (dP, dV, dQ, dK); for slots u, dq and
    both adjoint states, twice a read; per key/value head dk, dv and the write strength's gradient,
    twice a retirement.
    """
    pairs = sum(window_pairs(length, case.static_window) for length in case.document_lengths)
    # A token has slots, and has retired one, from the first retirement of its document on.
    with_slots = sum(max(0, length - case.static_window) for length in case.document_lengths)
    both_sizes = 2 * case.head_size
    window = 2 * both_sizes * pairs * case.num_heads
    reads = 2 * both_sizes * case.num_slots * with_slots * case.num_heads
    retirements = 2 * both_sizes * case.num_slots * with_slots * case.num_kv_heads
    forward = case.batch * (window + reads + retirements)
    return 3 * forward if backward else forward


def window_pairs(length: int, window: int) -> int:
    """How many (token, key) pairs a causal window of `window` tokens has over `length` tokens."""
    if length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def decode_bytes(case: Case) -> int:
    """Bytes of a decode step: slots read and written, window read, one token in and out."""
    heads, size, narrow = case.num_kv_heads, case.head_size, jnp.dtype(case.dtype).itemsize
    slots = 0 if case.is_full else heads * case.num_slots * 2 * size * _WIDE
    window = heads * min(case.static_window, case.length) * 2 * size * narrow
    token = (case.num_heads + 2 * heads) * size * narrow + heads * case.num_slots * _WIDE
    out = case.num_heads * size * narrow
    return case.batch * (2 * slots + window + token + out)


def decode_flops(case: Case) -> int:
    """FLOPs of a decode step: one token's reads and one retirement per key/value head."""
    seen = min(case.static_window, case.length)
    slots = 0 if case.is_full else case.num_slots
    per_row = case.num_heads * (seen + slots) + case.num_kv_heads * slots
    return case.batch * 2 * 2 * case.head_size * per_row
