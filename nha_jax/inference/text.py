"""Token ids to text while they arrive, and stop strings in it."""

from collections.abc import Sequence

from nha_jax.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what a tokenizer decodes a cut character to
_CONTEXT = 8  # tokens of the prompt that decide how the first generated ones decode


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a text that is to be continued, without BOS.

    A tokenizer with words makes a space part of the word after it, so spaces at the end are left to
    the continuation: the model would otherwise write a second one.
    """
    return tokenizer.encode(prompt.rstrip(" ") if tokenizer.has_words else prompt)


class TextDecoder:
    """Text of one row, token by token.

    `text` is what is settled: it ends before a character of which bytes are missing. After a stop
    string was found, it ends before that string.

    Args:
      tokenizer: of the model.
      prompt: ids before the first token, of which the last few decide whether it begins with a
        space.
      stop_strings: non-empty strings that end the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop_strings: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        # Tokens are decoded together with the few before them, whose text is then taken off.
        self._ids = list(prompt)[-_CONTEXT:]
        self._settled = len(self._ids)
        self._context = 0
        self._released = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Adds a token; returns whether it completed a stop string."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._context : self._settled])
        after = self._tokenizer.decode(self._ids[self._context :])
        if not after.endswith(_UNFINISHED) and len(after) >= len(before):
            self._settle(after[len(before) :])
        return self.stopped

    def release(self) -> str:
        """Text that was not released before and that no stop string can still take back."""
        end = len(self.text)
        if not self.stopped:
            end -= max((self._started(stop) for stop in self._stop_strings), default=0)
        released = self.text[self._released : end]
        self._released = max(self._released, end)
        return released

    def finish(self) -> str:
        """Text that was held back, when no token will follow."""
        if not self.stopped:
            before = self._tokenizer.decode(self._ids[self._context : self._settled])
            after = self._tokenizer.decode(self._ids[self._context :])
            self._settle(after[len(before) :])
        rest = self.text[self._released :]
        self._released = len(self.text)
        return rest

    def _settle(self, piece: str) -> None:
        start = len(self.text)
        self.text += piece
        # The last settled tokens stay as context, at most as many as are needed.
        self._context = max(self._context, self._settled - _CONTEXT)
        self._settled = len(self._ids)
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop_strings]
        if any(place >= 0 for place in found):
            self.text = self.text[: min(place for place in found if place >= 0)]
            self.stopped = True

    def _started(self, stop: str) -> int:
        """Length of the longest beginning of the stop string with which the text ends."""
        longest = min(len(stop) - 1, len(self.text))
        return next((n for n in range(longest, 0, -1) if self.text.endswith(stop[:n])), 0)
