"""The golden files: exact outputs and gradients in float64, for each implementation and dtype."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    IMPLEMENTATIONS,
    TOLERANCES,
    Case,
    assert_gradients_close,
    call,
    dtypes_of,
    relative_error,
)

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
# Two in every dtype (as drawn gates are, too), all in float64; in `make test-all` all in all.
ALL_DTYPES = ("gqa_rope", "extreme_gates")
# Interpretation compiles slowly: in the quick suite these alone, which cover every option.
INTERPRETED = (
    "linear_w0", "window_only", "packed_sink", "padded", "initial_state",
)  # fmt: skip
# These in float32 also as users have it: with all that `tests/conftest.py` has XLA leave out.
AS_USERS = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


def _is_quick(implementation: str, name: str, dtype: str) -> bool:
    if implementation == "interpret":
        return dtype == "float64" and name in INTERPRETED
    if implementation == "xla":
        return dtype in ("float64", "float32") or name in ALL_DTYPES
    return dtype == "float64"


def _cases():
    for implementation in IMPLEMENTATIONS:
        for name in INDEX:
            for dtype in dtypes_of(*implementation.values):
                marks = implementation.marks
                if not marks and not _is_quick(implementation.id, name, dtype):
                    marks = pytest.mark.wide
                label = f"{name}-{implementation.id}-{dtype}"
                yield pytest.param(name, *implementation.values, dtype, id=label, marks=marks)


@pytest.mark.parametrize(("name", "implementation", "dtype"), list(_cases()))
def test_golden(name, implementation, dtype, x64):
    spec, data = INDEX[name], dict(np.load(GOLDEN / f"{name}.npz"))
    case = Case(
        window=spec["window"],
        batch=spec["B"],
        length=spec["T"],
        num_heads=spec["N"],
        num_kv_heads=spec["G"],
        key_size=spec["K"],
        value_size=spec["V"],
        num_slots=spec["M"],
        slot_lag=spec.get("slot_lag"),
        empty_slots=spec.get("empty_slots", "mask"),
        rope=spec["rope"],
        scale=spec.get("scale"),
    )
    wide = jnp.promote_types(dtype, jnp.float32)
    dtypes = dict.fromkeys(data, wide) | dict.fromkeys(("q", "k", "v", "cotangent"), dtype)
    arrays = {
        key: jnp.asarray(value, jnp.int32 if key == "segment_ids" else dtypes[key])
        for key, value in data.items()
    }
    differentiable = {
        key: arrays[key]
        for key in ("q", "k", "v", "log_decay", "initial_slots_k", "initial_slots_v")
        if key in arrays
    }

    def run(x):
        cache = None
        if spec["initial"]:
            cache = case.cache(dtype).replace(
                slots_k=x["initial_slots_k"],
                slots_v=x["initial_slots_v"],
                slots_empty=jnp.zeros((case.batch,), bool),
            )
        results = call(
            case,
            implementation,
            arrays | x,
            segment_ids=arrays.get("segment_ids"),
            cache=cache,
            return_slot_mass=True,
            return_cache=spec["initial"],
        )
        final = (results[2].slots_k, results[2].slots_v) if spec["initial"] else ()
        return (results[0], *final), results[1]

    as_users = (
        jax.default_backend() == "cpu"
        and (implementation, dtype) == ("xla", "float32")
        and name in ALL_DTYPES
    )

    @functools.partial(jax.jit, compiler_options=AS_USERS if as_users else None)
    def both(x):
        outputs, pull_back, mass = jax.vjp(run, x, has_aux=True)
        names = ("final_cotangent_k", "final_cotangent_v") if spec["initial"] else ()
        cotangents = (arrays["cotangent"], *(arrays[name] for name in names))
        return outputs, mass, pull_back(cotangents)[0]

    outputs, mass, gradients = both(differentiable)
    # Gates beyond -20 in one token: within ten times the table.
    factor = 10 if (spec["min_log_decay"] or 0) < -20 else 1
    tolerance, gradient_tolerance = (factor * x for x in TOLERANCES[dtype])
    assert outputs[0].dtype == jnp.dtype(dtype)
    names = ("out", "final_slots_k", "final_slots_v")
    for found, key in zip(outputs, names[: len(outputs)], strict=True):
        assert relative_error(found, data[key]) <= tolerance, key
    assert relative_error(mass, data["slot_mass"], floor=1e-300) <= tolerance
    expected = {key: data[f"d{key}"] for key in differentiable}
    for key in gradients:
        assert gradients[key].dtype == differentiable[key].dtype
    assert_gradients_close(gradients, expected, gradient_tolerance)
