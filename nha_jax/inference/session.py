"""A text that a person and a model continue in turns.

The state of generation is all that is kept between turns, so a text of any length takes constant
memory where no layer reads all of it, and each turn reads what is new and nothing else.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nha_jax.inference.checks import check_options
from nha_jax.inference.generation import NewTokens, TokenStream, prefill
from nha_jax.inference.sampling import SamplingConfig
from nha_jax.inference.state import GenerationState
from nha_jax.inference.state_files import save_state
from nha_jax.inference.text import prompt_ids
from nha_jax.models.cache import outreaches
from nha_jax.models.config import ModelConfig
from nha_jax.models.language_model import LanguageModel
from nha_jax.tokenizer import Tokenizer

# Room of layers that read the whole text, where nobody said how much.
DEFAULT_ROOM = 4096


class Session:
    """A text that a person and a model continue in turns.

    Args:
      model: the model.
      tokenizer: of the model.
      sampling: how tokens are chosen.
      max_tokens: of an answer, at most.
      stop_strings: that end an answer.
      block: tokens between two outputs.
      piece: tokens of a text that are read at once, at most.
      max_length: room of layers that read the whole text, in tokens, and of longer windows; None:
        `DEFAULT_ROOM`, or what the first text needs, where a layer has window "full".
      state: to go on from, of one row; its room is the session's.

    Attributes:
      state: after all that was read and written; None: nothing was.

    Raises:
      ValueError: an argument, by name; a state of several rows.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        sampling: SamplingConfig,
        max_tokens: int,
        stop_strings: Sequence[str],
        block: int,
        piece: int = 512,
        max_length: int | None = None,
        state: GenerationState | None = None,
    ) -> None:
        if state is not None and state.batch != 1:
            raise ValueError(f"state: it has {state.batch} rows, a session goes on with one")
        self._model, self._tokenizer, self._piece = model, tokenizer, piece
        self._options: dict[str, Any] = {
            "stop_tokens": [tokenizer.eos_id],
            "stop_strings": stop_strings,
            "tokenizer": tokenizer,
            "block": block,
        }
        check_options(model, max_tokens=max_tokens, **self._options)
        self._options["sampling"] = sampling
        self._max_tokens = max_tokens
        self._max_length = max_length
        if state is not None:
            self._max_length = state.cache.max_length
        self.state = state
        self._ended = False

    def reset(self) -> None:
        """Forgets the text."""
        self.state, self._ended = None, False

    def save(self, path: str) -> None:
        """Saves the state; a session that goes on from it reads what this one would.

        Raises:
          ValueError: there is none.
          OSError: the file cannot be written.
        """
        if self.state is None:
            raise ValueError("there is no state to save: nothing was read")
        state = self.state
        if self._ended:
            state = where_texts_begin(self._model, self._tokenizer, state, [True])
        save_state(path, state, self._model)

    def turn_ids(self, text: str) -> list[int]:
        """The tokens that a turn adds: the text itself, as models without a chat template want it.

        BOS comes first in a text, and again after the model ended its own.
        """
        ids = prompt_ids(self._tokenizer, text)
        if self.state is None or self._ended:
            ids = [self._tokenizer.bos_id, *ids]
        return ids

    def turn(self, text: str, write: Callable[[NewTokens], Any]) -> dict[str, Any]:
        """Reads a text and answers; Ctrl-C ends the answer after the block that is being made.

        Args:
          text: to read, perhaps "".
          write: called with each block of the answer.

        Returns:
          What there is to say about the turn: numbers of tokens and why it ended.

        Raises:
          ValueError: there is no room for the text; nothing was read.
          KeyboardInterrupt: while the text was read, which then did not happen.
        """
        started, count = time.perf_counter(), 0
        ids = self.turn_ids(text)
        stream = self._stream(ids)
        stream.state.logits.block_until_ready()
        self.state, self._ended = stream.state, False
        with _interruptions() as interrupted:
            for new in stream:
                self.state = stream.state
                count += len(new.tokens[0])
                write(new)
                if interrupted() and stream.finish_reasons[0] is None:
                    write(NewTokens([[]], [[]], stream.rest(), [None]))
                    break
        (reason,) = stream.finish_reasons
        self._ended = reason == "stop_token"
        return {
            "finish_reasons": [reason or "interrupted"],
            "prompt_tokens": len(ids),
            "tokens": count,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _stream(self, ids: list[int]) -> TokenStream:
        model, max_tokens, before = self._model, self._max_tokens, 0
        room = room_for(self._model.config, self._max_length, len(ids) + max_tokens)
        if self.state is not None:
            before, room = int(self.state.position[0]), self.state.cache.max_length
        if room is not None:
            left = room - before - len(ids)
            if left < 1:
                raise ValueError(
                    f"no room: the text has {before:,} of at most {room:,} tokens, and these "
                    f"{len(ids):,} do not fit. /reset forgets it; --max-length gives a new text "
                    f"more room"
                )
            max_tokens = min(max_tokens, left)
        return TokenStream(
            model,
            [ids],
            max_tokens=max_tokens,
            piece=self._piece,
            state=self.state,
            max_length=room if self.state is None else None,
            **self._options,
        )


def where_texts_begin(
    model: LanguageModel, tokenizer: Tokenizer, state: GenerationState, ended: Sequence[bool]
) -> GenerationState:
    """The state to save after the model ended its text in the rows `ended` [B]: BOS was read there.

    A file says nothing of how a text ended, and what is read after loading it is added as it is.
    Rows without room for BOS stay as they are: nothing can be added to them.
    """
    room = state.cache.max_length
    lengths = state.position.tolist()
    bos = [
        [tokenizer.bos_id] if end and (room is None or length < room) else []
        for end, length in zip(ended, lengths, strict=True)
    ]
    return prefill(model, bos, state=state) if any(bos) else state


def room_for(config: ModelConfig, max_length: int | None, needed: int) -> int | None:
    """Tokens that a text may have which goes on after the `needed` ones; None: any number."""
    windows = [layer.window for layer in config.layers()]
    if max_length is None:
        # Twice: a long text is read in order to go on from it.
        return max(DEFAULT_ROOM, 2 * needed) if "full" in windows else None
    return max_length if outreaches(windows, max_length) else None


@contextlib.contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed, instead of raising on it.

    A block whose buffers are donated must not be left half way: the state before it is gone.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set  # handlers are the main thread's
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
