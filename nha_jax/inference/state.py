"""The state of a generation: what was read, and what the next token is drawn from."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax.inference.sampling import row_keys
from nha_jax.inference.text import PROMPT_TOKENS
from nha_jax.layers.checks import Window
from nha_jax.models.cache import ModelCache, outreaches
from nha_jax.models.config import ModelConfig
from nha_jax.models.language_model import LanguageModel
from nha_jax.models.windows import parse_windows


@dataclasses.dataclass(frozen=True)
class GenerationState:
    """All that generation needs to go on after the last token that was read; a pytree.

    Attributes:
      cache: of the model, with windows and max_length.
      logits: of the next token, [B,P] float32.
      counts: how often each token occurred in the text so far, prompt included, [B,P] int32.
      keys: sampler keys of the rows, [B,2] uint32 (key data); with the position they determine each
        draw.
      recent: the last tokens of each row, oldest first, [B,11] int32, -1 in front of a text that is
        shorter: text that goes on is decoded behind them.
    """

    # Any: leaves are arrays, but also ShapeDtypeStructs and shardings in transformed trees.
    cache: ModelCache
    logits: Any
    counts: Any
    keys: Any
    recent: Any

    @property
    def position(self) -> jax.Array:
        """Tokens of each row so far, which is the position of the next one, int32 [B]."""
        return self.cache.length

    @property
    def batch(self) -> int:
        """Rows B."""
        return self.logits.shape[0]

    def with_seed(self, seed: int) -> "GenerationState":
        """The same state with other draws to come; `seed` in [0, 2**32)."""
        keys = row_keys(seed, self.batch)
        # On one device left uncommitted, as they were: committed ones would be another program.
        if len(self.keys.sharding.device_set) > 1:
            keys = jax.device_put(keys, self.keys.sharding)
        return dataclasses.replace(self, keys=keys)

    def as_new(self) -> "GenerationState":
        """The same state with a promise that no token was read."""
        return dataclasses.replace(self, cache=self.cache.as_new())

    def copy(self) -> "GenerationState":
        """The same state in new buffers, so that these can be donated."""
        return jax.tree.map(jnp.copy, self)


jax.tree_util.register_dataclass(
    GenerationState, data_fields=["cache", "logits", "counts", "keys", "recent"], meta_fields=[]
)


def empty_state(
    model: LanguageModel,
    batch: int,
    *,
    max_length: int | None,
    windows: tuple[Window, ...] | None = None,
    seed: int = 0,
) -> GenerationState:
    """The state before the first token; its logits mean nothing until a token was read.

    Args:
      model: the model.
      batch: rows B.
      max_length: the longest text in tokens, which no layer keeps more of; None: any, if no layer
        has window "full". It bounds nothing where no window is longer.
      windows: instead of the model's.
      seed: of the draws.
    """
    vocab_size = model.config.vocab_size
    pattern = [layer.window for layer in model.config.layers(windows)]
    bounded = max_length is not None and outreaches(pattern, max_length)
    # Where nothing is bounded by it, any other value would be a program of its own.
    room = max_length if bounded and max_length is not None else 1
    return GenerationState(
        cache=model.init_cache(batch, max_length=room, windows=windows, bounded=bounded),
        logits=jnp.zeros((batch, vocab_size), jnp.float32),
        counts=jnp.zeros((batch, vocab_size), jnp.int32),
        keys=row_keys(seed, batch),
        recent=jnp.full((batch, PROMPT_TOKENS), -1, jnp.int32),
    )


@functools.lru_cache(maxsize=32)
def _abstract_model(config: ModelConfig) -> LanguageModel:
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def cache_bytes(
    config: ModelConfig,
    batch: int,
    context: int,
    *,
    windows: Window | str | Sequence[Window | str] | None = None,
) -> int:
    """Bytes that the caches of all layers take.

    Per row and layer: M slots, keys and values, in float32; W rotated keys and values in the
    compute dtype (`context` of them where the window is longer or "full"); as many unrotated keys
    with their log decays that wait to retire into the slots (none where the window is longer than
    `context`, or "full"); and 13 bytes of counters.

    Args:
      config: the model.
      batch: rows B.
      context: longest text in tokens, the cache's `max_length`.
      windows: instead of the config's, as in `nha_jax.models.load`.

    Raises:
      ValueError: an argument, by name.
    """
    for name, value in (("batch", batch), ("context", context)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    pattern = None if windows is None else parse_windows(windows)
    model = _abstract_model(config)
    shapes = jax.eval_shape(
        lambda: model.init_cache(int(batch), max_length=int(context), windows=pattern, bounded=True)
    )
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
