"""Continue a text with a trained model, on the command line.

    python -m nha_jax.generate --checkpoint runs/nano --prompt "def "

The continuation streams to standard output; tokens per second follow on standard error. With
`--interactive` the text goes on in turns: each line of standard input is added to it and continued.
"""

import contextlib
import functools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from nha_jax.compilation_cache import DEFAULT_COMPILATION_CACHE, use_compilation_cache
from nha_jax.inference.generation import NewTokens, TokenStream
from nha_jax.inference.sampling import SamplingConfig
from nha_jax.inference.session import Session, room_for, where_texts_begin
from nha_jax.inference.state import GenerationState
from nha_jax.inference.state_files import load_state, save_state
from nha_jax.inference.text import prompt_ids
from nha_jax.interactive import converse
from nha_jax.models.checkpoint import LoadedModel, load
from nha_jax.models.checkpoint_files import DamagedCheckpointError
from nha_jax.ops.devices import gpu_at_hand

_DASHES = "What begins with '-' is written --prompt=-foo"


class CommandLineError(Exception):
    """The command cannot be carried out; one line says why."""


_ERRORS = (
    CommandLineError,
    ArgumentError,
    ValueError,
    OSError,
    FloatingPointError,
    DamagedCheckpointError,
    jax.errors.JaxRuntimeError,  # no memory, above all
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      The exit status: 0; 1 if the output cannot be written; 2 after an error of one line; 130 after
      Ctrl-C.
    """
    try:
        options = _parsed(sys.argv[1:] if arguments is None else arguments)
        prompt = _prompt(options)
        use_compilation_cache(options.compilation_cache or None)
        sampling = SamplingConfig(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
        with _warnings_like_errors():
            loaded = load(options.checkpoint, windows=options.windows, tokenizer=options.tokenizer)
        if gpu_at_hand():  # on CPUs it decodes no faster, and compiles every layer
            loaded.model.unstack()
        run = _converse if options.interactive else _run
        run(options, prompt, sampling, loaded)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130  # what a shell says of a program that Ctrl-C ended
    except BrokenPipeError:
        # Whoever read the text has enough of it; Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # Names of arguments in these messages are those of the library; they read like the options.
    except _ERRORS as error:
        _complain(error)
        return 2
    return 0


def _complain(message: Any) -> None:
    print(f"nha_jax.generate: {' '.join(str(message).split())}", file=sys.stderr)


def _parsed(arguments: Sequence[str]) -> Namespace:
    try:
        return _parser().parse_args(list(arguments))
    except ArgumentError as error:
        lacking = re.fullmatch(r"argument --(prompt|file|stop): expected .*argument", str(error))
        if lacking is None:
            raise
        raise CommandLineError(f"{error}. {_DASHES.replace('prompt', lacking[1])}") from None


@contextlib.contextmanager
def _warnings_like_errors() -> Iterator[None]:
    """Shows warnings in one line each, without the place in the source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **options: _complain(message)
        yield


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m nha_jax.generate",
        description="Continue a text with a trained model.",
        exit_on_error=False,
        default_env=False,
    )
    add = parser.add_argument
    # Texts are `str`, not `str | None`: that would be read as YAML, in which "# text" is null.
    add("--checkpoint", type=str, required=True, help="folder of a run or of one checkpoint")
    add("--prompt", type=str, default=None, help=f"text to continue; -: standard input. {_DASHES}")
    add("--file", type=str, default=None, help="file with the text to continue")
    add("--max-tokens", type=int, default=256, help="new tokens at most")
    add("--max-length", type=int | None, default=None, help="room of layers that keep all, tokens")
    add("--windows", type=str, default=None, help="per layer: 64, full, '64x7,full'")
    add(
        "--tokenizer",
        type=str,
        default=None,
        help="instead of the checkpoint's: a JSON file, its folder, or bytes",
    )
    add("--temperature", type=float, default=1.0, help="0: greedy")
    add("--top-k", type=int | None, default=None, help="only the k most probable tokens")
    add("--top-p", type=float | None, default=None, help="only the most probable p of the mass")
    add(
        "--min-p",
        type=float | None,
        default=None,
        help="only tokens p times as probable as the best",
    )
    add("--repetition-penalty", type=float, default=1.0, help="above 1: repeats less")
    add("--seed", type=int | None, default=None, help="of the draws")
    add("--stop", type=str, nargs="+", default=[], help="strings that end the text")
    add("--block", type=int, default=16, help="tokens made between two outputs")
    add("--piece", type=int, default=512, help="tokens of the prompt read at once")
    add("--save-state", type=str, default=None, help="file for the state after the text")
    add("--load-state", type=str, default=None, help="state to go on from")
    add("--interactive", action="store_true", help="go on in turns: a line, an answer; /help")
    add("--json", action="store_true", help="write a JSON object per block, and one at the end")
    add(
        "--compilation-cache",
        type=str,
        default=os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT_COMPILATION_CACHE),
        help="folder of compiled programs, so that they are compiled once; '': none",
    )
    return parser


