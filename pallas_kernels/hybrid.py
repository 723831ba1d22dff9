"""The operator's chunkwise kernels joined: forward, backward, and their `jax.custom_vjp`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.adjoint import adjoint_states
from pallas_kernels.outputs import Outputs, outputs
from pallas_kernels.queries import Cotangents, query_gradients
from pallas_kernels.slot_keys import slot_key_gradients
from pallas_kernels.spec import BackwardBlocks, ForwardBlocks, Operands, Spec
from pallas_kernels.states import States, chunk_states
from pallas_kernels.window_keys import window_key_gradients

_NO_GRADIENT = ("cos", "sin", "key_cos", "key_sin")


class Results(NamedTuple):
    out: Any  # [B,T,N,V]
    slot_mass: Any  # [B,T,N] wide
    slots_k: Any  # [B,G,M,K] wide, after the last row; None without slots
    slots_v: Any  # [B,G,M,V]


def hybrid_attention(
    spec: Spec, forward: ForwardBlocks, backward: BackwardBlocks, x: Operands
) -> Results:
    """One call, differentiable in every floating operand but the rotary tables.

    Raises:
      NotImplementedError: under differentiation with respect to the rotary tables.
    """
    return _attend(spec, forward, backward, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(spec, forward, backward, x):
    return _results(*_run_forward(spec, forward, x))


def _run_forward(spec: Spec, blocks: ForwardBlocks, x: Operands) -> tuple[Outputs, States | None]:
    states = chunk_states(spec, blocks, x) if spec.num_slots else None
    return outputs(spec, blocks, x, states), states


def _results(results: Outputs, states: States | None) -> Results:
    final = (None, None) if states is None else (states.final_k, states.final_v)
    return Results(results.out, results.slot_mass, *final)


def _attend_forward(spec, forward, backward, x):
    perturbed = [name for name in _NO_GRADIENT if getattr(getattr(x, name), "perturbed", False)]
    if perturbed:
        raise NotImplementedError(
            "the Pallas kernels have no gradient with respect to rope: use implementation='xla', or "
            "jax.lax.stop_gradient where the tables are not learned"
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
    return (_run_backward(spec, forward, backward, x, results, states, Cotangents(out, mass), final),)


def _run_backward(spec, forward, backward, x, results, states, cotangents, final) -> Operands:
    chunk = forward.chunk
    queries = query_gradients(spec, chunk, backward.queries, x, states, results, cotangents)
    arrays = (x, results, cotangents, queries)
    window = None
    if spec.window:
        window = window_key_gradients(spec, chunk, backward.window, *arrays)
    grads = dict.fromkeys(Operands._fields)
    if not spec.num_slots:
        return Operands(**grads | {"q": queries.q, "k": window.k, "v": window.v})
    adjoint, initial = adjoint_states(
        spec, chunk, backward.adjoint, backward.scan, x, states, results, cotangents, queries, final
    )
    slots = slot_key_gradients(
        spec, chunk, backward.slots, x, states, results, cotangents, queries, adjoint, window
    )
    grads |= {"q": queries.q, "v": slots.v, "log_decay": slots.log_decay}
    grads |= {"k": slots.k} if x.slot_k is None else {"k": window.k, "slot_k": slots.k}
    if x.slots_k is not None:
        grads |= {"slots_k": initial.k, "slots_v": initial.v}
    return Operands(**grads)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
