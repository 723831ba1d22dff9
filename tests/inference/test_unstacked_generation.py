"""Generation with a model whose layers have arrays of their own."""

import pytest
from flax import nnx
from small_models import WINDOWS, assert_same_state, make_model, prompts
from test_mesh import cut_over_heads

from nha_jax.inference import SamplingConfig, generate, load_state, save_state


@pytest.mark.parametrize("cut", [pytest.param(False, marks=pytest.mark.wide), True])
def test_same_text_and_states_that_move_both_ways(tmp_path, cut):
    def model():
        made = nnx.merge(*nnx.split(make_model(WINDOWS["mixed"])))  # its own: others share it
        return cut_over_heads(made) if cut else made

    stacked, unstacked = model(), model().unstack()
    options = dict(max_tokens=20, sampling=SamplingConfig(temperature=0.0), max_length=64, piece=16)
    found = [generate(m, prompts(20, 5), **options) for m in (stacked, unstacked)]
    assert found[0].tokens == found[1].tokens
    for source, target, result in (
        (stacked, unstacked, found[0]),
        (unstacked, stacked, found[1]),
    ):
        save_state(tmp_path / "state", result.state, source)
        moved = load_state(tmp_path / "state", target)
        assert_same_state(moved, result.state)
        more = generate(target, state=moved, max_tokens=4, sampling=options["sampling"])
        assert len(more.tokens[0]) == 4