def _prompt(options: Namespace) -> str | None:
    given = [name for name in ("prompt", "file") if options[name] is not None]
    if len(given) > 1:
        raise CommandLineError("--prompt and --file: give one of them")
    if options.save_state is not None:
        if not Path(options.save_state).absolute().parent.is_dir():
            raise CommandLineError(f"--save-state {options.save_state}: no such folder")
        if Path(options.save_state).is_dir():
            raise CommandLineError(f"--save-state {options.save_state}: a folder, expected a file")
    if options.interactive and options.prompt == "-":
        raise CommandLineError(
            "--prompt - and --interactive: both read standard input; give the first text with "
            "--file, or as the first line"
        )
    if sys.stdin is None and (options.interactive or options.prompt == "-"):
        raise CommandLineError("standard input is closed")
    if not given:
        if options.load_state is None and not options.interactive:
            raise CommandLineError("--prompt, --file or --load-state: give one of them")
        return None
    # As bytes: no line end is changed.
    if options.file is not None:
        try:
            text = Path(options.file).read_bytes()
        except OSError as error:
            raise CommandLineError(f"--file {options.file}: {error.strerror}") from None
        return _decoded(f"--file {options.file}", text)
    if options.prompt == "-":
        return _decoded("--prompt -", sys.stdin.buffer.read())
    return options.prompt


