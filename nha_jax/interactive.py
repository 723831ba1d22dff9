"""The loop of `python -m nha_jax.generate --interactive`: a person and a model write one text."""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

from nha_jax.inference.generation import NewTokens
from nha_jax.inference.session import Session

HELP = """\
A line is added to the text as it is, and the model goes on from there; an empty line only lets it
go on. A line that ends with \\ breaks there and continues with the next one.
  /save FILE   save the state; --load-state FILE goes on from it
  /reset       forget the text
  /help        show this
  /quit        end (so does Ctrl-D)
  //...        text that begins with /
Ctrl-C stops the answer at the end of its block; what was written stays in the text."""


def converse(
    session: Session,
    first: str | None,
    write: Callable[[NewTokens], Any],
    finish: Callable[[dict[str, Any]], None],
    *,
    shows_prompt: bool,
) -> None:
    """Reads lines from standard input until it ends or says /quit, and answers each.

    Args:
      session: the text.
      first: read and answered before the first line; None: nothing.
      write: called with each block of an answer.
      finish: called after each answer with what `Session.turn` returned.
      shows_prompt: whether a terminal's input may be asked for on standard output.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text are then those of one turn, which says so, and end nothing. Only \n
        # ends a line.
        sys.stdin.reconfigure(errors="surrogateescape", newline="\n")
    _say("/help lists the commands")
    if first is not None:
        _answer(session, first, write, finish)
    for text in _texts(shows_prompt):
        command, _, argument = text.partition(" ")
        if not text.startswith("/") or text.startswith("//"):
            _answer(session, text[1:] if text.startswith("//") else text, write, finish)
        elif command == "/quit":
            return
        else:
            _obey(session, command, argument.strip())


def _answer(
    session: Session,
    text: str,
    write: Callable[[NewTokens], Any],
    finish: Callable[[dict[str, Any]], None],
) -> None:
    try:
        finish(session.turn(text, write))
    except KeyboardInterrupt:
        _say("stopped; the text was not read")
    except ValueError as error:
        _say(str(error))


def _obey(session: Session, command: str, argument: str) -> None:
    if command == "/help":
        _say(HELP)
    elif command == "/reset":
        session.reset()
        _say("the text is forgotten")
    elif command != "/save":
        _say(f"{command}: no such command; /help lists them, // begins a text with /")
    elif not argument:
        _say("/save FILE: the file is missing")
    else:
        try:
            session.save(argument)
            _say(f"saved in {argument}")
        except KeyboardInterrupt:
            _say("stopped; nothing was saved")
        except (ValueError, OSError) as error:
            _say(f"not saved: {error}")


def _texts(shows_prompt: bool) -> Iterator[str]:
    """What is written, line by line; lines that end with a backslash are joined to the next."""
    lines: list[str] = []
    while True:
        try:
            line = _line(shows_prompt, "> " if not lines else "| ")
        except KeyboardInterrupt:  # as in a shell: the line is dropped
            lines.clear()
            _say("")
            continue
        except EOFError:
            break
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        yield "\n".join([*lines, line])
        lines.clear()
    if lines:
        yield "\n".join([*lines, ""])


def _line(shows_prompt: bool, prompt: str) -> str:
    if sys.stdin.isatty() and shows_prompt:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # editing and history, where there is such a thing
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
