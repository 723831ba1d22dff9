"""Generation: reading prompts, decoding in constant memory, sampling, saved states."""

from nha_jax.inference.generation import (
    FinishReason,
    Generation,
    NewTokens,
    TokenStream,
    generate,
    prefill,
)
from nha_jax.inference.sampling import SamplingConfig
from nha_jax.inference.state import GenerationState, cache_bytes
from nha_jax.inference.state_files import StateError, load_state, save_state

__all__ = [
    "FinishReason",
    "Generation",
    "GenerationState",
    "NewTokens",
    "SamplingConfig",
    "StateError",
    "TokenStream",
    "cache_bytes",
    "generate",
    "load_state",
    "prefill",
    "save_state",
]
