"""Models and caches filled with numbers, on the device and without temporaries."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.inference.sampling import row_keys
from nha_jax.inference.state import GenerationState, empty_state
from nha_jax.models.config import ModelConfig
from nha_jax.models.language_model import LanguageModel

_DOCUMENT = 1  # the id that generation gives to a row's text


def noise(shape: tuple[int, ...], dtype: Any, scale: float, seed: int) -> jax.Array:
    """Numbers in [-scale, scale) that look random: a hash of each element's place.

    A generator of random numbers keeps its bits in memory before they are numbers: too much where
    the numbers fill the device. This is one fused loop, for arrays of more than 2^32 elements too.
    """
    bits = jnp.full(shape, seed * 0x9E3779B9 & 0xFFFFFFFF, jnp.uint32)
    for axis in range(len(shape)):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        bits = (bits ^ place) * jnp.uint32(0x7FEB352D)
        bits = bits ^ (bits >> 15)
    bits = bits * jnp.uint32(0x846CA68B)
    signed = jax.lax.bitcast_convert_type(bits ^ (bits >> 16), jnp.int32)
    return (signed.astype(jnp.float32) * (scale * 2.0**-31)).astype(dtype)


def noise_model(config: ModelConfig) -> tuple[Any, Any]:
    """A model with random weights, as what `nnx.split` gives: graph and parameters.

    One small program makes all of them. Norms are ones, the rest is uniform with the standard
    deviation of a new model's matrices.
    """
    graph, abstract = abstract_model(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    scale = (3 * 2 / (5 * config.width)) ** 0.5

    def make() -> list[jax.Array]:
        return [
            jnp.ones(leaf.shape, leaf.dtype)
            if "scale" in jax.tree_util.keystr(path)
            else noise(leaf.shape, leaf.dtype, scale, number)
            for number, (path, leaf) in enumerate(leaves)
        ]

    return graph, jax.tree.unflatten(tree, jax.jit(make)())


def abstract_model(config: ModelConfig) -> tuple[Any, Any]:
    """Graph and shapes of the parameters, unstacked: the form that decodes fastest."""
    make = functools.partial(LanguageModel, config)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)).unstack()))


def abstract_state(config: ModelConfig, batch: int, max_length: int) -> GenerationState:
    """Shapes of a generation's state."""
    return jax.eval_shape(lambda: first_state(config, batch, max_length))


def first_state(config: ModelConfig, batch: int, max_length: int) -> GenerationState:
    """The state before the first token, for a model of this config."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return empty_state(model, batch, max_length=max_length)


def noise_state(like: GenerationState, length: int) -> GenerationState:
    """A state of these shapes, as if `length` tokens had been read, in new buffers."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(like.cache)

    def fill(name: str, leaf: Any, number: int) -> jax.Array:
        if name in ("length", "segment_length"):
            return jnp.full(leaf.shape, length, leaf.dtype)
        if name == "segment_id":
            return jnp.full(leaf.shape, _DOCUMENT, leaf.dtype)
        if name == "slots_empty":
            return jnp.zeros(leaf.shape, leaf.dtype)
        values = noise(leaf.shape, leaf.dtype, 1.0, number)
        # Gates that forget up to a tenth per token.
        return -0.1 * jnp.abs(values) if name == "pending_log_decay" else values

    def make() -> GenerationState:
        filled = [fill(path[-1].name, leaf, n) for n, (path, leaf) in enumerate(leaves)]
        return dataclasses.replace(
            like,
            cache=jax.tree.unflatten(tree, filled),
            logits=noise(like.logits.shape, like.logits.dtype, 1.0, len(leaves)),
            counts=jnp.zeros(like.counts.shape, like.counts.dtype),
            keys=row_keys(0, like.batch),
            recent=jnp.zeros(like.recent.shape, like.recent.dtype),
        )

    return jax.jit(make)()
