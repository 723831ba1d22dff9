"""The language model: loops against layers by hand, windows, caches, remat, dtypes."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from nha_jax.layers.rotary import rotary_tables
from nha_jax.models import LanguageModel, ModelConfig, weight_decay_mask

T = 10
SMALL = ModelConfig(
    vocab_size=11,
    num_layers=4,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=24,
    num_slots=3,
    windows=(4,),
    implementation="reference",  # compiles fastest
)
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "one loop": {},
    "periods": {"windows": (4, "full")},
    "switch of windows": {"windows": (2, 4, 4, "full")},
    "periods of kinds": {"layer_kinds": ("nha", "full"), "windows": (4,)},
    "switch of kinds": {
        "num_layers": 5,
        "layer_kinds": ("swa", "nha", "fusion", "nha", "gsa"),
        "windows": (3, 4, 4, "full", 4),
    },
}
SEGMENTS = jnp.asarray([[1, 1, 1, 0, 1, 1, 2, 2, 2, 2], [0, 3, 3, 3, 3, 3, 3, 3, 7, 0]], jnp.int32)


def config(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


@functools.cache
def model_of(config: ModelConfig) -> LanguageModel:
    """A model with parameters from NumPy: compiling the initialisation would take the longest."""
    graph, params = split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)

    def fill(path: tuple[str, ...], leaf: nnx.Param) -> nnx.Param:
        mean = 1.0 if path[-1] == "scale" else 0.0
        value = mean + 0.15 * draw.normal(size=leaf.shape)
        return leaf.replace(jnp.asarray(value, leaf.dtype))

    flat = [(path, fill(path, leaf)) for path, leaf in nnx.to_flat_state(params)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, T)), jnp.int32)


def split(model: LanguageModel) -> tuple[Any, Any]:
    return nnx.split(model, nnx.Param)


@nnx.jit(static_argnames=("windows",))
def run(model, tokens, segment_ids=None, cache=None, *, windows=None):
    return model(
        tokens,
        segment_ids=segment_ids,
        cache=cache,
        windows=windows,
        return_cache=cache is not None,
        return_slot_mass=True,
    )


@functools.partial(jax.jit, static_argnames=("graph", "spec", "settings"))
def _layer_by_hand(graph, state, x, spec, settings):
    block = nnx.merge(graph, state)
    rope = rotary_tables(jnp.arange(T)[None], *settings)
    read = functools.partial(block.attention.read, window=spec.window, rope=rope)
    x, mass, _ = block(x, read)
    return x, mass.mean(-1)


def by_hand(model: LanguageModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Layer after layer, each taken from its stack; no loops, no plan."""
    config = model.config
    x, masses, seen = model.embedding[...][tokens], [], dict.fromkeys(config.kinds, 0)
    for spec in config.layers():
        graph, state = nnx.split(model.blocks[spec.kind])
        number = seen[spec.kind]
        seen[spec.kind] += 1
        state = jax.tree.map(lambda leaf, i=number: leaf[i], state)
        x, mass = _layer_by_hand(graph, state, x, spec, (config.key_size, config.rope_theta))
        masses.append(mass)
    return model.final_norm(x) @ model.embedding[...].T, jnp.stack(masses)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_loops_run_the_layers_in_order(name):
    model = model_of(config(**ARRANGEMENTS[name]))
    chex.assert_trees_all_close(run(model, tokens()), by_hand(model, tokens()), atol=1e-5)


