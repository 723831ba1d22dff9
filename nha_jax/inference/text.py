"""Token ids to text while they arrive, and stop strings in it."""

from collections.abc import Sequence

from nha_jax.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what a tokenizer decodes a cut character to
_LONGEST_CUT = 3  # bytes that a character of UTF-8 can lack its last of
_CONTEXT = 8  # tokens before a new one that decide how it decodes


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a text that is to be continued, without BOS.

    A tokenizer with words makes a space part of the word after it, so spaces at the end are left to
    the continuation: the model would otherwise write a second one.

    Raises:
      ValueError: the text has half characters (surrogates), as bytes that are not UTF-8 become on a
        command line.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode ({error.reason})") from None
    return tokenizer.encode(prompt.rstrip(" ") if tokenizer.has_words else prompt)


class TextDecoder:
    """Text of one row, token by token, in memory that does not grow with it.

    Text is settled when no token to come can change it: it ends before a character of which bytes
    are missing. After a stop string was found, it ends before that string.

    Args:
      tokenizer: of the model.
      prompt: ids before the first token, of which the last few decide whether it begins with a
        space.
      stop_strings: non-empty strings that end the text.

    Attributes:
      stopped: whether a stop string was found.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop_strings: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._ids = list(prompt)[-_CONTEXT:]
        text = tokenizer.decode(self._ids)
        # Characters of the text of `_ids` that are the prompt's, or were settled before.
        self._taken = len(text) - _unfinished(text)
        self._held = ""  # settled, and not released
        self.stopped = False

    def push(self, token: int) -> bool:
        """Adds a token; returns whether it completed a stop string."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        self._settle(text, len(text) - _unfinished(text))
        if len(self._ids) > 2 * _CONTEXT:
            pending = max(len(text) - self._taken, 0)
            self._ids = self._ids[-_CONTEXT:]
            self._taken = max(len(self._tokenizer.decode(self._ids)) - pending, 0)
        return self.stopped

    def release(self) -> str:
        """Text that was not released before and that no stop string can still take back."""
        end = len(self._held)
        if not self.stopped:
            end -= max(map(self._started, self._stop_strings), default=0)
        released, self._held = self._held[:end], self._held[end:]
        return released

    def finish(self) -> str:
        """Text that was held back, when no token will follow."""
        if not self.stopped:
            text = self._tokenizer.decode(self._ids)
            self._settle(text, len(text))
        released, self._held = self._held, ""
        return released

    def _settle(self, text: str, end: int) -> None:
        """Takes the characters of the text of `_ids` up to `end`."""
        if end <= self._taken:
            return
        start = len(self._held)
        self._held += text[self._taken : end]
        self._taken = end
        # What was released begins no stop string, so one can only begin in what is held.
        found = [
            self._held.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop_strings
        ]
        if any(place >= 0 for place in found):
            self._held = self._held[: min(place for place in found if place >= 0)]
            self.stopped = True

    def _started(self, stop: str) -> int:
        """Length of the longest beginning of the stop string with which the text ends."""
        place = max(0, len(self._held) - len(stop) + 1)
        while (place := self._held.find(stop[0], place)) >= 0:
            if stop.startswith(self._held[place:]):
                return len(self._held) - place
            place += 1
        return 0


def _unfinished(text: str) -> int:
    """Characters at the end that bytes to come may change.

    A cut character is one replacement character or, with some tokenizers, one for each byte; more
    than a character can lack are bytes that are no text, for which nothing is worth waiting.
    """
    return min(len(text) - len(text.rstrip(_UNFINISHED)), _LONGEST_CUT)
