"""The way of the kernels through chunks that decay strongly, taken for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS, TOLERANCES, Case, call, draw, draw_segments, gradient_errors

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
@pytest.mark.parametrize("implementation", KERNELS)
def test_any_gates(implementation, documents, monkeypatch):
    monkeypatch.setattr(gates, "LIMIT", -1.0)
    monkeypatch.setattr(gates, "BACKWARD_LIMIT", -1.0)
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


@pytest.mark.parametrize("gate", [pytest.param(-0.6, marks=pytest.mark.wide), -0.9])
def test_small_gradients_survive(gate):
    """Chunks that decay by e^-38 and e^-58, whose factors meet gradients of 1e-12."""
    x = draw(CASE, 2, gates=gate, dtype="float32")
    cotangent = x["q"][:, ::-1] * 1e-12
    grads = [
        _with_gradients(name, None)(x, cotangent)[1]
        for name in ("pallas_triton_interpret", "reference")
    ]
    grads = [{name: 1e12 * np.asarray(y, np.float64) for name, y in each.items()} for each in grads]
    tolerance = TOLERANCES["float32"][1]
    for name, error in gradient_errors(*grads, tolerance).items():
        assert error <= tolerance, name


def _with_gradients(implementation, ids):
    names = ("q", "k", "v", "log_decay")

    @jax.jit
    def run(x, cotangent):
        rest = functools.partial(call, CASE, implementation, segment_ids=ids)
        out, pull_back = jax.vjp(lambda part: rest(x | part), {name: x[name] for name in names})
        return out, pull_back(cotangent)[0]

    return run
