"""Calls too large for the kernels' offsets, in pieces: the same numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, draw, draw_segments, outputs_and_gradients

from pallas_kernels import pieces
from pallas_kernels.pieces import in_pieces


def _arrays(rows, heads):
    rng = np.random.default_rng(0)
    return {
        "q": jnp.asarray(rng.standard_normal((rows, 3, 2 * heads))),
        "k": jnp.asarray(rng.standard_normal((rows, heads, 5))),
        "table": jnp.asarray(rng.standard_normal((1, 7))),
        "ids": jnp.asarray(rng.standard_normal((rows, 3))),
        "none": None,
    }


@pytest.mark.parametrize(
    ("rows", "heads", "limit", "calls"),
    [
        (5, 3, 150, [(5, 3)]),
        (5, 3, 149, [(4, 3), (1, 3)]),
        (5, 3, 60, [(2, 3), (2, 3), (1, 3)]),
        (1, 3, 20, [(1, 2), (1, 1)]),
        (2, 3, 10, [(1, 1)] * 6),
    ],
)
def test_pieces_of_arrays(rows, heads, limit, calls):
    """Rows first, then heads, each piece within the limit; query heads stay with theirs."""
    seen = []

    def function(x):
        seen.append(x["k"].shape[:2])
        q = x["q"].reshape(*x["q"].shape[:2], -1, 2) * x["k"].sum(2)[:, None, :, None]
        q = q * x["table"].sum() + x["ids"][:, :, None, None]
        return q.reshape(x["q"].shape), x["k"] + x["ids"].sum(1)[:, None, None], x["ids"][:, 0]

    dims = {"q": "btn", "k": "bgk", "table": "Bx", "ids": "bt", "none": None}
    x = _arrays(rows, heads)
    found = in_pieces(function, (dims,), ("btn", "bgk", "b"), 10, limit=limit)(x)
    assert seen == calls
    for a, b in zip(found, function(x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_programs_of_a_grid(monkeypatch):
    monkeypatch.setattr(pieces, "_PROGRAMS", 6)
    seen = []
    dims = {"k": "bgk", "ids": "bt"}
    x = {name: _arrays(5, 3)[name] for name in dims}
    in_pieces(lambda x: seen.append(x["k"].shape) or x["k"], (dims,), "bgk", 1, programs=3)(x)
    assert [shape[0] for shape in seen] == [2, 2, 1]


def test_one_head_too_large():
    dims = {"k": "bgk"}
    x = {"k": jnp.zeros((1, 1, 5))}
    with pytest.raises(NotImplementedError, match=r"11 elements.*reach 10.*'xla'"):
        in_pieces(lambda x: x["k"], (dims,), "bgk", 11, limit=10)(x)


def test_a_call_in_pieces(monkeypatch):
    """Forward and backward, a key/value head at a time, with documents."""
    case = Case(window=5, length=20, batch=1, num_heads=4, num_slots=3)
    inputs = draw(case, seed=1, dtype="float32")
    ids = jnp.asarray(draw_segments(np.random.default_rng(2), 1, 20, padded=True))
    rng = np.random.default_rng(3)
    cotangents = (
        jnp.asarray(rng.standard_normal((1, 20, 4, case.value_size)), jnp.float32),
        jnp.asarray(rng.standard_normal((1, 20, 4)), jnp.float32),
    )

    def run(implementation):
        def both(inputs):
            return outputs_and_gradients(case, implementation, inputs, cotangents, segment_ids=ids)

        return jax.jit(both)

    monkeypatch.setattr(pieces, "LIMIT", 20 * 2 * case.value_size)
    found = run("pallas_triton_interpret")(inputs)
    chex.assert_trees_all_close(found, run("xla")(inputs), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(pieces, "LIMIT", 20 * 2 * case.value_size - 1)
    with pytest.raises(NotImplementedError, match="one sequence of one head"):
        jax.eval_shape(run("pallas_triton_interpret"), inputs)
