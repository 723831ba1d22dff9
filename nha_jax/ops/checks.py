"""Argument checks of the operator: every bad call is an error that names the argument."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from nha_jax.ops.cache import Cache

EmptySlots = Literal["mask", "sink"]

# Of queries, keys and values.
DTYPES = tuple(jnp.dtype(x) for x in ("bfloat16", "float16", "float32", "float64"))
DTYPE_NAMES = ", ".join(dtype.name for dtype in DTYPES)

INT32_MAX = int(np.iinfo(np.int32).max)


class ArgumentError(ValueError, TypeError):
    """A call with a bad argument: the message holds its name, what was found and what was expected.

    Both a `ValueError` and a `TypeError`, since a wrong dtype is as much one as the other.
    """


@dataclasses.dataclass(frozen=True)
class Call:
    """One checked call, defaults resolved: what every implementation receives."""

    q: jax.Array  # [B,T,N,K]
    k: jax.Array  # [B,T,G,K]
    v: jax.Array  # [B,T,G,V]
    log_decay: jax.Array  # [B,T,G,M]; M = 0 without slots
    window: int
    slot_lag: int
    empty_slots: EmptySlots
    rope: tuple[jax.Array, jax.Array] | None
    scale: float
    segment_ids: jax.Array | None
    cache: "Cache | None"
    return_cache: bool
    stack: "Cache | None" = None  # of which `cache` is the layer at hand

    @property
    def state_dtype(self) -> jnp.dtype:
        """Of gates, softmax, accumulation and slots: float32, or float64 for float64 inputs."""
        return jnp.promote_types(self.q.dtype, jnp.float32)

    @property
    def reads_slots(self) -> bool:
        """Whether slots may hold something, or are read empty; else they get no probability."""
        # From the beginning, no token of a call that is no longer than the lag retires.
        may_hold = self.cache is not None or self.slot_lag < self.q.shape[1]
        return self.log_decay.shape[3] > 0 and (may_hold or self.empty_slots == "sink")


def resolve_slot_lag(window: Any, slot_lag: Any, num_slots: int) -> int:
    """Checks `window` and `slot_lag` against each other; returns the lag (default: the window).

    Raises:
      ArgumentError: one of them is no such number, or there is nothing to attend to.
    """
    if not isinstance(window, int | np.integer) or isinstance(window, bool) or window < 0:
        raise ArgumentError(f"window={window!r}: expected an int of at least 0")
    if window > INT32_MAX:
        raise ArgumentError(
            f"window={window}: expected at most {INT32_MAX}, as positions are int32"
        )
    if slot_lag is None:
        slot_lag = window
    if not isinstance(slot_lag, int | np.integer) or isinstance(slot_lag, bool) or slot_lag < 0:
        raise ArgumentError(f"slot_lag={slot_lag!r}: expected None or an int of at least 0")
    if slot_lag > window:
        raise ArgumentError(f"slot_lag={slot_lag}: expected at most window={window}")
    if window == 0 and num_slots == 0:
        raise ArgumentError("window=0 with no slots (log_decay=None or M=0): nothing to attend to")
    return int(slot_lag)


def check_call(
    q,
    k,
    v,
    log_decay,
    *,
    window,
    slot_lag,
    empty_slots,
    rope,
    scale,
    segment_ids,
    cache,
    return_cache,
) -> Call:
    """Checks every argument of `native_hybrid_attention` and resolves its defaults.

    Raises:
      ArgumentError: a bad argument, by name, with what was found and what was expected.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _expect_array(name, x)
        if x.dtype not in DTYPES:
            raise ArgumentError(f"{name} has dtype {x.dtype}: expected one of {DTYPE_NAMES}")
        if x.ndim != 4:
            raise ArgumentError(
                f"{name} has shape {x.shape}: expected four axes [B, T, heads, size]"
            )
        if x.dtype != q.dtype:
            raise ArgumentError(f"{name} has dtype {x.dtype}: expected q's dtype {q.dtype}")
        if 0 in x.shape:
            raise ArgumentError(f"{name} has shape {x.shape}: expected no axis of size 0")
    b, t, n, key_size = q.shape
    g = k.shape[2]
    _expect_shape("k", k, (b, t, g, key_size), "[B,T,G,K] with q's B, T and K")
    _expect_shape("v", v, (b, t, g, v.shape[3]), "[B,T,G,V] with q's B, T and k's G")
    if n % g:
        raise ArgumentError(f"q has N={n} heads and k has G={g}: expected N to be a multiple of G")

    state_dtype = jnp.promote_types(q.dtype, jnp.float32)
    if log_decay is None:
        log_decay = jnp.zeros((b, t, g, 0), state_dtype)
    _expect_array("log_decay", log_decay)
    if log_decay.dtype not in (q.dtype, state_dtype):
        raise ArgumentError(
            f"log_decay has dtype {log_decay.dtype}: expected {_either(q.dtype, state_dtype)}"
        )
    if log_decay.ndim != 4 or log_decay.shape[:3] != (b, t, g):
        raise ArgumentError(
            f"log_decay has shape {log_decay.shape}: expected [B,T,G,M] = {(b, t, g, 'M')}"
        )
    num_slots = log_decay.shape[3]
    lag = resolve_slot_lag(window, slot_lag, num_slots)
    if empty_slots not in ("mask", "sink"):
        raise ArgumentError(f"empty_slots={empty_slots!r}: expected 'mask' or 'sink'")
    if scale is None:
        scale = key_size**-0.5
    number = isinstance(scale, int | float | np.number) and not isinstance(scale, bool)
    if not number or not np.isfinite(scale):
        raise ArgumentError(f"scale={scale!r}: expected None or a finite number")
    _check_rope(rope, b, t, key_size, q.dtype, state_dtype)
    if segment_ids is not None:
        _expect_array("segment_ids", segment_ids)
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ArgumentError(f"segment_ids has dtype {segment_ids.dtype}: expected int32")
        _expect_shape("segment_ids", segment_ids, (b, t), "[B,T]")
        _check_ids(segment_ids)
    if cache is not None:
        _check_cache(cache, q, v, g, num_slots, int(window), lag)
        _check_max_length(cache, t, segment_ids)
        q = _unless_read_before(q, cache)
    if return_cache and cache is None:
        cache = _fresh_cache(q, v, g, num_slots, int(window), lag)
    return Call(
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        window=int(window),
        slot_lag=lag,
        empty_slots=empty_slots,
        rope=rope,
        scale=float(scale),
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32),
        cache=cache,
        return_cache=return_cache,
    )


