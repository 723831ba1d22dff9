"""Generation with the parameters cut over the heads of a mesh."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_models import WINDOWS, Letters, assert_same_state, make_config, make_model, prompts

from nha_jax.inference import SamplingConfig, generate, generation, load_state, prefill, save_state
from nha_jax.inference.layout import Layout
from nha_jax.inference.steps import decode_block, read_piece
from nha_jax.models import LanguageModel, logical_axes
from train.sharding import parameter_shardings


def cut_over_heads(model, axis_types=(AxisType.Auto,) * 3) -> LanguageModel:
    names = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((1, 1, 2), names, axis_types=axis_types, devices=jax.devices()[:2])
    graph, parameters = nnx.split(model)
    pure = nnx.to_pure_dict(parameters)
    shardings = parameter_shardings(mesh, logical_axes(model.config), pure)
    nnx.replace_by_pure_dict(parameters, jax.device_put(pure, shardings))
    return nnx.merge(graph, parameters)


def compiled() -> tuple[int, int]:
    return read_piece._cache_size(), decode_block._cache_size()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_model_cut_over_heads_generates_the_same(tmp_path, axis_type):
    model = make_model(WINDOWS["mixed"])
    assert make_config(WINDOWS["mixed"]).num_kv_heads == 2
    cut = cut_over_heads(model, (axis_type,) * 3)
    options = dict(max_tokens=20, sampling=SamplingConfig(temperature=0.0), max_length=64, piece=16)
    rows = prompts(20, 5)
    expected = generate(model, rows, **options)
    before = compiled()
    found = generate(cut, rows, **options)
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.state.logits, expected.state.logits, rtol=1e-4, atol=1e-4)
    # Each device holds the cache of its heads only.
    full = found.state.cache.stacks[-1]
    assert full.window_k.shape == (1, 2, 64, 2, 8)
    assert full.window_k.addressable_shards[0].data.shape == (1, 2, 64, 1, 8)
    # Fingerprints do not depend on the mesh, so states move between them, both ways.
    for source, target in ((cut, model), (model, cut)):
        save_state(tmp_path / "state", found.state, source)
        moved = load_state(tmp_path / "state", target)
        assert_same_state(moved, found.state)
        more = generate(target, state=moved, max_tokens=4, sampling=options["sampling"])
        assert len(more.tokens[0]) == 4
    assert moved.cache.stacks[-1].window_k.addressable_shards[0].data.shape == (1, 2, 64, 1, 8)
    # All pieces were one program, and all blocks, from a loaded state too.
    assert compiled() == (before[0] + 1, before[1] + 1)


def test_a_state_is_never_whole_on_a_device(monkeypatch):
    cut = cut_over_heads(make_model((16, "full")))
    seen = []
    read = generation.read_piece

    def watch(graph, layout, parameters, state, *piece):
        new = read(graph, layout, parameters, state, *piece)
        seen.extend(jax.tree.map(lambda leaf: leaf.sharding.spec, s) for s in (state, new))
        return new

    monkeypatch.setattr(generation, "read_piece", watch)
    prefill(cut, prompts(20, 5), max_length=64, piece=16)
    # The first piece finds its caches cut, and they stay where they were: one program for all.
    assert len(seen) == 4
    assert all(jax.tree.leaves(specs) == jax.tree.leaves(seen[0]) for specs in seen)
    slots, full = seen[0].cache.stacks
    assert full.window_k == PartitionSpec(None, None, None, "tensor")
    assert slots.slots_k == PartitionSpec(None, None, "tensor")
    assert slots.length == PartitionSpec()


def test_an_uncut_model_has_no_layout():
    model = make_model(WINDOWS["mixed"])
    assert Layout.of(model, prefill(model, [[1]], max_length=64)) is None


@pytest.mark.parametrize(
    "axis_types",
    [(AxisType.Explicit,) * 3, (AxisType.Explicit, AxisType.Auto, AxisType.Auto)],
    ids=["all", "one"],
)
def test_generation_in_a_mesh_of_explicit_axes(axis_types):
    model = make_model((16, "full"), num_layers=2)
    cut = cut_over_heads(nnx.merge(*nnx.split(model)), axis_types).unstack()
    options = dict(max_tokens=20, sampling=SamplingConfig(temperature=0.0), max_length=64, piece=16)
    before = compiled()
    with jax.set_mesh(cut.embedding.get_value().sharding.mesh):
        stops = dict(stop_strings=["no such text"], tokenizer=Letters())
        found = generate(cut, prompts(20, 5), **stops, **options)
    assert compiled() == (before[0] + 1, before[1] + 1)
    assert found.tokens == generate(model, prompts(20, 5), **options).tokens
    full = found.state.cache.stacks[1].window_k
    assert full.addressable_shards[0].data.shape == (1, 2, 64, 1, 8)


def test_a_call_of_a_model_cut_over_explicit_axes_is_refused():
    model = make_model(WINDOWS["mixed"])
    cut = cut_over_heads(model, (AxisType.Explicit,) * 3)
    mesh = cut.embedding.get_value().sharding.mesh
    tokens = jnp.zeros((2, 3), jnp.int32)
    rows = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("tensor")))
    call = nnx.jit(lambda model, tokens: model(tokens, return_cache=True))
    message = r"gate is cut by .*'tensor'.* of type Explicit: .*jax.sharding.AxisType.Auto"
    for surrounding in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with surrounding, pytest.raises(ValueError, match=message):
            call(cut, tokens)
    with pytest.raises(ValueError, match=r"tokens is cut by .*'tensor'"):
        call(model, rows)


def test_automatic_axes_within_explicit_ones_serve():
    model = make_model(WINDOWS["mixed"])
    graph, parameters = nnx.split(cut_over_heads(model, (AxisType.Explicit,) * 3))
    mesh = parameters["embedding"].get_value().sharding.mesh
    tokens = jnp.asarray([prompts(20)[0]])

    def read(parameters, tokens):
        return nnx.merge(graph, parameters)(tokens, return_cache=True)

    with jax.set_mesh(mesh):
        whole = jax.sharding.auto_axes(read, out_sharding=PartitionSpec())
        found = jax.jit(whole)(parameters, tokens)
    expected = jax.jit(read)(nnx.split(model)[1], tokens)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )
