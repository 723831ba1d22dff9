"""The token of a decode step: its own vectors. Suffixes and groups as in `decode_load`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.decode_blocks import power_of_two
from pallas_kernels.decode_load import Program, below, vector


class Token(NamedTuple):
    """The token's own vectors, loaded once, before anything waits."""

    # From the turn of a loop over tiles to the queries of each group, [H,K].
    plain: Callable[[Any], list[jax.Array]]  # for the slots
    rotated: Callable[[Any], list[jax.Array]]  # for the window
    k: jax.Array  # [K], rotated
    v: jax.Array  # [V]
    pending_k: Any  # [K], not rotated; None where no token waits to retire
    log_decay: Any  # [M]; likewise


def load_token(p: Program) -> Token:
    spec, refs = p.spec, p.refs

    def of_head(ref, size: int, rope: bool = False) -> jax.Array:
        return vector(p, ref, p.b, 0, p.g, size=size, rope=rope)

    return Token(
        plain=queries_in_turn(p, rope=False),
        rotated=queries_in_turn(p, rope=True),
        k=of_head(refs.k, spec.key_size, rope=True),
        v=of_head(refs.v, spec.value_size),
        pending_k=of_head(refs.k, spec.key_size) if spec.pending else None,
        log_decay=of_head(refs.log_decay, spec.num_slots) if spec.pending else None,
    )


def queries(p: Program, rope: bool, turn: Any = None) -> list[jax.Array]:
    """The queries of each group, [H,K]; rotated ones are for the window.

    With the turn of a loop they are loaded in it: no compiler moves that out.
    """
    first_head = p.g * p.spec.heads
    if turn is not None:
        first_head += jnp.minimum(p.here + turn, 0)  # 0, which no compiler knows
    load_heads = partial(vector, p, p.refs.q, p.b, 0, size=p.spec.key_size, rope=rope)
    found = []
    for r, heads in p.spec.groups(p.blocks):
        first = first_head + r
        if p.blocks.products == "sum":
            found.append(load_heads(first))
            continue
        r_H1 = jnp.arange(power_of_two(heads), dtype=jnp.int32)[:, None]
        mask = below(heads, r_H1)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (r_H1.shape[0], p.spec.padded_key))
        found.append(load_heads(first + r_H1, mask=mask))
    return found


def queries_in_turn(p: Program, rope: bool) -> Callable[[Any], list[jax.Array]]:
    """From the turn of a loop over tiles to `queries`: the same ones unless heads are split.

    Those of several products would fill the shared memory if they were kept.
    """
    if p.blocks.products == "dot" and len(p.spec.groups(p.blocks)) > 1:
        return lambda i: queries(p, rope, turn=i)
    kept = queries(p, rope)
    return lambda i: kept
