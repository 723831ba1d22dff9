"""Calls whose arrays are cut over mesh axes of type Explicit."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nha_jax.ops.cache import HEAD_AXES
from nha_jax.ops.checks import Call

_ARRAYS = ("q", "k", "v", "log_decay", "rope", "segment_ids", "cache")
_SETTINGS = [f.name for f in dataclasses.fields(Call) if f.name not in (*_ARRAYS, "stack")]


def run_under_auto_axes(run: Callable[[Call], Any], call: Call) -> Any:
    """What an implementation returns, its operations left to the compiler to cut.

    Where an array is cut over an Explicit axis, JAX wants every operation to say how its result is
    cut. Only this function says it: outputs are cut as `q` is, a cache by its rows and heads.

    Args:
      run: an implementation.
      call: for it. Without arrays that are cut over Explicit axes it is run as it is.
    """
    arrays = {name: getattr(call, name) for name in _ARRAYS}
    # The type of an array tells of Explicit axes only.
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(arrays)]
    cut = [sharding for sharding in shardings if any(axes is not None for axes in sharding.spec)]
    if not cut:
        return run(call)
    mesh = cut[0].mesh
    batch, time, heads, _ = jax.typeof(call.q).sharding.spec
    kv_heads = jax.typeof(call.k).sharding.spec[2]

    def of_cache(path: Any, leaf: jax.Array) -> NamedSharding:
        axes = [batch, *[None] * (leaf.ndim - 1)]
        if path[-1].name in HEAD_AXES:
            axes[HEAD_AXES[path[-1].name]] = kv_heads
        return NamedSharding(mesh, PartitionSpec(*axes) if leaf.size else PartitionSpec())

    final = jax.tree_util.tree_map_with_path(of_cache, call.cache) if call.return_cache else None
    rows = NamedSharding(mesh, PartitionSpec(batch, time, heads))
    settings = tuple((name, getattr(call, name)) for name in _SETTINGS)
    return _run(run, settings, (rows, rows, final), arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    run: Callable[[Call], Any],
    settings: tuple[tuple[str, Any], ...],
    out_sharding: Any,
    arrays: Any,
) -> Any:
    mesh = out_sharding[0].mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return jax.sharding.auto_axes(
        lambda arrays: run(Call(**dict(settings), **arrays)),
        axes=tuple(name for name, kind in kinds if kind == AxisType.Explicit),
        out_sharding=out_sharding,
    )(arrays)
