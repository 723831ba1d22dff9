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
import numpy as np
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
        again = rematerialised(layer, remat, in_loop=False)
        return run_with_stack(again, x, state, stack, given, place)

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


class _Stack:
    """A stacked parameter in its block.

    Attributes:
      kind: of the block.
      path: of the parameter in the block.
      name: of the parameter, for messages.
      size: bytes of the stack.
    """

    def __init__(self, kind: LayerKind, block: Block, path: tuple[Any, ...], layers: int) -> None:
        self.kind, self.path = kind, path
        self.name = ".".join(map(str, ("blocks", kind, *path)))
        self._owner: Any = block
        for name in path[:-1]:
            self._owner = getattr(self._owner, str(name))
        self._attribute = str(path[-1])
        stack = self._stack()
        _check_stack(self.name, stack, layers)
        self.size = stack.size * stack.dtype.itemsize
        sharding = None if isinstance(stack, jax.core.Tracer) else getattr(stack, "sharding", None)
        self._sharding = sharding if isinstance(sharding, NamedSharding) else None
        # Without an array: one that is held here would not be let go.
        self._empty = getattr(self._owner, self._attribute).replace(None)

    def parts(self) -> tuple[jax.Array, ...]:
        """The layers' parts of the stack, in memory of the same kind."""
        sharding = self._sharding
        if sharding is not None:
            spec = PartitionSpec(*sharding.spec[1:])
            sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
        return jax.block_until_ready(jax.jit(tuple, out_shardings=sharding)(self._stack()))

    def let_go(self) -> None:
        """Takes the stack out of the module; not out of the variable, which others may hold."""
        delattr(self._owner, self._attribute)

    def put_back(self, parts: tuple[jax.Array, ...]) -> None:
        """Stacks the parts again, into the module."""
        stack = jax.jit(lambda *parts: jnp.stack(parts), out_shardings=self._sharding)(*parts)
        setattr(self._owner, self._attribute, self.variable(jax.block_until_ready(stack)))

    def variable(self, value: jax.Array) -> Any:
        """Such a parameter with this value."""
        return self._empty.replace(value)

    def _stack(self) -> Any:
        return getattr(self._owner, self._attribute).get_value()


def unstack_blocks(
    blocks: Mapping[LayerKind, Block], layers: tuple[LayerSpec, ...]
) -> dict[LayerKind, nnx.List]:
    """The layers of stacked blocks, each with its own arrays; the stacked arrays are let go.

    One stack is split after another, so that only one is in memory twice. The largest is first:
    where it finds room the others do, and where it finds none the blocks are as they were. Should
    a later one fail, those before it are stacked again, for which the same room is enough.

    Args:
      blocks: for each kind all its layers, stacked.
      layers: of the model.

    Returns:
      For each kind its layers in model order.

    Raises:
      ValueError: a parameter that cannot be split, by name; nothing was changed.
    """
    kinds = [layer.kind for layer in layers]
    stacks = [
        _Stack(kind, block, path, kinds.count(kind))
        for kind, block in blocks.items()
        # Not of a flat state: making one leaves a cycle behind that holds all stacks until a
        # garbage collection.
        for path, node in nnx.iter_graph(block)
        if isinstance(node, nnx.Variable)
    ]
    graphs = {kind: nnx.split(block)[0] for kind, block in blocks.items()}
    split: list[tuple[_Stack, tuple[jax.Array, ...]]] = []
    try:
        for stack in sorted(stacks, key=lambda stack: stack.size, reverse=True):
            split.append((stack, stack.parts()))
            stack.let_go()
        return {kind: _layers(graph, kind, split) for kind, graph in graphs.items()}
    except BaseException:  # Ctrl-C, too
        while split:
            stack, parts = split.pop()
            stack.put_back(parts)
        raise


def _layers(
    graph: Any, kind: LayerKind, split: Sequence[tuple[_Stack, tuple[jax.Array, ...]]]
) -> nnx.List:
    """The layers of a kind, made of their parts."""
    mine = [(stack, parts) for stack, parts in split if stack.kind == kind]
    layers = []
    for number in range(len(mine[0][1])):
        values = {stack.path: stack.variable(parts[number]) for stack, parts in mine}
        layer = nnx.merge(graph, nnx.State.from_flat_path(values))
        for _, parameter in nnx.iter_graph(layer):
            if isinstance(parameter, nnx.Param):
                names = parameter.get_metadata("logical_axes")
                parameter.set_metadata(logical_axes=names[1:])
        layers.append(layer)
    return nnx.List(layers)


def _check_stack(name: str, stack: Any, layers: int) -> None:
    if isinstance(stack, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{name} is a shape without an array: an abstract model has nothing to unstack; give "
            f"it its parameters first, or unstack inside of the nnx.eval_shape that makes it"
        )
    if not isinstance(stack, (jax.Array, np.ndarray)):
        raise ValueError(f"{name} is a {type(stack).__name__}: expected an array")
    if not isinstance(stack, (jax.core.Tracer, np.ndarray)) and stack.is_deleted():
        raise ValueError(f"{name} was deleted or donated: expected an array that is still there")
    if stack.shape[:1] != (layers,):
        raise ValueError(f"{name} has shape {stack.shape}: expected {layers} layers in front")
