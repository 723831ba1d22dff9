"""Generation: prompts in, tokens out, block by block."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from nha_jax.inference.checks import (
    Prompts,
    check_integer,
    check_options,
    check_prompts,
    check_room,
    check_state,
    check_type,
)
from nha_jax.inference.layout import Layout, first_state
from nha_jax.inference.sampling import SamplingConfig
from nha_jax.inference.state import GenerationState
from nha_jax.inference.steps import NOTHING, Block, decode_block, read_piece
from nha_jax.inference.text import PROMPT_TOKENS, TextDecoder
from nha_jax.layers.checks import Window
from nha_jax.models.language_model import LanguageModel
from nha_jax.models.windows import parse_windows
from nha_jax.tokenizer import Tokenizer

FinishReason = Literal["length", "stop_token", "stop_string"]
Windows = Window | str | Sequence[Window | str]

_SHORTEST_PIECE = 16
# So many pieces without padding are worth a program of their own.
_WHOLE_PIECES = 4
# Room of full-attention layers comes in steps: each length is a compilation of its own.
_ROOM_STEP = 64
_STOP_TOKENS_STEP = 8


class NewTokens(NamedTuple):
    """What a block added, row by row.

    Attributes:
      tokens: new token ids of each row.
      log_probs: the model's log-probability of each, in nats, before any sampling option.
      text: new text of each row ("" without a tokenizer). It comes when it is settled: whole
        characters, and nothing that may turn out to begin a stop string.
      finish_reasons: why a row is finished; None: it goes on.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    text: list[str]
    finish_reasons: list[FinishReason | None]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: the new tokens of each row; one that stopped ends with the stop token, or with the
        token that completed a stop string.
      log_probs: the model's log-probability of each, in nats, before any sampling option.
      text: of the new tokens, before the stop string ("" without a tokenizer). A character that is
        incomplete at the end is U+FFFD, one that the text before began and these complete is whole.
      finish_reasons: "length", "stop_token" or "stop_string", per row.
      state: after each row's last token, to go on from.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    text: list[str]
    finish_reasons: list[FinishReason]
    state: GenerationState


def prefill(
    model: LanguageModel,
    tokens: Prompts,
    *,
    state: GenerationState | None = None,
    max_length: int | None = None,
    windows: Windows | None = None,
    seed: int | None = None,
    reserve: int = 0,
    piece: int = 512,
) -> GenerationState:
    """Reads prompts, in pieces of equal length so that prompts of all lengths share programs.

    Args:
      model: the model.
      tokens: the prompts of the rows, ids in [0, P); their lengths may differ. With `state`, a row
        may be empty.
      state: what the rows read before; it stays valid. None: nothing.
      max_length: the longest text in tokens, of which no layer keeps more; a text may outgrow it if
        no window is longer. None: enough for the longest prompt and `reserve` where a layer has
        window "full", any number elsewhere.
      windows: instead of the model's, as in `nha_jax.models.load`; not with `state`.
      seed: of the draws to come, in [0, 2**32); None: the state's, 0 without one.
      reserve: tokens that are to follow the prompts, for which there has to be room as well.
      piece: tokens that are read at once, at most. More of them take more memory for activations.
        On NVIDIA GPUs layers with window "full" read pieces of 128 tokens or more fastest where
        none is padding: all pieces of prompts whose length is a multiple of it (or a power of two
        up to it), and those of longer prompts that come before the end of the shortest.

    Returns:
      The state after the prompts.

    Raises:
      ValueError: an argument, by name; a prompt that has no room; a state of another model.
    """
    check_type("state", state, GenerationState)
    prompts = check_prompts(tokens, model.config.vocab_size, state)
    check_integer("piece", piece, 1, 2**63)
    check_integer("reserve", reserve, 0)
    if max_length is not None:
        check_integer("max_length", max_length, 1)
    if seed is not None:
        check_integer("seed", seed, 0, 2**32)
    longest = max(map(len, prompts))
    is_new = state is None
    if state is None:
        pattern = None if windows is None else parse_windows(windows)
        reads_all = any(layer.window == "full" for layer in model.config.layers(pattern))
        if max_length is None and reads_all:
            max_length = _rounded_up(longest + reserve, _ROOM_STEP)
        state = first_state(
            model,
            len(prompts),
            # As Python's own int, of which a cache's shape is made.
            max_length=None if max_length is None else int(max_length),
            windows=pattern,
            seed=0 if seed is None else seed,
        )
    else:
        for name, value in (("max_length", max_length), ("windows", windows)):
            if value is not None:
                raise ValueError(f"{name}={value!r}: that of the state cannot be changed")
        check_state(model, state)
        state = state.copy()
        if seed is not None:
            state = state.with_seed(seed)
    check_room(state, prompts, reserve)
    graph, parameters = nnx.split(model)
    layout = Layout.of(model, state)
    # A power of two, so that short prompts of many lengths share few programs.
    length = min(piece, max(_SHORTEST_PIECE, 1 << max(longest - 1, 0).bit_length()))
    # One program for all pieces, unless it is many that need no padding and some that do.
    whole = min(map(len, prompts)) // length * length
    if whole < longest and whole < _WHOLE_PIECES * length:
        whole = 0
    if is_new and longest == length:
        state = state.as_new()
    for start in range(0, longest, length):
        part = np.zeros((len(prompts), length), np.int32)
        valid = np.zeros((len(prompts), length), bool)
        for row, prompt in enumerate(prompts):
            ids = prompt[start : start + length]
            part[row, : len(ids)], valid[row, : len(ids)] = ids, True
        state = read_piece(
            graph, layout, parameters, state, part, valid if start >= whole else None
        )
    return state


