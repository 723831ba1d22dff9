"""Reading the slots, chunkwise: the gated recurrence as matrix products, exact for any gate.

Time is cut into chunks of `CHUNK` tokens, and those into sub-blocks of `SUB_BLOCK`. A decay between two
tokens is a product of factors that are all at most 1, each the exponential of a sum of its own gates:
inside a sub-block pair by pair, across sub-blocks to and from their ends, across chunks through
the slots at the chunk's start. Nothing is divided by a decay and no two long sums are subtracted, so gates
from 0 to -infinity, mixed at will, neither overflow nor cancel, and nothing is clipped that could show.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.ops.checks import Call
from nha_jax.ops.precision import dot
from nha_jax.ops.rows import Rows

CHUNK = 64
SUB_BLOCK = 16
# exp(-1000) is 0 in every dtype: a floor that no result can show, and that keeps sums of gates finite.
_LOWEST_LOG_DECAY = -1000.0


class _Decays(NamedTuple):
    """Per chunk of C = J * S tokens; every entry is in [0, 1]."""

    pair: jax.Array  # [B,G,c,J,S,S,M] from token i through r of one sub-block (1 where i >= r)
    from_start: jax.Array  # [B,G,c,J,S,M] from the sub-block's start through r
    from_chunk: jax.Array  # [B,G,c,J,S,M] from the chunk's start through r
    write_to: (
        jax.Array
    )  # [B,G,c,J,C,M] write strength of i, decayed to the start of a later sub-block
    write_to_end: jax.Array  # [B,G,c,C,M] write strength of i, decayed to the chunk's end
    total: jax.Array  # [B,G,c,M] over the whole chunk
    write: jax.Array  # [B,G,c,J,S,M] write strength


def read_slots(
    call: Call, rows: Rows, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Softmax attention to the slots alone.

    Args:
      call: the call; its scale, dtypes and initial slots are used.
      rows: documents and padding.
      q: unrotated queries [B,T,G,R,K].
      k: unrotated keys [B,T,G,K] of the tokens that retire at each row.
      v: their values [B,T,G,V].
      log_decay: their log decays [B,T,G,M], 0 where nothing retires.

    Returns:
      Output [B,T,G,R,V], log-sum-exp [B,T,G,R] (-inf where slots are empty and masked), and the slots
      after the last token, ([B,G,M,K], [B,G,M,V]).
    """
    b, t, g, r, key_size = q.shape
    size = min(CHUNK, _next_power_of_two(t))
    count = -(-t // size)

    def chunks(x, fill=0):
        x = _pad(x, count * size, fill)
        return x.reshape(x.shape[0], count, size, *x.shape[2:])

    # Padding at the end belongs to the last document, so that the slots pass through it.
    start = chunks(rows.start, "edge")  # [1|B,c,C]
    readable = chunks(rows.valid)
    if call.empty_slots == "mask":
        readable &= ~chunks(rows.slots_empty(call))
    q = chunks(q).transpose(0, 3, 1, 4, 2, 5)  # [B,G,c,R,C,K]
    k, v, log_decay = (chunks(x).transpose(0, 3, 1, 2, 4) for x in (k, v, log_decay))
    log_decay = jnp.maximum(log_decay, _LOWEST_LOG_DECAY)

    if call.cache is None:
        shape = (b, g, log_decay.shape[-1], key_size + v.shape[-1])
        initial = jnp.zeros(shape, call.state_dtype)
    else:
        initial = jnp.concatenate([call.cache.slots_k, call.cache.slots_v], axis=-1)
    slots, final = _chunk_starts(k, v, log_decay, start, initial)
    read = functools.partial(_read_chunks, float(call.scale))
    # Recomputed in the backward pass: the decays of pairs are 16 times as large as the inputs.
    out, lse = jax.checkpoint(read)(q, k, v, log_decay, slots, start, readable)

    def tokens(x):  # [B,G,c,R,C,...] -> [B,T,G,R,...]
        x = jnp.moveaxis(x, (2, 4), (1, 2))
        return x.reshape(b, count * size, *x.shape[3:])[:, :t]

    final_k, final_v = jnp.split(final, [key_size], axis=-1)
    return tokens(out), tokens(lse), (final_k, final_v)


def _chunk_starts(k, v, log_decay, start, initial):
    """Slots [c,B,G,M,K+V] at each chunk's start, in k's dtype, and after the last chunk."""
    count, size = k.shape[2:4]
    decays = _decays(log_decay)
    first = jnp.arange(count) * size
    last_start = start[..., -1]  # [1|B,c] where the document of the chunk's end began
    in_last = (first[:, None] + jnp.arange(size))[None] >= last_start[..., None]
    write = decays.write_to_end * in_last[:, None, :, :, None]
    written = dot("bgcim,bgcix->cbgmx", write, jnp.concatenate([k, v], axis=-1), k.dtype)
    keep = decays.total * (last_start < first)[:, None, :, None]

    def step(slots, chunk):
        keep, written = chunk
        return keep[..., None] * slots + written, slots.astype(k.dtype)

    final, starts = jax.lax.scan(step, initial, (jnp.moveaxis(keep, 2, 0), written))
    return starts, final


def _read_chunks(scale, q, k, v, log_decay, slots, start, readable):
    """Every chunk's slot scores, softmax and output: [B,G,c,R,C,V] and log-sum-exp [B,G,c,R,C]."""
    b, g, count, r, size, key_size = q.shape
    dtype = q.dtype
    decays = _decays(log_decay)
    sub = decays.pair.shape[4]
    parts = size // sub
    slots_k, slots_v = jnp.split(slots, [key_size], axis=-1)

    index = jnp.arange(size)
    first = jnp.arange(count)[:, None] * size
    from_slots = (start < first)[:, None, :, None, :, None]  # [1|B,1,c,1,C,1]
    pairs = (index <= index[:, None]) & (first[..., None] + index >= start[..., None])
    pairs = pairs[:, None, :, None]  # [1|B,1,c,1,C,C]

    def split(x):  # a chunk's tokens into sub-blocks: [...,C,Y] -> [...,J,S,Y]
        return x.reshape(*x.shape[:-2], parts, sub, x.shape[-1])

    def diagonal(x):  # the blocks of a sub-block with itself: [...,C,C] -> [...,J,S,S]
        x = x.reshape(*x.shape[:-2], parts, sub, parts, sub)
        return jnp.moveaxis(jnp.diagonal(x, axis1=-4, axis2=-2), -1, -3)

    def per_head(x):  # [B,G,c,J,S,M] beside [B,G,c,R,J,S,M]
        return x[:, :, :, None]

    state_decay = per_head(decays.from_chunk).reshape(b, g, count, 1, size, -1) * from_slots
    written = decays.pair * decays.write[..., None, :, :]  # [B,G,c,J,S(r),S(i),M]

    products = dot("bgcrik,bgcjk->bgcrij", q, k, dtype) * pairs
    scores = split(dot("bgcrik,cbgmk->bgcrim", q, slots_k, dtype) * state_decay)
    across = dot("bgcrxsi,bgcxim->bgcrxsm", split(products), decays.write_to, dtype)
    scores += across * per_head(decays.from_start)
    scores += _pair_sum(diagonal(products)[..., None], per_head(written), -2)
    scores = jnp.where(
        readable[:, None, :, None, :, None],
        scale * scores.reshape(b, g, count, r, size, -1),
        -jnp.inf,
    )

    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    p = jnp.exp(scores - jnp.where(highest > -jnp.inf, highest, 0))
    total = p.sum(-1, keepdims=True)
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + highest, -jnp.inf)
    p = p / jnp.where(total > 0, total, 1)

    out = dot("bgcrim,cbgmv->bgcriv", p * state_decay, slots_v, dtype)
    p = split(p)
    across = dot("bgcrxsm,bgcxim->bgcrxsi", p * per_head(decays.from_start), decays.write_to, dtype)
    across = across.reshape(products.shape) * pairs
    out += dot("bgcrij,bgcjv->bgcriv", across, v, dtype)
    within = _pair_sum(p[..., None, :], per_head(written), -1) * diagonal(pairs)
    out += dot("bgcrxij,bgcxjv->bgcrxiv", within, split(v), dtype).reshape(out.shape)
    return out, lse[..., 0]


