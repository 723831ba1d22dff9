"""The attention layer and its baselines against NumPy, and what a call may vary."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_by_hand import heads_by_hand, project_by_hand, sigmoid
from flax import nnx

from nha_jax.layers import NativeHybridAttention, RopeScaling, SwiGLU, WeightedSumFusion

T, WIDTH = 10, 16
SMALL = {"num_kv_heads": 2, "num_slots": 3, "window": 4}


def make(cls=NativeHybridAttention, **settings) -> NativeHybridAttention:
    """A layer of two key/value heads with every parameter moved off its initial value."""
    settings = {**SMALL, "implementation": "reference", **settings}
    layer = cls(WIDTH, 4, rngs=nnx.Rngs(0), **settings)
    draw = np.random.default_rng(1)

    def move(leaf: jax.Array) -> jax.Array:  # far enough that every gate, norm and bias shows
        return jnp.asarray(np.asarray(leaf) + 0.3 * draw.normal(size=leaf.shape), leaf.dtype)

    nnx.update(layer, jax.tree.map(move, nnx.state(layer, nnx.Param)))
    return layer


def inputs(dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, T, WIDTH)), dtype)


@nnx.jit(static_argnames=("window",))
def call(layer, x, segment_ids=None, positions=None, cache=None, *, window=None):
    return layer(
        x,
        segment_ids=segment_ids,
        positions=positions,
        cache=cache,
        return_cache=cache is not None,
        return_slot_mass=True,
        window=window,
    )


SETTINGS = {
    "plain": {},
    "published_options": {"silu_values": True, "output_norm": True, "gate_normalizer": 2.0},
    "qwen": {"qkv_bias": True, "qk_norm": True, "norm_eps": 1e-3, "head_size": 6},
    "silu_slots": {"slot_feature_map": "silu"},
    "relu_slots_unrotated": {"slot_feature_map": "relu", "rope_theta": None, "scale": 1.0},
    "lag_and_sink": {"slot_lag": 2, "empty_slots": "sink", "rope_theta": 50.0},
    "gated_slot_attention": {"window": 0, "slot_feature_map": "silu"},
    "sliding_window": {"num_slots": 0},
    "full": {"window": "full"},
    "full_attention": {"window": "full", "num_slots": 0},
    "full_with_sink": {"window": "full", "empty_slots": "sink", "slot_feature_map": "silu"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_layer_is_its_definition(settings, x64):
    layer = make(dtype="float64", param_dtype="float64", **settings)
    x = inputs(jnp.float64)
    window = T if layer.window == "full" else layer.window
    heads, mass = heads_by_hand(layer, np.asarray(x), window)
    out, slot_mass = call(layer, x)
    chex.assert_shape([out, slot_mass], [(2, T, WIDTH), (2, T, 4)])
    chex.assert_trees_all_close(out, project_by_hand(layer, heads), atol=1e-10, rtol=1e-10)
    chex.assert_trees_all_close(slot_mass, mass, atol=1e-10)


def test_weighted_sum_fusion_is_two_softmaxes_and_a_weight_per_head(x64):
    layer = make(WeightedSumFusion, dtype="float64", param_dtype="float64")
    x = inputs(jnp.float64)
    slots, _ = heads_by_hand(layer, np.asarray(x), 0)
    alone = make(num_slots=0, dtype="float64", param_dtype="float64")
    for name in ("query", "key", "value"):
        setattr(alone, name, getattr(layer, name))
    near, _ = heads_by_hand(alone, np.asarray(x), 4)
    share = sigmoid(np.asarray(layer.fusion_logits[...]))
    heads = share[:, None] * slots + (1 - share[:, None]) * near
    out, slot_mass = call(layer, x)
    chex.assert_trees_all_close(out, project_by_hand(layer, heads), atol=1e-7)
    chex.assert_trees_all_close(slot_mass, np.broadcast_to(share, (2, T, 4)), atol=1e-7)
    assert np.ptp(share) > 0.1  # the heads do differ


def test_window_of_a_call_is_the_window_of_the_layer():
    """Same weights at another window, no retraining, no new parameters."""
    layer = make(slot_feature_map="silu")
    for window in (0, "full"):
        other = make(slot_feature_map="silu", window=window)
        chex.assert_trees_all_equal_structs(nnx.state(layer), nnx.state(other))
        chex.assert_trees_all_equal(call(layer, inputs(), window=window), call(other, inputs()))


SEGMENTS = np.asarray([[1, 1, 1, 0, 1, 1, 2, 2, 2, 2], [0, 3, 3, 3, 3, 3, 3, 3, 7, 0]], np.int32)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (NativeHybridAttention, {"slot_feature_map": "silu"}),
        (NativeHybridAttention, {"window": "full"}),
        (WeightedSumFusion, {}),
    ],
)
def test_packed_documents_and_caches(cls, settings):
    """Documents in a row equal documents alone; a row cut into calls equals the whole."""
    layer, x, segments = make(cls, **settings), inputs(), jnp.asarray(SEGMENTS)
    out, mass = call(layer, x, segments)
    for row in range(2):
        for document in set(SEGMENTS[row]) - {0}:
            where = np.flatnonzero(SEGMENTS[row] == document)
            # Padding behind and below it keeps the shape, and so the compilation.
            tokens, ids = np.zeros((2, T, WIDTH), np.float32), np.zeros((2, T), np.int32)
            tokens[0, : len(where)], ids[0, : len(where)] = x[row, where], 1
            alone, alone_mass = call(layer, jnp.asarray(tokens), jnp.asarray(ids))
            chex.assert_trees_all_close(out[row, where], alone[0, : len(where)], atol=2e-6)
            chex.assert_trees_all_close(mass[row, where], alone_mass[0, : len(where)], atol=2e-6)
    assert not out[SEGMENTS == 0].any() and not mass[SEGMENTS == 0].any()

    cache = layer.init_cache(2, max_length=T)
    pieces = []
    for cut in (slice(0, 5), slice(5, T)):
        *results, cache = call(layer, x[:, cut], segments[:, cut], None, cache)
        pieces.append(results)
    whole = [jnp.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True)]
    chex.assert_trees_all_close(whole, [out, mass], atol=2e-6)


def test_positions_can_be_given():
    layer, x = make(), inputs()
    shifted = call(layer, x, None, jnp.arange(T)[None] + 1000)
    chex.assert_trees_all_close(call(layer, x), shifted, atol=1e-4)  # rotation is relative
    stretched = call(layer, x, None, 2 * jnp.arange(T)[None])
    assert float(jnp.abs(stretched[0] - shifted[0]).max()) > 1e-2


def test_a_cache_can_be_returned_without_one_given():
    layer, x = make(window="full"), inputs()
    out, cache = nnx.jit(lambda layer, x: layer(x, return_cache=True))(layer, x)
    assert out.shape == x.shape and cache.max_length == T
    with pytest.raises(ValueError, match="max_length"):
        layer(x[:, :1], cache=cache, return_cache=True)


def test_llama3_scaling_reaches_the_layer():
    scaled = make(rope_theta=50.0, rope_scaling=RopeScaling(original_context=16))
    assert float(
        jnp.abs(call(scaled, inputs())[0] - call(make(rope_theta=50.0), inputs())[0]).max()
    )


def test_dtypes_of_parameters_compute_and_gates():
    layer = make(param_dtype="float32", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {
        jnp.dtype("float32")
    }
    parts = layer.project(inputs())
    assert {x.dtype for x in (parts.q, parts.k, parts.v)} == {jnp.dtype("bfloat16")}
    assert parts.log_decay.dtype == jnp.float32 and float(parts.log_decay.max()) <= 0
    out, mass = call(layer, inputs())
    assert out.dtype == jnp.bfloat16 and mass.dtype == jnp.float32
    # bfloat16 carries 8 bits: outputs of order 1 agree to a few of its last places.
    chex.assert_trees_all_close(out.astype(jnp.float32), call(make(), inputs())[0], atol=0.1)


def test_gates_are_computed_in_float32():
    """Of operands in bfloat16; a product rounded to bfloat16 would be wrong in the third digit."""
    layer, x = make(dtype="bfloat16"), inputs(jnp.bfloat16)
    kernel = np.asarray(layer.gate[...].astype(jnp.bfloat16), np.float64)
    logits = np.einsum("btd,dgm->btgm", np.asarray(x, np.float64), kernel)
    expected = -np.logaddexp(0, -logits) / 8
    np.testing.assert_allclose(layer.project(x).log_decay, expected, rtol=1e-5)


def test_the_same_seed_gives_the_same_layer_in_every_dtype():
    def parameters(dtype):
        settings = {**SMALL, "param_dtype": dtype, "dtype": dtype}
        layer = NativeHybridAttention(WIDTH, 4, rngs=nnx.Rngs(3), **settings)
        mlp = SwiGLU(WIDTH, 24, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(4))
        return nnx.to_pure_dict(nnx.state((layer, mlp), nnx.Param))

    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters("float32"))
    chex.assert_trees_all_equal(parameters("bfloat16"), rounded)


def test_a_new_gate_forgets_eight_percent_a_token():
    layer = NativeHybridAttention(256, 2, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 256)), jnp.float32)
    mean = float(np.exp(layer.project(x).log_decay).mean())
    assert mean == pytest.approx(np.exp(np.log(0.5) / 8), abs=5e-3)


def test_gradients_reach_every_parameter():
    layer = make(qkv_bias=True, qk_norm=True, output_norm=True)
    graph, params = nnx.split(layer, nnx.Param)
    grads = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(inputs()) ** 2).sum()))(params)
    for path, leaf in nnx.to_flat_state(grads):
        assert float(jnp.abs(leaf[...]).max()) > 0, path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3: expected a divisor of num_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"head_size": 5}, "head_size=5"),
        ({"head_size": 0}, "head_size=0"),
        ({"window": -1}, "window=-1"),
        ({"window": True}, "window=True"),
        ({"num_slots": -1}, "num_slots=-1"),
        ({"gate_normalizer": 0.0}, "gate_normalizer=0.0"),
        ({"slot_lag": 5}, "slot_lag=5: expected at most window=4"),
        ({"slot_lag": -1, "window": "full"}, "slot_lag=-1"),
        ({"window": 0, "num_slots": 0}, "window=0 with num_slots=0"),
        ({"empty_slots": "none"}, "empty_slots='none': expected one of 'mask', 'sink'"),
        ({"slot_feature_map": "gelu"}, "slot_feature_map='gelu': expected one of None, 'silu'"),
        ({"scale": float("nan")}, "scale=nan: expected None or a finite number"),
        ({"scale": "big"}, "scale='big'"),
        ({"implementation": "fast"}, "implementation='fast': expected one of None, .*'xla'"),
        ({"depth": 0}, "depth=0: expected at least 1"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings, message, unchecked_annotations):
    with pytest.raises(ValueError, match=message):
        NativeHybridAttention(WIDTH, 4, rngs=nnx.Rngs(0), **SMALL | settings)


@pytest.mark.parametrize("cls", [NativeHybridAttention, WeightedSumFusion])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [[0.0]]}, r"x is a list: expected floats \[B,T,D\] with D = 16"),
        ({"x": np.ones((T, WIDTH))}, r"x has shape \(10, 16\)"),
        ({"x": np.ones((2, T, 8))}, r"x has shape \(2, 10, 8\)"),
        ({"x": np.ones((2, 0, WIDTH))}, r"x has shape \(2, 0, 16\)"),
        ({"x": np.ones((2, T, WIDTH), int)}, "x has shape .* and dtype int64: expected floats"),
        (
            {"segment_ids": np.ones((2, 5), int)},
            r"segment_ids has shape \(2, 5\).*B = 2 and T = 10",
        ),
        ({"segment_ids": np.ones((2, T))}, "segment_ids has .* dtype float64: expected integers"),
        ({"positions": np.arange(T)}, r"positions has shape \(10,\).*expected .* \[1\|B,T\]"),
        ({"positions": np.ones((2, 5), int)}, r"positions has shape \(2, 5\)"),
        ({"positions": np.ones((3, T), int)}, r"positions has shape \(3, 10\)"),
        ({"cache": 3}, "cache is a int: expected one made by init_cache"),
        ({"cache": 3 * [None]}, "cache is a list"),
        ({"cache": "of three rows"}, "cache has batch=3: expected .* B = 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments_are_named(cls, arguments, message, unchecked_annotations):
    layer = make(cls)
    if arguments.get("cache") == "of three rows":
        arguments = {"cache": layer.init_cache(3, max_length=T)}
    with pytest.raises(ValueError, match=message):
        layer(**{"x": inputs()} | arguments)


def test_bad_calls_are_named():
    layer = make()
    pair = make(WeightedSumFusion).init_cache(2, max_length=T)
    with pytest.raises(ValueError, match="cache is a tuple"):
        layer(inputs(), cache=pair)
    with pytest.raises(ValueError, match="cache is a Cache"):
        make(WeightedSumFusion)(inputs(), cache=pair[0])
    with pytest.raises(ValueError, match="num_slots=0"):
        make(WeightedSumFusion, num_slots=0)
    with pytest.raises(ValueError, match="slot_lag=2"):
        make(WeightedSumFusion, slot_lag=2)
    with pytest.raises(ValueError, match="window=0"):
        make(WeightedSumFusion, window=0)
    with pytest.raises(ValueError, match="window="):
        layer(inputs(), window=-2)
    with pytest.raises(ValueError, match="expected one for 'full'"):
        layer(inputs(), cache=layer.init_cache(2, max_length=8), window="full")
    with pytest.raises(ValueError, match="divisor of width=16"):
        NativeHybridAttention(16, 3, rngs=nnx.Rngs(0))
