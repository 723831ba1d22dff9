"""What the backward pass computes again of one chunk's slots: probabilities, score gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import gates as decays
from pallas_kernels import slot_tiles, tiles, tokens
from pallas_kernels.gates import Gates
from pallas_kernels.instructions import exp2, fma
from pallas_kernels.slot_tiles import ChunkView, SlotTile
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.tiles import dot, dot_parts
from pallas_kernels.tokens import Rows


class SlotGradients(NamedTuple):
    """Of one head's rows and one tile of slots."""

    p: jax.Array  # [C,M] probabilities
    dz: jax.Array  # [C,M] gradient of the scaled scores
    delta: jax.Array  # [C] as given, or of this tile
    products: jax.Array  # [C,C] q . k of pairs
    value_products: jax.Array  # [C,C] do . v of pairs
    # [C,M] inner product of each row's read with its gradient: what the gates' gradient sums up; of
    # the state alone where the chunk decays strongly, as pairs are then summed apart
    moved: jax.Array
    sums: "Sums"


# A log-sum-exp with which every probability is 0.
_NOTHING = float("inf")


class Head(NamedTuple):
    """What the backward pass reads of one query head's rows."""

    q: tuple  # in parts [C,K]
    do: jax.Array  # [C,V]
    lse: jax.Array  # [C]
    delta: jax.Array  # [C] of the slots' scores


def load_head(spec: Spec, x: Operands, results, cotangents, queries, b, n, rows: Rows) -> Head:
    """Loads head n from the operands, the forward pass's results and the queries' gradients."""
    delta = queries.delta if queries.slot_delta is None else queries.slot_delta
    return Head(
        tiles.load_parts(spec, x.q, b, rows.at, n, rows.loaded),
        tiles.load_features(cotangents.out, b, rows.at, n, spec.value_size, rows.loaded),
        tokens.load_per_row(results.lse, b, n, rows, other=_NOTHING),
        tokens.load_per_row(delta, b, n, rows),
    )


def output_shift(spec: Spec, results, b, n, rows: Rows, do_CV: jax.Array) -> jax.Array:
    """do . o, [C]."""
    out_CV = tiles.load_features(results.out, b, rows.at, n, spec.value_size, rows.loaded)
    return jnp.sum(do_CV.astype(spec.wide) * out_CV.astype(spec.wide), axis=1)


def shifts(results, cotangents, b, n, rows: Rows, delta: jax.Array):
    """What the gradients of the window's and of the slots' scores are shifted by, [C] each.

    `delta` is that without the slot mass's cotangent.
    """
    if cotangents.slot_mass is None:
        return delta, delta
    d_mass, mass = (
        tiles.load(ref, b, rows.at, n, mask=rows.loaded)
        for ref in (cotangents.slot_mass, results.slot_mass)
    )
    delta = delta + d_mass * mass
    return delta, delta - d_mass


class Sums(NamedTuple):
    """Of probabilities p, and of p (do . v), [C] each, over some of what rows read."""

    p: jax.Array
    pu: jax.Array

    @property
    def delta(self) -> jax.Array:
        """do . o, of an output that is not rounded and of probabilities that sum up to 1."""
        return self.pu / jnp.where(self.p > 0, self.p, 1)


def sums(p: jax.Array, u: jax.Array) -> Sums:
    """Over columns."""
    return Sums(jnp.sum(p, axis=1), jnp.sum(p * u, axis=1))


def slot_gradients(
    spec: Spec,
    view: ChunkView,
    first,
    state: SlotTile,
    gates: Gates,
    q: tuple,
    k: tuple,
    do_CV: jax.Array,
    v_CV: jax.Array,
    lse: jax.Array,
    delta: jax.Array | None,
) -> SlotGradients:
    """`z = R(q; H, k)`, `u = R(do; H, v)`, `p = exp(scale z - lse)`, `dz = p (u - delta)`.

    Without a `delta` it is that of this tile, which is all if nothing else is read.
    """
    # In this order, in which few of them are alive at a time.
    products = jnp.where(view.pairs, dot_parts(q, k, spec, "b"), 0)
    z_state = tiles.where(view.has_state, dot_parts(q, state.k, spec, "b"))
    z = decays.read(gates, z_state, products, spec)
    readable = slot_tiles.readable_slots(spec, view, first, state.log_decay.shape[1])
    p = probabilities(spec, z, lse[:, None], readable)

    value_products = jnp.where(view.pairs, dot(do_CV, v_CV, spec, "b"), 0)
    u_state = tiles.where(view.has_state, dot(do_CV, state.v, spec, "b"))
    u = decays.read(gates, u_state, value_products, spec)
    of_tile = sums(p, u)
    if delta is None:
        delta = of_tile.delta
    dz = p * (u - delta[:, None])
    if gates.is_strong:
        moved = gates.rows * (p * u_state + spec.scale * z_state * dz)
    else:
        moved = fma(p, u, spec.scale * z * dz, spec)
    return SlotGradients(p, dz, delta, products, value_products, moved, of_tile)


def probabilities(
    spec: Spec, products: jax.Array, lse: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """2^(scaled products - lse), at most 1 however they were rounded this time; 0 where masked."""
    exponent = fma(products, spec.log2_scale, -lse, spec)
    return tiles.where(mask, exp2(jnp.minimum(exponent, 0), spec))
