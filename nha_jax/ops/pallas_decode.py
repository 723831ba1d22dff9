"""Joins the decode kernel to the operator: which calls it serves, gradients, vmap."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from nha_jax.ops.cache import Cache
from nha_jax.ops.checks import Call
from pallas_kernels.decode import decode_step
from pallas_kernels.decode_blocks import DecodeBlocks
from pallas_kernels.decode_leaves import Leaves

Result = tuple[jax.Array, jax.Array, Cache]

_LARGEST = 256  # key and value sizes and slots: what fits a program's registers
_MOST_HEADS = 64  # query heads per key/value head, likewise


def serves(call: Call) -> bool:
    """Whether the decode kernel can run this call: one token per row, with a cache in and out."""
    sizes = (call.q.shape[3], call.v.shape[3], call.log_decay.shape[3])
    return (
        call.q.shape[1] == 1
        and call.cache is not None
        and call.return_cache
        and max(sizes) <= _LARGEST
        and call.q.shape[2] // call.k.shape[2] <= _MOST_HEADS
    )


def step(
    call: Call,
    interpret: bool,
    general: Callable[[Call], tuple[jax.Array, jax.Array, Any]],
    blocks: DecodeBlocks | None = None,
) -> Result:
    """Runs a call that `serves`.

    Args:
      call: checked, one token per row, with a cache.
      interpret: run the kernels interpreted, on any device.
      general: an implementation that JAX can differentiate; it runs in the kernel's place where the
        call is differentiated (in reverse; forward mode is not supported).
      blocks: block sizes of the kernels; None: chosen from the shapes.

    Returns:
      Output [B,1,N,V], slot mass [B,1,N], the cache after the token. Under jit with the cache
      donated, slots and rings are updated in place.
    """
    assert call.cache is not None
    arrays = _arrays(call)
    is_float = {name: jnp.issubdtype(x.dtype, jnp.floating) for name, x in arrays.items()}
    floats = {name: x for name, x in arrays.items() if is_float[name]}
    integers = {name: x for name, x in arrays.items() if not is_float[name]}
    kernel = _batched_kernel(call, interpret, blocks)

    @jax.custom_vjp
    def run(floats, integers):
        return kernel({**floats, **integers})

    def forward(floats, integers):
        def differentiable(floats):
            out, slot_mass, cache = general(_with_arrays(call, {**floats, **integers}))
            after = {name: getattr(cache, name) for name in Leaves._fields}
            return (out, slot_mass, {n: x for n, x in after.items() if is_float[n]}), after

        (out, slot_mass, changed), pull_back, after = jax.vjp(differentiable, floats, has_aux=True)
        return (out, slot_mass, Leaves(**{**after, **changed})), pull_back

    def backward(pull_back, cotangents):
        out, slot_mass, leaves = cotangents
        changed = {name: x for name, x in leaves._asdict().items() if is_float[name]}
        return *pull_back((out, slot_mass, changed)), None

    run.defvjp(forward, backward)
    out, slot_mass, leaves = run(floats, integers)
    return out, slot_mass, call.cache.replace(**leaves._asdict())


def _arrays(call: Call) -> dict[str, jax.Array]:
    arrays = {"q": call.q, "k": call.k, "v": call.v, "log_decay": call.log_decay}
    arrays |= {name: getattr(call.cache, name) for name in Leaves._fields}
    if call.rope is not None:
        arrays["cos"], arrays["sin"] = call.rope
    if call.segment_ids is not None:
        arrays["segment_ids"] = call.segment_ids
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def _with_arrays(call: Call, arrays: dict[str, jax.Array]) -> Call:
    assert call.cache is not None
    return dataclasses.replace(
        call,
        q=arrays["q"],
        k=arrays["k"],
        v=arrays["v"],
        log_decay=arrays["log_decay"],
        rope=None if call.rope is None else (arrays["cos"], arrays["sin"]),
        segment_ids=arrays.get("segment_ids"),
        cache=call.cache.replace(**{name: arrays[name] for name in Leaves._fields}),
    )


def _batched_kernel(call: Call, interpret: bool, blocks: DecodeBlocks | None):
    """The kernel on a dict of arrays; a mapped axis becomes part of the batch."""

    @custom_vmap
    def kernel(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, Leaves]:
        rope = (arrays["cos"], arrays["sin"]) if "cos" in arrays else None
        leaves = Leaves(**{name: arrays[name] for name in Leaves._fields})
        return decode_step(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            arrays["log_decay"],
            leaves,
            rope,
            arrays.get("segment_ids"),
            window=call.window,
            slot_lag=call.slot_lag,
            mask_empty=call.empty_slots == "mask",
            scale=call.scale,
            interpret=interpret,
            blocks=blocks,
        )

    @kernel.def_vmap
    def _(size, in_batched, arrays):
        [mapped] = in_batched
        rows = arrays["q"].shape[1 if mapped["q"] else 0]

        def fold(name: str) -> jax.Array:
            x = arrays[name]
            shared = name in ("cos", "sin") and not mapped[name] and x.shape[0] == 1
            if shared:
                return x
            if not mapped[name]:
                x = jnp.broadcast_to(x, (size, *x.shape))
            x = jnp.broadcast_to(x, (size, rows, *x.shape[2:]))  # a table for all rows: for each
            return x.reshape(size * rows, *x.shape[2:])

        results = kernel({name: fold(name) for name in arrays})
        unfolded = jax.tree.map(lambda x: x.reshape(size, rows, *x.shape[1:]), results)
        return unfolded, jax.tree.map(lambda _: True, unfolded)

    return kernel
