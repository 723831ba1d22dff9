"""Flax NNX layers: Native Hybrid Attention, its baselines, and what a block needs."""

from nha_jax.layers.attention import NativeHybridAttention
from nha_jax.layers.block import Block
from nha_jax.layers.checks import Window
from nha_jax.layers.fusion import WeightedSumFusion
from nha_jax.layers.linen import linen_attention
from nha_jax.layers.mlp import SwiGLU
from nha_jax.layers.norm import RMSNorm
from nha_jax.layers.rotary import RopeScaling, rotary_frequencies, rotary_tables

__all__ = [
    "Block",
    "NativeHybridAttention",
    "RMSNorm",
    "RopeScaling",
    "SwiGLU",
    "WeightedSumFusion",
    "Window",
    "linen_attention",
    "rotary_frequencies",
    "rotary_tables",
]
