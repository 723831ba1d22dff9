"""The operator's chunkwise kernels joined: forward, backward, and their `jax.custom_vjp`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.adjoint import adjoint_states
from pallas_kernels.blocks import BackwardBlocks, ForwardBlocks
from pallas_kernels.distribute import distribute
from pallas_kernels.outputs import Outputs, outputs
from pallas_kernels.queries import Cotangents, query_gradients
from pallas_kernels.slot_gates import gate_gradients
from pallas_kernels.slot_keys import slot_key_gradients
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States, chunk_states
from pallas_kernels.window_keys import window_key_gradients

_FLOATING = ("q", "k", "slot_k", "v", "log_decay", "slots_k", "slots_v")
_NO_GRADIENT = ("rotation", "key_rotation")


class Results(NamedTuple):
    """What `hybrid_attention` returns; wide: float32, float64 for float64."""

    out: Any  # [B,T,N,V]
    slot_mass: Any  # [B,T,N] wide
    slots_k: Any  # [B,G,M,K] wide, after the last row; None without slots
    slots_v: Any  # [B,G,M,V]


def hybrid_attention(
    spec: Spec, forward: ForwardBlocks, backward: BackwardBlocks, x: Operands
) -> Results:
    """One call, differentiable in every floating operand but the rotary tables.

    `docs/operator.md`, "Definition", chunk by chunk.

    Args:
      spec: sizes and options (static).
      forward: block sizes (static), such as `pallas_kernels.blocks.choose` gives.
      backward: likewise.
      x: the arrays, with their shapes.

    Returns:
      Output, slot mass and the slots after the last row.

    Raises:
      NotImplementedError: under differentiation with respect to the rotary tables; or when it is
        lowered for anything but CUDA and the spec does not say `interpret`.
    """
    return _attend(spec, forward, backward, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(spec, forward, backward, x):
    return _results(*_run_forward(spec, forward, x))


# Letters of `distribute`: b batch (B: or 1), n query heads, g key/value heads.
_OPERANDS = Operands(
    q="btnk",
    k="bsgk",
    slot_k="bsgk",
    v="bsgv",
    log_decay="bsgm",
    slots_k="bgmk",
    slots_v="bgmv",
    rotation="Btk",
    key_rotation="Bsk",
    source="Bt",
    reach="Bt",
    start="Bt",
    readable="Bt",
    bounds="Bx",
)
_OUTPUTS = Outputs(out="btnv", slot_mass="btn", lse="bnt")
_STATES = States(k="bcgmk", v="bcgmv", final_k="bgmk", final_v="bgmv", totals="bcgm")


def _present(dims: Operands, x: Operands) -> Operands:
    return Operands(*(d if array is not None else None for d, array in zip(dims, x, strict=True)))


def _local(spec: Spec, x: Operands) -> Spec:
    """The spec of the heads at hand: those of this device."""
    return dataclasses.replace(spec, num_heads=x.q.shape[2], num_kv_heads=x.k.shape[2])


def _run_forward(spec: Spec, blocks: ForwardBlocks, x: Operands) -> tuple[Outputs, States | None]:
    def run(x):
        here = _local(spec, x)
        states = chunk_states(here, blocks, x) if spec.num_slots else None
        return outputs(here, blocks, x, states), states

    dims = (_present(_OPERANDS, x),), (_OUTPUTS, _STATES if spec.num_slots else None)
    return distribute(run, *dims)(x)


def _results(results: Outputs, states: States | None) -> Results:
    final = (None, None) if states is None else (states.final_k, states.final_v)
    return Results(results.out, results.slot_mass, *final)


def _attend_forward(spec, forward, backward, x):
    perturbed = [name for name in _NO_GRADIENT if getattr(getattr(x, name), "perturbed", False)]
    if perturbed:
        raise NotImplementedError(
            "the Pallas kernels have no gradient with respect to rope: use implementation='xla', "
            "or jax.lax.stop_gradient where the tables are not learned"
        )
    x = jax.tree.map(lambda leaf: leaf.value, x, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    results, states = _run_forward(spec, forward, x)
    return _results(results, states), (x, results, states)


def _attend_backward(spec, forward, backward, residuals, cotangents):
    x, results, states = residuals
    zero = jax.custom_derivatives.SymbolicZero
    out, mass, *final = cotangents
    if type(out) is zero:
        out = jnp.zeros_like(results.out)
    mass = None if type(mass) is zero or not spec.num_slots else mass
    if not spec.num_slots or all(type(y) is zero for y in final):
        final = None
    else:
        final = tuple(jnp.zeros(y.shape, y.dtype) if type(y) is zero else y for y in final)
    return (
        _run_backward(spec, forward, backward, x, results, states, Cotangents(out, mass), final),
    )


def _run_backward(spec, forward, backward, x, results, states, cotangents, final) -> Operands:
    def gradients(x, *args):
        return _gradients(_local(spec, x), forward.chunk, backward, x, *args)

    dims = (
        _present(_OPERANDS, x),
        _OUTPUTS,
        None if states is None else _STATES,
        Cotangents(_OUTPUTS.out, None if cotangents.slot_mass is None else _OUTPUTS.slot_mass),
        None if final is None else (_STATES.final_k, _STATES.final_v),
    )
    grads = Operands(*(d if name in _FLOATING else None for name, d in dims[0]._asdict().items()))
    return distribute(gradients, dims, grads)(x, results, states, cotangents, final)


def _gradients(spec, chunk, backward, x, results, states, cotangents, final) -> Operands:
    queries = query_gradients(spec, chunk, backward.queries, x, states, results, cotangents)
    arrays: tuple[Any, ...] = (x, results, cotangents, queries)
    window = None
    if spec.window:
        window = window_key_gradients(spec, backward.window, *arrays)
    grads: dict[str, Any] = dict.fromkeys(Operands._fields)
    grads["q"] = queries.q
    if not spec.num_slots:
        assert window is not None
        return Operands(**grads | {"k": window.k, "v": window.v})
    adjoint, initial = adjoint_states(
        spec, chunk, backward.adjoint, backward.scan, x, states, results, cotangents, queries, final
    )
    inputs = (x, states, results, cotangents, queries, adjoint)
    slots = slot_key_gradients(spec, chunk, backward.slot_keys, *inputs, window)
    grads["v"] = slots.v
    grads["log_decay"] = gate_gradients(spec, chunk, backward.slot_gates, x, states, adjoint)
    if x.slot_k is None:
        grads["k"] = slots.k
    else:
        grads["slot_k"] = slots.k
        grads["k"] = jnp.zeros_like(x.k) if window is None else window.k
    if x.slots_k is not None:
        grads |= {"slots_k": initial.k, "slots_v": initial.v}
    return Operands(**grads)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
