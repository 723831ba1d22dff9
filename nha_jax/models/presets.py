"""Models by name. Sizes are stated here and counted in `tests/models/test_presets.py`."""

import dataclasses

from nha_jax.layers.rotary import RopeScaling
from nha_jax.models.config import ModelConfig

# Minutes on two CPU cores, on bytes (256 of them, and where a document begins and ends).
_NANO = ModelConfig(
    vocab_size=258,
    num_layers=4,
    width=128,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=384,
    num_slots=16,
    windows=(32,),
)

# After the paper (arXiv 2510.07019, section 4): M = 64, W = 64, vocabulary 32,000; values pass
# through SiLU, heads through SiLU and a norm, as in its released code. Heads of 128, the size that
# pretrained models and GPU kernels share; the released code has 4 heads at every width. F is a
# little below the Transformer++ twin's and gives back what the gates take.
_NHA_340M = ModelConfig(
    vocab_size=32_000,
    num_layers=24,
    width=1024,
    num_heads=8,
    num_kv_heads=8,
    mlp_width=2688,
    num_slots=64,
    windows=(64,),
    silu_values=True,
    output_norm=True,
    tie_embeddings=True,
    compute_dtype="bfloat16",
    remat="dots",
)
_NHA_1_3B = dataclasses.replace(
    _NHA_340M, width=2048, num_heads=16, num_kv_heads=16, mlp_width=5376, tie_embeddings=False
)


def _transformer(config: ModelConfig, mlp_width: int) -> ModelConfig:
    """Transformer++ (Llama's architecture): full attention with none of the slots' options."""
    return dataclasses.replace(
        config,
        mlp_width=mlp_width,
        layer_kinds=("full",),
        windows=("full",),
        silu_values=False,
        output_norm=False,
    )


def _gated_slot_attention(config: ModelConfig) -> ModelConfig:
    """Gated Slot Attention (arXiv 2409.07146): slots only, SiLU on queries and keys, scale 1."""
    return dataclasses.replace(
        config,
        layer_kinds=("gsa",),
        windows=(0,),
        slot_feature_map="silu",
        attention_scale=1.0,
        rope_theta=None,
    )


# The shapes of pretrained models, with gates for M = 64. Windows are a choice, not a shape.
_LLAMA3_8B = ModelConfig(
    vocab_size=128_256,
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_width=14_336,
    num_slots=64,
    windows=(64, 64, 64, "full"),
    rope_theta=500_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
    remat="full",
)
_QWEN2_5_7B = dataclasses.replace(
    _LLAMA3_8B,
    vocab_size=152_064,
    num_layers=28,
    width=3584,
    num_heads=28,
    num_kv_heads=4,
    mlp_width=18_944,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qkv_bias=True,
)

PRESETS: dict[str, ModelConfig] = {
    "nano": _NANO,
    "nha_340m": _NHA_340M,
    "transformer_340m": _transformer(_NHA_340M, 2816),
    "gsa_340m": _gated_slot_attention(_NHA_340M),
    "nha_1_3b": _NHA_1_3B,
    "transformer_1_3b": _transformer(_NHA_1_3B, 5632),
    "gsa_1_3b": _gated_slot_attention(_NHA_1_3B),
    "llama3_8b": _LLAMA3_8B,
    "llama3_1_8b": dataclasses.replace(_LLAMA3_8B, rope_scaling=RopeScaling()),
    "qwen2_5_7b": _QWEN2_5_7B,
}


def preset(name: str) -> ModelConfig:
    """The config of this name.

    Raises:
      ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"model.preset={name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
