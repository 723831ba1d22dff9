"""RMSNorm, SwiGLU, rotary tables, positions."""

import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax.layers import RMSNorm, RopeScaling, SwiGLU, rotary_frequencies, rotary_tables
from nha_jax.layers.positions import document_positions


def test_rms_norm_is_its_formula_in_float32():
    norm = RMSNorm(6, eps=1e-3)
    norm.scale[...] = jnp.arange(6.0)
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * np.arange(6.0)
    chex.assert_trees_all_close(norm(jnp.asarray(x)), expected.astype(np.float32), rtol=1e-6)

    # 300² overflows nothing in bfloat16 but loses its mean there: the mean has to be wide.
    rounded = norm(jnp.asarray(300 * x, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    wide = norm(jnp.asarray(300 * x, jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(rounded, wide)


def test_swiglu_is_its_formula_and_names_its_axes():
    mlp = SwiGLU(4, 6, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    gate, up, down = (np.asarray(p[...], np.float64) for p in (mlp.gate, mlp.up, mlp.down))
    chex.assert_shape([gate, up, down], [(4, 6), (4, 6), (6, 4)])
    a = x @ gate
    expected = (a / (1 + np.exp(-a)) * (x @ up)) @ down
    chex.assert_trees_all_close(mlp(jnp.asarray(x)), expected.astype(np.float32), atol=1e-6)
    assert mlp.down.get_metadata("logical_axes") == ("mlp", "embed")


def test_initial_standard_deviations_are_the_documented_ones():
    width, depth = 256, 8
    mlp = SwiGLU(width, 512, depth=depth, rngs=nnx.Rngs(0))
    stddev = math.sqrt(2 / (5 * width))
    assert np.std(mlp.up[...]) == pytest.approx(stddev, rel=0.01)
    assert np.std(mlp.down[...]) == pytest.approx(stddev / math.sqrt(2 * depth), rel=0.01)


def test_rotary_frequencies_without_scaling():
    chex.assert_trees_all_close(
        rotary_frequencies(8, 10_000.0), 10_000.0 ** (-np.arange(4) / 4), rtol=1e-12
    )


def test_llama3_scaling_is_piecewise_in_the_wavelength():
    """Written as Llama's description has it, wavelength by wavelength."""
    scaling = RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=8192
    )
    found = rotary_frequencies(128, 500_000.0, scaling)
    cases = set()
    for i, frequency in enumerate(500_000.0 ** (-np.arange(64) / 64)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            case, expected = "kept", frequency
        elif wavelength > 8192:
            case, expected = "scaled", frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            case, expected = "between", (1 - smooth) * frequency / 8 + smooth * frequency
        cases.add(case)
        assert found[i] == pytest.approx(expected, rel=1e-12), (i, case)
    assert cases == {"kept", "between", "scaled"}


def test_rotary_tables_hold_cosines_and_sines_of_the_positions():
    positions = jnp.asarray([[0, 5, 1000], [3, 0, 1]])
    cos, sin = rotary_tables(positions, 8, 10_000.0)
    angles = np.asarray(positions)[..., None] * 10_000.0 ** (-np.arange(4) / 4)
    chex.assert_shape([cos, sin], (2, 3, 4))
    chex.assert_trees_all_close(cos, np.cos(angles).astype(np.float32), atol=1e-4)
    chex.assert_trees_all_close(sin, np.sin(angles).astype(np.float32), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary_frequencies(7, 1e4), "head_size=7"),
        (lambda: rotary_frequencies(8, 0.0), "rope_theta=0.0"),
        (lambda: RopeScaling(factor=0.5), "rope_scaling.factor=0.5"),
        (lambda: RopeScaling(low_frequency_factor=4.0), "low_frequency_factor"),
        (lambda: RopeScaling(original_context=0), "original_context=0"),
    ],
)
def test_bad_rotary_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


_count = jax.jit(document_positions, static_argnums=0)


@hypothesis.given(
    ids=st.lists(st.integers(0, 3), min_size=16, max_size=16),
    previous=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=2, max_size=2),
)
def test_positions_are_counted_as_the_operator_counts(ids, previous):
    """Against the definition: padding does not count, a change of id starts at 0."""
    ids = np.asarray(ids, np.int32).reshape(2, 8)
    last = np.asarray([i for i, _ in previous], np.int32)
    length = np.asarray([n if i else 0 for i, n in previous], np.int32)
    found = np.asarray(_count(8, jnp.asarray(ids), jnp.asarray(last), jnp.asarray(length)))
    for row in range(2):
        current, count = last[row], length[row]
        for t, segment in enumerate(ids[row]):
            if segment == 0:
                continue
            count = count if segment == current else 0
            assert found[row, t] == count, (row, t)
            current, count = segment, count + 1


def test_positions_without_documents_continue_the_cache():
    chex.assert_trees_all_equal(document_positions(3), jnp.asarray([[0, 1, 2]]))
    lengths = jnp.asarray([4, 0])
    found = document_positions(2, None, jnp.asarray([1, 0]), lengths)
    chex.assert_trees_all_equal(found, jnp.asarray([[4, 5], [0, 1]]))
