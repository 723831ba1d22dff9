"""Memory and time per token over a long generation, which both should stay as they are.

    python -m nha_jax.inference.endurance --tokens 100000

Generates with a preset and random weights, or with `--checkpoint`, and prints a line for each tenth
of the tokens: the process's memory, the bytes of all live arrays, and the time a token took. Layers
with window "full" are the exception: their cache has room for all of the text from the start.
"""

import argparse
import dataclasses
import gc
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from nha_jax.inference.generation import TokenStream
from nha_jax.models import LanguageModel, load, preset
from nha_jax.models.checkpoint_files import DamagedCheckpointError
from nha_jax.models.presets import PRESETS
from nha_jax.models.windows import parse_windows
from nha_jax.tokenizer import Tokenizer

PARTS = 10


class Part(NamedTuple):
    """A tenth of a generation.

    Attributes:
      tokens: generated so far.
      resident_bytes: memory of the process (RSS) at its end.
      live_bytes: of all arrays on devices at its end.
      seconds_per_token: in this tenth.
    """

    tokens: int
    resident_bytes: int
    live_bytes: int
    seconds_per_token: float


def endure(
    model: LanguageModel, tokens: int, *, block: int = 16, tokenizer: Tokenizer | None = None
) -> Iterator[Part]:
    """Generates, and yields what it took after each tenth, to the block.

    Args:
      model: the model.
      tokens: to generate, at least ten blocks.
      block: tokens between two looks.
      tokenizer: to make text of them as well.

    Raises:
      ValueError: so few tokens that a tenth would be no block.
    """
    if tokens < PARTS * block:
        raise ValueError(f"tokens={tokens}: expected at least {PARTS} blocks of {block}")
    first = 0 if tokenizer is None else tokenizer.bos_id
    # Nothing of a stream is kept but its state: what grows here grows in everyone's use.
    stream = TokenStream(model, [[first]], max_tokens=tokens, block=block, tokenizer=tokenizer)
    # Compiled before the clock starts.
    made = len(next(stream).tokens[0])
    before, started = made, time.perf_counter()
    for part in range(1, PARTS + 1):
        while made < tokens * part // PARTS:
            made += len(next(stream).tokens[0])
        seconds = time.perf_counter() - started
        gc.collect()
        yield Part(made, _resident_bytes(), _live_bytes(), seconds / max(made - before, 1))
        before, started = made, time.perf_counter()


def _live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the largest so far, which does not grow either
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()


def describe(part: Part) -> str:
    """A line of the table."""
    return (
        f"{part.tokens:>10,} {part.resident_bytes / 2**20:>10.1f} {part.live_bytes:>14,} "
        f"{1e3 * part.seconds_per_token:>10.3f}"
    )


HEADER = f"{'tokens':>10} {'RSS MiB':>10} {'live bytes':>14} {'ms/token':>10}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m nha_jax.inference.endurance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS), help="random weights")
    parser.add_argument("--checkpoint", help="a run or a checkpoint, instead of a preset")
    parser.add_argument("--windows", help="instead of the model's: 64, full, '64x7,full'")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=16, help="tokens between two looks")
    args = parser.parse_args(arguments)
    try:
        model, tokenizer = _model(args)
        parts = endure(model, args.tokens, block=args.block, tokenizer=tokenizer)
        print(
            f"windows {','.join(str(layer.window) for layer in model.config.layers())}, "
            f"{jax.devices()[0].device_kind}, JAX {jax.__version__}"
        )
        print(HEADER, flush=True)
        for part in parts:
            print(describe(part), flush=True)
    except (ValueError, OSError, DamagedCheckpointError) as error:
        parser.error(str(error))


def _model(args: argparse.Namespace) -> tuple[LanguageModel, Tokenizer | None]:
    if args.checkpoint is not None:
        loaded = load(args.checkpoint, windows=args.windows)
        return loaded.model, loaded.tokenizer
    config = preset(args.preset)
    if args.windows is not None:
        config = dataclasses.replace(config, windows=parse_windows(args.windows))
    made = LanguageModel(config, rngs=nnx.Rngs(0))
    return made, Tokenizer.bytes() if config.vocab_size >= Tokenizer.bytes().vocab_size else None


if __name__ == "__main__":
    main()
