"""Reading the slots, chunkwise: the gated recurrence as matrix products, exact for any gate.

Time is cut into chunks of `CHUNK` tokens, and those into sub-blocks of `SUB_BLOCK`. A decay between
two tokens is a product of factors that are all at most 1, each the exponential of a sum of its own
gates: across sub-blocks to and from their ends, across chunks through the slots at the chunk's
start. Inside a sub-block there are two ways. Where no sub-block of the call decays by more than
`_MILD`, the decay from i through r is split into `exp(sum through r) * exp(-sum through i)`, one
matrix product. Otherwise every pair gets its own exponential. A scalar test chooses; neither way
clips anything that could show.

Axes: c chunks, J sub-blocks per chunk, S tokens per sub-block, C = J S; Y = R S query rows per
sub-block, X = J Y per chunk; Z = c J sub-blocks per call. They are joined so that nothing that is
summed, forward or backward, has more than five: sums over arrays of seven axes crash the CPU
backend of jaxlib 0.10.2, and `vmap` adds one.
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
# exp(-1000) is 0 in every dtype: a floor that no result can show; it keeps sums of gates finite.
_LOWEST_LOG_DECAY = -1000.0
# Beyond exp(16) a split decay would cost bfloat16 gradients their accuracy; float16 overflows.
_MILD = 16.0
_MILD_FLOAT16 = 4.0
# So many chunks at a time at most: decays take several times the memory of the inputs, pair by pair
# S times that. Large buffers, new in every call, cost a CPU more than the loop.
_MILD_CHUNKS = 64
_EXACT_CHUNKS = 8
# Of q, k, v, log_decay, slots, start, readable and first.
_CHUNK_AXES = (2, 2, 2, 2, 0, 1, 1, 0)


class _Decays(NamedTuple):
    """Decays of a call cut into chunks, in [0, 1] except for `write_to`'s own sub-blocks."""

    from_start: jax.Array  # [B,G,Z,S,M] from the sub-block's start through r
    from_chunk: jax.Array  # [B,G,Z,S,M] from the chunk's start through r
    write_to: jax.Array  # [B,G,Z,C,M] write strength of i, decayed to the sub-block's start


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
      Output [B,T,G,R,V], log-sum-exp [B,T,G,R] (-inf where slots are empty and masked), and the
      slots after the last token, ([B,G,M,K], [B,G,M,V]).
    """
    b, t, g, r, key_size = q.shape
    size = min(CHUNK, _next_power_of_two(t))
    sub = min(SUB_BLOCK, size)
    count, parts = _divisible(-(-t // size), _MILD_CHUNKS), size // sub

    def chunks(x, fill=0):
        x = _pad(x, count * size, fill)
        return x.reshape(x.shape[0], count, size, *x.shape[2:])

    # Padding at the end belongs to the last document, so that the slots pass through it.
    start = chunks(rows.start, "edge")  # [1|B,c,C]
    readable = chunks(rows.valid)
    if call.empty_slots == "mask":
        readable &= ~chunks(rows.slots_empty(call))
    q = _pad(q, count * size, 0).reshape(b, count, parts, sub, g, r, key_size)
    q = q.transpose(0, 4, 1, 2, 5, 3, 6).reshape(b, g, count, r * size, key_size)
    k, v, log_decay = (chunks(x).transpose(0, 3, 1, 2, 4) for x in (k, v, log_decay))
    log_decay = jnp.maximum(log_decay, _LOWEST_LOG_DECAY)

    if call.cache is None:
        shape = (b, g, log_decay.shape[-1], key_size + v.shape[-1])
        initial = jnp.zeros(shape, call.state_dtype)
    else:
        initial = jnp.concatenate([call.cache.slots_k, call.cache.slots_v], axis=-1)
    slots, final = _chunk_starts(k, v, log_decay, start, initial)

    first = jnp.arange(count, dtype=jnp.int32) * size
    operands = (q, k, v, log_decay, slots, start, readable, first)
    sums = log_decay.reshape(b, g, count * parts, sub, -1).sum(-2)
    is_mild = sums.min() > -(_MILD_FLOAT16 if q.dtype == jnp.float16 else _MILD)
    mild = functools.partial(_read_group_by_group, call.scale, False, _MILD_CHUNKS)
    exact = functools.partial(_read_group_by_group, call.scale, True, _EXACT_CHUNKS)
    out, lse = jax.lax.cond(is_mild, mild, exact, *operands)

    def tokens(x):  # [B,G,c,X,...] -> [B,T,G,R,...]
        x = x.reshape(b, g, count, parts, r, sub, *x.shape[4:])
        x = jnp.moveaxis(x, (2, 3, 5), (1, 2, 3))
        return x.reshape(b, count * size, g, r, *x.shape[6:])[:, :t]

    final_k, final_v = jnp.split(final, [key_size], axis=-1)
    return tokens(out), tokens(lse), (final_k, final_v)


def _chunk_starts(k, v, log_decay, start, initial):
    """Slots [c,B,G,M,K+V] at each chunk's start, in k's dtype, and after the last chunk."""
    count, size = k.shape[2:4]
    first = jnp.arange(count) * size
    last_start = start[..., -1]  # [1|B,c] where the document of the chunk's end began
    in_last = (first[:, None] + jnp.arange(size))[None] >= last_start[..., None]
    later = jnp.pad(log_decay[..., 1:, :], [(0, 0)] * 3 + [(0, 1), (0, 0)])
    to_end = jax.lax.cumsum(later, axis=3, reverse=True)  # from after i through the chunk's end
    write = -jnp.expm1(log_decay) * jnp.exp(to_end) * in_last[:, None, :, :, None]
    written = dot("bgcim,bgcix->cbgmx", write, jnp.concatenate([k, v], axis=-1), k.dtype)
    keep = jnp.exp(log_decay.sum(3)) * (last_start < first)[:, None, :, None]

    def step(slots, chunk):
        keep, written = chunk
        return keep[..., None] * slots + written, slots.astype(k.dtype)

    final, starts = jax.lax.scan(step, initial, (jnp.moveaxis(keep, 2, 0), written))
    return starts, final


def _read_group_by_group(scale, pairwise, most, *operands):
    """`_read_chunks` of at most so many chunks at a time, each group computed again backward."""
    count = operands[-1].shape[0]
    group = next(size for size in range(min(most, count), 0, -1) if count % size == 0)
    read = jax.checkpoint(functools.partial(_read_chunks, scale, pairwise))
    if group == count:
        return read(*operands)

    def split(x, axis):
        x = x.reshape(*x.shape[:axis], count // group, group, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    groups = tuple(split(x, axis) for x, axis in zip(operands, _CHUNK_AXES, strict=True))
    out, lse = jax.lax.map(lambda group: read(*group), groups)

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], count, *x.shape[4:])

    return join(out), join(lse)


def _read_chunks(scale, pairwise, q, k, v, log_decay, slots, start, readable, first):
    """Every chunk's slot scores, softmax and output: [B,G,c,X,V] and log-sum-exp [B,G,c,X]."""
    b, g, count, size, key_size = k.shape
    dtype, sub = q.dtype, min(SUB_BLOCK, size)
    heads, parts = q.shape[3] // size, size // sub
    decays = _decays(log_decay, sub, own=not pairwise)
    slots_k, slots_v = jnp.split(slots, [key_size], axis=-1)

    def blocks(x):  # [1|B,1|G,c,X,...] -> [1|B,1|G,Z,Y,...]
        return x.reshape(*x.shape[:2], count * parts, heads * sub, *x.shape[4:])

    def chunks(x):  # [B,G,Z,Y,...] -> [B,G,c,X,...]
        return x.reshape(b, g, count, parts * heads * sub, *x.shape[4:])

    def per_row(x):  # a value per token [1|B,c,C] for every query row [1|B,1,c,X]
        x = x.reshape(x.shape[0], 1, count, parts, 1, sub)
        return jnp.broadcast_to(x, (*x.shape[:4], heads, sub)).reshape(*x.shape[:3], -1)

    def for_heads(decay):  # [B,G,Z,S,M] -> [B,G,Z,Y,M]; backward, slices are added, not an axis
        return jnp.concatenate([decay] * heads, axis=3)

    index = jnp.arange(size)
    first = first[:, None]  # [c,1]: index of each chunk's first token
    row_start, row_index = per_row(start), per_row(jnp.broadcast_to(index, (1, count, size)))
    pairs = (index <= row_index[..., None]) & (first[..., None] + index >= row_start[..., None])
    continues = (row_start < first)[..., None]  # the document began in an earlier chunk
    from_start, from_chunk = for_heads(decays.from_start), for_heads(decays.from_chunk)

    products = dot("bgcxk,bgcik->bgcxi", q, k, dtype) * pairs
    # Of products and of what they are multiplied with, float16 cannot hold all.
    wide = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
    across = dot("bgzyi,bgzim->bgzym", blocks(products), decays.write_to, wide)
    scores = dot("bgcxk,cbgmk->bgcxm", q, slots_k, dtype) * continues
    scores = across * from_start + blocks(scores) * from_chunk
    if pairwise:
        own = _Pairs(log_decay, sub, heads)
        scores += own.read(own.diagonal(products))
    scores = jnp.where(blocks(per_row(readable))[..., None], scale * scores, -jnp.inf)
    p, lse = softmax_and_lse(scores)

    out = dot("bgcxm,cbgmv->bgcxv", chunks(p * from_chunk), slots_v, dtype) * continues
    across = chunks(dot("bgzym,bgzim->bgzyi", p * from_start, decays.write_to, dtype)) * pairs
    out += dot("bgcxi,bgciv->bgcxv", across, v, dtype)
    if pairwise:
        within = own.write_back(p) * own.diagonal(pairs)
        own_v = v.reshape(b, g, count * parts, sub, -1)
        out += chunks(dot("bgzyi,bgziv->bgzyv", within, own_v, dtype))
    return out, chunks(lse)


