"""Kernels on a mesh, under `jax.vmap` and differentiated twice."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, call, draw, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import states

KERNELS = "pallas_triton_interpret"
DIFFERENTIATED = ("q", "k", "v", "log_decay")
CASE = Case(
    window=3, batch=1, length=8, num_heads=4, num_kv_heads=2, key_size=8, value_size=8, num_slots=4
)


def _mesh(kind=AxisType.Auto, **axes):
    count = math.prod(axes.values())
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} (simulated) devices")
    kinds, devices = (kind,) * len(axes), jax.devices()[:count]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def _put(mesh, arrays, **specs):
    """Arrays by name, those without a spec on every device."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P())))
        for name, x in arrays.items()
    }


def _gradients(case, implementation, inputs):
    def loss(x, inputs):
        return (call(case, implementation, inputs | x) ** 2).sum()

    x = {name: inputs[name] for name in DIFFERENTIATED}
    return jax.jit(jax.grad(loss))(x, inputs)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.wide)]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "axes", "cut"),
    [
        pytest.param(4, 2, {"x": 2, "y": 2}, ("x", "y"), id="finer_than_groups"),
        pytest.param(4, 2, {"x": 4}, "x", id="a_group_on_two_devices"),
        pytest.param(4, 1, {"x": 2}, "x", id="one_group"),
        pytest.param(6, 3, {"x": 2}, "x", id="three_groups_on_two_devices"),
        pytest.param(2, 2, {"x": 2}, "x", id="groups_of_one"),
    ],
)
def test_query_heads_that_are_cut_anyhow(heads, kv_heads, axes, cut, kind):
    case = dataclasses.replace(CASE, num_heads=heads, num_kv_heads=kv_heads)
    inputs = draw(case, seed=1, dtype="float32")
    sharded = _put(_mesh(kind, **axes), inputs, q=P(None, None, cut))
    expected = jax.jit(lambda x: call(case, "xla", x))(inputs)
    found = jax.jit(lambda x: call(case, KERNELS, x))(sharded)
    assert relative_error(np.asarray(found), expected) < 1e-5


def test_gradients_of_query_heads_that_are_cut_finer_than_groups():
    inputs = draw(CASE, seed=2, dtype="float32")
    sharded = _put(_mesh(AxisType.Explicit, x=2, y=2), inputs, q=P(None, None, ("x", "y")))
    found, expected = _gradients(CASE, KERNELS, sharded), _gradients(CASE, "xla", inputs)
    for name in DIFFERENTIATED:
        assert relative_error(np.asarray(found[name]), expected[name]) < 1e-5, name


@pytest.mark.parametrize("length", [1, 8])
def test_a_cache_that_is_cut(length):
    """Each device has its rows and heads of the cache, and nothing crosses."""
    case = dataclasses.replace(CASE, batch=2, length=length)
    inputs, mesh = draw(case, seed=3, dtype="float32"), _mesh(data=2, tensor=2)
    heads = P("data", None, "tensor")
    sharded = _put(mesh, inputs, **dict.fromkeys(DIFFERENTIATED, heads))
    cache = case.cache("float32")

    def spec(name, x):
        if x.ndim < 3 or not x.size:
            return P("data") if x.size else P()
        return P("data", "tensor") if name.startswith("slots") else heads

    leaves = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}
    cut = {
        name: jax.device_put(x, NamedSharding(mesh, spec(name, x)))
        for name, x in leaves.items()
        if isinstance(x, jax.Array)
    }

    def run(implementation):
        def step(x, cache):
            return call(case, implementation, x, cache=cache, return_cache=True)

        return jax.jit(step)

    compiled = run(KERNELS).lower(sharded, cache.replace(**cut)).compile()
    assert "all-gather" not in compiled.as_text()
    found = jax.tree.map(np.asarray, compiled(sharded, cache.replace(**cut)))
    chex.assert_trees_all_close(found, run("xla")(inputs, cache), rtol=1e-5, atol=1e-5)


def test_a_mapped_axis_that_is_cut_stays_cut():
    """Calls of one row each: the mapped axis becomes the batch, and is one that devices share."""
    mesh = _mesh(x=4)
    inputs = [draw(CASE, seed=seed, dtype="float32") for seed in range(4)]
    stacked = {name: jnp.stack([x[name] for x in inputs]) for name in DIFFERENTIATED}
    tables = {name: inputs[0][name] for name in ("cos", "sin")}
    sharded = _put(mesh, stacked, **dict.fromkeys(DIFFERENTIATED, P("x")))

    def run(x):
        return jax.vmap(lambda y: call(CASE, KERNELS, y | tables))(x)

    compiled = jax.jit(run).lower(sharded).compile()
    assert "all-gather" not in compiled.as_text()
    found = compiled(sharded)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), found.ndim)
    for i, x in enumerate(inputs):
        assert relative_error(np.asarray(found[i]), call(CASE, "xla", x | tables)) < 1e-5


def test_the_recurrence_is_split_for_what_one_device_holds(monkeypatch):
    asked = []

    def splits(spec, batch, *_):
        asked.append((batch, spec.num_kv_heads))
        return 1

    monkeypatch.setattr(states, "enough_splits", splits)
    case = dataclasses.replace(CASE, batch=4)
    inputs = draw(case, seed=4, dtype="float32")
    spec = P("data", None, "tensor")
    sharded = _put(_mesh(data=2, tensor=2), inputs, **dict.fromkeys(DIFFERENTIATED, spec))
    jax.jit(lambda x: call(case, KERNELS, x)).lower(sharded).compile()
    assert asked[-1] == (2, 1)


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.wide), 8])
def test_shards_of_shard_map(length):
    inputs = draw(dataclasses.replace(CASE, batch=2, length=length), seed=6, dtype="float32")

    def gradient(implementation, x):
        b, _, n, _ = x["q"].shape
        case = dataclasses.replace(
            CASE, batch=b, length=length, num_heads=n, num_kv_heads=x["k"].shape[2]
        )
        cache = case.cache("float32") if length == 1 else None

        def loss(q):
            found = call(case, implementation, x | {"q": q}, cache=cache, return_cache=length == 1)
            return sum((y**2).sum() for y in jax.tree.leaves(found) if y.dtype == q.dtype)

        return jax.grad(loss)(x["q"])

    def run(cut, **options):
        specs = {name: cut if name in DIFFERENTIATED else P() for name in inputs}
        shards = jax.shard_map(
            lambda x: gradient(KERNELS, x), mesh=_mesh(data=2, tensor=2), in_specs=(specs,),
            out_specs=cut, check_vma=False, **options,
        )  # fmt: skip
        return np.asarray(jax.jit(shards)(inputs))

    found = run(P("data", None, "tensor"))
    assert relative_error(found, gradient("xla", inputs)) < 1e-5
    with pytest.raises(NotImplementedError, match="axis_names leave out 'tensor'"):
        run(P("data"), axis_names={"data"})


@pytest.mark.parametrize("length", [1, 8])
def test_second_derivatives_are_refused(length):
    case = dataclasses.replace(CASE, length=length)
    inputs = draw(case, seed=5, dtype="float32")
    cache = {"cache": case.cache("float32"), "return_cache": True} if length == 1 else {}

    def loss(q):
        out = call(case, KERNELS, inputs | {"q": q}, **cache)
        return ((out[0] if cache else out) ** 2).sum()

    with pytest.raises(NotImplementedError, match=r"no second derivatives: use .*'xla'"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(inputs["q"])
