"""From a checked call to the Pallas kernels and back: caches and documents become plain arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nha_jax.ops import pallas_decode
from nha_jax.ops.cache import Cache
from nha_jax.ops.checks import Call
from nha_jax.ops.rotary import rotate
from nha_jax.ops.rows import Rows, rows_of
from nha_jax.ops.xla import final_cache
from pallas_kernels.blocks import choose, device_at_hand
from pallas_kernels.documents import Tables, document_tables
from pallas_kernels.hybrid import hybrid_attention
from pallas_kernels.spec import BEFORE, Operands, Spec, rotary_table

Result = tuple[jax.Array, jax.Array, Cache | None]


def pallas_triton(call: Call) -> Result:
    """Runs one checked call on an NVIDIA GPU. Returns as `nha_jax.ops.reference.reference` does.

    Raises:
      NotImplementedError: it is differentiated with respect to the rotary tables, or, when it is
        lowered, not for CUDA.
    """
    return _dispatch(call, interpret=False)


def pallas_triton_interpret(call: Call) -> Result:
    """The same kernels as JAX operations, on any device: for tests.

    Raises:
      NotImplementedError: it is differentiated with respect to the rotary tables.
    """
    return _dispatch(call, interpret=True)


def _dispatch(call: Call, interpret: bool) -> Result:
    if pallas_decode.serves(call):
        return pallas_decode.step(call, interpret, functools.partial(_run, interpret=interpret))
    return _run(call, interpret)


def _run(call: Call, interpret: bool) -> Result:
    cache = call.cache
    rows = None if cache is None else rows_of(call)
    past = 0 if cache is None else cache.capacity
    spec = Spec(
        rows=call.q.shape[1],
        past=past,
        num_heads=call.q.shape[2],
        num_kv_heads=call.k.shape[2],
        key_size=call.q.shape[3],
        value_size=call.v.shape[3],
        num_slots=call.log_decay.shape[3],
        window=call.window,
        # A cache without rows for tokens that wait is one in which none can retire.
        lag=call.slot_lag if cache is None else min(call.slot_lag, past),
        scale=call.scale,
        sink=call.empty_slots == "sink",
        rope=call.rope is not None,
        tables=cache is not None or call.segment_ids is not None,
        dtype=call.q.dtype,
        interpret=interpret,
    )
    # Tuned for the call's number of slots, whether they are read or not.
    forward, backward = choose(spec, device_at_hand())
    if not call.reads_slots:
        spec = dataclasses.replace(spec, num_slots=0)
    if cache is None:
        operands = _without_cache(call, spec)
    else:
        assert rows is not None
        operands = _with_cache(call, rows, cache)
    results = hybrid_attention(spec, forward, backward, operands)
    out, slot_mass = results.out, results.slot_mass
    if cache is None:
        return out, slot_mass, None
    assert rows is not None
    final = None
    if call.return_cache:
        slots = (results.slots_k, results.slots_v) if spec.num_slots else None
        rotated_k = rows.compact(rotate(call.k, call.rope))
        k, v = rows.compact(call.k), rows.compact(call.v)
        log_decay = rows.compact(call.log_decay).astype(call.state_dtype)
        final = final_cache(call, rows, slots, rotated_k, k, v, log_decay)
    return rows.restore(out), rows.restore(slot_mass), final


def _without_cache(call: Call, spec: Spec) -> Operands:
    tables: dict[str, jax.Array | None] = dict.fromkeys(Tables._fields)
    if call.segment_ids is not None:
        tables = document_tables(
            call.segment_ids,
            window=call.window,
            lag=call.slot_lag,
            sink=spec.sink,
            interpret=spec.interpret,
        )._asdict()
    return Operands(
        q=call.q,
        k=call.k,
        slot_k=None,
        v=call.v,
        log_decay=call.log_decay if spec.num_slots else None,
        slots_k=None,
        slots_v=None,
        rotation=None if call.rope is None else rotary_table(call.rope, call.q.dtype),
        key_rotation=None,
        **tables,
    )


def _row_tables(call: Call, rows: Rows, past: int):
    readable = rows.valid
    if call.empty_slots == "mask":
        readable &= ~rows.slots_empty(call)
    start = jnp.where(rows.start < 0, BEFORE, rows.start + past)
    # Without a window, reach only tells tokens from padding.
    return rows.reach(max(call.window, 1)), start, readable.astype(jnp.int32)


def _with_cache(call: Call, rows: Rows, cache: Cache) -> Operands:
    """The cache's tokens stand before the call's, which are compacted already."""
    past, pending = cache.capacity, cache.pending_k.shape[1]
    b, t = call.q.shape[:2]
    k, v = rows.compact(call.k), rows.compact(call.v)
    log_decay = rows.compact(call.log_decay).astype(call.state_dtype)

    def unrolled(ring):
        """The ring's tokens, oldest first, behind as many zeros as `past` has more rows."""
        size = ring.shape[1]
        if not size:
            return jnp.zeros((b, past, *ring.shape[2:]), ring.dtype)
        at = (cache.length[:, None] + jnp.arange(size)) % size
        tokens = jax.vmap(lambda x, i: x[i])(ring, at)
        return jnp.pad(tokens, ((0, 0), (past - size, 0), (0, 0), (0, 0)))

    def extended(ring, x):
        return jnp.concatenate([unrolled(ring), x], axis=1)

    rotation = key_rotation = slot_k = None
    if call.rope is not None:
        rotation = rotary_table(call.rope, call.q.dtype)
        if rows.source is not None:
            rotation = rows.compact(jnp.broadcast_to(rotation, (b, *rotation.shape[1:])))
        half = jnp.ones((rotation.shape[0], past, rotation.shape[2] // 2), rotation.dtype)
        rotated_already = jnp.concatenate([half, 0 * half], axis=2)
        key_rotation = jnp.concatenate([rotated_already, rotation], axis=1)
        # Without rotation, or where no token of the cache can retire, the window's keys serve.
        slot_k = extended(cache.pending_k, k) if pending else None
    reach, start, readable = _row_tables(call, rows, past)
    waiting = jnp.minimum(cache.segment_length, call.slot_lag)
    may_retire = pending > 0 or call.slot_lag == 0
    first = past - waiting if may_retire else jnp.full((b,), past + t, jnp.int32)
    count = jnp.broadcast_to(rows.num_tokens, (b,))
    has_slots = call.log_decay.shape[3] > 0
    return Operands(
        q=rows.compact(call.q),
        k=extended(cache.window_k, k),
        slot_k=slot_k if has_slots else None,
        v=extended(cache.window_v, v),
        log_decay=extended(cache.pending_log_decay, log_decay) if has_slots else None,
        slots_k=cache.slots_k if has_slots else None,
        slots_v=cache.slots_v if has_slots else None,
        rotation=rotation,
        key_rotation=key_rotation,
        source=None,
        reach=reach,
        start=start,
        readable=readable,
        bounds=jnp.stack([first, count], axis=1).astype(jnp.int32),
    )