class _Pairs:
    """The part inside sub-blocks, pair by pair: for gates too strong to split their product."""

    def __init__(self, log_decay: jax.Array, sub: int, heads: int):
        b, g, count, size, num_slots = log_decay.shape
        self.sub, self.heads = sub, heads
        gates = log_decay.reshape(b, g, -1, sub, num_slots)
        r, i, x = np.ogrid[:sub, :sub, :sub]
        between = jnp.asarray((i < x) & (x <= r), gates.dtype).reshape(sub * sub, sub)
        sums = dot("ax,bgzxm->bgzam", between, gates, gates.dtype)
        write = jnp.concatenate([-jnp.expm1(gates)] * sub, axis=3)
        # [B,G,c C,S(i),M]: what i writes, decayed through token r; i > r is masked later.
        self.written = (jnp.exp(sums) * write).reshape(b, g, count * size, sub, num_slots)

    def diagonal(self, x: jax.Array) -> jax.Array:
        """Columns of each sub-block's own tokens: [...,c,X,C] -> [...,Z,Y,S]."""
        rows, sub = self.heads * self.sub, self.sub
        own = [
            x[:, :, :, j * rows : (j + 1) * rows, j * sub : (j + 1) * sub]
            for j in range(x.shape[4] // sub)
        ]
        return jnp.stack(own, axis=3).reshape(*x.shape[:2], -1, rows, sub)

    def read(self, products: jax.Array) -> jax.Array:
        """sum_i (q_r . k_i) written_ri[m] for each query row: [B,G,Z,Y,S] -> [B,G,Z,Y,M]."""
        x = self._by_token(products)
        return self._by_row(dot("bgthi,bgtim->bgthm", x, self.written, x.dtype))

    def write_back(self, p: jax.Array) -> jax.Array:
        """sum_m p_r[m] written_ri[m]: [B,G,Z,Y,M] -> [B,G,Z,Y,S]."""
        x = self._by_token(p)
        return self._by_row(dot("bgthm,bgtim->bgthi", x, self.written, x.dtype))

    def _by_token(self, x: jax.Array) -> jax.Array:  # [B,G,Z,Y,.] -> [B,G,c C,R,.]
        b, g = x.shape[:2]
        x = x.reshape(b, g, -1, self.heads, self.sub, x.shape[-1])
        return x.swapaxes(3, 4).reshape(b, g, -1, self.heads, x.shape[-1])

    def _by_row(self, x: jax.Array) -> jax.Array:  # and back
        b, g = x.shape[:2]
        x = x.reshape(b, g, -1, self.sub, self.heads, x.shape[-1])
        return x.swapaxes(3, 4).reshape(b, g, -1, self.heads * self.sub, x.shape[-1])


def _decays(log_decay: jax.Array, sub: int, own: bool) -> _Decays:
    """The decays inside chunks from log decays [B,G,c,C,M], each from a sum of its own gates only.

    With `own`, `write_to` also holds each sub-block's own tokens, "decayed" backwards to its start
    by a factor >= 1, which `from_start` of the reading row more than undoes.
    """
    b, g, count, size, num_slots = log_decay.shape
    parts = size // sub
    gates = log_decay.reshape(b, g, count * parts, sub, num_slots)
    from_start = jnp.cumsum(gates, axis=3)
    later = jnp.pad(gates[:, :, :, 1:], [(0, 0)] * 3 + [(0, 1), (0, 0)])
    to_end = jax.lax.cumsum(later, axis=3, reverse=True)
    part_total = from_start[:, :, :, -1].reshape(b, g, count, parts, num_slots)
    before = _running_sums(part_total).reshape(b, g, count * parts, 1, num_slots)

    def of_part(x, part):  # [B,G,Z,S,M] -> [B,G,c,S,M]
        return x.reshape(log_decay.shape)[:, :, :, part * sub : (part + 1) * sub]

    write = -jnp.expm1(gates)

    # One by one, not as an array with two axes of sub-blocks: half of it would be zero.
    def write_to(reader):
        between = jnp.zeros_like(part_total[:, :, :, :1])
        blocks = [jnp.zeros_like(of_part(write, 0))] * parts
        if own:
            blocks[reader] = of_part(write, reader) * jnp.exp(-of_part(from_start, reader))
        for writer in range(reader - 1, -1, -1):
            factor = jnp.exp(of_part(to_end, writer) + between)
            blocks[writer] = of_part(write, writer) * factor
            between += part_total[:, :, :, writer : writer + 1]
        return jnp.concatenate(blocks, axis=3)  # [B,G,c,C,M]

    to_readers = jnp.stack([write_to(reader) for reader in range(parts)], axis=3)
    return _Decays(
        from_start=jnp.exp(from_start),
        from_chunk=jnp.exp(from_start + before),
        write_to=to_readers.reshape(b, g, count * parts, size, num_slots),
    )


def _running_sums(x: jax.Array) -> jax.Array:
    """Sums over the entries before each one, along axis 3."""
    sums = [jnp.zeros_like(x[:, :, :, 0])]
    for j in range(x.shape[3] - 1):
        sums.append(sums[-1] + x[:, :, :, j])
    return jnp.stack(sums, axis=3)


def softmax_and_lse(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis and its log-sum-exp; zeros and -inf where every score is -inf."""
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    p = jnp.exp(scores - jnp.where(highest > -jnp.inf, highest, 0))
    total = p.sum(-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    return p / total, jnp.where(seen, jnp.log(total) + highest, -jnp.inf)[..., 0]


def _pad(x: jax.Array, length: int, fill) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, length - x.shape[1])
    return jnp.pad(x, widths, mode="edge") if fill == "edge" else jnp.pad(x, widths)


def _divisible(count: int, most: int) -> int:
    """The least number from `count` on that equal groups of at most `most` make up."""
    groups = -(-count // most)
    return -(-count // groups) * groups


def _next_power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()
