"""Programs that do several heads of a group at once, or load keys again for each of them."""

import dataclasses

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
    draw_segments,
    outputs_and_gradients,
    relative_error,
)
from small_blocks import small_blocks

import nha_jax.ops.pallas as adapter

CASE = Case(window=24, length=90, num_heads=8, num_kv_heads=2, num_slots=20)


@pytest.mark.parametrize(
    ("changes", "gates", "documents"),
    [
        pytest.param({}, "typical", False, id="plain", marks=pytest.mark.wide),
        pytest.param({}, ("mixed", -20), True, id="strong-documents"),
        pytest.param({"window": 0}, "typical", True, id="linear", marks=pytest.mark.wide),
        pytest.param({"num_slots": 0}, "typical", True, id="sliding", marks=pytest.mark.wide),
        pytest.param({"slot_lag": 5, "rope": False}, "typical", False, id="lag"),
        pytest.param({"scale": -0.3}, "typical", False, id="scale", marks=pytest.mark.wide),
    ],
)
@pytest.mark.parametrize(
    ("heads", "reload"), [pytest.param(2, False, marks=pytest.mark.wide), (4, True)]
)
@pytest.mark.parametrize("implementation", KERNELS)
def test_as_defined(changes, gates, documents, heads, reload, implementation, monkeypatch):
    monkeypatch.setattr(adapter, "choose", small_blocks(32, heads=heads, reload=reload))
    case = dataclasses.replace(CASE, **changes)
    inputs = draw(case, 1, gates=gates, dtype="float32")
    rng = np.random.default_rng(2)
    ids = jnp.asarray(draw_segments(rng, case.batch, case.length, True)) if documents else None
    cotangents = draw_cotangents(rng, case, "float32")

    def run(name):
        return jax.jit(lambda x: outputs_and_gradients(case, name, x, cotangents, segment_ids=ids))(
            inputs
        )

    (outputs, gradients), (expected, exact) = run(implementation), run("reference")
    tolerance, gradient_tolerance = TOLERANCES["float32"]
    for found, wanted in zip(outputs, expected, strict=True):
        assert relative_error(found, wanted) <= tolerance
    assert_gradients_close(gradients, exact, gradient_tolerance)
