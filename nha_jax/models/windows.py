"""Windows of layers, written as text: `64`, `full`, `64x7,full`."""

import re
from collections.abc import Iterable, Sequence

from nha_jax.layers.checks import Window, check_window

_ENTRY = re.compile(r"(full|\d+)(?:\s*x\s*(\d+))?")


def parse_windows(windows: Window | str | Sequence[Window | str]) -> tuple[Window, ...]:
    """The windows of a model's layers, for `ModelConfig.windows`.

    Args:
      windows: one window (tokens, or "full"), a list of them, or text: windows with commas between
        them, `WxN` for N layers in a row with window W. So "64x7,full" is seven layers of 64 tokens
        and one that reads the whole document. Brackets around it, as in YAML, may stay.

    Returns:
      One entry a layer; `ModelConfig` repeats them to its depth.

    Raises:
      ValueError: the entry at fault.
    """
    if not isinstance(windows, Iterable):
        windows = [windows]
    if isinstance(windows, str):
        text = windows.strip()
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        windows = text.split(",")
    spread: list[Window] = []
    for entry in windows:
        spread += _entry(entry) if isinstance(entry, str) else [entry]
    if not spread:
        raise ValueError("windows is empty: expected at least one window")
    for window in spread:
        try:
            check_window(window)
        except ValueError as error:
            raise ValueError(str(error).replace("window", "windows", 1)) from None
    return tuple(spread)


def _entry(text: str) -> list[Window]:
    match = _ENTRY.fullmatch(text.strip().strip("'\""))
    repeats = 0 if match is None else int(match[2] or 1)
    if match is None or repeats < 1:
        raise ValueError(
            f"windows has the entry {text.strip()!r}: expected tokens or 'full', with xN behind it "
            f"for N layers in a row, such as '64x7,full'"
        )
    window: Window = "full" if match[1] == "full" else int(match[1])
    return [window] * repeats
