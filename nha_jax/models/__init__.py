"""Decoder language models of Native Hybrid Attention layers and their baselines."""

from typing import TYPE_CHECKING, Any

from nha_jax.models.accounting import (
    logical_axes,
    matmul_parameters,
    num_parameters,
    weight_decay_mask,
)
from nha_jax.models.cache import ModelCache
from nha_jax.models.config import LayerKind, LayerSpec, ModelConfig
from nha_jax.models.language_model import LanguageModel
from nha_jax.models.presets import PRESETS, preset

if TYPE_CHECKING:
    from nha_jax.models.checkpoint import LoadedModel, load

__all__ = [
    "PRESETS",
    "LanguageModel",
    "LayerKind",
    "LayerSpec",
    "LoadedModel",
    "ModelCache",
    "ModelConfig",
    "load",
    "logical_axes",
    "matmul_parameters",
    "num_parameters",
    "preset",
    "weight_decay_mask",
]


def __getattr__(name: str) -> Any:
    # A model in memory needs no checkpoint library and no tokenizer: loaded on first use.
    if name in ("LoadedModel", "load"):
        from nha_jax.models import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
