"""Layers with arrays of their own, one after another: how a model reads fastest.

A loop over stacked parameters takes a slice of each before it multiplies, and XLA on GPUs writes
that slice to memory and reads it again: three times the traffic of a weight, which is all the time
that decoding takes. Training keeps the stacks: there the products cost far more than the slices,
and one layer compiles faster than all.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nha_jax.layers.block import Block
from nha_jax.models.cache import each_cache
from nha_jax.models.config import LayerKind, LayerSpec, Remat
from nha_jax.models.layer import Shared, rematerialised, run_layer, run_with_stack, without_promise
from nha_jax.models.schedule import distinct
from nha_jax.ops import Cache


def run_each(
    blocks: Mapping[LayerKind, Sequence[Block]],
    layers: tuple[LayerSpec, ...],
    x: jax.Array,
    shared: Shared,
    stacks: tuple[Any, ...] | None,
    remat: Remat,
) -> tuple[jax.Array, jax.Array | None, tuple[Any, ...] | None]:
    """As `run_layers`, for blocks of which each layer has its own."""
    specs = distinct(layers)
    carried: list[Any] = [None] * len(specs)
    if stacks is not None:
        carried = [each_cache(_with_common_counters, s) for s in without_promise(stacks)]
    before = list(carried)
    of_kind: collections.Counter = collections.Counter()
    of_spec: collections.Counter = collections.Counter()
    steps: dict[LayerSpec, Any] = {}
    masses = []
    for spec in layers:
        number, place = specs.index(spec), of_spec[spec]
        graph, state = nnx.split(blocks[spec.kind][of_kind[spec.kind]])
        of_kind[spec.kind] += 1
        of_spec[spec] += 1
        if spec not in steps:
            given = None if stacks is None else stacks[number]
            steps[spec] = _step(graph, spec, shared, remat, given)
        x, stack, mass = steps[spec](x, state, carried[number], jnp.int32(place))
        masses.append(mass)
        if stack is not None:
            last = place if of_spec[spec] == layers.count(spec) else None
            finish = functools.partial(_with_counters, last)
            carried[number] = each_cache(finish, stack, before[number])
    slot_mass = jnp.stack(masses) if shared.collect_slot_mass else None
    return x, slot_mass, None if stacks is None else tuple(carried)


def _step(graph: Any, spec: LayerSpec, shared: Shared, remat: Remat, given: Any) -> Any:
    """A layer with its part of a stack, as a function that equal layers are traced with once."""

    def layer(x: jax.Array, state: Any, cache: Any) -> tuple[jax.Array, Any]:
        return run_layer(nnx.merge(graph, state), spec, shared, x, cache)

    def step(x: jax.Array, state: Any, stack: Any, place: jax.Array) -> Any:
        return run_with_stack(rematerialised(layer, remat), x, state, stack, given, place)

    return jax.jit(step)


# Every layer counts the same tokens. Counted once, they are not the smallest kernels of each.
_COUNTERS = ("length", "segment_id", "segment_length")


def _with_common_counters(stack: Cache) -> Cache:
    """All layers' counters are those of the first."""
    return stack.replace(**_broadcast(stack, 0))


def _with_counters(last: Any, stack: Cache, before: Cache) -> Cache:
    """Behind the last layer the counters that it left; behind the others those before the call."""
    if last is not None:
        return stack.replace(**_broadcast(stack, last))
    return stack.replace(**{name: getattr(before, name) for name in _COUNTERS})


def _broadcast(stack: Cache, layer: Any) -> dict[str, jax.Array]:
    counters = {name: getattr(stack, name) for name in _COUNTERS}
    return {name: jnp.broadcast_to(x[layer], x.shape) for name, x in counters.items()}


def unstack_block(block: Block) -> nnx.List:
    """The layers of a stacked block, each with its own arrays; the stacked arrays are let go."""
    graph, state = nnx.split(block)
    for path, _ in nnx.to_flat_state(state):
        # Out of the module, not out of the variable, which others may hold.
        owner: Any = block
        for name in path[:-1]:
            owner = getattr(owner, str(name))
        delattr(owner, str(path[-1]))
    leaves, tree = jax.tree.flatten(state)
    del state
    parts = []
    while leaves:
        # One stack after another, so that only one is there twice.
        parts.append(jax.block_until_ready(_parts(leaves.pop())))
    layers = []
    for of_layer in zip(*reversed(parts), strict=True):
        layer = nnx.merge(graph, jax.tree.unflatten(tree, list(of_layer)))
        for _, parameter in nnx.iter_graph(layer):
            if isinstance(parameter, nnx.Param):
                names = parameter.get_metadata("logical_axes")
                parameter.set_metadata(logical_axes=names[1:])
        layers.append(layer)
    return nnx.List(layers)


def _parts(leaf: jax.Array) -> tuple[jax.Array, ...]:
    sharding = None if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    else:
        sharding = None
    return jax.jit(tuple, out_shardings=sharding)(leaf)
