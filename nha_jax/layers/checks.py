"""What the settings of a layer, and the arguments of its calls, may be."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.ops import Cache
from nha_jax.ops.checks import INT32_MAX, resolve_slot_lag

Window = int | Literal["full"]


def check_window(window: Any) -> None:
    """Raises `ValueError` unless window is "full" or an int of at least 0."""
    if window == "full":
        return
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise ValueError(f"window={window!r}: expected 'full' or an int of at least 0")


def check_heads(width: int, num_heads: int, num_kv_heads: int, head_size: int | None) -> None:
    """Raises `ValueError` unless these make heads of a layer of this width."""
    for name, value in (("width", width), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads}: expected a divisor of num_heads={num_heads}"
        )
    if head_size is None and width % num_heads:
        raise ValueError(
            f"num_heads={num_heads}: expected a divisor of width={width}, or a head_size"
        )
    if head_size is not None and head_size < 1:
        raise ValueError(f"head_size={head_size}: expected at least 1")


def check_slots(num_slots: int, window: Window, slot_lag: Any, empty_slots: Any) -> None:
    """Raises `ValueError` unless slots and window together hold something, and the lag fits."""
    if num_slots < 0:
        raise ValueError(f"num_slots={num_slots}: expected at least 0")
    if window == 0 and num_slots == 0:
        raise ValueError("window=0 with num_slots=0: nothing to attend to")
    # A window of 0 and a "full" one have no use for the lag: it waits for a call with another.
    resolve_slot_lag(INT32_MAX if window in (0, "full") else window, slot_lag, num_slots)
    check_choice("empty_slots", empty_slots, ("mask", "sink"))


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises `ValueError` unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")


def check_scale(scale: Any) -> None:
    """Raises `ValueError` unless scale is None or a finite number."""
    if scale is None:
        return
    if not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: expected None or a finite number")


def check_array(name: str, x: Any, kind: Any, shapes: list[tuple[Any, ...]], meaning: str) -> None:
    """Raises `ValueError` unless x is an array of this kind of dtype, in one of the shapes.

    Args:
      name: of the argument.
      x: what was given.
      kind: of dtype, `jnp.floating` or `jnp.integer`.
      shapes: those allowed; None stands for any size of at least 1.
      meaning: of the shape, in the words of the docstring.
    """

    def fits(shape: tuple[Any, ...]) -> bool:
        return len(shape) == x.ndim and all(
            size >= 1 if wanted is None else size == wanted
            for size, wanted in zip(x.shape, shape, strict=True)
        )

    expected = f"expected {'floats' if kind is jnp.floating else 'integers'} {meaning}"
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"{name} is a {type(x).__name__}: {expected}")
    if not jnp.issubdtype(x.dtype, kind) or not any(map(fits, shapes)):
        raise ValueError(f"{name} has shape {x.shape} and dtype {x.dtype}: {expected}")


def check_documents(batch: int, length: int, segment_ids: Any, positions: Any) -> None:
    """Raises `ValueError` unless these are None or fit a call of B = batch and T = length."""
    sizes = f"B = {batch} and T = {length}"
    if segment_ids is not None:
        shape = (batch, length)
        check_array("segment_ids", segment_ids, jnp.integer, [shape], f"[B,T] with {sizes}")
    if positions is not None:
        shapes = [(1, length), (batch, length)]
        check_array("positions", positions, jnp.integer, shapes, f"[1|B,T] with {sizes}")


def check_cache(cache: Any, batch: int, count: int) -> None:
    """Raises `ValueError` unless this is None or a layer's cache for so many rows.

    Args:
      cache: what was given.
      batch: rows B of the call.
      count: how many of the operator's caches the layer has: one, or a tuple of several.
    """
    if cache is None:
        return
    parts = cache if isinstance(cache, tuple) else (cache,)
    if len(parts) != count or not all(isinstance(part, Cache) for part in parts):
        raise ValueError(
            f"cache is a {type(cache).__name__}: expected one made by init_cache of this layer"
        )
    for part in parts:
        check_cache_rows(part.length.shape[-1], batch)


def check_cache_rows(rows: int, batch: int) -> None:
    """Raises `ValueError` unless a cache has the rows B of the call."""
    if rows != batch:
        raise ValueError(f"cache has batch={rows}: expected that of the call, B = {batch}")
