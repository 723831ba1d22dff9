"""Random shapes and options of the operator: kernels against the definition in float64.

Compiling takes the time, so several draws of values, gates, documents and cache lengths share a
shape. `run` needs nothing of pytest's process: shapes are spread over processes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import (
    CACHE_INPUTS,
    TOLERANCES,
    Case,
    call,
    draw,
    draw_segments,
    gradient_errors,
    relative_error,
)

DTYPES = ("bfloat16", "float16", "float32")
GATES = ("typical", 0, -0.9, -2, -5, -20, -100, ("mixed", -20), ("mixed", -100))


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is static about a draw."""

    case: Case
    dtype: str
    # "nothing": a call without a cache, "fresh": one that returns a cache, "initial": one that
    # starts from slots, "previous": the second of two calls, rows of different lengths.
    start: str
    before: int  # tokens of the previous call
    documents: bool
    slot_mass: bool
    narrow_gates: bool  # log decays in the call's dtype, not in float32
    rope_rows: bool  # rotary tables of each row of the batch

    @property
    def first(self) -> Case:
        return dataclasses.replace(self.case, length=self.before)

    @property
    def has_step(self) -> bool:
        """Whether a call is a decode step: its own kernels run if nothing is differentiated."""
        calls = {"initial": (self.case.length,), "previous": (self.before, self.case.length)}
        return 1 in calls.get(self.start, ())

    def cache(self, dtype):
        return self.case.cache(dtype, max_length=self.before + self.case.length)


@dataclasses.dataclass
class Draw:
    """One comparison; errors over their tolerance, of the outputs and of the gradients."""

    shape: Shape
    gates: object
    errors: dict[str, float]
    gradients: dict[str, float]
    factor: float
    # Of gradients over their tolerance: the error of the definition in the call's own dtype. Where
    # terms cancel so far that it misses the table, too, kernels may miss it by twice as much.
    definition: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def over(self) -> dict[str, float]:
        pairs = zip((self.errors, self.gradients), TOLERANCES[self.shape.dtype], strict=True)
        return {
            name: error
            for errors, tolerance in pairs
            for name, error in errors.items()
            if not error <= self.factor * tolerance
        }

    @property
    def failures(self) -> list[str]:
        return [
            f"{name} {error:.1e}"
            for name, error in self.over.items()
            if not error <= 2 * self.definition.get(name, 0.0)
        ]

    @property
    def is_beyond_the_dtype(self) -> bool:
        return bool(self.over) and not self.failures


def draw_shape(seed: int) -> Shape:
    rng = np.random.default_rng([seed, 1])

    def one(*values):
        return values[rng.integers(len(values))]

    rope = bool(rng.integers(2))
    key_size = one(16, 32, 64, 80, 128, 256, int(rng.integers(8, 129)) * 2)
    if not rope and rng.uniform() < 0.3:
        key_size -= 1
    num_slots = one(0, 1, 3, 16, 33, 64, 64, 65, 100, 128, 200, 256, int(rng.integers(1, 257)))
    value_size = one(16, 32, 64, 80, 128, 256, int(rng.integers(16, 257)))
    groups = one(1, 2, 3)
    length = one(1, 2, 17, 63, 64, 65, 128, int(rng.integers(3, 300)), int(rng.integers(65, 300)))
    before = one(1, 20, 70, 130)
    if groups * num_slots * (key_size + value_size) > 10**5:  # the definition in float64 is large
        length = min(length, 130)
    window = one(0, 1, 2, 16, 63, 64, 65, 100, length, 2 * length, int(rng.integers(0, 300)))
    if not num_slots:
        window = max(window, 1)
    start = one("nothing", "nothing", "fresh", "initial", "previous", "previous")
    case = Case(
        window=window,
        batch=one(1, 2),
        length=length,
        num_heads=groups * one(1, 1, 2, 3, 4),
        num_kv_heads=groups,
        key_size=key_size,
        value_size=value_size,
        num_slots=num_slots,
        slot_lag=one(None, None, 0, int(rng.integers(0, window + 1))),
        empty_slots=one("mask", "mask", "sink"),
        rope=rope,
        scale=one(None, None, 0.5 * key_size**-0.5, 1.5 * key_size**-0.5),
    )
    documents = start != "initial" and bool(rng.integers(2))
    dtype, slot_mass = one(*DTYPES), bool(rng.integers(2))
    narrow_gates, rope_rows = (bool(x) for x in rng.integers(2, size=2))
    return Shape(case, dtype, start, before, documents, slot_mass, narrow_gates, rope_rows)


def _results(shape: Shape, implementation: str, dtype, x, ids, before_ids):
    """All floating outputs by name, those of the cache included."""
    case, cache, results = shape.case, None, {}
    options = {"return_slot_mass": shape.slot_mass}

    def split(found, prefix):
        if not isinstance(found, tuple):
            found = (found,)
        results.update(zip((f"{prefix}out", f"{prefix}mass"), found, strict=False))

    if shape.start == "initial":
        slots = {name: x.pop(name) for name in ("slots_k", "slots_v") if name in x}
        cache = shape.cache(dtype).replace(slots_empty=jnp.zeros(case.batch, bool), **slots)
    elif shape.start == "previous":
        earlier = {name[7:]: x.pop(name) for name in tuple(x) if name.startswith("before_")}
        *found, cache = call(
            shape.first, implementation, earlier, segment_ids=before_ids,
            cache=shape.cache(dtype), return_cache=True, **options,
        )  # fmt: skip
        split(tuple(found), "before_")
    returns = shape.start != "nothing"
    found = call(
        case, implementation, x, segment_ids=ids, cache=cache, return_cache=returns, **options
    )
    if returns:
        *found, final = found
        results |= {f"final_{name}": getattr(final, name) for name in CACHE_INPUTS}
        found = tuple(found)
    split(found, "")
    return results


