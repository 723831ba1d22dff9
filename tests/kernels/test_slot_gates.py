"""Gradients of the log decays, whose exact products take features in pieces."""

import jax
import numpy as np
import pytest
from cases import (
    KERNELS,
    TOLERANCES,
    Case,
    assert_gradients_close,
    draw,
    draw_cotangents,
    outputs_and_gradients,
)


@pytest.mark.parametrize(
    ("key_size", "value_size", "rope"),
    [
        # Two halves of two pieces of 40, two of 33; four of 40, and 67 whole.
        pytest.param(160, 66, True, id="rope"),
        pytest.param(160, 67, False, id="odd", marks=pytest.mark.wide),
    ],
)
@pytest.mark.parametrize("implementation", KERNELS)
def test_features_in_pieces(key_size, value_size, rope, implementation):
    case = Case(
        window=16,
        batch=1,
        length=70,
        num_heads=2,
        num_kv_heads=1,
        key_size=key_size,
        value_size=value_size,
        num_slots=20,
        rope=rope,
    )
    inputs = draw(case, 1, gates="typical", dtype="float32")
    cotangents = draw_cotangents(np.random.default_rng(2), case, "float32")

    def gradients(name):
        run = jax.jit(lambda x: outputs_and_gradients(case, name, x, cotangents))
        return run(inputs)[1]

    assert_gradients_close(
        gradients(implementation), gradients("reference"), TOLERANCES["float32"][1]
    )
