"""Counts, names and decay of a model's parameters, without building it."""

import functools
import math
from typing import Any

from flax import nnx

from nha_jax.layers.checks import Window
from nha_jax.models.config import ModelConfig
from nha_jax.models.language_model import LanguageModel


@functools.lru_cache(maxsize=32)
def _abstract_parameters(config: ModelConfig) -> Any:
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


def _per_parameter(config: ModelConfig, field: str) -> dict[str, Any]:
    """One piece of metadata of every parameter, in the structure of the pure parameters."""
    state = _abstract_parameters(config)
    flat = {path: leaf.get_metadata(field) for path, leaf in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(flat)


def num_parameters(config: ModelConfig) -> int:
    """How many numbers a model of this config learns."""
    leaves = (leaf for _, leaf in nnx.to_flat_state(_abstract_parameters(config)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def matmul_parameters(config: ModelConfig, windows: tuple[Window, ...] | None = None) -> int:
    """How many parameters each token is multiplied with in matrix products.

    The readout counts whether tied or not; looking up an embedding is no product. The gate of an
    "nha" layer with window "full" does not count where empty slots are masked: it is never read.

    Args:
      config: the model.
      windows: instead of the config's.

    Raises:
      ValueError: windows that do not fit the model.
    """
    d, n, g, k = config.width, config.num_heads, config.num_kv_heads, config.key_size
    common = 2 * d * n * k + 2 * d * g * k + 3 * d * config.mlp_width
    total = d * config.vocab_size + config.num_layers * common
    for layer in config.layers(windows):
        unread = layer.window == "full" and config.empty_slots == "mask"
        if layer.kind in ("gsa", "fusion") or (layer.kind == "nha" and not unread):
            total += d * g * config.num_slots
    return total


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axis names of every parameter, a tuple of strings each.

    The structure is that of `nnx.to_pure_dict(nnx.state(model, nnx.Param))`. The names are listed
    in `nha_jax.layers.parameters`.
    """
    return _per_parameter(config, "logical_axes")


def weight_decay_mask(config: ModelConfig) -> dict[str, Any]:
    """Whether an optimizer's weight decay applies to each parameter, in the same structure.

    It does to matrices (embeddings included), and not to norms, biases, fusion weights and gates.
    A gate takes none under any windows, so neither does that of a "full" layer, which nothing reads
    and which has to keep its value for the day it is read again.
    """
    return _per_parameter(config, "weight_decay")
