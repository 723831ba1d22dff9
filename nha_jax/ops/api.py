"""The public operator: checks, and dispatch to an implementation by name."""

import dataclasses
import functools
import importlib
import logging
import typing
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nha_jax.ops.cache import Cache
from nha_jax.ops.checks import (
    ArgumentError,
    Call,
    EmptySlots,
    check_call,
    refuse_checked_shards,
)
from nha_jax.ops.cudnn import refusals as cudnn_refusals
from nha_jax.ops.devices import gpu_at_hand, nvidia_compute_capability
from nha_jax.ops.explicit_axes import run_under_auto_axes

logger = logging.getLogger(__name__)

ImplementationName = Literal[
    "reference", "xla", "cudnn", "pallas_triton", "pallas_triton_interpret"
]
Result = tuple[jax.Array, jax.Array, Cache | None]


class Implementation(NamedTuple):
    """How to reach an implementation; loaded on first use, so an unused one costs no import."""

    module: str
    function: str
    # Why this implementation cannot serve a call; empty where it can.
    refusals: Callable[[Call], list[str]]
    # Whether implementation=None may choose it on the devices at hand.
    automatic: Callable[[], bool]

    def load(self) -> Callable[[Call], Result]:
        return getattr(importlib.import_module(self.module), self.function)


def _always() -> bool:
    return True


def _never() -> bool:
    return False


def _serves_all(call: Call) -> list[str]:
    return []


def _triton_refusals(call: Call) -> list[str]:
    """What no GPU could run, or the GPU at hand cannot; without one, it may be made for another."""
    reasons = _interpret_refusals(call)
    if call.q.dtype == jnp.float64:
        reasons.append("float64: it takes bfloat16, float16 and float32")
    if gpu_at_hand() and (nvidia_compute_capability() or 0) < 8:
        reasons.append("the GPU is no NVIDIA GPU of compute capability 8.0 or more")
    return reasons


def _interpret_refusals(call: Call) -> list[str]:
    sizes = {"K": call.q.shape[3], "V": call.v.shape[3], "M": call.log_decay.shape[3]}
    return [f"{name}={size}: it takes at most 256" for name, size in sizes.items() if size > 256]


# In order of preference for implementation=None.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "cudnn": Implementation("nha_jax.ops.cudnn", "cudnn", cudnn_refusals, gpu_at_hand),
    "pallas_triton": Implementation(
        "nha_jax.ops.pallas", "pallas_triton", _triton_refusals, gpu_at_hand
    ),
    "xla": Implementation("nha_jax.ops.xla", "xla", _serves_all, _always),
    "reference": Implementation("nha_jax.ops.reference", "reference", _serves_all, _never),
    "pallas_triton_interpret": Implementation(
        "nha_jax.ops.pallas", "pallas_triton_interpret", _interpret_refusals, _never
    ),
}


