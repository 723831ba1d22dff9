"""The operator: one softmax over memory slots and a sliding window."""

from nha_jax.ops.api import IMPLEMENTATIONS, native_hybrid_attention
from nha_jax.ops.cache import Cache, init_cache
from nha_jax.ops.checks import ArgumentError
from nha_jax.ops.rotary import rotate

__all__ = [
    "IMPLEMENTATIONS",
    "ArgumentError",
    "Cache",
    "init_cache",
    "native_hybrid_attention",
    "rotate",
]