@pytest.mark.parametrize("name", ["periods", "switch of kinds"])
def test_gradients_go_to_the_layers_they_belong_to(name):
    """The loop's reverse mode against the forward mode of the layers by hand, along random
    directions in the space of all parameters."""
    graph, params = split(model_of(config(**ARRANGEMENTS[name])))
    draw = np.random.default_rng(1)
    weights = jnp.asarray(draw.normal(size=(2, T, 11)), jnp.float32)

    def score(forward, params):
        logits, mass = forward(nnx.merge(graph, params), tokens())
        return (logits * weights).sum() + (mass * weights[:, :, 0]).sum()

    def looped(model, tokens):
        return model(tokens, return_slot_mass=True)

    grads = jax.jit(jax.grad(functools.partial(score, looped)))(params)
    for _ in range(4):
        along = jax.tree.map(
            lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), params
        )
        _, expected = jax.jvp(functools.partial(score, by_hand), (params,), (along,))
        terms = jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), grads, along))
        scale = math.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
        assert abs(float(sum(terms) - expected)) < 1e-4 * scale


@pytest.mark.parametrize("name", ["one loop", "switch of windows", "switch of kinds"])
def test_cut_into_calls_equals_the_whole(name):
    model = model_of(config(**ARRANGEMENTS[name]))
    whole = run(model, tokens(), SEGMENTS)
    cache, pieces = model.init_cache(2, max_length=T), []
    for cut in (slice(0, T // 2), slice(T // 2, T)):
        *results, cache = run(model, tokens()[:, cut], SEGMENTS[:, cut], cache)
        pieces.append(results)
    logits, mass = zip(*pieces, strict=True)
    chex.assert_trees_all_close(jnp.concatenate(logits, 1), whole[0], atol=1e-5)
    chex.assert_trees_all_close(jnp.concatenate(mass, 2), whole[1], atol=1e-5)
    chex.assert_shape(whole[1], (model.config.num_layers, 2, T))
    assert not whole[1][:, SEGMENTS == 0].any()
    chex.assert_trees_all_equal(cache.length, (SEGMENTS != 0).sum(1))
    chex.assert_trees_all_equal(cache.segment_length, jnp.asarray([4, 1]))


def test_a_nested_plan_keeps_every_layer_with_its_own_cache():
    """[4, 4, "full"] with caches runs as loops over runs; token by token equals the whole."""
    model = model_of(config(num_layers=6, windows=(4, 4, "full")))
    whole, _ = run(model, tokens())
    cache = model.init_cache(2, max_length=T)
    for t in range(T):
        logits, _, cache = run(model, tokens()[:, t : t + 1], None, cache)
        chex.assert_trees_all_close(logits[:, 0], whole[:, t], atol=1e-5)


def test_the_tree_and_its_first_values_are_the_same_for_every_window_pattern():
    """The programs that draw them are, letter for letter."""

    def program(windows):
        def build():
            return split(LanguageModel(config(windows=windows), rngs=nnx.Rngs(0)))[1]

        return str(jax.make_jaxpr(build)())

    assert "random_bits" in program((4,))
    assert program((4,)) == program((4, "full")) == program((0, 2, 2, "full"))


def test_every_layer_is_drawn_on_its_own_with_the_documented_deviations():
    wide = config(num_layers=3, width=64, mlp_width=64, vocab_size=512, layer_kinds=("nha",))
    model = nnx.jit(lambda: LanguageModel(wide, rngs=nnx.Rngs(0)))()
    stddev = math.sqrt(2 / (5 * 64))
    block = model.blocks["nha"]
    assert np.std(model.embedding[...]) == pytest.approx(stddev, rel=0.02)
    for matrix, expected in (
        (block.attention.query, stddev),
        (block.attention.output, stddev / math.sqrt(2 * 3)),
        (block.mlp.up, stddev),
        (block.mlp.down, stddev / math.sqrt(2 * 3)),
    ):
        layers = np.asarray(matrix[...]).reshape(3, -1)
        np.testing.assert_allclose(layers.std(1), expected, rtol=0.06)
        assert np.abs(np.corrcoef(layers) - np.eye(3)).max() < 0.1
    assert (np.asarray(block.mlp_norm.scale[...]) == 1).all()


def test_train_with_one_pattern_and_evaluate_with_another():
    graph, params = split(model_of(config()))
    optimizer = optax.adamw(1e-2, mask=weight_decay_mask(config()))

    def loss(params):
        logits = nnx.merge(graph, params)(tokens()[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens()[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(nnx.to_pure_dict(grads), state, nnx.to_pure_dict(params))
        pure = optax.apply_updates(nnx.to_pure_dict(params), updates)
        nnx.replace_by_pure_dict(params, pure)
        return params, state, value

    state, losses = optimizer.init(nnx.to_pure_dict(params)), []
    for _ in range(3):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] == pytest.approx(math.log(11), abs=0.3)
    assert losses[2] < losses[0] - 0.05

    trained = nnx.merge(graph, params)
    pattern = (0, "full")
    other = nnx.merge(split(model_of(config(windows=pattern)))[0], params)
    found = run(trained, tokens(), windows=pattern)
    chex.assert_trees_all_equal(found, run(other, tokens()))
    assert float(jnp.abs(found[0] - run(trained, tokens())[0]).max()) > 1e-3


def test_a_gate_that_is_never_read_keeps_its_value():
    """No gradient and no weight decay: AdamW leaves the gate of a "full" layer as it is."""
    changes = config(windows=("full", 4))
    graph, params = split(model_of(changes))
    assert not weight_decay_mask(changes)["blocks"]["nha"]["attention"]["gate"]
    optimizer = optax.adamw(1e-2, weight_decay=0.5, mask=weight_decay_mask(changes))

    @jax.jit
    def step(params):
        def loss(params):
            return (nnx.merge(graph, params)(tokens()) ** 2).mean()

        pure = nnx.to_pure_dict(params)
        grads = nnx.to_pure_dict(jax.grad(loss)(params))
        return optax.apply_updates(pure, optimizer.update(grads, optimizer.init(pure), pure)[0])

    before = nnx.to_pure_dict(params)["blocks"]["nha"]["attention"]
    after = step(params)["blocks"]["nha"]["attention"]
    chex.assert_trees_all_equal(after["gate"][::2], before["gate"][::2])
    assert (after["gate"][1::2] != before["gate"][1::2]).any()
    assert (after["query"] != before["query"]).any((1, 2, 3)).all()


def _trace(changes: dict[str, Any], layers: int) -> int:
    """Operations of a training step as XLA gets it, every loop body and branch counted once."""
    chosen = config(num_layers=layers, implementation="xla", **changes)
    graph, params = split(nnx.eval_shape(lambda: LanguageModel(chosen, rngs=nnx.Rngs(0))))

    def loss(params, tokens, segment_ids):
        return nnx.merge(graph, params)(tokens, segment_ids=segment_ids).sum()

    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(params, ids, ids).as_text().count(" = ")


@pytest.mark.parametrize(
    "pattern",
    [
        lambda depth: {"windows": (4,)},
        lambda depth: {"windows": (4, 4, 4, "full")},
        lambda depth: {"windows": tuple("full" if i * i % 5 == 1 else 4 for i in range(depth))},
        lambda depth: {
            "windows": (4,),
            "layer_kinds": tuple("full" if i * i % 5 == 1 else "nha" for i in range(depth)),
        },
    ],
    ids=["one", "regular", "irregular", "irregular kinds"],
)
def test_what_is_compiled_does_not_grow_with_depth(pattern):
    few, many = (_trace(pattern(depth), depth) for depth in (4, 24))
    assert many <= 1.1 * few


def test_remat_trades_what_is_stored_for_the_same_gradients():
    stored, grads = {}, {}
    for remat in ("none", "dots", "full"):
        graph, params = split(model_of(config(remat=remat)))

        def loss(params, graph=graph):
            return (nnx.merge(graph, params)(tokens()) ** 2).sum()

        residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        stored[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
        if remat != "dots":
            grads[remat] = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    assert stored["full"] < stored["dots"] < stored["none"]
    chex.assert_trees_all_close(grads["full"], grads["none"], rtol=1e-4, atol=1e-5)


def test_what_remat_stores_of_caches_grows_with_the_depth_and_not_with_its_square():
    def stored(depth: int) -> int:
        model = model_of(config(remat="full", num_layers=depth, windows=(64,)))
        graph, params = split(model)
        cache = jax.eval_shape(lambda: model.init_cache(2, max_length=64))

        def read(params, cache):
            return nnx.merge(graph, params)(tokens(), cache=cache, return_cache=True)

        residuals = jax.eval_shape(lambda p, c: jax.vjp(read, p, c)[1], params, cache)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert stored(16) <= 2.1 * stored(8)


def test_tied_and_untied_embeddings():
    tied, untied = model_of(config()), model_of(config(tie_embeddings=False))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    chex.assert_trees_all_close(tied.readout(hidden), hidden @ tied.embedding[...].T, atol=1e-5)
    chex.assert_shape(untied.unembedding[...], (16, 11))
    chex.assert_trees_all_close(untied.readout(hidden), hidden @ untied.unembedding[...], atol=1e-5)


def test_bfloat16_compute_keeps_float32_parameters_logits_and_slot_mass():
    model = model_of(config(compute_dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    logits, mass = run(model, tokens())
    assert logits.dtype == mass.dtype == jnp.float32
    assert nnx.eval_shape(lambda: model.hidden_states(tokens())).dtype == jnp.bfloat16
    expected, _ = run(model_of(config()), tokens())
    assert float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)) < 2e-2
    small = model_of(config(param_dtype="bfloat16"))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(small, nnx.Param)))


def test_a_returned_cache_and_the_ways_to_misuse_it():
    model = model_of(config(windows=(4, "full")))
    bare = nnx.jit(lambda model, tokens: model(tokens, return_cache=True))
    _, cache = bare(model, tokens())
    assert cache.max_length == T and cache.windows == (4, "full") * 2
    with pytest.raises(ValueError, match=r"max_length=10: a document would reach 11 tokens"):
        model(tokens()[:, :1], cache=cache)
    with pytest.raises(ValueError, match=r"windows=\(4,\): expected those of the cache"):
        model(tokens(), cache=cache, windows=(4,))
    assert model.init_cache(2, max_length=3, windows=(4,)).max_length is None  # any length fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [[1, 2]]}, r"tokens is a list: expected integers \[B,T\]"),
        ({"tokens": np.ones(T, int)}, r"tokens has shape \(10,\)"),
        ({"tokens": np.ones((2, T))}, r"tokens has shape \(2, 10\) and dtype float64"),
        (
            {"segment_ids": np.ones((2, 5), int)},
            r"segment_ids has shape \(2, 5\).*B = 2 and T = 10",
        ),
        ({"positions": np.arange(T)}, r"positions has shape \(10,\)"),
        ({"windows": 64}, r"windows=64: expected a list such as \[64\]"),
        ({"cache": 3}, "cache is a int: expected one made by init_cache of this model"),
        ({"cache": "of three rows"}, "cache has batch=3: expected .* B = 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments_are_named(arguments, message, unchecked_annotations):
    model = model_of(config())
    if arguments.get("cache") == "of three rows":
        arguments = {"cache": model.init_cache(3, max_length=T)}
    with pytest.raises(ValueError, match=message):
        model(**{"tokens": tokens()} | arguments)


def test_model_in_a_mesh_with_other_axis_names():
    if jax.device_count() < 8:
        pytest.skip("needs the eight simulated devices")
    before = nnx.using_eager_sharding()
    with jax.set_mesh(jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)):
        model = nnx.eval_shape(lambda: LanguageModel(SMALL, rngs=nnx.Rngs(0)))
        chex.assert_trees_all_equal_shapes(split(model)[1], split(model_of(SMALL))[1])
        inside, _ = run(model_of(SMALL), tokens())
    assert nnx.using_eager_sharding() == before
    chex.assert_trees_all_close(inside, run(model_of(SMALL), tokens())[0], atol=1e-5)
