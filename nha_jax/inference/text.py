"""Token ids to text while they arrive, and stop strings in it."""

import itertools
from collections.abc import Sequence

from nha_jax.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what a tokenizer decodes a cut character to
_LONGEST_CUT = 3  # bytes that a character of UTF-8 can lack its last of
_CONTEXT = 8  # tokens before a new one that decide how it decodes
# Tokens of a prompt that decide it: the first ones may belong to a character that began earlier.
PROMPT_TOKENS = _CONTEXT + _LONGEST_CUT


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
    are missing. After a stop string was found, it ends before that string. All that is released is
    the text of the tokens; where the prompt ends within a character, that character belongs to it
    if they complete it. One that is incomplete at the end is U+FFFD.

    Args:
      tokenizer: of the model.
      prompt: ids before the first token; the last `PROMPT_TOKENS` decide whether it begins with a
        space or within a character.
      stop_strings: non-empty strings that end the text.

    Attributes:
      stopped: whether a stop string was found.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop_strings: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        before, self._pending = _whole_characters(tokenizer, list(prompt))
        # Tokens in front of the pending ones, in groups that end with a character, and their text.
        self._groups, self._before = [before], tokenizer.decode(before)
        # Text of the pending tokens that is the prompt's, and all that was settled before.
        self._own = self._text()
        self._taken = len(self._own)
        self._held = ""  # settled, and not released
        self.stopped = False

    def push(self, token: int) -> bool:
        """Adds a token; returns whether it completed a stop string."""
        self._pending.append(token)
        text = self._text()
        end = len(text) - _unfinished(text)
        self._settle(text, end)
        if end == len(text):
            self._drop(len(self._pending))
        elif len(self._pending) > _CONTEXT:
            # Bytes that are no text: up to one that no byte to come can change.
            for count in range(len(self._pending) - 1, 0, -1):
                part = self._text(count)
                if len(part) <= min(self._taken, end) and text.startswith(part):
                    self._drop(count)
                    break
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
            text = self._text()
            self._settle(text, len(text))
        released, self._held = self._held, ""
        return released

    def _text(self, count: int | None = None) -> str:
        """The text of the pending tokens, or of the first ones."""
        ids = self._pending[:count]
        text = self._tokenizer.decode([*itertools.chain(*self._groups), *ids])
        if text.startswith(self._before):
            return text[len(self._before) :]
        # Some tokenizers decode a run of bytes only where all of it is text.
        return self._tokenizer.decode(ids)

    def _drop(self, count: int) -> None:
        """Makes the first pending tokens, whose text is settled, those before the others."""
        length = len(self._text(count))
        self._taken, self._own = self._taken - length, self._own[length:]
        self._groups.append(self._pending[:count])
        self._pending = self._pending[count:]
        while len(self._groups) > 1 and sum(map(len, self._groups)) > _CONTEXT:
            self._groups.pop(0)
        self._before = self._tokenizer.decode(itertools.chain(*self._groups))

    def _settle(self, text: str, end: int) -> None:
        """Takes the characters of the text of the pending tokens up to `end`."""
        if not text.startswith(self._own):  # a character that the prompt began is complete
            self._taken = next(n for n, own in enumerate(self._own) if text[n : n + 1] != own)
            self._own = ""
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


def _whole_characters(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """The last ids that are text of whole characters, and those behind, which may begin another."""
    last = ids[-PROMPT_TOKENS:]
    # The first of them may belong to a character, too.
    most = 0 if len(last) == len(ids) else _LONGEST_CUT
    for behind in range(min(_LONGEST_CUT, len(last)) + 1):
        for start in range(most + 1):
            end = len(last) - behind
            text = tokenizer.decode(last[start:end])
            if not (start and text.startswith(_UNFINISHED)) and not text.endswith(_UNFINISHED):
                return last[start:end], last[end:]
    return [], last


def _unfinished(text: str) -> int:
    """Characters at the end that bytes to come may change.

    A cut character is one replacement character or, with some tokenizers, one for each byte; more
    than a character can lack are bytes that are no text, for which nothing is worth waiting.
    """
    return min(len(text) - len(text.rstrip(_UNFINISHED)), _LONGEST_CUT)
