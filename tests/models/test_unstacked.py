"""A model whose layers have arrays of their own computes what the stacked one does."""

import dataclasses
import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

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


def sum_of_squares(model, tokens):
    return jnp.sum(model(tokens) ** 2)


def of_documents(model, tokens):
    segment_ids = jnp.asarray([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4])
    return jnp.sum(model(tokens, segment_ids=segment_ids) ** 2)


def through_a_cache(model, tokens):
    """A piece, then a token that reads its cache, and what is left of them."""
    first, cache = model(tokens[:, :11], return_cache=True)
    last, cache = model(tokens[:, 11:], cache=cache, return_cache=True)
    return jnp.sum(first**2) + jnp.sum(last**2) + jnp.sum(cache.stacks[0].slots_v ** 2)


def assert_same_gradients(stacked, unstacked):
    """Of dicts of gradients, leaf by leaf; none of the first is 0."""
    for kind, layers in unstacked["blocks"].items():
        of_layers = [layers[number] for number in sorted(layers)]
        unstacked["blocks"][kind] = jax.tree.map(lambda *xs: jnp.stack(xs), *of_layers)
    leaves = jax.tree_util.tree_leaves_with_path(stacked)
    for (path, one), other in zip(leaves, jax.tree.leaves(unstacked), strict=True):
        size = float(jnp.linalg.norm(one))
        assert size > 0 and float(jnp.linalg.norm(one - other)) <= 1e-5 * size, path


@pytest.mark.parametrize(
    ("loss", "remat", "windows"),
    [
        (sum_of_squares, "none", (8, "full")),
        (sum_of_squares, "full", (8, "full")),
        (of_documents, "dots", (3,)),
        pytest.param(through_a_cache, "dots", (3,), marks=pytest.mark.wide),
    ],
)
def test_gradients(loss, remat, windows):
    models = pair(windows=windows, num_layers=2 * len(windows), remat=remat)
    gradient = nnx.jit(nnx.grad(loss))
    grads = [nnx.to_pure_dict(gradient(model, draw(12))) for model in models]
    assert_same_gradients(*grads)


def test_gradients_of_each_row_by_vmap():
    found = []
    for model in pair(windows=(3,), num_layers=2):
        graph, parameters = nnx.split(model)

        def gradient(parameters, row, graph=graph):
            return jax.grad(lambda p: sum_of_squares(nnx.merge(graph, p), row[None]))(parameters)

        of_rows = jax.jit(jax.vmap(gradient, (None, 0)))(parameters, draw(12))
        found.append(nnx.to_pure_dict(of_rows))
    for row in range(2):
        assert_same_gradients(*(jax.tree.map(lambda leaf, r=row: leaf[r], one) for one in found))


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize(
    ("windows", "in_loop"),
    [((8, "full"), True), ((8, 8, 8, "full"), True), ((8, 5, 3, "full"), False)],
)
def test_recomputation_outside_of_loops_is_kept_from_being_undone(windows, in_loop, remat):
    def barriers(model):
        graph, parameters = nnx.split(model)
        loss = jax.grad(lambda parameters: jnp.sum(nnx.merge(graph, parameters)(tokens)))
        return jax.jit(loss).lower(parameters).as_text().count("optimization_barrier")

    tokens = draw(12)
    stacked, unstacked = pair(windows=windows, remat=remat, implementation="reference")
    assert (barriers(stacked) == 0) == in_loop
    assert barriers(unstacked) > 0
    assert barriers(pair(windows=windows, implementation="reference")[1]) == 0


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


def live_buffers() -> dict[int, int]:
    """Bytes by pointer, without those of cut arrays: other tests may leave some behind."""
    return {
        array.unsafe_buffer_pointer(): array.nbytes
        for array in jax.live_arrays()
        if len(array.sharding.device_set) == 1
    }


def test_stacks_are_let_go():
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    held = model.blocks["nha"].mlp.up.get_value()
    pointers = {
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    }
    model.unstack()
    alive = set(live_buffers())
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