def _decoded(source: str, text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandLineError(f"{source}: not UTF-8 ({error})") from None


def _state(options: Namespace, loaded: LoadedModel) -> GenerationState | None:
    if options.load_state is None:
        return None
    if options.max_length is not None:
        raise CommandLineError("--max-length: that of --load-state cannot be changed")
    state = load_state(options.load_state, loaded.model)
    if state.batch > 1 and not options.json:
        raise CommandLineError(
            f"--load-state {options.load_state}: has {state.batch} texts, which only --json tells "
            f"apart"
        )
    return state


def _run(
    options: Namespace, prompt: str | None, sampling: SamplingConfig, loaded: LoadedModel
) -> None:
    tokenizer, model = loaded.tokenizer, loaded.model
    state = _state(options, loaded)
    ids = [] if prompt is None else prompt_ids(tokenizer, prompt)
    if state is None:
        ids = [tokenizer.bos_id, *ids]
    max_length = options.max_length
    if options.save_state is not None and state is None:
        # A state has the room that it was made with: it shall be possible to go on from it.
        max_length = room_for(model.config, max_length, len(ids) + options.max_tokens)
    started = time.perf_counter()
    stream = TokenStream(
        model,
        [ids] if state is None else [ids] * state.batch,
        max_tokens=options.max_tokens,
        sampling=sampling,
        stop_tokens=[tokenizer.eos_id],
        stop_strings=options.stop,
        tokenizer=tokenizer,
        state=state,
        max_length=max_length,
        block=options.block,
        piece=options.piece,
    )
    stream.state.logits.block_until_ready()
    read = time.perf_counter()
    blocks = [Written(_write(new, options.json), time.perf_counter() - read) for new in stream]
    if options.save_state is not None:
        ended = [reason == "stop_token" for reason in stream.finish_reasons]
        ready = where_texts_begin(model, tokenizer, stream.state, ended)
        save_state(options.save_state, ready, model)
    if options.json:
        summary = {
            "finish_reasons": stream.finish_reasons,
            "prompt_tokens": len(ids),
            "prompt_seconds": round(read - started, 3),
            **_pace(blocks),
        }
        print(json.dumps(summary), flush=True)
        return
    print(flush=True)
    print(
        f"{len(ids):,} tokens read in {read - started:.1f} s; {_described(**_pace(blocks))}",
        file=sys.stderr,
    )


def _converse(
    options: Namespace, first: str | None, sampling: SamplingConfig, loaded: LoadedModel
) -> None:
    session = Session(
        loaded.model,
        loaded.tokenizer,
        sampling=sampling,
        max_tokens=options.max_tokens,
        stop_strings=options.stop,
        block=options.block,
        piece=options.piece,
        max_length=options.max_length,
        state=_state(options, loaded),
    )
    turns: list[dict[str, Any]] = []

    def finish(turn: dict[str, Any]) -> None:
        turns.append(turn)
        print(json.dumps(turn) if options.json else "", flush=True)

    shows_prompt = not options.json and sys.stdout.isatty()
    write = functools.partial(_write, as_json=options.json)
    converse(session, first, write, finish, shows_prompt=shows_prompt)
    if options.save_state is not None:
        session.save(options.save_state)
    count, seconds = (sum(turn[name] for turn in turns) for name in ("tokens", "seconds"))
    print(
        f"{count:,} tokens written in {len(turns):,} answers, {_speed(count, seconds):,} tokens/s "
        f"(reading and compiling included)",
        file=sys.stderr,
    )


class Written(NamedTuple):
    """A block of tokens, of all rows.

    Attributes:
      tokens: their number.
      at: when it was written, in seconds after the prompt was read.
    """

    tokens: int
    at: float


def _pace(blocks: Sequence[Written]) -> dict[str, Any]:
    """How many tokens were written, and how fast; the first block, for which the program was
    compiled or loaded, stands apart. None: there are no such tokens."""
    count, first = sum(block.tokens for block in blocks), blocks[0] if blocks else None
    rest = 0 if first is None else count - first.tokens
    return {
        "tokens": count,
        "first_block_tokens": None if first is None else first.tokens,
        "first_block_seconds": None if first is None else round(first.at, 3),
        "tokens_per_second": None
        if first is None or rest == 0
        else _speed(rest, blocks[-1].at - first.at),
    }


def _described(
    tokens: int,
    first_block_tokens: int | None,
    first_block_seconds: float | None,
    tokens_per_second: float | None,
) -> str:
    text = f"{tokens:,} written"
    if first_block_tokens is not None:
        text += f": first block of {first_block_tokens:,} after {first_block_seconds:.1f} s "
        text += "(compiling included)"
    if tokens_per_second is not None:
        text += f", then {tokens_per_second:,} tokens/s"
    return text


def _speed(count: int, seconds: float) -> float:
    return round(count / max(seconds, 1e-9), 1)


def _write(new: NewTokens, as_json: bool) -> int:
    """Writes what a block added; returns how many tokens that is."""
    for row, tokens in enumerate(new.tokens):
        if as_json and (tokens or new.text[row]):
            record = {
                "row": row,
                "text": new.text[row],
                "tokens": tokens,
                "log_probs": [round(value, 5) for value in new.log_probs[row]],
            }
            print(json.dumps(record, ensure_ascii=False))
        elif not as_json:
            sys.stdout.write(new.text[row])
    sys.stdout.flush()
    return sum(map(len, new.tokens))


if __name__ == "__main__":
    raise SystemExit(main())