def _pair_sum(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    # A product and a sum that XLA fuses; as a batched matrix product of one row each it would not fly.
    return (a * b).sum(axis)


def _decays(log_decay: jax.Array) -> _Decays:
    """All decays of a chunk from its log decays [B,G,c,C,M]; each a sum of its own gates only."""
    size, num_slots = log_decay.shape[3:]
    sub = min(SUB_BLOCK, size)
    parts = size // sub
    dtype = log_decay.dtype
    gates = log_decay.reshape(*log_decay.shape[:3], parts, sub, num_slots)
    write = -jnp.expm1(gates)

    def sums(spec, selector, x):
        return dot(spec, jnp.asarray(selector, dtype), x, dtype)

    r, i, x = np.ogrid[:sub, :sub, :sub]
    pair = sums("rix,bgcjxm->bgcjrim", (i < x) & (x <= r), gates)  # i < x <= r
    from_start = pair[..., 0, :] + gates[..., :1, :]
    to_end = pair[..., -1, :, :]
    part_total = from_start[..., -1, :]  # [B,G,c,J,M]
    a, b, x = np.ogrid[:parts, :parts, :parts]
    before = sums("ax,bgcxm->bgcam", (x < a)[:, 0], part_total)
    after = sums("ax,bgcxm->bgcam", (x > a)[:, 0], part_total)
    between = sums("aex,bgcxm->bgcaem", (b < x) & (x < a), part_total)
    earlier = (b < a)[..., None]  # [J,J,1,1]
    write_to = write[:, :, :, None] * jnp.exp(to_end[:, :, :, None] + between[..., None, :])
    write_to = jnp.where(earlier, write_to, 0)
    write_to_end = write * jnp.exp(to_end + after[..., None, :])
    return _Decays(
        pair=jnp.exp(pair),
        from_start=jnp.exp(from_start),
        from_chunk=jnp.exp(from_start + before[..., None, :]),
        write_to=write_to.reshape(*write_to.shape[:4], size, num_slots),
        write_to_end=write_to_end.reshape(log_decay.shape),
        total=jnp.exp(part_total.sum(-2)),
        write=write,
    )


def _pad(x: jax.Array, length: int, fill) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, length - x.shape[1])
    return jnp.pad(x, widths, mode="edge") if fill == "edge" else jnp.pad(x, widths)


def _next_power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()
