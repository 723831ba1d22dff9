"""Generation with the parameters cut over the heads of a mesh."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from small_models import WINDOWS, make_config, make_model, prompts

from nha_jax.inference import SamplingConfig, generate, load_state, save_state
from nha_jax.models import LanguageModel, logical_axes
from train.sharding import parameter_shardings


def cut_over_heads(model) -> LanguageModel:
    names = ("data", "fsdp", "tensor")
    auto = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 2), names, axis_types=auto, devices=jax.devices()[:2])
    graph, parameters = nnx.split(model)
    pure = nnx.to_pure_dict(parameters)
    shardings = parameter_shardings(mesh, logical_axes(model.config), pure)
    nnx.replace_by_pure_dict(parameters, jax.device_put(pure, shardings))
    return nnx.merge(graph, parameters)


def test_a_model_cut_over_heads_generates_the_same(tmp_path):
    model = make_model(WINDOWS["mixed"])
    assert make_config(WINDOWS["mixed"]).num_kv_heads == 2
    cut = cut_over_heads(model)
    options = dict(max_tokens=20, sampling=SamplingConfig(temperature=0.0), max_length=64)
    rows = prompts(20, 5)
    expected = generate(model, rows, **options)
    found = generate(cut, rows, **options)
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.state.logits, expected.state.logits, rtol=1e-4, atol=1e-4)
    # Each device holds the cache of its heads only.
    full = found.state.cache.stacks[-1]
    assert full.window_k.shape == (1, 2, 64, 2, 8)
    assert full.window_k.addressable_shards[0].data.shape == (1, 2, 64, 1, 8)
    # Fingerprints do not depend on the mesh, so states move between them.
    save_state(tmp_path / "state", found.state, cut)
    moved = generate(model, state=load_state(tmp_path / "state", model), max_tokens=4)
    assert len(moved.tokens[0]) == 4
