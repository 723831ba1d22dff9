"""A model whose layers have arrays of their own computes what the stacked one does."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nha_jax.models import LanguageModel, ModelConfig

CONFIG = ModelConfig(
    vocab_size=61, width=32, num_layers=4, num_heads=4, num_kv_heads=2, mlp_width=48, num_slots=4
)
PATTERNS = {
    "runs": dict(windows=(8, 8, 8, "full")),
    "irregular": dict(windows=(8, "full", 8, 8)),
    "no_window": dict(windows=(0, 5)),
    "kinds": dict(windows=(8, 8, "full", 8), layer_kinds=("nha", "swa", "full", "fusion")),
}


def pair(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    models = [LanguageModel(config, rngs=nnx.Rngs(3)) for _ in range(2)]
    return models[0], models[1].unstack()


def draw(length: int):
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, length), np.int32)
    return jnp.asarray(ids)


@nnx.jit
def run(model, tokens, segment_ids, cache):
    return model(
        tokens, segment_ids=segment_ids, cache=cache, return_cache=True, return_slot_mass=True
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_slot_mass_and_caches(pattern):
    stacked, unstacked = pair(**PATTERNS[pattern])
    tokens = draw(20)
    caches = [model.init_cache(2, max_length=40) for model in (stacked, unstacked)]
    chex.assert_trees_all_equal(*caches)
    # A whole piece, padding in one row, then tokens alone, of which one row has one less.
    ids = np.ones((2, 20), np.int32)
    ids[1, 15:] = 0
    steps = [(tokens, ids)] + [(draw(t)[:, :1], np.asarray([[1], [t % 2]])) for t in (1, 2, 3)]
    for piece, segments in steps:
        found = []
        for i, model in enumerate((stacked, unstacked)):
            logits, mass, caches[i] = run(model, piece, segments, caches[i])
            found.append((logits, mass, caches[i]))
        chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-5)
        assert float(jnp.abs(found[0][0]).max()) > 0.01
    assert caches[1].length.tolist() == [23, 17]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients(remat):
    stacked, unstacked = pair(windows=(8, "full"), remat=remat)
    tokens = draw(12)

    def loss(model):
        return jnp.sum(model(tokens) ** 2)

    grads = [nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model)) for model in (stacked, unstacked)]
    of_layers = [grads[1]["blocks"]["nha"][layer] for layer in range(4)]
    grads[1]["blocks"]["nha"] = jax.tree.map(lambda *xs: jnp.stack(xs), *of_layers)
    for one, other in zip(*map(jax.tree.leaves, grads), strict=True):
        assert float(jnp.linalg.norm(one - other)) <= 1e-5 * float(jnp.linalg.norm(one))


def test_the_tree_and_its_metadata():
    stacked, unstacked = pair(windows=(8, "full"))
    assert unstacked.unstack() is unstacked
    layer = unstacked.blocks["nha"][1]
    before = stacked.blocks["nha"].mlp.up
    np.testing.assert_array_equal(layer.mlp.up[...], before[...][1])
    assert before.get_metadata("logical_axes") == (
        "layers",
        *layer.mlp.up.get_metadata("logical_axes"),
    )
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        for model in (stacked, unstacked)
    ]
    assert sizes[0] == sizes[1]


def test_shapes_alone_can_be_unstacked():
    model = nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0)).unstack())
    assert model.blocks["nha"][3].mlp.up.get_value().shape == (32, 48)


def test_stacks_are_let_go():
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    held = model.blocks["nha"].mlp.up.get_value()
    pointers = {
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    }
    model.unstack()
    alive = {array.unsafe_buffer_pointer() for array in jax.live_arrays()}
    assert held.unsafe_buffer_pointer() in alive, "what someone else holds stays"
    stacks = pointers - {
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    }
    assert len(stacks & alive) == 1


def test_layers_of_a_cut_model_are_cut():
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    up = model.blocks["nha"].mlp.up
    up[...] = jax.device_put(
        up.get_value(), NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    )
    model.unstack()
    layer = model.blocks["nha"][2].mlp.up.get_value()
    assert layer.sharding.spec == PartitionSpec(None, "tensor")
    assert layer.addressable_shards[0].data.shape == (32, 24)
