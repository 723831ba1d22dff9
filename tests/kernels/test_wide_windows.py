"""Windows of many blocks, of which those that every row reads are not masked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    Case,
    assert_gradients_close,
    draw,
    draw_cotangents,
    outputs_and_gradients,
    relative_error,
)
from small_blocks import small_blocks

import nha_jax.ops.pallas as adapter

CASE = Case(window=64, length=150, num_slots=3)


def _documents():
    """One over the whole row; a long and a short one, padding before, between and after them."""
    ids = np.ones((2, 150), np.int32)
    ids[1, 120:] = 2
    ids[1, [*range(5), 30, *range(60, 70), *range(140, 150)]] = 0
    return jnp.asarray(ids)


def _cases():
    for window in (64, 75, 150):
        for documents in (False, True):
            marks = () if (window, documents) == (75, True) else pytest.mark.wide
            yield pytest.param(window, documents, "cpu", marks=marks)
            yield pytest.param(window, documents, "gpu", marks=pytest.mark.gpu)


@pytest.mark.parametrize(("window", "documents", "platform"), list(_cases()))
def test_as_compiled_by_xla(window, documents, platform, monkeypatch):
    monkeypatch.setattr(adapter, "choose", small_blocks(16))
    case = dataclasses.replace(CASE, window=window)
    inputs = draw(case, seed=window, dtype="float32")
    ids = _documents() if documents else None
    cotangents = draw_cotangents(np.random.default_rng(1), case, "float32")

    def run(implementation):
        return jax.jit(
            lambda inputs: outputs_and_gradients(
                case, implementation, inputs, cotangents, segment_ids=ids
            )
        )(inputs)

    kernels = "pallas_triton_interpret" if platform == "cpu" else "pallas_triton"
    (outputs, gradients), (expected, expected_gradients) = run(kernels), run("xla")
    for found, wanted in zip(outputs, expected, strict=True):
        assert relative_error(found, wanted) <= 2e-6
    assert_gradients_close(gradients, expected_gradients, 2e-5)
