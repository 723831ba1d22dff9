"""Tables of documents and padding, as `Operands` has them, from segment ids in one launch.

One program walks a row of the batch in tiles of lines of 32 tokens. What is known of one line's
tokens are the bits of an int32: the last token before a place is the highest bit below it, how many
there are is the count of bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.distribute import distribute
from pallas_kernels.launch import launch
from pallas_kernels.spec import BEFORE
from pallas_kernels.tiles import iota, load

_LINE = 32
_LINES = 128  # per tile; two maxima compare each with each
_NUM_WARPS = 16


class Tables(NamedTuple):
    """See `Operands`; rows are the row's tokens in order, then padding in any order."""

    source: Any  # [B,T]
    reach: Any  # [B,T]
    start: Any  # [B,T]; that of the last document for padding
    readable: Any  # [B,T]
    bounds: Any  # [B,2]


_TABLES = Tables(source="bt", reach="bt", start="bt", readable="bt", bounds="bx")


def document_tables(
    segment_ids: jax.Array, *, window: int, lag: int, sink: bool, interpret: bool
) -> Tables:
    """Tables of one call without a cache.

    Args:
      segment_ids: [B,T] int32, 0 for padding; a token of another id than the one before it begins
        a document.
      window: of the call.
      lag: of the call.
      sink: whether empty slots are read, too.
      interpret: run it as JAX operations, on any device.
    """

    def run(segment_ids):
        batch, length = segment_ids.shape
        shape = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        bounds = jax.ShapeDtypeStruct((batch, 2), jnp.int32)
        lines = min(_LINES, max(1 << (-(-length // _LINE) - 1).bit_length(), 1))
        return launch(
            functools.partial(_kernel, length, lines, window, 0 if sink else lag),
            name="nha_document_tables",
            grid=(batch,),
            out_shape=Tables(shape, shape, shape, shape, bounds),
            num_warps=min(_NUM_WARPS, lines),
            num_stages=1,
            interpret=interpret,
        )(segment_ids)

    return distribute(run, ("bt",), _TABLES)(segment_ids)


def _kernel(length, lines, window, first_readable, ids, segment_ids, out):
    (b,) = ids
    size = lines * _LINE
    lane, line = iota(_LINE)[None, :], iota(lines)
    bit = jnp.left_shift(jnp.int32(1), lane)

    def bits(flags):
        """Of each place's line up to it, [lines,32], and of the whole line, [lines]."""
        own = jnp.where(flags, bit, 0)
        return jnp.cumsum(own, axis=1, dtype=jnp.int32), jnp.sum(own, axis=1, dtype=jnp.int32)

    def above(of_line, before):
        """The maximum of the earlier lines' values and of that before the tile, [lines,1]."""
        values = jnp.where(line[None, :] < line[:, None], of_line[None, :], before)
        return jnp.maximum(jnp.max(values, axis=1), before)[:, None]

    def put(ref, place, value, mask):
        # Interpreted masked stores harm nothing behind the end.
        value = jnp.broadcast_to(jnp.asarray(value, jnp.int32), place.shape)
        plgpu.store(ref.at[b, jnp.where(mask, place, length)], value, mask=mask)

    def step(i, carry):
        count, last, begun = carry
        line_first = i * size + line * _LINE
        index = line_first[:, None] + lane
        inside = index < length
        segment = load(segment_ids, b, index, mask=inside)
        is_token = segment != 0
        tokens, of_line = bits(is_token)
        in_line = jax.lax.population_count(of_line)
        line_before = count + jnp.cumsum(in_line, dtype=jnp.int32) - in_line

        earlier = jnp.where(is_token, tokens ^ bit, tokens)
        before = line_before[:, None] + jax.lax.population_count(earlier)
        line_last = jnp.where(of_line != 0, line_first + _highest(of_line), -1)
        previous = jnp.where(
            earlier != 0, line_first[:, None] + _highest(earlier), above(line_last, last)
        )
        exists = previous >= 0
        previous = load(segment_ids, b, jnp.maximum(previous, 0), mask=exists)

        begins, line_begins = bits(is_token & (segment != previous))

        def begun_at(begins, tokens, before):
            """How many tokens stand before the last one that begins a document."""
            below = jnp.left_shift(jnp.int32(1), jnp.maximum(_highest(begins), 0)) - 1
            return before + jax.lax.population_count(tokens & below)

        line_begun = begun_at(line_begins, of_line, line_before)
        line_begun = jnp.where(line_begins != 0, line_begun, BEFORE)
        start = jnp.where(
            begins != 0,
            begun_at(begins, tokens, line_before[:, None]),
            above(line_begun, begun),
        )
        position = before - start
        # Padding is put behind the tokens from the end on, as their number is not known yet.
        place = jnp.where(is_token, before, length - 1 - (index - before))
        put(out.source, place, index, inside)
        put(out.reach, place, jnp.minimum(position, max(window, 1) - 1), is_token)
        put(out.start, place, start, is_token)
        put(out.readable, place, (position >= first_readable).astype(jnp.int32), is_token)
        return (
            count + jnp.sum(in_line, dtype=jnp.int32),
            jnp.maximum(jnp.max(line_last), last),
            jnp.maximum(jnp.max(line_begun), begun),
        )

    carry = jnp.int32(0), jnp.int32(-1), jnp.int32(BEFORE)
    tiles = jnp.int32(-(-length // size))
    count, _, begun = jax.lax.fori_loop(jnp.int32(0), tiles, step, carry)
    plgpu.store(out.bounds.at[b, jnp.int32(0)], jnp.int32(0))
    plgpu.store(out.bounds.at[b, jnp.int32(1)], count)

    def padding(i, carry):
        index = i * size + line[:, None] * _LINE + lane
        mask = (index >= count) & (index < length)
        for ref, value in ((out.reach, -1), (out.start, begun), (out.readable, 0)):
            put(ref, index, value, mask)
        return carry

    jax.lax.fori_loop(count // size, tiles, padding, jnp.int32(0))


def _highest(bits):
    """The highest bit that is set; -1 if none is."""
    return 31 - jax.lax.clz(bits)
