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

__all__ = [
    "FinishReason",
    "Generation",
    "GenerationState",
    "NewTokens",
    "SamplingConfig",
    "TokenStream",
    "cache_bytes",
    "generate",
    "prefill",
]
