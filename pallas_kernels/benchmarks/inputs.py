"""Inputs of a case, and the programs that call the operator on them.

Only the public contract is used: `nha_jax.ops.native_hybrid_attention` and `init_cache`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.ops import Cache, init_cache, native_hybrid_attention
from pallas_kernels.benchmarks.cases import Case
from pallas_kernels.benchmarks.timing import Program

_ROPE_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of one call; the cotangent is the output's."""

    # Any: leaves are arrays, but also tracers and ShapeDtypeStructs in transformed trees.
    q: Any  # [B,T,N,K]
    k: Any  # [B,T,G,K]
    v: Any  # [B,T,G,V]
    log_decay: Any  # [B,T,G,M] float32; None without slots
    cotangent: Any  # [B,T,N,V]; None where nothing is differentiated
    rope: Any  # (cos, sin), each [1,T,K/2] float32; None without rotation
    segment_ids: Any  # [B,T] int32; None for one document a row


jax.tree_util.register_dataclass(
    Inputs,
    data_fields=["q", "k", "v", "log_decay", "cotangent", "rope", "segment_ids"],
    meta_fields=[],
)


def draw_inputs(case: Case, seed: int) -> Inputs:
    """Random inputs of a case in its dtype; gates and tables float32."""
    length = 1 if case.decode else case.length
    keys = jax.random.split(jax.random.key(seed), 5)

    def normal(key: jax.Array, heads: int) -> jax.Array:
        return _normal(key, (case.batch, length, heads, case.head_size), case.dtype)

    gates = (case.batch, length, case.num_kv_heads, case.num_slots)
    return Inputs(
        q=normal(keys[0], case.num_heads),
        k=normal(keys[1], case.num_kv_heads),
        v=normal(keys[2], case.num_kv_heads),
        log_decay=_log_decay(keys[3], gates, case.log_decay) if case.num_slots else None,
        cotangent=normal(keys[4], case.num_heads) if case.backward else None,
        rope=_rope_tables(case) if case.rope else None,
        segment_ids=_segment_ids(case) if case.documents > 1 else None,
    )


