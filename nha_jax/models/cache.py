"""What a model remembers of the text so far: the caches of its layers."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from nha_jax.layers.attention import first_cache
from nha_jax.layers.checks import Window
from nha_jax.ops import Cache


@dataclasses.dataclass(frozen=True)
class ModelCache:
    """The state between calls of a `LanguageModel`, a pytree.

    Attributes:
      stacks: for each distinct layer, in order of first appearance, the caches of those layers
        stacked along a leading axis: leaves `[layers, B, ...]`.
      windows: of every layer, first to last; calls with this cache use them.
      max_length: the longest document in tokens that layers with a longer window, or "full", can
        hold; None: no layer is bounded.
    """

    stacks: tuple[Any, ...]
    windows: tuple[Window, ...]
    max_length: int | None

    def as_new(self) -> "ModelCache":
        """The same cache with a promise that no token was read, see `nha_jax.ops.Cache.as_new`."""
        stacks = each_cache(Cache.as_new, self.stacks)
        return dataclasses.replace(self, stacks=stacks)

    def within(self, segment_id: int) -> "ModelCache":
        """The same cache, as if the document that its rows are in had this id."""

        def renamed(cache: Cache) -> Cache:
            return cache.replace(segment_id=jnp.full_like(cache.segment_id, segment_id))

        return dataclasses.replace(self, stacks=each_cache(renamed, self.stacks))

    @property
    def segment_id(self) -> jax.Array:
        """Last non-zero document id of each row, int32 [B]."""
        return self._first().segment_id[0]

    @property
    def segment_length(self) -> jax.Array:
        """Tokens of that document so far, int32 [B]."""
        return self._first().segment_length[0]

    @property
    def length(self) -> jax.Array:
        """Tokens of each row so far, padding not counted, int32 [B]."""
        return self._first().length[0]

    def _first(self) -> Cache:
        cache = first_cache(self.stacks[0])
        assert cache is not None
        return cache


def outreaches(windows: Iterable[Window], length: int) -> bool:
    """Whether a window reaches further than so many tokens, as "full" always does."""
    return any(window == "full" or window > length for window in windows)


def each_cache(change: Callable[..., Cache], *trees: Any) -> Any:
    """`change` of each operator cache in a tree of them, and of its counterparts in more trees."""
    return jax.tree.map(change, *trees, is_leaf=lambda x: isinstance(x, Cache))


jax.tree_util.register_dataclass(
    ModelCache, data_fields=["stacks"], meta_fields=["windows", "max_length"]
)
