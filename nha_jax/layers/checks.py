"""What the settings of a layer may be."""

from typing import Any, Literal

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