def draw_cache(case: Case, seed: int) -> Cache:
    """A cache in the middle of a document of every row, filled with random values.

    Rows of a windowed layer have different lengths, between W and the case's length; those of a
    full layer all have the case's length. No two leaves share a buffer: a cache is donated whole.
    """
    cache = init_cache(
        case.batch,
        num_kv_heads=case.num_kv_heads,
        key_size=case.head_size,
        value_size=case.head_size,
        num_slots=case.num_slots,
        window=case.static_window,
        max_length=case.max_length,
        dtype=case.dtype,
    )
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    random = np.random.default_rng(seed)
    if case.is_full:
        lengths = np.full(case.batch, case.length, np.int32)
    else:
        lengths = random.integers(case.static_window, case.length + 1, case.batch, np.int32)
    return cache.replace(
        slots_k=_normal(next(keys), cache.slots_k.shape, "float32"),
        slots_v=_normal(next(keys), cache.slots_v.shape, "float32"),
        slots_empty=jnp.full(case.batch, case.is_full),
        window_k=_normal(next(keys), cache.window_k.shape, case.dtype),
        window_v=_normal(next(keys), cache.window_v.shape, case.dtype),
        pending_k=_normal(next(keys), cache.pending_k.shape, case.dtype),
        pending_log_decay=_log_decay(next(keys), cache.pending_log_decay.shape, case.log_decay),
        length=jnp.array(lengths),
        segment_id=jnp.ones((case.batch,), jnp.int32),
        segment_length=jnp.array(lengths),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _log_decay(key: jax.Array, shape: tuple[int, ...], fixed: float | None) -> jax.Array:
    if fixed is not None:
        return jnp.full(shape, fixed, jnp.float32)
    return jax.nn.log_sigmoid(jax.random.normal(key, shape, jnp.float32)) / 8


def _segment_ids(case: Case) -> jax.Array:
    ids = np.repeat(np.arange(1, case.documents + 1, dtype=np.int32), case.document_lengths)
    return jnp.array(np.broadcast_to(ids, (case.batch, case.length)))


def _rope_tables(case: Case) -> tuple[jax.Array, jax.Array]:
    """Of the positions within documents; a decode step's of the position after the context."""
    if case.decode:
        positions = np.array([case.length])
    else:
        positions = np.concatenate([np.arange(length) for length in case.document_lengths])
    half = case.head_size // 2
    angles = positions[None, :, None] * _ROPE_THETA ** (-np.arange(half) / half)
    return jnp.array(np.cos(angles), jnp.float32), jnp.array(np.sin(angles), jnp.float32)


def num_sets(bytes_of_one: int, l2_bytes: int) -> int:
    """How many sets of buffers to rotate over, so that none is left in the L2 when its turn comes.

    Together they are larger than twice the L2, and at least two.
    """
    return max(2, 2 * l2_bytes // bytes_of_one + 1)


def tree_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def rotating(
    function: Callable[..., Any], draw: Callable[[int], Any], l2_bytes: int
) -> tuple[Program, int]:
    """A program that calls a compiled function of one argument on rotating inputs.

    Args:
      function: jitted here.
      draw: the argument, from a seed.
      l2_bytes: of the device.

    Returns:
      The program, and the number of input sets.
    """
    sets = [draw(0)]
    sets += [draw(seed) for seed in range(1, num_sets(tree_bytes(sets[0]), l2_bytes))]
    compiled = jax.jit(function).lower(sets[0]).compile()
    return lambda i: compiled(sets[i % len(sets)]), len(sets)


def operator_program(
    case: Case, implementation: str | None, l2_bytes: int, *, backward: bool
) -> tuple[Program, int]:
    """The case's program, forward or forward + backward, and its number of input sets."""
    if case.decode:
        return _decode_program(case, implementation, l2_bytes)

    def forward(q, k, v, log_decay, inputs: Inputs):
        return native_hybrid_attention(
            q,
            k,
            v,
            log_decay,
            window=case.static_window,
            rope=inputs.rope,
            segment_ids=inputs.segment_ids,
            implementation=implementation,  # type: ignore[arg-type]
        )

    def draw(seed: int) -> Inputs:
        inputs = draw_inputs(case, seed)
        return inputs if backward else dataclasses.replace(inputs, cotangent=None)

    def differentiated(inputs: Inputs) -> tuple[jax.Array, ...]:
        return (inputs.q, inputs.k, inputs.v, inputs.log_decay)

    return rotating(with_gradients(forward, differentiated, backward), draw, l2_bytes)


def with_gradients(
    forward: Callable[..., jax.Array],
    differentiated: Callable[[Inputs], tuple[jax.Array, ...]],
    backward: bool,
) -> Callable[[Inputs], Any]:
    """`inputs -> out`, or `inputs -> (out, gradients)` by `jax.vjp` with the inputs' cotangent.

    Args:
      forward: function of the differentiated arrays and, last, the inputs.
      differentiated: picks these arrays.
      backward: whether to differentiate.
    """

    def only_forward(inputs: Inputs) -> Any:
        return forward(*differentiated(inputs), inputs)

    def both(inputs: Inputs) -> Any:
        out, pull_back = jax.vjp(lambda *x: forward(*x, inputs), *differentiated(inputs))
        return out, pull_back(inputs.cotangent)

    return both if backward else only_forward


def _decode_program(case: Case, implementation: str | None, l2_bytes: int) -> tuple[Program, int]:
    def step(cache: Cache, inputs: Inputs) -> Any:
        return native_hybrid_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.log_decay,
            window=case.static_window,
            rope=inputs.rope,
            cache=cache,
            return_cache=True,
            implementation=implementation,  # type: ignore[arg-type]
        )

    first = draw_cache(case, 0)
    count = num_sets(tree_bytes(first), l2_bytes)
    caches = [first, *(draw_cache(case, seed) for seed in range(1, count))]
    inputs = [draw_inputs(case, seed) for seed in range(count)]
    compiled = jax.jit(step, donate_argnums=0).lower(caches[0], inputs[0]).compile()

    def call(i: int) -> jax.Array:
        i %= count
        out, caches[i] = compiled(caches[i], inputs[i])
        return out

    return call, count
