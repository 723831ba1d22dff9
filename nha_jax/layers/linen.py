"""The attention layer inside a Flax Linen model."""

from typing import Any

from flax import linen, nnx
from flax.core import FrozenDict

from nha_jax.layers.attention import NativeHybridAttention


def linen_attention(
    width: int,
    num_heads: int,
    *,
    layer: type[NativeHybridAttention] = NativeHybridAttention,
    name: str | None = None,
    **settings: Any,
) -> linen.Module:
    """The attention layer as a Linen module, for use in a Linen model's `setup` or compact call.

    Its parameters are plain arrays in the collection "params", under the names of the NNX layer;
    the call takes what the NNX layer's does, `window=` and `cache=` included.

    Args:
      width: model width D.
      num_heads: query heads N.
      layer: which layer, `NativeHybridAttention` or `WeightedSumFusion`.
      name: of the Linen module.
      **settings: the other arguments of the layer, without `rngs`: Linen supplies those.

    Raises:
      ValueError: when it is first called, an argument that makes no layer, by name.
    """
    return nnx.bridge.ToLinen(
        layer,
        args=(width, num_heads),
        kwargs=FrozenDict(settings),
        # Without Flax's metadata boxes, which would look for a mesh when they are opened.
        metadata_fn=None,
        name=name,
    )