def test_memory_kinds_are_kept():
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    mlp = model.blocks["nha"].mlp
    shardings = {
        "up": NamedSharding(mesh, PartitionSpec(None, None, "tensor"), memory_kind="pinned_host"),
        "down": SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"),
    }
    for name, sharding in shardings.items():
        parameter = getattr(mlp, name)
        parameter.set_value(jax.device_put(parameter.get_value(), sharding))
    model.unstack()
    mlp = model.blocks["nha"][1].mlp
    assert mlp.up.get_value().sharding.spec == PartitionSpec(None, "tensor")
    kinds = [getattr(mlp, name).get_value().sharding.memory_kind for name in ("up", "down", "gate")]
    assert kinds == ["pinned_host", "pinned_host", jax.devices()[0].default_memory().kind]


def test_arrays_on_the_host_are_split_like_those_on_devices():
    stacked, unstacked = [LanguageModel(CONFIG, rngs=nnx.Rngs(0)) for _ in range(2)]
    up = unstacked.blocks["nha"].mlp.up
    up.set_value(np.asarray(up.get_value()))
    unstacked.unstack()
    layer = unstacked.blocks["nha"][2].mlp.up.get_value()
    assert isinstance(layer, jax.Array)
    np.testing.assert_array_equal(layer, stacked.blocks["nha"].mlp.up.get_value()[2])


def abstract(parameter):
    return jax.ShapeDtypeStruct(parameter.get_value().shape, parameter.get_value().dtype)


def deleted(parameter):
    array = jnp.copy(parameter.get_value())
    array.delete()
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            abstract,
            r"blocks\.swa\.mlp\.up is a shape without an array: an abstract model has .*give",
        ),
        (deleted, r"blocks\.swa\.mlp\.up was deleted or donated"),
        (lambda parameter: parameter.get_value().tolist(), r"blocks\.swa\.mlp\.up is a list"),
        (
            lambda parameter: parameter.get_value()[1:],
            r"blocks\.swa\.mlp\.up has shape \(0, 32, 48\): expected 1 layers in front",
        ),
    ],
)
def test_what_cannot_be_split_is_said_and_nothing_is_changed(change, message):
    model = LanguageModel(dataclasses.replace(CONFIG, **PATTERNS["kinds"]), rngs=nnx.Rngs(0))
    up = model.blocks["swa"].mlp.up
    held = up.get_value()
    up.set_value(change(up))
    with pytest.raises(ValueError, match=message):
        model.unstack()
    up.set_value(held)
    assert model.blocks["swa"].mlp.up is up
    assert len(model.unstack().blocks["nha"]) == 1


def live_bytes() -> int:
    return sum(live_buffers().values())


@pytest.fixture
def no_garbage_collection():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("fails_at", [0, 1, 18, None])
def test_one_stack_at_a_time_is_there_twice_and_a_failure_changes_nothing(
    no_garbage_collection, monkeypatch, fails_at
):
    pattern = dict(windows=(8, 5, "full", 8), layer_kinds=("nha", "nha", "full", "nha"))
    model = LanguageModel(dataclasses.replace(CONFIG, **pattern), rngs=nnx.Rngs(0))
    parameters = nnx.to_flat_state(nnx.state(model.blocks, nnx.Param))
    largest = max(parameter.get_value().nbytes for _, parameter in parameters)
    stacks = len(parameters)
    del parameters
    values = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    graph = nnx.graphdef(model)
    gc.collect()
    before = live_bytes()
    wait, used = jax.block_until_ready, []

    def fail(tree):
        tree = wait(tree)
        used.append(live_bytes() - before)
        if len(used) - 1 == fails_at:
            del tree  # or the error would hold it
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return tree

    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", fail)
        if fails_at is None:
            model.unstack()
        else:
            with pytest.raises(RuntimeError, match="Out of memory"):
                model.unstack()
    assert 0 < max(used) <= largest
    assert used[0] == largest, "the first that can fail is the one that asks for most"
    if fails_at is None:
        assert len(used) == stacks
        return
    assert len(used) == 2 * fails_at + 1, "each that was split is stacked again"
    gc.collect()
    assert nnx.graphdef(model) == graph and live_bytes() == before
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Param)), values)
    model.unstack()
    np.testing.assert_array_equal(
        model.blocks["nha"][2].mlp.up.get_value(), values["blocks"]["nha"]["mlp"]["up"][2]
    )
