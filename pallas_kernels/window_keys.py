"""Gradients of keys and values through the window: flash attention's, with the joint softmax."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles, tokens, walk, within
from pallas_kernels.blocks import Block
from pallas_kernels.launch import launch
from pallas_kernels.outputs import Outputs
from pallas_kernels.queries import Cotangents, QueryGradients
from pallas_kernels.rebuild import probabilities
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.tiles import batch_index, dot, dot_parts, load


class KeyGradients(NamedTuple):
    """Of keys and values, in the call's dtype."""

    k: Any  # [B,S,G,K]
    v: Any  # [B,S,G,V]


def window_key_gradients(
    spec: Spec,
    block: Block,
    x: Operands,
    results: Outputs,
    cotangents: Cotangents,
    queries: QueryGradients,
) -> KeyGradients:
    """Each program owns a block of keys and walks the rows that read it, head by head."""
    return launch(
        functools.partial(_kernel, spec, block),
        name="nha_window_key_gradients",
        grid=(spec.num_kv_heads, -(-spec.keys // block.own), x.k.shape[0]),
        out_shape=KeyGradients(
            jax.ShapeDtypeStruct(x.k.shape, spec.dtype), jax.ShapeDtypeStruct(x.v.shape, spec.dtype)
        ),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        interpret=spec.interpret,
    )(x, results, cotangents, queries)


def _kernel(spec, block, ids, x, results, cotangents, queries, grads):
    first = ids[1] * block.own
    last = first + _blocks_of_rows(spec, block) * block.walk - 1

    def body(spec, x):
        _body(spec, block, ids, x, results, cotangents, queries, grads)

    within.apart(spec, x, ids[2], lowest=first, last=last, start=first, body=body)


def _blocks_of_rows(spec, block) -> int:
    """That may read a block of keys: rows first - past ... first - past + own + window - 2."""
    return -(-(block.own + min(spec.window, spec.keys) - 1) // block.walk)


def _end(spec, x, b, last_key, first_row, size: int, begin, end, most: int):
    """The first of the blocks of rows [begin, end) that reads no such key, nor do those behind it.

    Documents end, and a window may be longer. No row reaches further back than those before it.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        row = jnp.clip(first_row + middle * size, 0, spec.rows - 1)
        lowest = row + spec.past - load(x.reach, batch_index(x.reach, b), row)
        low, high = (jnp.where(lowest <= last_key, *y) for y in ((middle + 1, low), (high, middle)))
        return jnp.minimum(low, high), high

    steps = jnp.int32(most.bit_length())
    return jax.lax.fori_loop(jnp.int32(0), steps, halve, (jnp.int32(begin), jnp.int32(end)))[1]


def _body(spec, block, ids, x, results, cotangents, queries, grads):
    g, index, b = ids
    first = index * block.own
    keys = tokens.load_keys(spec, x, b, first + tiles.iota(block.own))
    k = tokens.load_window_keys(spec, x, b, keys, g)
    v_CV = tiles.load_features(x.v, b, keys.at, g, spec.value_size, keys.valid)

    size, first_row = block.walk, first - spec.past
    per_head = _blocks_of_rows(spec, block)
    begin = jnp.maximum(-first_row, 0) // size
    end = jnp.clip(-(-(spec.rows - first_row) // size), begin, per_head)
    if spec.tables and walk.is_long(spec, size):
        end = _end(spec, x, b, first + block.own - 1, first_row, size, begin, end, per_head)

    def tables_at(i):
        return tokens.row_tables(spec, x, b, first_row + i * size, size)

    def masked(i, rows, p):
        """Only where not every row reads all keys."""

        def mask(p):
            return jnp.where(tokens.in_window(spec, rows, keys, transpose=True), p, 0)

        if spec.tables or not walk.is_long(spec, size):
            return mask(p)
        last = jnp.minimum(spec.window // size, (spec.rows - first_row) // size)
        inside = (i * size >= block.own - 1) & (i < last)
        return jax.lax.cond(inside, lambda p: p, mask, p)

    def head(h, carry):
        n = g * spec.group + h

        def step(i, carry):
            tables, d_k, d_v = carry
            rows = tokens.rows_at(spec, x, first_row + i * size, size, tables)
            # Those of the next step, maybe the next head's first, so that it need not wait.
            tables = tables_at(jnp.where(i + 1 < end, i + 1, begin))
            q = tiles.load_parts(spec, x.q, b, rows.at, n, rows.loaded)
            rotation = tiles.load_rotation(spec, x.rotation, b, rows.at, rows.loaded)
            q = tiles.rotated(spec, q, rotation)
            do_RV = tiles.load_features(cotangents.out, b, rows.at, n, spec.value_size, rows.loaded)
            lse, delta = (tokens.load_per_row(y, b, n, rows) for y in (results.lse, queries.delta))
            # Keys by rows, so that what is summed over the rows needs no transposition.
            products = dot_parts(k, q, spec, "b")
            p = masked(i, rows, probabilities(spec, products, lse[None, :], None))
            d_v += dot(p, do_RV, spec)
            ds = p * (dot(v_CV, do_RV, spec, "b") - delta[None, :])
            d_k = tuple(d + dot(ds, y, spec) for d, y in zip(d_k, q, strict=True))
            return tables, d_k, d_v

        return jax.lax.fori_loop(begin, end, step, carry)

    carry = (
        tables_at(begin),
        tuple(jnp.zeros(part.shape, spec.wide) for part in k),
        jnp.zeros(v_CV.shape, spec.wide),
    )
    _, d_k, d_v = tiles.loop(spec.group, head, carry)
    rotation = tokens.key_rotation(spec, x, b, keys)
    for part, value in enumerate(tiles.rotated(spec, d_k, rotation, inverse=True)):
        tiles.store_features(
            grads.k, b, keys.at, g, spec.part_size, keys.exist, spec.scale * value, part
        )
    tiles.store_features(grads.v, b, keys.at, g, spec.value_size, keys.exist, d_v)
