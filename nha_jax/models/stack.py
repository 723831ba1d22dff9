"""Runs the layers of a model: loops over stacked parameters, by the plan of `schedule.py`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nha_jax.layers.attention import Projections
from nha_jax.layers.block import Block
from nha_jax.models.config import LayerKind, LayerSpec, Remat
from nha_jax.models.layer import (
    Shared,
    at_layer,
    mean_over_heads,
    rematerialised,
    run_layer,
    run_with_stack,
    whole,
    without_promise,
)
from nha_jax.models.schedule import PeriodicPlan, Run, SwitchPlan, distinct, plan
from nha_jax.models.unstacked import run_each

# Kinds whose layers have all the parameters of the kinds behind them.
_MOST_PARAMETERS_FIRST: tuple[LayerKind, ...] = ("fusion", "nha", "gsa", "full", "swa")


def run_layers(
    blocks: Mapping[LayerKind, Block | Sequence[Block]],
    layers: tuple[LayerSpec, ...],
    x: jax.Array,
    shared: Shared,
    stacks: tuple[Any, ...] | None,
    remat: Remat,
) -> tuple[jax.Array, jax.Array | None, tuple[Any, ...] | None]:
    """Passes the residual stream through all layers.

    Args:
      blocks: for each kind its layers in model order: one block whose parameters are stacked along
        a leading axis, or (in an unstacked model) a block each.
      layers: kind and window of each layer.
      x: residual stream [B,T,D].
      shared: what all layers see.
      stacks: caches of the distinct layers, stacked; None: no caches in or out.
      remat: what the backward pass recomputes.

    Returns:
      The stream after the last layer, slot mass [L,B,T] (or None), and the final caches (or None).
    """
    stacked, each = _sorted_out(blocks)
    if each:
        return run_each(each, layers, x, shared, stacks, remat)
    schedule = plan(layers, with_caches=stacks is not None)
    if isinstance(schedule, PeriodicPlan):
        return _run_periods(stacked, schedule, x, shared, stacks, remat)
    return _run_switch(stacked, schedule, x, shared, stacks, remat)


def _sorted_out(
    blocks: Mapping[LayerKind, Block | Sequence[Block]],
) -> tuple[dict[LayerKind, Block], dict[LayerKind, Sequence[Block]]]:
    """Stacked blocks, and sequences of blocks; a model has either."""
    stacked = {kind: block for kind, block in blocks.items() if isinstance(block, Block)}
    each = {kind: block for kind, block in blocks.items() if not isinstance(block, Block)}
    return stacked, each


def _scanned(step: Callable, carry: Any, inputs: tuple[Any, ...]) -> Any:
    return step(carry, *inputs)


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _run_periods(
    blocks: Mapping[LayerKind, Block],
    schedule: PeriodicPlan,
    x: jax.Array,
    shared: Shared,
    stacks: tuple[Any, ...] | None,
    remat: Remat,
) -> tuple[jax.Array, jax.Array | None, tuple[Any, ...] | None]:
    graphs, states = {}, {}
    for kind, block in blocks.items():
        graphs[kind], states[kind] = nnx.split(block)

    def layer(spec: LayerSpec, x: jax.Array, state: Any, cache: Any) -> tuple[jax.Array, Any]:
        return run_layer(nnx.merge(graphs[spec.kind], state), spec, shared, x, cache)

    def at_place(number: int, carry: Any, state: Any, place: jax.Array) -> tuple[Any, Any]:
        """One layer of a run, `place` among those of its spec; the carry: stream and stack."""
        x, stack = carry
        run = schedule.runs[number]
        in_loop = schedule.periods > 1 or run.length > 1
        step = rematerialised(functools.partial(layer, run.spec), remat, in_loop=in_loop)
        given = None if stacks is None else stacks[number]
        x, stack, mass = run_with_stack(step, x, state, stack, given, place)
        return (x, stack), mass

    def period(carry: tuple[jax.Array, Any], inputs: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        (x, carried), (states, index) = carry, inputs
        carried = list(carried)
        masses = []
        for number, run in enumerate(schedule.runs):
            places = index * run.length + jnp.arange(run.length, dtype=jnp.int32)
            one, mine = functools.partial(at_place, number), (x, carried[number])
            if run.length == 1:
                mine, mass = one(mine, states[number], places[0])
                mass = jax.tree.map(lambda leaf: leaf[None], mass)
            else:
                inputs = (states[number], places)
                mine, mass = lax.scan(functools.partial(_scanned, one), mine, inputs)
            x, carried[number] = mine
            masses.append(mass)
        mass = jnp.concatenate(masses) if shared.collect_slot_mass else None
        return (x, tuple(carried)), mass

    def of_run(run: Run, leaf: jax.Array) -> jax.Array:
        """A parameter's part in a run, by period. Cut out here, not in the loop: what the loop is
        given as it is, the backward pass need not be kept another copy of."""
        each = leaf.shape[0] // schedule.periods
        by_period = leaf.reshape(schedule.periods, each, *leaf.shape[1:])
        if run.length == 1:
            return by_period[:, run.start]
        return by_period[:, run.start : run.start + run.length]

    none = (None,) * len(schedule.runs)
    carry = (x, none if stacks is None else without_promise(stacks))
    of_runs = tuple(
        jax.tree.map(functools.partial(of_run, run), states[run.spec.kind]) for run in schedule.runs
    )
    inputs = (of_runs, jnp.arange(schedule.periods, dtype=jnp.int32))
    if schedule.periods == 1:
        (x, finals), slot_mass = period(carry, _at(inputs, 0))
    else:
        (x, finals), slot_mass = lax.scan(period, carry, inputs)
        if slot_mass is not None:
            slot_mass = slot_mass.reshape(-1, *slot_mass.shape[2:])
    return x, slot_mass, None if stacks is None else finals


def _run_switch(
    blocks: Mapping[LayerKind, Block],
    schedule: SwitchPlan,
    x: jax.Array,
    shared: Shared,
    stacks: tuple[Any, ...] | None,
    remat: Remat,
) -> tuple[jax.Array, jax.Array | None, tuple[Any, ...] | None]:
    graph, state = _union(blocks, schedule)

    def branch(number: int, projections: Projections, place: jax.Array, stacks: Any) -> Any:
        spec = schedule.specs[number]
        stack = None if stacks is None else stacks[number]
        heads, slot_mass, final = blocks[spec.kind].attention.read(
            projections,
            window=spec.window,
            rope=shared.rope,
            segment_ids=shared.segment_ids,
            cache=None if stack is None else at_layer(stack, stack, place),
            return_cache=stack is not None,
        )
        if stacks is not None:
            stacks = (*stacks[:number], whole(final), *stacks[number + 1 :])
        return heads, slot_mass, stacks

    stacks = None if stacks is None else without_promise(stacks)
    branches = [functools.partial(branch, number) for number in range(len(schedule.specs))]

    def layer(x: jax.Array, stacks: Any, state: Any, number: jax.Array, place: jax.Array) -> Any:
        block = nnx.merge(graph, state)

        def read(projections: Projections) -> tuple[Any, Any, Any]:
            return lax.switch(number, branches, projections, place, stacks)

        x, slot_mass, stacks = block(x, read)
        return (x, stacks), mean_over_heads(slot_mass, shared)

    step = rematerialised(layer, remat, in_loop=True)
    numbers = jnp.asarray(schedule.branch, jnp.int32)
    places = jnp.asarray(schedule.place, jnp.int32)
    (x, stacks), slot_mass = lax.scan(
        lambda carry, xs: step(*carry, *xs), (x, stacks), (state, numbers, places)
    )
    return x, slot_mass, stacks


def _union(blocks: Mapping[LayerKind, Block], schedule: SwitchPlan) -> tuple[Any, Any]:
    """One graph that fits every layer, and its parameters stacked in model order.

    With one kind these are its own parameters, untouched. With several, they are put in model order
    (a copy), and a parameter that a kind lacks (a gate, a fusion weight) is zeros that no branch
    reads.
    """
    widest = next(kind for kind in _MOST_PARAMETERS_FIRST if kind in blocks)
    graph, state = nnx.split(blocks[widest])
    if len(blocks) == 1:
        return graph, state
    kinds = [schedule.specs[number].kind for number in schedule.branch]
    starts, count = {}, 0
    for kind in blocks:
        starts[kind], count = count, count + kinds.count(kind)
    order, seen = [], dict.fromkeys(blocks, 0)
    for kind in kinds:
        order.append(starts[kind] + seen[kind])
        seen[kind] += 1

    leaves = {kind: _leaves(nnx.state(block)) for kind, block in blocks.items()}
    paths = jax.tree_util.tree_flatten_with_path(state)
    joined = []
    for path, leaf in paths[0]:
        parts = [
            leaves[kind].get(path, jnp.zeros((kinds.count(kind), *leaf.shape[1:]), leaf.dtype))
            for kind in blocks
        ]
        joined.append(jnp.concatenate(parts)[jnp.asarray(order)])
    return graph, jax.tree.unflatten(paths[1], joined)


def _leaves(state: Any) -> dict[Any, jax.Array]:
    return dict(jax.tree_util.tree_flatten_with_path(state)[0])


def stack_counts(layers: tuple[LayerSpec, ...]) -> dict[LayerSpec, int]:
    """How many layers there are of each distinct one, in order of first appearance."""
    return {spec: layers.count(spec) for spec in distinct(layers)}
