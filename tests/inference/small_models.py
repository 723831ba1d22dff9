"""Small models that the tests of inference share, and what they should generate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.tokenizer import Tokenizer

WINDOWS = {"0": (0,), "16": (16,), "full": ("full",), "mixed": (0, 16, 16, "full")}
VOCABULARY = 61


def make_config(windows, **changes) -> ModelConfig:
    settings = dict(
        vocab_size=VOCABULARY,
        num_layers=4,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=48,
        num_slots=5,
        windows=windows,
        tie_embeddings=False,  # tied and untrained, a model repeats its last token
    )
    return ModelConfig(**{**settings, **changes})


@functools.cache
def make_model(windows, seed=0, **changes) -> LanguageModel:
    model = LanguageModel(make_config(windows, **changes), rngs=nnx.Rngs(seed))
    # A larger readout than the initial one: tokens that differ in probability.
    model.unembedding[...] = model.unembedding[...] * 4
    return model


def prompts(*lengths, seed=0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, length).tolist() for length in lengths]


class Letters(Tokenizer):
    """Token i is the i-th character from "A"; 60 ends a text."""

    def encode(self, text):
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("A") + int(i)) for i in ids if int(i) < 60)


@nnx.jit
def logits_of(model, tokens):
    return model(tokens)


def full_logits(model, text, length) -> np.ndarray:
    """Logits [T,P] of one pass over the whole text, padded at its end to `length`."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(logits_of(model, jnp.asarray(padded)))[0, : len(text)]


def assert_same_state(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)
