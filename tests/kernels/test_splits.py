"""The recurrence in splits that run side by side, as long sequences of few heads have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, call, draw, draw_segments, relative_error
from small_blocks import small_blocks

import nha_jax.ops.pallas as adapter

CASE = Case(window=9, length=150)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_as_compiled_by_xla(documents, cached, monkeypatch):
    """Outputs, and where there is a cache the one after, whose slots were not empty."""
    monkeypatch.setattr(adapter, "choose", small_blocks(16, splits=4))
    inputs = draw(CASE, seed=1, dtype="float32")
    ids, options = None, {}
    if documents:
        ids = draw_segments(np.random.default_rng(0), CASE.batch, CASE.length, padded=True)
        ids[1] = np.where(np.arange(CASE.length) < 100, 1, 2)  # over several splits
        ids = jnp.asarray(ids)
    if cached:
        rng, cache = np.random.default_rng(3), CASE.cache("float32")
        slots = {
            name: jnp.asarray(rng.standard_normal(getattr(cache, name).shape), jnp.float32)
            for name in ("slots_k", "slots_v")
        }
        cache = cache.replace(**slots, slots_empty=jnp.zeros(CASE.batch, bool))
        options = {"cache": cache, "return_cache": True}

    def run(implementation):
        result = jax.jit(lambda x: call(CASE, implementation, x, segment_ids=ids, **options))(
            inputs
        )
        if not cached:
            return [result]
        return [result[0], result[1].slots_k, result[1].slots_v]

    for found, expected in zip(run("pallas_triton_interpret"), run("xla"), strict=True):
        assert relative_error(found, expected) < 1e-5
