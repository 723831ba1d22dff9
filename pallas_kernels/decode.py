"""One token per row against a cache, in place: a kernel bound by the state's memory traffic.

The token's row enters the rings, token t - lag retires into the slots, and one softmax reads slots
and window. Short windows take one kernel, one program per batch row and key/value head; long ones
are split (`decode_split`). Semantics: `docs/operator.md`, "Definition" and "The cache".
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.blocks import device_at_hand
from pallas_kernels.decode_blocks import DecodeBlocks, DecodeSpec, default_blocks
from pallas_kernels.decode_leaves import IN_PLACE, SMALL, Leaves, OfLayer, small_leaves
from pallas_kernels.decode_load import enter, place
from pallas_kernels.decode_parts import (
    run,
    token_items,
    used_rows,
    window_items,
    write_rings,
)
from pallas_kernels.decode_slots import slot_items
from pallas_kernels.decode_softmax import column, empty_states, slot_share, store_heads
from pallas_kernels.decode_split import merge_kernel, part_kernel, part_shapes
from pallas_kernels.decode_token import load_token
from pallas_kernels.launch import launch


def decode_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    leaves: Leaves,
    rope: tuple[jax.Array, jax.Array] | None,
    token_ids: jax.Array | None,
    layer: jax.Array | None = None,
    *,
    window: int,
    slot_lag: int,
    mask_empty: bool,
    scale: float,
    interpret: bool,
    blocks: DecodeBlocks | None = None,
) -> tuple[jax.Array, jax.Array, Leaves]:
    """One decode step; `blocks` None: `default_blocks`. `interpret` runs on any device.

    `docs/operator.md`, "Definition" and "The cache", for a piece of one token.

    Args:
      q: [B,1,N,K]. k: [B,1,G,K]. v: [B,1,G,V]. Unrotated, one dtype.
      log_decay: [B,1,G,M]; M = 0 without slots.
      leaves: slots_k [B,G,M,K], slots_v [B,G,M,V], slots_empty [B] bool, window_k [B,S,G,K] and
        window_v [B,S,G,V] (a ring of S rows), pending_k [B,lag|0,G,K], pending_log_decay
        [B,lag|0,G,M], length, segment_id and segment_length [B] int32. Slots and pending log
        decays are float32 (float64 for float64).
      rope: (cos, sin), each [1|B,1,K/2], or None.
      token_ids: [B,1] int32 document ids, 0 for padding; None: each row's document goes on.
      layer: [1|B] int32; the leaves are stacked, [L,...], and this is the layer at hand.
      window, slot_lag, scale: as in the operator. mask_empty: empty slots get no probability.

    Returns:
      Output [B,1,N,V] in q's dtype, slot mass [B,1,N] in the slots' dtype, and the leaves after the
      token. All but the four small leaves share their buffer with the input's, if it is donated.

    Raises:
      NotImplementedError: when it is lowered for anything but CUDA, without `interpret`.
    """
    spec = DecodeSpec(
        batch=q.shape[0],
        kv_heads=k.shape[2],
        heads=q.shape[2] // k.shape[2],
        key_size=k.shape[3],
        value_size=v.shape[3],
        num_slots=log_decay.shape[3],
        capacity=leaves.window_k.shape[-3],
        pending=leaves.pending_k.shape[-3],
        window=window,
        slot_lag=slot_lag,
        mask_empty=mask_empty,
        scale=scale,
        rope=rope is not None,
        has_ids=token_ids is not None,
        dtype=q.dtype,
        interpret=interpret,
    )
    blocks = blocks or default_blocks(spec, device_at_hand())
    operands = {"q": q, "k": k, "v": v, "log_decay": log_decay, "token_ids": token_ids}
    operands["layer"] = layer
    operands |= leaves._asdict()
    if rope is not None:
        operands |= {"cos": rope[0], "sin": rope[1]}
    # Arrays without elements stay outside.
    operands = {name: x for name, x in operands.items() if x is not None and x.size}
    read = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    outputs = {"out": read, "slot_mass": jax.ShapeDtypeStruct(q.shape[:3], spec.state_dtype)}
    call = functools.partial(_call, spec, blocks)
    if blocks.splits == 1:
        results = call("nha_decode", _kernel, (spec.kv_heads, spec.batch), operands, outputs)
    else:
        grid = (spec.kv_heads, 1 + blocks.splits, spec.batch)
        shapes = part_shapes(spec, blocks)
        results = call("nha_decode_parts", part_kernel, grid, operands, shapes)
        parts = {name: results[name] for name in shapes}
        if token_ids is not None:
            parts["token_ids"] = token_ids
        results |= call("nha_decode_merge", merge_kernel, (q.shape[2], spec.batch), parts, outputs)
    changed = {name: results[name] for name in IN_PLACE if name in results}
    changed |= small_leaves(spec, leaves, token_ids, layer)
    return results["out"], results["slot_mass"], leaves._replace(**changed)


def _call(spec, blocks, name: str, body: Callable, grid, operands: dict, outputs: dict) -> dict:
    """Launches `body(ids, refs by name, spec, blocks)`; in-place operands are outputs too."""
    names = list(operands)
    in_place = [n for n in names if n in IN_PLACE]
    shapes = {n: jax.ShapeDtypeStruct(operands[n].shape, operands[n].dtype) for n in in_place}
    shapes = outputs | shapes

    def kernel(ids, *refs):
        *inputs, results = refs
        # An aliased array is read and written through its output's ref.
        by_name = dict(zip(names, inputs, strict=True)) | dict(zip(shapes, results, strict=True))
        if "layer" in by_name:
            ref, b = by_name["layer"], ids[-1]
            layer = plgpu.load(place(ref, jnp.minimum(b, ref.shape[0] - 1)))
            stacked = [n for n in (*IN_PLACE, *SMALL) if n in by_name]
            by_name |= {n: OfLayer(by_name[n], layer) for n in stacked}
        body(ids, SimpleNamespace(**by_name), spec, blocks)

    results = launch(
        kernel,
        name=name,
        grid=grid,
        out_shape=tuple(shapes.values()),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        interpret=spec.interpret,
        input_output_aliases={names.index(n): list(shapes).index(n) for n in in_place},
    )(*operands.values())
    return dict(zip(shapes, results, strict=True))


def _kernel(ids, refs: SimpleNamespace, spec: DecodeSpec, blocks: DecodeBlocks) -> None:
    """Grid (G, B): the whole step of one key/value head."""
    g, b = ids
    p = enter(refs, spec, blocks, b, g)
    token, after_slots = load_token(p), empty_states(p)

    def note(states):
        nonlocal after_slots
        after_slots = states
        return states

    items = slot_items(p, token)
    if items:
        fetch, use = items[-1]
        items[-1] = fetch, lambda tiles, states: note(use(tiles, states))
    items += window_items(p, token.rotated, 0, used_rows(p))
    items += token_items(p, token)
    states = run(items, empty_states(p), blocks.ahead)
    shares = [slot_share(*pair) / pair[1].total for pair in zip(after_slots, states, strict=True)]
    outs = [s.values / column(s.total) for s in states]
    if spec.has_ids:
        shares, outs = ([jnp.where(p.valid, x, 0) for x in xs] for xs in (shares, outs))
    store_heads(p, lambda n: place(refs.slot_mass, p.b, 0, n), shares)
    columns = pl.ds(0, spec.padded_value)
    store_heads(p, lambda n: place(refs.out, p.b, 0, n, columns), outs, values=True)
    write_rings(p, token)
