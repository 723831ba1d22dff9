"""The running softmax of a decode program: over slots, the token itself and ring rows in turn.

Suffixes and groups as in `decode_load`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_blocks import power_of_two
from pallas_kernels.decode_load import Program, below, tile_mask


class State(NamedTuple):
    """A running softmax: maximum [H], sum of exponentials [H], weighted values [H,V]."""

    highest: jax.Array
    total: jax.Array
    values: jax.Array


def empty_states(p: Program) -> list[State]:
    dtype, value_size = p.spec.state_dtype, p.spec.padded_value
    states = []
    for _, heads in p.spec.groups(p.blocks):
        lead = () if p.blocks.products == "sum" else (power_of_two(heads),)
        highest, total = jnp.full(lead, -jnp.inf, dtype), jnp.zeros(lead, dtype)
        states.append(State(highest, total, jnp.zeros((*lead, value_size), dtype)))
    return states


def column(x: jax.Array) -> jax.Array:
    return x[:, None] if x.ndim else x


def finite(highest: jax.Array) -> jax.Array:
    """0 for the maximum of nothing, so that differences from it stay numbers."""
    return jnp.where(highest == -jnp.inf, 0, highest)


def attend(p: Program, state: State, query, k_SK, v_SV, read_S) -> State:
    """Adds keys and values to the softmax of a group; `read_S` (None: all) says which."""
    dtype = p.spec.state_dtype
    if query.ndim == 1:
        scores = (k_SK.astype(dtype) * query.astype(dtype)[None, :]).sum(1)
    else:
        scores = _dot(p, query.astype(k_SK.dtype), k_SK.T)
    scores = scores * p.spec.scale
    if read_S is not None:
        read_S = jnp.broadcast_to(read_S if query.ndim == 1 else read_S[None, :], scores.shape)
        scores = jnp.where(read_S, scores, -jnp.inf)
    highest = jnp.maximum(state.highest, scores.max(-1))
    base = finite(highest)
    weights = jnp.exp(scores - column(base))
    decay = jnp.exp(state.highest - base)
    if query.ndim == 1:
        added = (weights[:, None] * v_SV.astype(dtype)).sum(0)
    else:
        added = _dot(p, weights.astype(v_SV.dtype), v_SV)
    total = state.total * decay + weights.sum(-1)
    return State(highest, total, state.values * column(decay) + added)


def attend_token(p: Program, state: State, query, k_K, v_V) -> State:
    """Adds this token's own rotated key and value, which are in no ring yet."""
    dtype = p.spec.state_dtype
    k, v = k_K.astype(dtype), v_V.astype(dtype)
    if query.ndim == 2:
        k, v = k[None, :], v[None, :]
    score = (query.astype(dtype) * k).sum(-1) * p.spec.scale
    highest = jnp.maximum(state.highest, score)
    weight, decay = jnp.exp(score - highest), jnp.exp(state.highest - highest)
    values = state.values * column(decay) + column(weight) * v
    return State(highest, state.total * decay + weight, values)


def _dot(p: Program, a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = p.spec.state_dtype
    if p.spec.interpret:  # XLA's CPU backend has no narrow products; widening loses nothing
        a, b = a.astype(dtype), b.astype(dtype)
    # Three TF32 passes stand for float32 on the tensor cores; the default would be a single one.
    triple = a.dtype == jnp.float32 and not p.spec.interpret
    precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if triple else jax.lax.Precision.HIGHEST
    return jnp.dot(a, b, precision=precision, preferred_element_type=dtype)


def slot_share(after_slots: State, after: State) -> jax.Array:
    """The slots' part [H] of the later state's sum of exponentials."""
    return after_slots.total * jnp.exp(after_slots.highest - finite(after.highest))


def store_heads(p: Program, at: Callable, groups: list[jax.Array], values: bool = False) -> None:
    """Stores each group's [H], or [H,V] for `values`, into `at(heads)`: a ref of those rows."""
    value_size, grouped = p.spec.value_size, p.blocks.products == "dot"
    for (r, heads), x in zip(p.spec.groups(p.blocks), groups, strict=True):
        first = p.g * p.spec.heads + r
        target = at(pl.ds(first, x.shape[0]) if grouped else first)
        inside = below(heads, jnp.arange(x.shape[0], dtype=jnp.int32)) if grouped else None
        if values and grouped:
            mask = tile_mask(inside, value_size, x.shape)
        elif values:
            mask = below(value_size, jnp.arange(x.shape[0], dtype=jnp.int32))
        else:
            mask = inside
        plgpu.store(target, x.astype(target.dtype), mask=mask)
