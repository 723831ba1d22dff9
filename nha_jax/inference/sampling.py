"""From logits to the next token: penalties, truncation, the draw, log-probabilities.

Pure functions of float32 logits `[B,P]`. In the order in which `processed_logits` applies them:
repetition penalty (arXiv 1909.05858, section 4.1), temperature, top-k (arXiv 1805.04833), top-p
(arXiv 1904.09751) and min-p (arXiv 2407.01082). Each of the last three looks at what the ones
before it left, renormalised. Tokens that they remove have a logit of -inf.
"""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

# Named, so that a user's default implementation of keys changes neither seeds nor saved states.
_KEY_IMPLEMENTATION = "threefry2x32"
_COLDEST = 1e-30  # lower ones are 0 in float32
_STRONGEST_PENALTY = 1e6


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0: the most probable token, always (greedy).
      top_k: only the k most probable tokens; None: all. Ties with the k-th stay.
      top_p: only the most probable tokens that together reach this probability; None: all. Ties
        with the last of them stay.
      min_p: only tokens at least this fraction as probable as the most probable; None: all.
      repetition_penalty: r. A logit of a token that the prompt or the text so far contains is
        divided by r where positive and multiplied by r where negative; 1: no penalty. Between 1e-6
        and 1e6.
      seed: of the draws; None: that of the state which is continued, 0 where there is none. Each
        row of a batch draws its own numbers; a row's draws depend on the seed, its row number and
        its position in the text only.

    Raises:
      ValueError: a field out of range, by name.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            optional = value is None and name in ("top_p", "min_p")
            if not optional and not isinstance(value, numbers.Real):
                raise ValueError(f"sampling.{name}={value!r}: expected a number")
        warm = self.temperature >= 0
        _check("temperature", self.temperature, warm, "a finite number of at least 0")
        if self.top_k is not None:
            integer = _is_integer(self.top_k) and self.top_k >= 1
            _check("top_k", self.top_k, integer, "an int of at least 1")
        if self.top_p is not None:
            _check("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]")
        if self.min_p is not None:
            _check("min_p", self.min_p, 0 <= self.min_p <= 1, "a number in [0, 1]")
        penalty = self.repetition_penalty
        # Beyond, logits could overflow.
        moderate = 1 / _STRONGEST_PENALTY <= penalty <= _STRONGEST_PENALTY
        _check("repetition_penalty", penalty, moderate, "a number in [1e-6, 1e6]")
        if self.seed is not None:
            integer = _is_integer(self.seed) and 0 <= self.seed < 2**32
            _check("seed", self.seed, integer, "an int in [0, 2**32)")
        for name in ("top_k", "seed"):  # shapes and keys are made of Python's own
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not (holds and math.isfinite(value)):
        raise ValueError(f"sampling.{name}={value!r}: expected {expected}")


def penalise_repetition(
    logits: Float[Array, "B P"], counts: Int[Array, "B P"], penalty: float
) -> Float[Array, "B P"]:
    """Makes tokens that occurred (`counts` > 0) less likely (penalty > 1).

    Positive logits are divided by the penalty, negative ones multiplied: arXiv 1909.05858, section
    4.1, which divides all.
    """
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(counts > 0, penalised, logits)


def keep_top_k(logits: Float[Array, "B P"], k: int) -> Float[Array, "B P"]:
    """Keeps the k largest logits of each row and ties with the k-th (arXiv 1805.04833)."""
    if k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B P"], p: float) -> Float[Array, "B P"]:
    """Keeps the fewest most probable tokens whose probabilities reach p, and ties with the last.

    arXiv 1904.09751, section 3.1.
    """
    if p >= 1:
        return logits
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    # A token stays if those before it do not reach p: the first always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_min_p(logits: Float[Array, "B P"], p: float) -> Float[Array, "B P"]:
    """Keeps tokens at least p times as probable as the most probable (arXiv 2407.01082)."""
    if p <= 0:
        return logits
    least = jnp.max(logits, axis=-1, keepdims=True) + math.log(p)
    return jnp.where(logits < least, -jnp.inf, logits)


def processed_logits(
    logits: Float[Array, "B P"], counts: Int[Array, "B P"], config: SamplingConfig
) -> Float[Array, "B P"]:
    """The logits to draw from, up to a constant; with temperature 0, those whose largest is taken.

    Args:
      logits: the model's.
      counts: how often each token occurred in the text so far.
      config: what to apply.
    """
    if config.repetition_penalty != 1:
        logits = penalise_repetition(logits, counts, config.repetition_penalty)
    if config.is_greedy:
        return logits
    # From the largest down: however low the temperature, the largest is 0 and none overflows.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / max(config.temperature, _COLDEST)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = keep_min_p(logits, config.min_p)
    return logits


def row_keys(seed: int, batch: int) -> UInt32[Array, "B k"]:
    """The sampler keys of a batch's rows, as key data."""
    key = jax.random.key(seed, impl=_KEY_IMPLEMENTATION)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    return jax.random.key_data(keys)


def choose_tokens(
    logits: Float[Array, "B P"],
    counts: Int[Array, "B P"],
    keys: UInt32[Array, "B k"],
    positions: Int[Array, "B"],
    config: SamplingConfig,
) -> Int[Array, "B"]:
    """The next token of each row.

    Args:
      logits: the model's.
      counts: how often each token occurred in the text so far.
      keys: from `row_keys`.
      positions: of the tokens to come. The draw at a position depends on key, position and logits
        only, so a row draws the same numbers in any company, and again when it is replayed.
      config: how to choose.

    Returns:
      int32 token ids.
    """
    logits = processed_logits(logits, counts, config)
    if config.is_greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(key: jax.Array, position: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, position), row)

    typed = jax.random.wrap_key_data(keys, impl=_KEY_IMPLEMENTATION)
    return jax.vmap(draw)(typed, positions, logits).astype(jnp.int32)


def log_probabilities(logits: Float[Array, "B P"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """The model's own log-probability of each token, in nats: of the logits as they came."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
