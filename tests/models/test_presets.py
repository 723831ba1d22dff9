"""Presets: shapes without memory, and parameter counts derived from the papers' sizes."""

import jax
import pytest
from flax import nnx

from nha_jax.layers import RopeScaling
from nha_jax.models import (
    PRESETS,
    LanguageModel,
    logical_axes,
    matmul_parameters,
    num_parameters,
    preset,
    weight_decay_mask,
)


def by_formula(
    *, P, D, F, L, N, G, K, tied, bias=False, gate_slots=0, output_norm=False, norms=2
) -> int:
    """Embeddings, L layers and the final norm, counted by hand."""
    attention = D * N * K + 2 * D * G * K + N * K * D
    attention += (N + 2 * G) * K if bias else 0
    attention += D * G * gate_slots
    attention += N * K if output_norm else 0
    return (1 if tied else 2) * P * D + L * (attention + 3 * D * F + norms * D) + D


_LLAMA = {"P": 128_256, "D": 4096, "F": 14_336, "L": 32, "N": 32, "G": 8, "K": 128, "tied": False}
_QWEN = {
    "P": 152_064,
    "D": 3584,
    "F": 18_944,
    "L": 28,
    "N": 28,
    "G": 4,
    "K": 128,
    "tied": False,
    "bias": True,
}
_SMALL = {"P": 32_000, "D": 1024, "L": 24, "N": 8, "G": 8, "K": 128, "tied": True}
_LARGE = {"P": 32_000, "D": 2048, "L": 24, "N": 16, "G": 16, "K": 128, "tied": False}

COUNTS = {
    "nano": by_formula(P=258, D=128, F=384, L=4, N=4, G=2, K=32, tied=True, gate_slots=16),
    "nha_340m": by_formula(**_SMALL, F=2688, gate_slots=64, output_norm=True),
    "transformer_340m": 341_099_520,
    "gsa_340m": by_formula(**_SMALL, F=2688, gate_slots=64, output_norm=True),
    "nha_1_3b": by_formula(**_LARGE, F=5376, gate_slots=64, output_norm=True),
    "transformer_1_3b": by_formula(**_LARGE, F=5632),
    "gsa_1_3b": by_formula(**_LARGE, F=5376, gate_slots=64, output_norm=True),
    "llama3_8b": 8_030_261_248 + 67_108_864,
    "llama3_1_8b": 8_030_261_248 + 67_108_864,
    "qwen2_5_7b": 7_615_616_512 + 25_690_112,
}


def test_the_formula_gives_the_published_counts():
    assert by_formula(**_LLAMA) == 8_030_261_248
    assert by_formula(**_LLAMA, gate_slots=64) - by_formula(**_LLAMA) == 67_108_864
    assert by_formula(**_QWEN) == 7_615_616_512
    assert by_formula(**_QWEN, gate_slots=64) - by_formula(**_QWEN) == 25_690_112
    assert by_formula(**_SMALL, F=2816) == 341_099_520


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_size_it_says(name):
    config = preset(name)
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[name]
    assert num_parameters(config) == COUNTS[name]

    axes, mask = logical_axes(config), weight_decay_mask(config)
    rank = jax.tree.map(lambda leaf: leaf.ndim, params)
    assert jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple)) == rank
    assert jax.tree.structure(mask) == jax.tree.structure(params)


@pytest.mark.parametrize("size", ["340m", "1_3b"])
def test_twins_are_within_three_percent(size):
    nha = num_parameters(preset(f"nha_{size}"))
    for twin in (f"transformer_{size}", f"gsa_{size}"):
        assert abs(num_parameters(preset(twin)) / nha - 1) < 0.03, twin


# What the counts do not show, from the papers and the released models: the options of plain NHA,
# then where each preset differs. Pretrained models have no windows: theirs are our choice.
_PLAIN = {
    "layer_kinds": ("nha",),
    "slot_lag": None,
    "empty_slots": "mask",
    "gate_normalizer": 8.0,
    "slot_feature_map": None,
    "attention_scale": None,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "norm_eps": 1e-6,
    "silu_values": False,
    "output_norm": False,
    "qk_norm": False,
    "qkv_bias": False,
    "tie_embeddings": True,
    "param_dtype": "float32",
    "compute_dtype": "bfloat16",
}
_NHA = {"windows": (64,), "silu_values": True, "output_norm": True}  # arXiv 2510.07019
_TRANSFORMER = {"windows": ("full",), "layer_kinds": ("full",)}
_GSA = {  # arXiv 2409.07146
    **_NHA,
    "windows": (0,),
    "layer_kinds": ("gsa",),
    "slot_feature_map": "silu",
    "attention_scale": 1.0,
    "rope_theta": None,
}
_UNTIED = {"tie_embeddings": False}
_PRETRAINED = {"windows": (64, 64, 64, "full"), **_UNTIED, "param_dtype": "bfloat16"}
_LLAMA3 = {**_PRETRAINED, "rope_theta": 500_000.0, "norm_eps": 1e-5}  # arXiv 2407.21783
OPTIONS = {
    "nano": {"windows": (32,), "compute_dtype": "float32"},
    "nha_340m": _NHA,
    "transformer_340m": _TRANSFORMER,
    "gsa_340m": _GSA,
    "nha_1_3b": _NHA | _UNTIED,
    "transformer_1_3b": _TRANSFORMER | _UNTIED,
    "gsa_1_3b": _GSA | _UNTIED,
    "llama3_8b": _LLAMA3,
    "llama3_1_8b": _LLAMA3 | {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)},
    "qwen2_5_7b": {**_PRETRAINED, "rope_theta": 1_000_000.0, "qkv_bias": True},  # arXiv 2412.15115
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_options_of_what_it_is_named_for(name):
    expected = _PLAIN | OPTIONS[name]
    config = preset(name)
    assert {option: getattr(config, option) for option in expected} == expected


def test_matmul_parameters_leave_out_what_multiplies_nothing():
    config = preset("nano")
    norms = (2 * 4 + 1) * 128
    assert matmul_parameters(config) == COUNTS["nano"] - norms  # tied: the table is the readout
    gates = 4 * 128 * 2 * 16
    assert matmul_parameters(config, ("full",)) == matmul_parameters(config) - gates
    large, table = preset("transformer_1_3b"), 32_000 * 2048
    assert matmul_parameters(large) == COUNTS["transformer_1_3b"] - table - (2 * 24 + 1) * 2048


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match=r"model.preset='nano2': expected one of nano, nha_340m"):
        preset("nano2")
