"""Checks of generation's arguments, with errors that name them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nha_jax.inference.state import GenerationState, empty_state
from nha_jax.models.language_model import LanguageModel
from nha_jax.tokenizer import Tokenizer

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | jax.Array


def check_integer(name: str, value: Any, least: int, below: int = 2**31) -> None:
    """Raises ValueError for a value that is no integer in [least, below)."""
    if not isinstance(value, int | np.integer):
        raise ValueError(f"{name}={value!r}: expected an integer")
    if not least <= value < below:
        limit = f"2**{below.bit_length() - 1}"
        raise ValueError(f"{name}={value}: expected at least {least}, and less than {limit}")


def check_type(name: str, value: Any, expected: type) -> None:
    """Raises ValueError for a value of another type, and not None."""
    if value is not None and not isinstance(value, expected):
        raise ValueError(f"{name}={value!r}: expected a {expected.__name__}")


def check_state(model: LanguageModel, state: GenerationState) -> None:
    """Raises ValueError for a state that no model of these sizes made, or that is gone."""
    leaves = jax.tree.leaves(state)
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise ValueError(
            "state: its arrays are gone, a TokenStream gave them to its next block; keep "
            "state.copy() of a stream's state"
        )
    room, windows = state.cache.max_length, state.cache.windows
    try:
        expected = jax.eval_shape(
            lambda: empty_state(model, state.batch, max_length=room, windows=windows)
        )
    except ValueError as error:  # a pattern that does not divide the depth
        raise ValueError(f"state: of another model ({error})") from None
    ours, theirs = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): (leaf.dtype, leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(each)
        }
        for each in (expected, state)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            found, wanted = (_described(shapes.get(name)) for shapes in (theirs, ours))
            raise ValueError(f"state: of another model: its {name} is {found}, expected {wanted}")


def _described(leaf: tuple[Any, tuple[int, ...]] | None) -> str:
    return "missing" if leaf is None else f"{leaf[0]}{list(leaf[1])}"


def check_options(
    model: LanguageModel,
    *,
    max_tokens: int,
    stop_tokens: Sequence[int],
    stop_strings: Sequence[str],
    tokenizer: Tokenizer | None,
    block: int,
) -> None:
    """Raises ValueError for an argument of `generate` that no prompt could make right."""
    check_integer("max_tokens", max_tokens, 0)
    check_integer("block", block, 1)
    check_type("tokenizer", tokenizer, Tokenizer)
    if isinstance(stop_tokens, str | int | np.integer):
        raise ValueError(f"stop_tokens={stop_tokens!r}: expected a list of ids")
    for token in np.asarray(stop_tokens).tolist():
        if not isinstance(token, int):
            raise ValueError(f"stop_tokens has {token!r}: expected integers")
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(f"stop_tokens has {token}: the model has no such token")
    if isinstance(stop_strings, str):
        raise ValueError(f"stop_strings={stop_strings!r}: expected a list of strings")
    if any(not isinstance(stop, str) for stop in stop_strings):
        raise ValueError(f"stop_strings={stop_strings!r}: expected a list of strings")
    if any(not stop for stop in stop_strings):
        raise ValueError("stop_strings has an empty string: it would stop everything")
    for stop in stop_strings:
        if any("\ud800" <= letter <= "\udfff" for letter in stop):  # no text has them
            raise ValueError(f"stop_strings has {stop!r}: not valid Unicode")
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings: a tokenizer is needed to find them")


def check_prompts(tokens: Any, vocab_size: int, state: GenerationState | None) -> list[np.ndarray]:
    """The prompts as int32 arrays [T]; raises ValueError for what is no prompt."""
    if isinstance(tokens, jax.Array | np.ndarray) and tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}: expected [B,T], or a list of rows")
    try:
        prompts = [np.asarray(row) for row in tokens]
    except (TypeError, ValueError):  # rows of rows, or no rows
        raise ValueError("tokens: expected [B,T], or a list of lists of integers") from None
    if not prompts:
        raise ValueError("tokens has no rows: expected at least one prompt")
    if state is not None and len(prompts) != state.batch:
        raise ValueError(f"tokens has {len(prompts)} rows: the state has {state.batch}")
    for row, prompt in enumerate(prompts):
        if prompt.size == 0 and state is not None:
            continue
        if prompt.size == 0:
            raise ValueError(f"tokens[{row}] is empty: a prompt needs a token, such as BOS")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"tokens[{row}]: expected a list of integers")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(
                f"tokens[{row}] has ids from {prompt.min()} to {prompt.max()}: "
                f"expected them in [0, {vocab_size})"
            )
    return [prompt.astype(np.int32) for prompt in prompts]


def check_room(state: GenerationState, prompts: Sequence[Any], new: int) -> None:
    """Raises ValueError if a row with `new` more tokens outgrew the layers that keep all of it."""
    room = state.cache.max_length
    if room is None:
        return
    for row, before in enumerate(np.asarray(state.position).tolist()):
        length = before + len(prompts[row])
        if length + new > room:
            more = f" and {new:,} are to come" if new else ""
            raise ValueError(
                f"max_length={room:,} is too short: row {row} has {length:,} tokens{more}, "
                f"and layers with a longer window, or 'full', keep all of them; a text, or its "
                f"saved state, has the room that it was begun with: begin it with a larger "
                f"max_length"
            )
