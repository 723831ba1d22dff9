"""Continue a text with a trained model, on the command line.

    python -m nha_jax.generate --checkpoint runs/nano --prompt "def "

The continuation streams to standard output; tokens per second follow on standard error.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from nha_jax.inference.generation import TokenStream
from nha_jax.inference.sampling import SamplingConfig
from nha_jax.inference.state_files import load_state, save_state
from nha_jax.inference.text import prompt_ids
from nha_jax.models.checkpoint import LoadedModel, load
from nha_jax.models.checkpoint_files import DamagedCheckpointError


class CommandLineError(Exception):
    """The command cannot be carried out; one line says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 2 after an error of one line."""
    parser = _parser()
    try:
        options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
        prompt = _prompt(options)
        sampling = SamplingConfig(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
        loaded = _load(options)
        _run(options, prompt, sampling, loaded)
    # Names of arguments in these messages are those of the library; they read like the options.
    except (CommandLineError, ArgumentError, ValueError, OSError, DamagedCheckpointError) as error:
        print(f"nha_jax.generate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m nha_jax.generate",
        description="Continue a text with a trained model.",
        exit_on_error=False,
        default_env=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="folder of a run or of one checkpoint")
    add("--prompt", type=str | None, default=None, help="text to continue; -: standard input")
    add("--file", type=str | None, default=None, help="file with the text to continue")
    add("--max-tokens", type=int, default=256, help="new tokens at most")
    add("--max-length", type=int | None, default=None, help="room of full-attention layers, tokens")
    add("--windows", type=str | None, default=None, help="per layer: 64, full, '64x7,full'")
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
    add("--stop", type=list[str], default=[], help="strings that end the text, as a list")
    add("--block", type=int, default=16, help="tokens made between two outputs")
    add("--save-state", type=str | None, default=None, help="file for the state after the text")
    add("--load-state", type=str | None, default=None, help="state to go on from")
    add("--json", action="store_true", help="write a JSON object per block, and one at the end")
    return parser


def _prompt(options: Namespace) -> str | None:
    given = [name for name in ("prompt", "file") if options[name] is not None]
    if len(given) > 1:
        raise CommandLineError("--prompt and --file: give one of them")
    if not given:
        if options.load_state is None:
            raise CommandLineError("--prompt, --file or --load-state: give one of them")
        return None
    if options.file is not None:
        try:
            return Path(options.file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CommandLineError(f"--file {options.file}: not UTF-8 ({error})") from None
    return sys.stdin.read() if options.prompt == "-" else options.prompt


def _load(options: Namespace) -> LoadedModel:
    loaded = load(options.checkpoint, windows=options.windows)
    if loaded.tokenizer.vocab_size > loaded.config.vocab_size:
        raise CommandLineError(
            f"{options.checkpoint}: its tokenizer has {loaded.tokenizer.vocab_size:,} ids, "
            f"its model {loaded.config.vocab_size:,}"
        )
    return loaded


def _run(
    options: Namespace,
    prompt: str | None,
    sampling: SamplingConfig,
    loaded: LoadedModel,
) -> None:
    out = sys.stdout
    tokenizer, model = loaded.tokenizer, loaded.model
    state = None if options.load_state is None else load_state(options.load_state, model)
    ids = [] if prompt is None else prompt_ids(tokenizer, prompt)
    if state is None:
        ids = [tokenizer.bos_id, *ids]
    elif options.max_length is not None:
        raise CommandLineError("--max-length: that of --load-state cannot be changed")
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
        max_length=options.max_length,
        block=options.block,
    )
    stream.state.logits.block_until_ready()
    read = time.perf_counter()
    count = 0
    for record in _records(stream):
        count += len(record["tokens"])
        out.write(json.dumps(record, ensure_ascii=False) + "\n" if options.json else record["text"])
        out.flush()
    seconds = time.perf_counter() - read
    if options.save_state is not None:
        save_state(options.save_state, stream.state, model)
    summary = {
        "finish_reasons": stream.finish_reasons,
        "prompt_tokens": len(ids),
        "prompt_seconds": round(read - started, 3),
        "tokens": count,
        "tokens_per_second": round(count / max(seconds, 1e-9), 1),
    }
    if options.json:
        out.write(json.dumps(summary) + "\n")
        return
    out.write("\n")
    out.flush()
    print(
        f"{len(ids):,} tokens read in {read - started:.1f} s; {count:,} written, "
        f"{summary['tokens_per_second']:,} tokens/s (compiling included)",
        file=sys.stderr,
    )


def _records(stream: TokenStream) -> Iterator[dict[str, Any]]:
    for new in stream:
        for row, tokens in enumerate(new.tokens):
            if tokens:
                yield {
                    "row": row,
                    "text": new.text[row],
                    "tokens": tokens,
                    "log_probs": [round(value, 5) for value in new.log_probs[row]],
                }


if __name__ == "__main__":
    raise SystemExit(main())
