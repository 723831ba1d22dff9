"""The way of the kernels through chunks that decay strongly, taken for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCES, Case, call, draw, draw_segments, gradient_errors

from pallas_kernels import gates

CASE = Case(
    window=20,
    batch=2,
    length=150,
    num_heads=4,
    num_kv_heads=2,
    key_size=16,
    value_size=16,
    num_slots=8,
)


@pytest.mark.parametrize("documents", [pytest.param(False, marks=pytest.mark.wide), True])
@pytest.mark.parametrize(
    "implementation",
    ["pallas_triton_interpret", pytest.param("pallas_triton", marks=pytest.mark.gpu)],
)
def test_any_gates(implementation, documents, monkeypatch):
    monkeypatch.setattr(gates, "LIMIT", -1.0)
    monkeypatch.setattr(gates, "gate_gradient_limit", lambda spec: -1.0)
    ids = None
    if documents:
        ids = jnp.asarray(draw_segments(np.random.default_rng(0), 2, 150, padded=True))
    run = {name: _with_gradients(name, ids) for name in (implementation, "reference")}
    tolerance, gradient_tolerance = TOLERANCES["float32"]
    for kind in ("typical", ("mixed", -20), -0.3, -5):
        x = draw(CASE, 1, gates=kind, dtype="float32")
        cotangent = x["q"][:, ::-1]
        out, found = run[implementation](x, cotangent)
        exact, expected = run["reference"](x, cotangent)
        assert float(jnp.linalg.norm(out - exact)) <= tolerance * float(jnp.linalg.norm(exact))
        for name, error in gradient_errors(found, expected, gradient_tolerance).items():
            assert error <= gradient_tolerance, (kind, name)


def _with_gradients(implementation, ids):
    names = ("q", "k", "v", "log_decay")

    @jax.jit
    def run(x, cotangent):
        rest = functools.partial(call, CASE, implementation, segment_ids=ids)
        out, pull_back = jax.vjp(lambda part: rest(x | part), {name: x[name] for name in names})
        return out, pull_back(cotangent)[0]

    return run
