"""Chunks within one document, which some kernels compute without tables, beside those that are not.

Documents are several chunks long here, and padding stands before, between and behind them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    KERNELS,
    Case,
    assert_gradients_close,
    draw,
    draw_cotangents,
    exact_dtype,
    outputs_and_gradients,
    relative_error,
)
from small_blocks import small_blocks

import nha_jax.ops.pallas as adapter
from pallas_kernels import within
from pallas_kernels.spec import Offset

CHUNK = 32
LENGTH = 24 + 12 * CHUNK  # the last chunk's rows end with it
CASE = Case(window=24, length=LENGTH, batch=5, num_heads=2, num_kv_heads=1, num_slots=20)
ROWS = (  # lengths, of padding where the id is 0
    ((0, 9), (1, 180), (0, 5), (2, 130), (1, 1), (3, 60), (0, LENGTH - 385)),
    ((1, LENGTH),),
    ((1, 3 * CHUNK), (2, LENGTH - 3 * CHUNK)),  # begins with a chunk
    ((1, 150), (0, 7), (1, LENGTH - 157)),  # goes on behind padding
    ((1, LENGTH - 1), (0, 1)),
)


def _segments() -> jax.Array:
    rows = [np.concatenate([np.full(n, i, np.int32) for i, n in row]) for row in ROWS]
    return jnp.asarray(np.stack(rows))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(adapter, "choose", small_blocks(CHUNK))


def _run(case, inputs, implementation, dtype):
    cotangents = draw_cotangents(np.random.default_rng(2), case, dtype)
    return jax.jit(
        lambda x: outputs_and_gradients(
            case, implementation, x, cotangents, segment_ids=_segments()
        )
    )(inputs)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"window": 70, "slot_lag": 5, "num_heads": 1}, id="lag", marks=pytest.mark.wide
        ),
        pytest.param({"window": 0, "rope": False}, id="linear", marks=pytest.mark.wide),
        pytest.param({"num_slots": 0}, id="sliding", marks=pytest.mark.wide),
        pytest.param({"empty_slots": "sink"}, id="sink", marks=pytest.mark.wide),
    ],
)
@pytest.mark.parametrize("implementation", KERNELS)
def test_as_by_xla(changes, implementation):
    dtype = exact_dtype(implementation)
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    case = dataclasses.replace(CASE, **changes)
    with jax.enable_x64(dtype == "float64"):
        inputs = draw(case, 1, dtype=dtype)
        outputs, gradients = _run(case, inputs, implementation, dtype)
        expected, exact = _run(case, inputs, "xla", dtype)
        for found, wanted in zip(outputs, expected, strict=True):
            assert relative_error(found, wanted) <= tolerance
        assert_gradients_close(gradients, exact, 10 * tolerance)


@pytest.mark.wide
def test_some_chunks_take_no_tables(monkeypatch):
    """With false offsets the gradients that are computed like this change."""
    inputs = draw(CASE, 1, dtype="float32")
    _, right = _run(CASE, inputs, "pallas_triton_interpret", "float32")
    monkeypatch.setattr(within, "Offset", lambda offset: Offset(offset - 1))
    _, wrong = _run(CASE, inputs, "pallas_triton_interpret", "float32")
    for name in ("k", "v", "log_decay"):
        assert not relative_error(wrong[name], right[name]) <= 1e-2, name  # or not a number