class TokenStream(Iterator[NewTokens]):
    """Generates block by block; see `generate` for the arguments and the errors.

    Iterate over it for `NewTokens`. It ends when all rows are finished. `state` is the state after
    the tokens that were yielded, valid until the next block is asked for, which reuses its memory:
    keep `state.copy()`. `finish_reasons` says why each row is finished (None: it is not). If Ctrl-C
    interrupts the wait for a block, `state` is gone until the next call has brought that block.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Prompts | None = None,
        *,
        max_tokens: int,
        sampling: SamplingConfig | None = None,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
        state: GenerationState | None = None,
        max_length: int | None = None,
        windows: Windows | None = None,
        block: int = 16,
        piece: int = 512,
    ) -> None:
        check_type("sampling", sampling, SamplingConfig)
        check_type("state", state, GenerationState)
        sampling = SamplingConfig() if sampling is None else sampling
        stop_tokens = () if stop_tokens is None else stop_tokens
        stop_strings = () if stop_strings is None else stop_strings
        check_options(
            model,
            max_tokens=max_tokens,
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            block=block,
        )
        if tokens is None and state is None:
            raise ValueError("tokens: expected prompts, or a state to go on from")

        prompts = (
            [np.zeros(0, np.int32)] * state.batch
            if tokens is None and state is not None
            else check_prompts(tokens, model.config.vocab_size, state)
        )
        self.state = prefill(
            model,
            prompts,
            state=state,
            max_length=max_length,
            windows=windows,
            seed=sampling.seed,
            reserve=max_tokens,
            piece=piece,
        )
        self._graph, self._parameters = nnx.split(model)
        self._layout = Layout.of(model, self.state)
        # The seed is in the state; as part of a static argument it would recompile.
        self._sampling = dataclasses.replace(sampling, seed=None)
        # Padded: a number of stop tokens is a program of its own, and two programs round apart.
        padding = -len(stop_tokens) % _STOP_TOKENS_STEP if stop_tokens else _STOP_TOKENS_STEP
        self._stop_tokens = np.asarray([*stop_tokens, *[NOTHING] * padding], np.int32)
        self._stop_strings = tuple(stop_strings)
        self._block = int(block)
        self._max_tokens = max_tokens
        self._pending: tuple[Block, GenerationState | None] | None = None
        self._remaining = np.full(self.state.batch, max_tokens, np.int32)
        done: FinishReason | None = None if max_tokens else "length"
        self.finish_reasons: list[FinishReason | None] = [done] * self.state.batch
        self._decoders: list[TextDecoder] | None = None
        if tokenizer is not None:
            # A text that goes on may begin with a space, or within a character.
            before = np.empty((len(prompts), 0)) if state is None else np.asarray(state.recent)
            self._decoders = [
                TextDecoder(tokenizer, [int(i) for i in (*row, *prompt) if i >= 0], stop_strings)
                for row, prompt in zip(before, (p[-PROMPT_TOKENS:] for p in prompts), strict=True)
            ]

    def __next__(self) -> NewTokens:
        if all(self.finish_reasons):
            raise StopIteration
        allowed = self._remaining
        if self._pending is None:
            # Slots cannot be unwound: without the state before the block there is no way back.
            kept = self.state.copy() if self._stop_strings else None
            self._pending = self._run(self.state, allowed), kept
        block, kept = self._pending
        tokens, log_probs, remaining, stopped = jax.device_get(block[1:])
        self._pending = None
        emitted = np.sum(tokens != NOTHING, axis=0)
        self._check_finite(log_probs, emitted)
        rows = [tokens[: emitted[row], row].tolist() for row in range(len(allowed))]
        reasons: list[FinishReason | None] = [
            "stop_token" if stopped[row] else "length" if remaining[row] == 0 else None
            for row in range(len(allowed))
        ]
        remaining = np.array(remaining)
        replay = np.array(emitted)
        for row, stop_at in self._find_stop_strings(rows).items():
            replay[row], remaining[row], reasons[row] = stop_at, 0, "stop_string"
            rows[row] = rows[row][:stop_at]
        if kept is not None and (replay < emitted).any():
            block = self._run(kept, replay.astype(np.int32))
        self.state, self._remaining = block.state, remaining
        values = [log_probs[: len(ids), row].tolist() for row, ids in enumerate(rows)]
        text = self._text(reasons)
        # A row that stopped in an earlier block looks like "length" in this one.
        self.finish_reasons = [
            old or new for old, new in zip(self.finish_reasons, reasons, strict=True)
        ]
        return NewTokens(rows, values, text, list(self.finish_reasons))

    def rest(self) -> list[str]:
        """Text of each row that was held back, for a caller who asks for no further block.

        That is the beginning of a stop string, and U+FFFD for an incomplete character.
        """
        return (
            [""] * len(self._remaining)
            if self._decoders is None
            else [decoder.finish() for decoder in self._decoders]
        )

    def _run(self, state: GenerationState, remaining: np.ndarray) -> Block:
        return decode_block(
            self._graph,
            self._layout,
            self._block,
            self._sampling,
            self._parameters,
            state,
            remaining,
            self._stop_tokens,
        )

    def _check_finite(self, log_probs: np.ndarray, emitted: np.ndarray) -> None:
        """Raises where a token was drawn from logits of which one was NaN or infinite."""
        for row, count in enumerate(emitted.tolist()):
            (bad,) = np.nonzero(~np.isfinite(log_probs[:count, row]))
            if bad.size:
                place = self._max_tokens - int(self._remaining[row]) + int(bad[0]) + 1
                raise FloatingPointError(
                    f"row {row}: the model's logits are not finite at new token {place}: its "
                    f"parameters are not, or an activation overflowed"
                )

    def _find_stop_strings(self, rows: list[list[int]]) -> dict[int, int]:
        """Row → how many of its tokens it takes to complete its first stop string."""
        found: dict[int, int] = {}
        for row, decoder in enumerate(self._decoders or ()):
            for count, token in enumerate(rows[row], start=1):
                if decoder.push(token):
                    found[row] = count
                    break
        return found

    def _text(self, reasons: list[FinishReason | None]) -> list[str]:
        if self._decoders is None:
            return [""] * len(reasons)
        return [
            decoder.release() if reason is None else decoder.finish()
            for decoder, reason in zip(self._decoders, reasons, strict=True)
        ]


def generate(
    model: LanguageModel, tokens: Prompts | None = None, *, max_tokens: int, **options: Any
) -> Generation:
    """Continues prompts, each as if it ran alone.

    Tokens are made on the device in blocks; between blocks the host looks at them. A row that is
    finished is frozen: it emits nothing more, and its state is the one after its last token.

    Args:
      model: the model.
      tokens: the prompts, one a row, ids in [0, P); their lengths may differ, and each has at least
        one token (a BOS). With `state` they are read after it, and None or an empty row adds none.
      max_tokens: new tokens of each row, at most.
      sampling: `SamplingConfig`; None: temperature 1, seed 0.
      stop_tokens: ids that finish a row; the stop token is emitted. None: none.
      stop_strings: strings that finish a row; None: none. They need `tokenizer`. The token that
        completes the string is emitted, the text ends before the string. This keeps the state of
        each block's start: twice the memory.
      tokenizer: for stop strings and `text`.
      state: to go on from; it stays valid.
      max_length: the longest text in tokens, of which no layer keeps more; a text may outgrow it if
        no window is longer. None: enough.
      windows: instead of the model's, as in `nha_jax.models.load`; not with `state`.
      block: tokens that the device makes between two looks.
      piece: tokens of the prompts that are read at once, at most.

    Returns:
      Tokens, log-probabilities, text, finish reasons and the final state.

    Raises:
      ValueError: an argument, by name; text that would not fit into max_length; a state of another
        model.
      FloatingPointError: the model's logits were NaN or infinite.
    """
    stream = TokenStream(model, tokens, max_tokens=max_tokens, **options)
    batch = stream.state.batch
    tokens_of: list[list[int]] = [[] for _ in range(batch)]
    log_probs_of: list[list[float]] = [[] for _ in range(batch)]
    text = [""] * batch
    for new in stream:
        for row in range(batch):
            tokens_of[row] += new.tokens[row]
            log_probs_of[row] += new.log_probs[row]
            text[row] += new.text[row]
    reasons = [reason or "length" for reason in stream.finish_reasons]
    return Generation(tokens_of, log_probs_of, text, reasons, stream.state)


def _rounded_up(number: int, step: int) -> int:
    return -(-max(number, 1) // step) * step