@typing.no_type_check  # checked by hand below, with better messages than a type checker's
def native_hybrid_attention(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G M"] | None,
    *,
    window: int,
    slot_lag: int | None = None,
    empty_slots: EmptySlots = "mask",
    rope: tuple[Float[Array, "b T K/2"], Float[Array, "b T K/2"]] | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_slot_mass: bool = False,
    cache: Cache | None = None,
    return_cache: bool = False,
    implementation: ImplementationName | None = None,
) -> Float[Array, "B T N V"] | tuple[jax.Array | Cache, ...]:
    """Linear and full attention in one softmax (arXiv 2510.07019; `docs/operator.md` in full).

    At time t a token reads, in one softmax, the last `window` tokens exactly and `M` slots per
    key/value head that hold everything older: tokens retire into them, `slot_lag` tokens after
    their arrival, by the gated recurrence `S <- diag(alpha) S + (1 - alpha) (x) k` with
    `alpha = exp(log_decay)`. Query head n reads key/value head `n // (N // G)`.

    Args:
      q: queries, unrotated.
      k: keys, unrotated, in q's dtype.
      v: values, in q's dtype.
      log_decay: log forget gates, every entry finite and <= 0, in q's dtype or float32. None: no
        slots.
      window: W >= 0, tokens read exactly, the current one included. 0: gated slot attention; at
        least T: causal softmax attention.
      slot_lag: tokens after which a token retires into the slots, 0 <= lag <= W. None: W, so that
        each past token is counted once.
      empty_slots: until a document's first retirement, "mask" gives slots no probability; "sink"
        reads them as they are (scores of 0 with value 0).
      rope: rotary tables (cos, sin) for the rows of this call; rotates q and k for window scores
        only. The Pallas kernels have no gradient with respect to them, and say so.
      scale: of all scores. None: K ** -0.5.
      segment_ids: int32 >= 0. 0 is padding, skipped as if removed; among other positions a change
        of id starts a new document. None: one document.
      return_slot_mass: also return the probability that went to the slots, [B,T,N], float32
        (float64 for float64 inputs); zeros without slots.
      cache: the state to start from, by `init_cache` or an earlier call. None: the beginning. A
        stack of caches with the layer at hand (`Cache.at_layer`) comes back as a stack.
      return_cache: also return the state after the last token. Without `cache` it has rows for
        max(W, T) tokens; for a window far beyond the text, pass one made for its `max_length`.
      implementation: None picks the first that serves the call and logs the choice once:
        "cudnn" (plain causal attention, from the beginning or of a longer piece behind a cache)
        and "pallas_triton" on NVIDIA GPUs, "xla" elsewhere: the fastest in 16 bits. In float32,
        "xla" trains faster than the kernels (`pallas_kernels/README.md`). A named one that cannot
        serve the call raises. "reference" is the definition read aloud,
        "pallas_triton_interpret" the kernels run as JAX operations on any device, for tests. Under
        differentiation a piece behind a cache runs on "pallas_triton" (or "xla", where that
        refuses) in cuDNN's place.

    Arrays may be cut over batch and heads, over mesh axes of any type; outputs are cut as q is.
    Within `jax.shard_map` (with `check_vma=False`) each call is of the shard alone.

    Returns:
      out [B,T,N,V] in q's dtype, or (out[, slot mass][, cache]) in this order.

    Raises:
      ArgumentError: (a ValueError) a bad argument, by name, with what was expected.
      NotImplementedError: the named implementation cannot serve this call, with the reasons; or the
        call is within a `jax.shard_map` that checks how values vary (`check_vma`).
    """
    stack = None
    if isinstance(cache, Cache) and cache.layer is not None:
        stack, cache = cache, cache.unstacked()
    call = check_call(
        q,
        k,
        v,
        log_decay,
        window=window,
        slot_lag=slot_lag,
        empty_slots=empty_slots,
        rope=rope,
        scale=scale,
        segment_ids=segment_ids,
        cache=cache,
        return_cache=return_cache,
    )
    refuse_checked_shards(call)
    call = dataclasses.replace(call, stack=stack)
    run = choose(call, implementation).load()
    out, slot_mass, final = run_under_auto_axes(run, call)
    if final is not None:
        final = dataclasses.replace(final, is_new=False)
        if stack is not None and final.layer is None:
            final = stack.with_unstacked(final, q.shape[1])
    results = (
        out,
        *((slot_mass,) if return_slot_mass else ()),
        *((final,) if return_cache else ()),
    )
    return results[0] if len(results) == 1 else results


def choose(call: Call, name: str | None) -> Implementation:
    """The implementation to run: the named one or a refusal; for None the first that serves.

    Raises:
      ArgumentError: (a ValueError) there is none of this name.
      NotImplementedError: the named one, or without a name every one, refuses the call: why.
    """
    if name is not None:
        if not isinstance(name, str) or name not in IMPLEMENTATIONS:
            known = ", ".join(repr(known) for known in IMPLEMENTATIONS)
            raise ArgumentError(f"implementation={name!r}: expected None or one of {known}")
        if reasons := IMPLEMENTATIONS[name].refusals(call):
            raise NotImplementedError(f"implementation={name!r}: " + "; ".join(reasons))
        return IMPLEMENTATIONS[name]
    for candidate, implementation in IMPLEMENTATIONS.items():
        if implementation.automatic() and not implementation.refusals(call):
            slower = candidate == "pallas_triton" and call.q.dtype == jnp.float32
            _log_choice(candidate, "; float32 trains faster through 'xla'" if slower else "")
            return implementation
    raise NotImplementedError("no implementation serves this call")


@functools.cache
def _log_choice(name: str, remark: str) -> None:
    logger.info("native_hybrid_attention: implementation=None chose %r%s", name, remark)
