"""Drawn cases against the dense statement of the definition: options, gates, lengths, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CHUNKWISE,
    IMPLEMENTATIONS,
    TOLERANCES,
    Case,
    assert_gradients_close,
    dense,
    draw,
    draw_cotangents,
    draw_segments,
    dtypes_of,
    outputs_and_gradients,
    quick,
    relative_error,
    with_dtypes,
)

OPTIONS = {
    "hybrid": Case(window=9),
    "wide_window": Case(window=33, length=150, num_kv_heads=1, key_size=10, value_size=7),
    "lag_between": Case(window=21, slot_lag=5, scale=0.3),
    "lag_zero_sink": Case(window=6, slot_lag=0, empty_slots="sink", rope=False),
    "linear": Case(window=0, num_slots=5, rope=False),
    "linear_many_slots": Case(window=0, num_slots=130, rope=False),
    "linear_sink": Case(window=0, num_slots=3, empty_slots="sink", rope=False),
    "window_only": Case(window=17, num_slots=0),
    "full": Case(window=500, slot_lag=4),
    "one_token": Case(window=3, length=1),
    "below_a_block": Case(window=2, length=11, slot_lag=1),
    "group_of_three": Case(window=70, length=150, num_heads=6, slot_lag=66, num_slots=3),
    "one_head": Case(
        window=1, num_heads=1, num_kv_heads=1, key_size=1, value_size=1, num_slots=1, rope=False
    ),
    "many_slots": Case(window=4, key_size=33, value_size=40, num_slots=70, rope=False),
    "wide_slots": Case(window=5, length=40, key_size=130, value_size=200, num_slots=130),
}
# Every option in float64; the sweep over options and implementations in `make test-all`.
EVERY_TIME = ("hybrid", "lag_between", "lag_zero_sink", "window_only", "full", "below_a_block")
INTERPRETED = ("group_of_three", "many_slots")


def _option_cases():
    for implementation in IMPLEMENTATIONS:
        (function,) = implementation.values
        every_time = INTERPRETED if implementation.id == "interpret" else EVERY_TIME
        dtypes = dtypes_of(function)
        for name in OPTIONS:
            for dtype in dtypes if function == "pallas_triton" else dtypes[:1]:
                marks = list(implementation.marks)
                if name not in every_time and not marks:
                    marks = [pytest.mark.wide]
                label = f"{name}-{implementation.id}-{dtype}"
                yield pytest.param(name, function, dtype, id=label, marks=marks)


@functools.cache
def _found(case, implementation):
    @jax.jit
    def run(inputs, segment_ids, cotangents):
        return outputs_and_gradients(
            case, implementation, inputs, cotangents, segment_ids=segment_ids
        )

    return run


@functools.cache
def _exact(case):
    @jax.jit
    def run(inputs, segment_ids, cotangents):
        names = [name for name in ("q", "k", "v", "log_decay") if name in inputs]
        outputs, pull_back = jax.vjp(
            lambda x: dense(case, inputs | x, segment_ids), {name: inputs[name] for name in names}
        )
        return outputs, pull_back(cotangents)[0]

    return run


def _compare(case, implementation, dtype, inputs, segment_ids, factor=1.0):
    tolerance, gradient_tolerance = (factor * x for x in TOLERANCES[dtype])
    rng = np.random.default_rng(99)
    cotangents = draw_cotangents(rng, case, dtype)

    (out, mass), gradients = _found(case, implementation)(inputs, segment_ids, cotangents)
    # On the CPU, where float64 is quick to compile and to run; also when the rest is on a GPU.
    exact_inputs, exact_ids, exact_cotangents = jax.device_put(
        (inputs, segment_ids, cotangents), jax.devices("cpu")[0]
    )
    exact_inputs = {name: x.astype(jnp.float64) for name, x in exact_inputs.items()}
    exact_cotangents = tuple(x.astype(jnp.float64) for x in exact_cotangents)
    (exact_out, exact_mass), exact_gradients = _exact(case)(
        exact_inputs, exact_ids, exact_cotangents
    )
    assert out.dtype == jnp.dtype(dtype)
    assert relative_error(out, exact_out) <= tolerance
    assert relative_error(mass, exact_mass) <= tolerance
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
    assert_gradients_close(gradients, exact_gradients, gradient_tolerance)


@pytest.mark.parametrize(("name", "implementation", "dtype"), list(_option_cases()))
def test_options(name, implementation, dtype, x64):
    """Every option of the contract, with and without documents and padding."""
    case = OPTIONS[name]
    inputs = draw(case, seed=1, dtype=dtype)
    for padded in (False, True):
        segment_ids = jnp.asarray(
            draw_segments(np.random.default_rng(2), case.batch, case.length, padded)
        )
        if padded:
            segment_ids = segment_ids.at[0].set(0)  # a row that is padding throughout
        _compare(case, implementation, dtype, inputs, segment_ids)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    with_dtypes(CHUNKWISE, ("float32", "bfloat16", "float16"), interpreted=("float32",)),
)
def test_gates(implementation, dtype, x64):
    """Gates from 0 to -100, mixed and uniform, at the table's tolerances (ten times below -20)."""
    case = Case(window=5, length=150, batch=1, key_size=16, value_size=16, num_slots=8)
    for gates in ("typical", ("mixed", -20), -0.6, -0.9, -1.1, -2, -5, -20, ("mixed", -100), -100):
        lowest = gates[1] if isinstance(gates, tuple) else gates
        factor = 10 if lowest == -100 else 1
        inputs = draw(case, seed=3, gates=gates, dtype=dtype)
        _compare(case, implementation, dtype, inputs, None, factor)


def _each_in_its_dtypes():
    """Kernels in every dtype of the hardware, the others in float64."""
    for name in ("xla", "pallas_triton_interpret", "pallas_triton"):
        params = [param for param in CHUNKWISE if param.values == (name,)]
        dtypes = dtypes_of(name) if name == "pallas_triton" else ["float64"]
        yield from with_dtypes(params, dtypes)


@pytest.mark.parametrize(("implementation", "dtype"), list(_each_in_its_dtypes()))
def test_documents_about_a_block_long(implementation, dtype, x64):
    """Lengths of 1, 2, 63, 64 and 65 tokens, none of them aligned, and the first across a block."""
    case = Case(window=20, length=260, batch=1, num_heads=6, key_size=16, value_size=24)
    lengths = (65, 1, 2, 63, 64, 65)
    ids = jnp.asarray(np.repeat([1, 2, 1, 3, 2, 1], lengths)[None], jnp.int32)
    _compare(case, implementation, dtype, draw(case, seed=5, dtype=dtype), ids)


@pytest.mark.parametrize("implementation", quick(IMPLEMENTATIONS, interpreted=True))
def test_extreme_inputs_stay_finite(implementation):
    """Huge scores and gates down to the lowest float32: no NaN, no infinity."""
    case = Case(window=4, length=40, rope=False)
    inputs = draw(case, seed=4, gates=("mixed", -3e38), dtype="float32")
    inputs["q"] = inputs["q"] * 1e18
    inputs["k"] = inputs["k"] * 1e18
    cotangents = (
        jnp.ones((case.batch, case.length, case.num_heads, case.value_size)),
        jnp.ones((case.batch, case.length, case.num_heads)),
    )
    outputs, gradients = jax.jit(
        lambda x: outputs_and_gradients(case, implementation, x, cotangents)
    )(inputs)
    for name, x in {"out": outputs[0], "mass": outputs[1], "v": gradients["v"]}.items():
        assert np.isfinite(x).all(), name
    for name, x in gradients.items():
        assert not np.isnan(x).any(), name
