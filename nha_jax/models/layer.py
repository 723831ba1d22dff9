"""One layer's call, whatever loop it stands in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.layers.attention import Projections
from nha_jax.layers.block import Block
from nha_jax.layers.feature_map import RopeTables
from nha_jax.models.cache import each_cache
from nha_jax.models.config import LayerSpec, Remat
from nha_jax.ops import Cache


class Shared(NamedTuple):
    """What all layers of a call see."""

    rope: RopeTables | None
    segment_ids: jax.Array | None
    collect_slot_mass: bool


def run_layer(
    block: Block, spec: LayerSpec, shared: Shared, x: jax.Array, cache: Any
) -> tuple[jax.Array, tuple[jax.Array | None, Any]]:
    """The residual stream behind a layer; its slot mass, mean over heads; its final cache."""

    def read(projections: Projections) -> tuple[Any, Any, Any]:
        return block.attention.read(
            projections,
            window=spec.window,
            rope=shared.rope,
            segment_ids=shared.segment_ids,
            cache=cache,
            return_cache=cache is not None,
        )

    x, slot_mass, cache = block(x, read)
    return x, (mean_over_heads(slot_mass, shared), cache)


def run_with_stack(
    step: Callable[..., Any], x: jax.Array, state: Any, stack: Any, given: Any, place: Any
) -> tuple[jax.Array, Any, jax.Array | None]:
    """A layer whose cache is part of a stack.

    Args:
      step: `(x, state, cache)` to the results of `run_layer`.
      x: residual stream [B,T,D].
      state: of the layer.
      stack: caches of all layers with this one's spec; None: no cache.
      given: the stack as the caller of all layers gave it, with its promises.
      place: of the layer in the stack, int32 [].

    Returns:
      The stream, the stack after the layer, slot mass.
    """
    if stack is None:
        x, (mass, _) = step(x, state, None)
        return x, None, mass
    # Read and written where it lies: a loop over the stack's layers would make another one.
    here = at_layer(stack, given, place)
    tokens = x.shape[1]
    if tokens == 1:
        x, (mass, final) = step(x, state, here)
        return x, whole(final), mass
    # Longer calls replace a layer's cache whole. They do so out here, since a backward pass
    # keeps what a rematerialised layer was given: of its cache alone, not of the whole stack.
    x, (mass, final) = step(x, state, each_cache(Cache.unstacked, here))
    stack = each_cache(lambda to, new: to.with_unstacked(new, tokens), here, final)
    return x, whole(stack), mass


def rematerialised(layer: Callable, remat: Remat, *, in_loop: bool) -> Callable:
    """A layer of which the backward pass recomputes what the policy says.

    Args:
      layer: to be differentiated.
      remat: the policy.
      in_loop: whether the call stands in a loop over layers of more than one turn.
    """
    if remat == "none":
        return layer
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Forward and backward pass of a loop are two loops, which XLA does not merge. Elsewhere it
    # finds that the recomputed values are those of the forward pass, and keeps these instead.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not in_loop)


def mean_over_heads(slot_mass: jax.Array, shared: Shared) -> jax.Array | None:
    return slot_mass.mean(-1).astype(jnp.float32) if shared.collect_slot_mass else None


def without_promise(stacks: Any) -> Any:
    """What a loop carries keeps its form, and a layer's cache is new only until its call."""
    return each_cache(lambda cache: cache.replace(is_new=False), stacks)


def at_layer(stack: Any, given: Any, place: Any) -> Any:
    """The stack for a call of one layer, with the promise that came with it."""
    return each_cache(
        lambda whole, cache: whole.replace(layer=place, is_new=cache.is_new), stack, given
    )


def whole(stack: Any) -> Any:
    """The stack without a layer at hand."""
    return each_cache(lambda cache: cache.at_layer(None), stack)
