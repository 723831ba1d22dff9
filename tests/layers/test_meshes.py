"""Built, shape-evaluated, bridged and called with no mesh, and in a mesh with other axis names."""

import contextlib

import chex
import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec

from nha_jax.layers import Block, NativeHybridAttention, WeightedSumFusion, linen_attention

WIDTH, HEADS, T = 16, 4, 6
SETTINGS = {
    "num_kv_heads": 2,
    "num_slots": 3,
    "window": 2,
    "qk_norm": True,
    "qkv_bias": True,
    "implementation": "reference",  # compiles fastest
}


def _mesh(axis_type: AxisType):
    if jax.device_count() < 8:
        pytest.skip("needs the eight simulated devices")
    return jax.set_mesh(jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(axis_type,) * 2))


MESHES = {
    "no mesh": contextlib.nullcontext,
    "automatic mesh": lambda: _mesh(AxisType.Auto),
    "explicit mesh": lambda: _mesh(AxisType.Explicit),
}


@pytest.fixture(params=MESHES)
def mesh(request):
    """Inside each surrounding, and with Flax's configuration as the user left it."""
    before = (nnx.using_eager_sharding(), flax.config.flax_always_shard_variable)
    with MESHES[request.param]():
        yield
    assert (nnx.using_eager_sharding(), flax.config.flax_always_shard_variable) == before


def _layer(**settings) -> NativeHybridAttention:
    return NativeHybridAttention(WIDTH, HEADS, rngs=nnx.Rngs(0), **{**SETTINGS, **settings})


def _names(layer: nnx.Module) -> dict:
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {path: leaf.get_metadata("logical_axes") for path, leaf in flat}


def test_build(mesh):
    layer = _layer()
    chex.assert_shape(layer.query[...], (WIDTH, HEADS, 4))
    assert layer.query[...].sharding.is_fully_replicated
    assert _names(layer) == {
        ("gate",): ("embed", "kv_heads", "slots"),
        ("key",): ("embed", "kv_heads", "head_size"),
        ("key_bias",): ("kv_heads", "head_size"),
        ("key_norm", "scale"): ("head_size",),
        ("output",): ("heads", "head_size", "embed"),
        ("query",): ("embed", "heads", "head_size"),
        ("query_bias",): ("heads", "head_size"),
        ("query_norm", "scale"): ("head_size",),
        ("value",): ("embed", "kv_heads", "head_size"),
        ("value_bias",): ("kv_heads", "head_size"),
    }


def test_eval_shape(mesh):
    def build() -> Block:
        rngs = nnx.Rngs(0)
        return Block(
            lambda rngs: WeightedSumFusion(WIDTH, HEADS, rngs=rngs, **SETTINGS),
            WIDTH,
            24,
            rngs=rngs,
        )

    block = nnx.eval_shape(build)
    assert isinstance(block.attention.query.get_value(), jax.ShapeDtypeStruct)
    for path, leaf in nnx.to_flat_state(nnx.state(block, nnx.Param)):
        assert len(leaf.get_metadata("logical_axes")) == len(leaf.shape), path


def test_call(mesh):
    layer = _layer(implementation=None)
    out = nnx.jit(lambda layer, x: layer(x, return_slot_mass=True))(
        layer, jnp.ones((2, T, WIDTH), jnp.float32)
    )
    chex.assert_shape(out, [(2, T, WIDTH), (2, T, HEADS)])
    chex.assert_tree_all_finite(out)


@pytest.mark.parametrize(
    "kind", [NativeHybridAttention, pytest.param(WeightedSumFusion, marks=pytest.mark.wide)]
)
def test_data_parallel_call_in_an_explicit_mesh(kind):
    """Rows cut over an axis that every operation has to speak of: output, cache, gradient."""
    layer = kind(WIDTH, HEADS, rngs=nnx.Rngs(0), **SETTINGS | {"implementation": "xla"})
    graph, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (2, T, WIDTH))
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 4]])

    @jax.jit
    def run(state, x, ids):
        def loss(state, x):
            out, cache = nnx.merge(graph, state)(x, segment_ids=ids, return_cache=True)
            return (out**2).sum(), (out, cache)

        (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(state, x)
        return found, gradient

    expected = run(state, x, ids)
    with _mesh(AxisType.Explicit):
        cut = PartitionSpec("rows")
        found = run(state, jax.device_put(x, cut), jax.device_put(ids, cut))
        assert found[0][0].sharding.spec[0] == "rows"
        chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), atol=1e-5)


class Model(linen.Module):
    """A Linen model of our layer and a Linen one."""

    window: int | str | None = None

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mixed = linen_attention(WIDTH, HEADS, name="mixer", **SETTINGS)(x, window=self.window)
        return linen.Dense(1, name="head")(x + mixed)


@pytest.mark.parametrize("mesh", ["no mesh", "automatic mesh"], indirect=True)
def test_bridge_trains_one_step_in_linen(mesh):
    x = jnp.asarray(jax.random.normal(jax.random.key(0), (2, T, WIDTH)))
    target = jnp.sin(jnp.arange(T, dtype=jnp.float32))[None, :, None]
    params = jax.jit(Model().init)(jax.random.key(1), x)["params"]
    expected = nnx.to_pure_dict(nnx.state(_layer(), nnx.Param))
    chex.assert_trees_all_equal_shapes_and_dtypes(params["mixer"], expected)

    def loss(params):
        return ((Model().apply({"params": params}, x) - target) ** 2).mean()

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value, grads

    trained, first, grads = step(params)
    _, second, _ = step(trained)
    assert float(second) < float(first)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        # A key bias shifts a row's window scores alike, but not its slots': it has a gradient too.
        assert float(jnp.abs(grad).max()) > 0, path


def test_bridge_passes_windows_and_caches():
    x = jax.random.normal(jax.random.key(0), (2, T, WIDTH))
    variables = jax.jit(Model().init)(jax.random.key(1), x)
    chex.assert_trees_all_equal_shapes(variables, jax.jit(Model("full").init)(jax.random.key(1), x))
    wide = jax.jit(Model("full").apply)(variables, x)
    assert float(jnp.abs(jax.jit(Model().apply)(variables, x) - wide).max()) > 1e-4

    mixer = linen_attention(WIDTH, HEADS, **SETTINGS)
    params = {"params": variables["params"]["mixer"]}
    cache = _layer().init_cache(2, max_length=T)
    half = jax.jit(lambda p, x, cache: mixer.apply(p, x, cache=cache, return_cache=True))
    first, cache = half(params, x[:, :3], cache)
    second, cache = half(params, x[:, 3:], cache)
    whole = jax.jit(lambda p, x: mixer.apply(p, x))(params, x)
    chex.assert_trees_all_close(jnp.concatenate([first, second], 1), whole, atol=1e-5)


def test_flax_own_bridge_works_too(mesh):
    """`nnx.bridge.to_linen` with its default metadata boxes: nothing in them asks for a mesh."""
    module = nnx.bridge.to_linen(NativeHybridAttention, WIDTH, HEADS, **SETTINGS)
    x = jnp.ones((1, T, WIDTH), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    assert linen.get_partition_spec(variables)["params"]["gate"] is not None
    out = jax.jit(module.apply)(variables, x)
    chex.assert_tree_all_finite(out)
