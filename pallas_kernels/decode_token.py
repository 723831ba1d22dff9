"""The token of a decode step: its own vectors. Suffixes and groups as in `decode_load`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.decode_blocks import power_of_two
from pallas_kernels.decode_load import Program, below, vector


class Token(NamedTuple):
    """The token's own vectors, loaded once, before anything waits."""

    plain: list[jax.Array]  # queries of each group, [H,K], for the slots; rotated for the window
    rotated: list[jax.Array]
    k: jax.Array  # [K], rotated
    v: jax.Array  # [V]
    pending_k: Any  # [K], not rotated; None where no token waits to retire
    log_decay: Any  # [M]; likewise


def load_token(p: Program) -> Token:
    spec, refs = p.spec, p.refs

    def of_head(ref, size: int, rope: bool = False) -> jax.Array:
        return vector(p, ref, p.b, 0, p.g, size=size, rope=rope)

    return Token(
        plain=queries(p, rope=False) if spec.num_slots else [],
        rotated=queries(p, rope=True) if spec.window else [],
        k=of_head(refs.k, spec.key_size, rope=True),
        v=of_head(refs.v, spec.value_size),
        pending_k=of_head(refs.k, spec.key_size) if spec.pending else None,
        log_decay=of_head(refs.log_decay, spec.num_slots) if spec.pending else None,
    )


def queries(p: Program, rope: bool) -> list[jax.Array]:
    """The queries of each group, [H,K]; rotated ones are for the window."""
    first, heads, size = p.g * p.spec.heads, p.spec.heads, p.spec.key_size
    if p.blocks.products == "sum":
        return [vector(p, p.refs.q, p.b, 0, first + r, size=size, rope=rope) for r in range(heads)]
    r_H1 = jnp.arange(power_of_two(heads), dtype=jnp.int32)[:, None]
    mask = below(heads, r_H1)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (r_H1.shape[0], p.spec.padded_key))
    return [vector(p, p.refs.q, p.b, 0, first + r_H1, size=size, rope=rope, mask=mask)]
