"""The compiled programs of generation with the memory they take, and how they are timed."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.inference.benchmarks.noise import abstract_state, first_state, noise_state
from nha_jax.inference.sampling import SamplingConfig
from nha_jax.inference.state import GenerationState
from nha_jax.inference.steps import NOTHING, decode_block, read_piece
from nha_jax.models.config import ModelConfig

# Greedy: what is timed is the model.
_SAMPLING = SamplingConfig(temperature=0.0)
_STOP_TOKENS = 8  # padded to this many by generation
# A prompt that takes longer is read once, and a first run that did counts.
_LONG_S = 10.0


class Program(NamedTuple):
    """A compiled program; `bytes`: arguments, results that share none of their memory, the rest."""

    run: Any
    bytes: int
    compile_seconds: float


def compiled(function: Any, *arguments: Any) -> Program:
    """Compiles a jitted function for arguments or their shapes."""
    start = time.perf_counter()
    run = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    analysis = run.memory_analysis()
    total = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.generated_code_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return Program(run, total, seconds)


def cache_size(state: GenerationState) -> int:
    """Bytes of a state's caches, by its arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))


class Decoding:
    """Blocks of tokens for rows whose caches hold `context` tokens at the end of the last block.

    Args:
      config: the model's.
      graph, parameters: of the model; shapes do for parameters until it runs.
      batch: rows.
      context: tokens.
      block: tokens a row in a block.
      blocks: that are timed.

    Raises:
      ValueError: the blocks are longer than the context.
    """

    def __init__(
        self,
        config: ModelConfig,
        graph: Any,
        parameters: Any,
        *,
        batch: int,
        context: int,
        block: int,
        blocks: int,
    ) -> None:
        self._steps, self._blocks = block * (1 + blocks), blocks
        if self._steps >= context:
            raise ValueError(
                f"context={context}: expected more than the {self._steps} tokens of {1 + blocks} "
                f"blocks of {block}"
            )
        self._block, self._batch, self._length = block, batch, context - self._steps
        self._like = abstract_state(config, batch, context)
        rest = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (batch, _STOP_TOKENS))
        self.program = compiled(
            decode_block, graph, None, block, _SAMPLING, parameters, self._like, *rest
        )

    def run(self, parameters: Any) -> tuple[list[float], int]:
        """Milliseconds of a step, block by block, and the bytes of the caches.

        Raises:
          FloatingPointError: log-probabilities are not finite.
        """
        state = noise_state(self._like, self._length)
        size = cache_size(state)
        remaining = np.full(self._batch, self._steps, np.int32)
        stop_tokens = jnp.full((_STOP_TOKENS,), NOTHING, jnp.int32)
        samples = []
        for number in range(1 + self._blocks):
            jax.block_until_ready(state)
            start = time.perf_counter()
            block = self.program.run(parameters, state, jnp.asarray(remaining), stop_tokens)
            # What generation looks at between blocks.
            _, log_probs, remaining, _ = jax.device_get(block[1:])
            seconds = time.perf_counter() - start
            state = block.state
            if not np.isfinite(log_probs).all():
                raise FloatingPointError("log-probabilities that are not finite")
            if number:
                samples.append(1e3 * seconds / self._block)
        return samples, size


class Prefill:
    """A prompt of one row, read in pieces, until its first token is known to the host.

    Args:
      config: the model's.
      graph, parameters: of the model; shapes do for parameters until it runs.
      context: tokens of the prompt.
      piece: tokens that are read at once.
    """

    def __init__(
        self, config: ModelConfig, graph: Any, parameters: Any, *, context: int, piece: int
    ) -> None:
        def empty() -> GenerationState:
            state = first_state(config, 1, context)
            return state.as_new() if context == piece else state

        random = np.random.default_rng(0)
        padded = -(-context // piece) * piece
        self._tokens = random.integers(0, config.vocab_size, (1, padded), np.int32)
        self._valid = np.arange(padded)[None] < context if padded > context else None
        self._piece = piece
        tokens = jax.ShapeDtypeStruct((1, piece), jnp.int32)
        valid = None if self._valid is None else jax.ShapeDtypeStruct((1, piece), jnp.bool)
        like = jax.eval_shape(empty)
        self.program = compiled(read_piece, graph, None, parameters, like, tokens, valid)
        self._empty = jax.jit(empty)

    def run(self, parameters: Any, runs: int) -> tuple[list[float], int, str]:
        """Milliseconds of each prompt, the bytes of its cache, and what to know of the times.

        Raises:
          FloatingPointError: the next token's logits are not finite.
        """
        milliseconds, size = self._read(parameters)
        if milliseconds > 1e3 * _LONG_S:
            return [milliseconds], size, "the first run"
        again = 1 if milliseconds > 1e3 * _LONG_S / runs else runs
        return [self._read(parameters)[0] for _ in range(again)], size, ""

    def _read(self, parameters: Any) -> tuple[float, int]:
        start = time.perf_counter()
        state = self._empty()
        for at in range(0, self._tokens.shape[1], self._piece):
            part = slice(at, at + self._piece)
            valid = None if self._valid is None else jnp.asarray(self._valid[:, part])
            state = self.program.run(parameters, state, jnp.asarray(self._tokens[:, part]), valid)
        np.asarray(jnp.argmax(state.logits, axis=-1))
        milliseconds = 1e3 * (time.perf_counter() - start)
        if not np.isfinite(state.logits).all():
            raise FloatingPointError("logits that are not finite")
        return milliseconds, cache_size(state)


def median(samples: list[float]) -> float:
    """The samples' median."""
    return statistics.median(samples)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory did not do."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def attempt(run: Callable[..., Any], *arguments: Any) -> Any:
    """What `run` returns; None where the device's memory did not do. Other errors are raised."""
    try:
        return run(*arguments)
    except (RuntimeError, MemoryError, ValueError) as error:
        if not out_of_memory(error) and not isinstance(error, MemoryError):
            raise
    # The error's frames, a cycle, hold the buffers of the run.
    gc.collect()
    return None
