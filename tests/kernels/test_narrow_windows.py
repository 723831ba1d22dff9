"""Windows of few tokens beside slots that are alike: gradients of terms that cancel."""

import jax
import jax.numpy as jnp
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
    ("options", "gates", "dtype"),
    [
        pytest.param(
            {"window": 2, "slot_lag": 0},
            -20,
            "bfloat16",
            id="slots-as-the-window",
            marks=pytest.mark.wide,
        ),
        pytest.param({"window": 2, "slot_lag": 0}, -0.9, "bfloat16", id="nearly"),
        pytest.param(
            {"window": 1, "rope": False}, -20, "bfloat16", id="many-alike", marks=pytest.mark.wide
        ),
        pytest.param(
            {"window": 24, "slot_lag": 0, "num_slots": 256, "scale": 0.09},
            -0.9,
            "bfloat16",
            id="fewer-than-slots",
            marks=pytest.mark.wide,
        ),
        pytest.param({"window": 1}, -5, "float16", id="float16", marks=pytest.mark.wide),
        pytest.param({"window": 0}, -5, "bfloat16", id="linear", marks=pytest.mark.wide),
        pytest.param({"window": 1}, -5, "float32", id="float32", marks=pytest.mark.wide),
    ],
)
@pytest.mark.parametrize("implementation", KERNELS)
def test_gradients(options, gates, dtype, implementation):
    """All slots hold the same: one gate for all of them, and the window's share is a hundredth."""
    sizes = {"length": 64, "num_heads": 2, "num_kv_heads": 1, "key_size": 32, "value_size": 28}
    case = Case(**{"num_slots": 128, **sizes, **options})
    inputs = draw(case, 1, gates=gates, dtype=dtype)
    d_out, d_mass = draw_cotangents(np.random.default_rng(2), case, dtype)
    # The mass's gradient cancels less: in one case.
    cotangents = d_out, jnp.zeros_like(d_mass) if case.rope else d_mass

    def gradients(implementation, dtype):
        x = {name: y.astype(jnp.promote_types(y.dtype, dtype)) for name, y in inputs.items()}
        run = jax.jit(lambda x: outputs_and_gradients(case, implementation, x, cotangents)[1])
        return run(x)

    with jax.enable_x64(True):
        exact = gradients("reference", "float64")
    assert_gradients_close(gradients(implementation, dtype), exact, TOLERANCES[dtype][1])