def _expect_array(name: str, x) -> None:
    if not isinstance(x, jax.Array | np.ndarray):
        raise ArgumentError(f"{name} is a {type(x).__name__}: expected an array")


def _expect_shape(name: str, x, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ArgumentError(f"{name} has shape {tuple(x.shape)}: expected {meaning} = {shape}")


def _check_ids(segment_ids) -> None:
    """Raises where concrete ids are none: cast to int32 they would be other ids, or padding."""
    if isinstance(segment_ids, jax.core.Tracer):
        return
    if not getattr(segment_ids, "is_fully_addressable", True):
        return  # some are on other hosts
    ids = np.asarray(segment_ids)
    for found in (int(ids.min()), int(ids.max())):
        if not 0 <= found <= INT32_MAX:
            raise ArgumentError(
                f"segment_ids holds {found}: expected ids from 0 (padding) to {INT32_MAX}"
            )


def refuse_checked_shards(call: Call) -> None:
    """Refuses what `jax.shard_map` passes when it checks how values vary over the mesh.

    Raises:
      NotImplementedError: some array does, with what to pass to `jax.shard_map`.
    """
    for x in (call.q, call.k, call.v, call.log_decay):
        kind = getattr(jax.typeof(x), "manual_axis_type", None)
        if kind is not None and kind.varying:
            raise NotImplementedError(
                "native_hybrid_attention does not say how its values vary over mesh axes: pass "
                "check_vma=False to jax.shard_map"
            )


def _either(dtype, state_dtype) -> str:
    wider = "" if state_dtype == dtype else f" or {state_dtype}"
    return f"q's dtype {dtype}{wider}"


def _check_rope(rope, b: int, t: int, key_size: int, dtype, state_dtype) -> None:
    if rope is None:
        return
    if not isinstance(rope, tuple | list) or len(rope) != 2:
        raise ArgumentError("rope: expected None or a pair (cos, sin)")
    if key_size % 2:
        raise ArgumentError(f"q has K={key_size}: rope needs an even K")
    for name, x in zip(("rope[0] (cos)", "rope[1] (sin)"), rope, strict=True):
        _expect_array(name, x)
        if x.dtype not in (dtype, state_dtype):
            raise ArgumentError(
                f"{name} has dtype {x.dtype}: expected {_either(dtype, state_dtype)}"
            )
        if tuple(x.shape) not in ((1, t, key_size // 2), (b, t, key_size // 2)):
            raise ArgumentError(
                f"{name} has shape {tuple(x.shape)}: expected [1|B,T,K/2] = "
                f"{(1, t, key_size // 2)} or {(b, t, key_size // 2)}"
            )


def _fresh_cache(q, v, g: int, num_slots: int, window: int, lag: int) -> "Cache":
    """For `return_cache=True` without a cache: one that no later call can outgrow."""
    from nha_jax.ops.cache import init_cache

    return init_cache(
        q.shape[0],
        num_kv_heads=g,
        key_size=q.shape[3],
        value_size=v.shape[3],
        num_slots=num_slots,
        window=window,
        slot_lag=lag,
        max_length=max(window, q.shape[1]),
        dtype=q.dtype,
    ).as_new()


def _check_cache(cache: "Cache", q, v, g: int, num_slots: int, window: int, lag: int) -> None:
    from nha_jax.ops.cache import Cache

    if not isinstance(cache, Cache):
        raise ArgumentError(f"cache is a {type(cache).__name__}: expected one made by init_cache")
    found = {
        "batch": cache.slots_k.shape[0],
        "num_kv_heads": cache.slots_k.shape[1],
        "num_slots": cache.slots_k.shape[2],
        "key_size": cache.slots_k.shape[3],
        "value_size": cache.slots_v.shape[3],
        "window": cache.window,
        "slot_lag": cache.slot_lag,
        "dtype": cache.window_k.dtype.name,
    }
    expected = {
        "batch": q.shape[0],
        "num_kv_heads": g,
        "num_slots": num_slots,
        "key_size": q.shape[3],
        "value_size": v.shape[3],
        "window": window,
        "slot_lag": lag,
        "dtype": q.dtype.name,
    }
    wrong = [
        f"{name}={found[name]} where the call has {expected[name]}"
        for name in expected
        if found[name] != expected[name]
    ]
    if wrong:
        raise ArgumentError("cache does not fit this call: it has " + ", ".join(wrong))


def _unless_read_before(q, cache: "Cache"):
    """The queries; NaN in rows whose cache is called new and is not, an error where that shows.

    What such a cache holds would otherwise be left out of the output without a word.
    """
    if not cache.is_new:
        return q
    if any(isinstance(x, jax.core.Tracer) for x in (cache.length, cache.slots_empty)):
        is_new = (cache.length == 0) & cache.slots_empty
        return jnp.where(is_new[:, None, None, None], q, jnp.nan)
    if (longest := int(np.asarray(cache.length).max())) > 0:
        raise ArgumentError(f"cache is called new, but has {longest} tokens: expected an empty one")
    if not np.asarray(cache.slots_empty).all():
        raise ArgumentError("cache is called new, but its slots are not empty (`slots_empty`)")
    return q


def _check_max_length(cache: "Cache", t: int, segment_ids) -> None:
    """Raises where concrete lengths show that a bounded cache would lose tokens."""
    if not cache.is_bounded:
        return
    state = (cache.segment_length, cache.segment_id)
    if any(isinstance(x, jax.core.Tracer) for x in (*state, segment_ids)):
        return
    # As NumPy: inside a trace, a row of a concrete jax.Array is a tracer.
    lengths, ids = (np.asarray(x) for x in state)
    if segment_ids is None:
        longest = int(lengths.max()) + t
    else:
        longest = max(
            _longest_document(row, int(last), int(length))
            for row, last, length in zip(np.asarray(segment_ids), ids, lengths, strict=True)
        )
    if longest > cache.max_length:
        raise ArgumentError(
            f"cache has max_length={cache.max_length} and window={cache.window}: a document would "
            f"reach {longest} tokens; expected at most max_length (make a longer cache)"
        )


def _longest_document(ids: np.ndarray, last_id: int, length: int) -> int:
    longest = length
    for segment in ids[ids != 0]:
        length = length + 1 if segment == last_id else 1
        last_id = segment
        longest = max(longest, length)
    return longest
