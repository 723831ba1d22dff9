"""Joins the decode kernel to the operator: which calls it serves, gradients, vmap."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nha_jax.ops.cache import Cache
from nha_jax.ops.checks import Call
from pallas_kernels.decode import decode_step
from pallas_kernels.decode_blocks import MOST_HEADS, DecodeBlocks
from pallas_kernels.decode_leaves import Leaves
from pallas_kernels.distribute import distribute

Result = tuple[jax.Array, jax.Array, Cache]

_LARGEST = 256  # key and value sizes and slots: what fits a program's registers


def serves(call: Call) -> bool:
    """Whether the decode kernel can run this call: one token per row, with a cache in and out.

    Others run the chunkwise kernels, which copy the cache's rings.
    """
    sizes = (call.q.shape[3], call.v.shape[3], call.log_decay.shape[3])
    return (
        call.q.shape[1] == 1
        and call.cache is not None
        and call.return_cache
        and max(sizes) <= _LARGEST
        and call.q.shape[2] // call.k.shape[2] <= MOST_HEADS
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
    arrays = _arrays(call)
    is_float = {name: jnp.issubdtype(x.dtype, jnp.floating) for name, x in arrays.items()}
    floats = {name: x for name, x in arrays.items() if is_float[name]}
    integers = {name: x for name, x in arrays.items() if not is_float[name]}
    kernel = _distributed_kernel(call, interpret, blocks)

    @jax.custom_vjp
    def run(floats, integers):
        return kernel({**floats, **integers})

    def forward(floats, integers):
        # Rotary tables that nobody differentiates are no reason for a refusal.
        moves = {name: x.value for name, x in floats.items() if x.perturbed}
        rest = {name: x.value for name, x in {**floats, **integers}.items()}

        def differentiable(moves):
            here = _with_arrays(call, {**rest, **moves})
            out, slot_mass, cache = general(here)
            if here.stack is not None:
                cache = here.stack.with_unstacked(cache, 1)
            after = {name: getattr(cache, name) for name in Leaves._fields}
            return (out, slot_mass, {n: x for n, x in after.items() if is_float[n]}), after

        (out, slot_mass, changed), pull_back, after = jax.vjp(differentiable, moves, has_aux=True)
        return (out, slot_mass, Leaves(**{**after, **changed})), pull_back

    def backward(pull_back, cotangents):
        out, slot_mass, leaves = (_instantiated(x) for x in cotangents)
        changed = {name: x for name, x in leaves._asdict().items() if is_float[name]}
        (gradients,) = pull_back((out, slot_mass, changed))
        return {name: gradients.get(name) for name in floats}, None

    run.defvjp(forward, backward, symbolic_zeros=True)
    out, slot_mass, leaves = run(floats, integers)
    return out, slot_mass, _leaves_of(call).replace(**leaves._asdict())


def _instantiated(cotangents: Any) -> Any:
    zero = jax.custom_derivatives.SymbolicZero

    def one(x):
        return jnp.zeros(x.shape, x.dtype) if type(x) is zero else x

    return jax.tree.map(one, cotangents, is_leaf=lambda x: type(x) is zero)


def _arrays(call: Call) -> dict[str, jax.Array]:
    arrays = {"q": call.q, "k": call.k, "v": call.v, "log_decay": call.log_decay}
    arrays |= {name: getattr(_leaves_of(call), name) for name in Leaves._fields}
    if call.stack is not None:
        arrays["layer"] = jnp.reshape(call.stack.layer, (1,)).astype(jnp.int32)
    if call.rope is not None:
        arrays["cos"], arrays["sin"] = call.rope
    if call.segment_ids is not None:
        arrays["segment_ids"] = call.segment_ids
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def _leaves_of(call: Call) -> Cache:
    cache = call.cache if call.stack is None else call.stack
    assert cache is not None
    return cache


def _with_arrays(call: Call, arrays: dict[str, jax.Array]) -> Call:
    cache = _leaves_of(call).replace(**{name: arrays[name] for name in Leaves._fields})
    stack = None
    if call.stack is not None:
        stack = cache
        cache = stack.unstacked()
    return dataclasses.replace(
        call,
        q=arrays["q"],
        k=arrays["k"],
        v=arrays["v"],
        log_decay=arrays["log_decay"],
        rope=None if call.rope is None else (arrays["cos"], arrays["sin"]),
        segment_ids=arrays.get("segment_ids"),
        cache=cache,
        stack=stack,
    )


def _distributed_kernel(call: Call, interpret: bool, blocks: DecodeBlocks | None):
    """The kernel on a dict of arrays, under `jax.vmap` and on a mesh, too."""

    def run(q, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, Leaves]:
        rope = (arrays["cos"], arrays["sin"]) if "cos" in arrays else None
        leaves = Leaves(**{name: arrays[name] for name in Leaves._fields})
        return decode_step(
            q,
            arrays["k"],
            arrays["v"],
            arrays["log_decay"],
            leaves,
            rope,
            arrays.get("segment_ids"),
            arrays.get("layer"),
            window=call.window,
            slot_lag=call.slot_lag,
            mask_empty=call.empty_slots == "mask",
            scale=call.scale,
            interpret=interpret,
            blocks=blocks,
        )

    def kernel(arrays: dict[str, jax.Array]):
        rest = {name: x for name, x in arrays.items() if name != "q"}
        leading = "" if call.stack is None else "l"
        dims = {name: _DIMS[name] for name in rest}
        dims |= {name: leading + _DIMS[name] for name in Leaves._fields}
        results: Any = ("btnv", "btn", Leaves._make(dims[name] for name in Leaves._fields))
        return distribute(run, ("btnk", dims), results)(arrays["q"], rest)

    return kernel


# Letters of `distribute`: b batch (B: or 1), n query heads, g key/value heads.
_DIMS = {
    "k": "btgk",
    "v": "btgv",
    "log_decay": "btgm",
    "slots_k": "bgmk",
    "slots_v": "bgmv",
    "slots_empty": "b",
    "window_k": "bsgk",
    "window_v": "bsgv",
    "pending_k": "bsgk",
    "pending_log_decay": "bsgm",
    "length": "b",
    "segment_id": "b",
    "segment_length": "b",
    "cos": "Btk",
    "sin": "Btk",
    "segment_ids": "bt",
    "layer": "B",
}