@functools.cache
def _compiled(shape: Shape, implementation: str, dtype: str, differentiated: bool = True):
    """Outputs and gradients, or outputs alone: what is differentiated is no decode step."""

    @jax.jit
    def run(x, tables, ids, before_ids, seed):
        def results(x):
            return _results(shape, implementation, dtype, x | tables, ids, before_ids)

        if not differentiated:
            return results(x)
        outputs, pull_back = jax.vjp(results, x)
        keys = jax.random.split(seed, len(outputs))
        cotangents = {  # the same numbers in every dtype
            name: jax.random.normal(key, outputs[name].shape, shape.dtype).astype(y.dtype)
            for key, (name, y) in zip(keys, sorted(outputs.items()), strict=True)
        }
        return outputs, pull_back(cotangents)[0]

    return run


def _values(shape: Shape, seed: int, gates):
    rng = np.random.default_rng([seed, 2])
    case, b = shape.case, shape.case.batch
    x = draw(case, seed, gates, shape.dtype)
    ids = before_ids = None
    if shape.documents:
        ids = draw_segments(rng, b, case.length, padded=bool(rng.integers(2)))
        ids[rng.uniform(size=b) < 0.1] = 0
    if shape.start == "previous":
        earlier = draw(shape.first, seed + 10**6, gates, shape.dtype)
        x |= {f"before_{name}": y for name, y in earlier.items()}
        before_ids = np.ones((b, shape.before), np.int32)
        if shape.documents:
            before_ids = draw_segments(rng, b, shape.before, padded=True)
        lengths = rng.integers(0, shape.before + 1, (b, 1))
        before_ids[np.arange(shape.before) >= lengths] = 0
    elif shape.start == "initial" and case.num_slots:
        lead = (b, case.num_kv_heads, case.num_slots)
        for name, size in (("slots_k", case.key_size), ("slots_v", case.value_size)):
            x[name] = jnp.asarray(rng.standard_normal((*lead, size)), jnp.float32)
    if shape.narrow_gates:
        x |= {name: y.astype(shape.dtype) for name, y in x.items() if name.endswith("log_decay")}
    tables = {name: x.pop(name) for name in tuple(x) if name.endswith(("cos", "sin"))}
    if shape.rope_rows:
        tables = {
            name: jnp.concatenate([jnp.roll(y, i, axis=1) for i in range(b)])
            for name, y in tables.items()
        }
    return x, tables, ids, before_ids


def compare(shape: Shape, implementation: str, seed: int) -> Draw:
    """One draw of values, float64 types being enabled."""
    gates = GATES[np.random.default_rng([seed, 3]).integers(len(GATES))]
    x, tables, ids, before_ids = _values(shape, seed, gates)
    key = jax.random.key(seed)
    rest = (ids, before_ids, key)
    outputs, gradients = _compiled(shape, implementation, shape.dtype)(x, tables, *rest)
    exact = jax.tree.map(lambda y: y.astype(jnp.float64), (x, tables))
    expected, exact_gradients = _compiled(shape, "reference", "float64")(*exact, *rest)
    factor = 10.0 if gates in (-100, ("mixed", -100)) else 1.0
    errors = {name: relative_error(outputs[name], expected[name]) for name in expected}
    if shape.has_step:
        outputs = _compiled(shape, implementation, shape.dtype, False)(x, tables, *rest)
        errors |= {f"step_{y}": relative_error(outputs[y], expected[y]) for y in expected}
    tolerance = factor * TOLERANCES[shape.dtype][1]

    def against_exact(gradients):
        return gradient_errors(gradients, exact_gradients, tolerance)

    found = Draw(shape, gates, errors, against_exact(gradients), factor)
    if shape.case.window <= 2 and found.over.keys() & gradients.keys():
        _, narrow = _compiled(shape, "reference", shape.dtype)(x, tables, *rest)
        resolved = against_exact(narrow)
        found.definition = {name: resolved[name] for name in found.over if name in resolved}
    return found


def run(implementation: str, draws: int, seed: int) -> list[Draw]:
    """Draws a shape, and compares some draws of values."""
    shape = draw_shape(seed)
    with jax.enable_x64(True):
        found = [compare(shape, implementation, 1000 * seed + i) for i in range(draws)]
    _compiled.cache_clear()
    return found


def report(draws: list[Draw]) -> str:
    """One line: draws, failures, the worst errors of each dtype without those beyond it."""
    failed = sum(bool(draw.failures) for draw in draws)
    beyond = sum(draw.is_beyond_the_dtype for draw in draws)
    worst = []
    for dtype in DTYPES:
        here = [d for d in draws if d.shape.dtype == dtype and not d.is_beyond_the_dtype]
        if here:
            pair = [
                max(max(getattr(draw, kind).values()) / draw.factor for draw in here)
                for kind in ("errors", "gradients")
            ]
            worst.append(f"{dtype} {pair[0]:.1e}, {pair[1]:.1e}")
    counts = f"{len(draws)} draws, {failed} failures, {beyond} beyond the dtype"
    return f"{counts}; worst output, gradient: {'; '.join(worst)}"
