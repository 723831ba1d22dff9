"""Kernels under `jax.vmap` and on a mesh.

A mapped axis joins the batch, and each device runs its own shard: every array of a call has a batch
axis, and most a head axis, and nothing crosses either. Heads are cut between groups: over as many
mesh axes of the query's, from the first on, as divide the key/value heads. Dimensions are named by
letters: b batch (B: of size 1 where all rows agree), n query heads, g key/value heads, n = g r; any
other letter is one that every device holds whole.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def distribute(function: Callable[..., Any], in_dims: Any, out_dims: Any) -> Callable[..., Any]:
    """`function` of arrays to arrays, sharded over batch and heads as its operands are.

    Args:
      function: takes pytrees of arrays, of any number of rows and heads. The first array has b,
        and n where any array has heads.
      in_dims: the arguments' trees with a string of letters for each array, None where there is
        none.
      out_dims: likewise for the result.

    Returns:
      A function of the same arguments. Differentiating it raises `NotImplementedError`: it is what
      gradients are made of.
    """
    shared, in_tree = jax.tree.flatten(in_dims)
    ins = [d.lower() for d in shared]
    outs, out_tree = jax.tree.flatten(out_dims)

    def flat(*arrays):
        results = function(*jax.tree.unflatten(in_tree, arrays))
        leaves, tree = jax.tree.flatten(results)
        assert tree == out_tree, (tree, out_tree)
        return tuple(leaves)

    def run(*args):
        arrays, tree = jax.tree.flatten(args)
        assert tree == in_tree, (tree, in_tree)
        rows = _rows(arrays, ins)
        call = _undifferentiated(_batched(flat, shared, outs, rows))
        return jax.tree.unflatten(out_tree, call(*arrays))

    return run


def _undifferentiated(function):
    call = jax.custom_jvp(function)

    @call.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            "the Pallas kernels have no second derivatives: use implementation='xla'"
        )

    return call


def _rows(arrays, ins: list[str]) -> int:
    return max(a.shape[d.index("b")] for a, d in zip(arrays, ins, strict=True))


def _batched(function, ins: list[str], outs: list[str], rows: int):
    """Folds an axis of `jax.vmap` into the batch."""

    @custom_vmap
    def call(*arrays):
        return _partitioned(function, arrays, [d.lower() for d in ins], outs)(*arrays)

    @call.def_vmap
    def _(size, in_batched, *arrays):
        def fold(x, letters, is_batched):
            at = letters.lower().index("b")
            if not is_batched:
                if x.shape[at] == 1 and letters[at] == "B":
                    return x
                x = jnp.broadcast_to(x, (size, *x.shape))
            x = jnp.moveaxis(x, 0, at)
            before, after = x.shape[:at], x.shape[at + 2 :]
            x = jnp.broadcast_to(x, (*before, size, rows, *after))
            return x.reshape(*before, size * rows, *after)

        def unfold(y, letters):
            at = letters.index("b")
            y = y.reshape(*y.shape[:at], size, rows, *y.shape[at + 1 :])
            return jnp.moveaxis(y, at, 0)

        folded = map(fold, arrays, ins, in_batched)
        results = _batched(function, ins, outs, size * rows)(*folded)
        return tuple(map(unfold, results, outs)), (True,) * len(results)

    return call


def _partitioned(function, arrays, ins: list[str], outs: list[str]):
    """Runs each device's shard of these arrays; a batch of one row is held whole."""
    rows = _rows(arrays, ins)
    outs = outs if rows > 1 else [d.replace("b", "1") for d in outs]
    ins = [
        d if a.shape[d.index("b")] > 1 else d.replace("b", "1")
        for a, d in zip(arrays, ins, strict=True)
    ]
    # A rule for devices cannot be lowered without devices, so one device gets none: programs for a
    # GPU that is not there are lowered under an abstract mesh of one.
    mesh = jax.sharding.get_abstract_mesh()
    if jax.device_count() == 1 or (not mesh.empty and mesh.size == 1):
        return function
    with_heads = "n" in ins[0]
    kv_heads = next(
        (a.shape[d.index("g")] for a, d in zip(arrays, ins, strict=True) if "g" in d), 1
    )

    def specs(mesh, first):
        """Of all arrays, from that of the first: its batch and head axes; the rest is whole."""
        first = (*first, None, None, None, None)
        n = _whole_groups(mesh, first[ins[0].index("n")], kv_heads) if with_heads else None
        axes = {"b": first[0] if ins[0][0] == "b" else None, "n": n, "g": n}
        return tuple(tuple(PartitionSpec(*map(axes.get, d)) for d in dims) for dims in (ins, outs))

    sharding = jax.typeof(arrays[0]).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        arguments, results = specs(sharding.mesh, sharding.spec)

        def on_shards(*args):
            args = [
                jax.reshard(x, NamedSharding(sharding.mesh, spec))
                for x, spec in zip(args, arguments, strict=True)
            ]
            return jax.shard_map(
                function, mesh=sharding.mesh, in_specs=arguments, out_specs=results, check_vma=False
            )(*args)

        return on_shards

    if mesh.manual_axes:
        return _within_shards(function, mesh)
    call = custom_partitioning(function)

    def shardings(mesh, first):
        return tuple(
            tuple(NamedSharding(mesh, s) for s in side) for side in specs(mesh, first.spec)
        )

    def infer(mesh, arg_shapes, result_shape):
        return shardings(mesh, arg_shapes[0].sharding)[1]

    def partition(mesh, arg_shapes, result_shape):
        arguments, results = shardings(mesh, arg_shapes[0].sharding)
        return mesh, function, results, arguments

    def rule(*_):
        # Query heads are no factor of key/value heads: an axis that does not divide both would be
        # split in a way that `partition` cannot be told of.
        whole: list[str] = []

        def factors(letters: str) -> str:
            names = []
            for letter in letters:
                if letter not in "bng":
                    whole.append(f"x{len(whole)}")
                names.append(letter if letter in "bng" else whole[-1])
            return " ".join(names)

        sides = [", ".join(map(factors, dims)) for dims in (ins, outs)]
        return " -> ".join(sides), {"need_replication_factors": tuple(whole)}

    call.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return call


def _within_shards(function, mesh):
    """For arrays that `jax.shard_map` has cut already, over all axes of the mesh."""
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Auto and mesh.shape[name] > 1:
            raise NotImplementedError(
                "the Pallas kernels run under jax.shard_map over all axes of the mesh: its "
                f"axis_names leave out {name!r}"
            )
    return function


def _whole_groups(mesh, axes, kv_heads: int):
    """The longest head of mesh axes whose product divides the key/value heads; None: no axis."""
    kept: list[str] = []
    for axis in axes if isinstance(axes, tuple) else () if axes is None else (axes,):
        if kv_heads % math.prod(mesh.shape[name] for name in (*kept, axis)):
            break
        kept.append(axis)
    return tuple(kept) or None
