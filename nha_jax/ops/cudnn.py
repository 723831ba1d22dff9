"""Full attention through cuDNN: what the operator is where no token ever retires.

A text from its beginning is one causal call. cuDNN's causal mask begins at the first key, so a
piece that follows the tokens of a cache is two calls, see `cudnn_pieces`.
"""

import jax
import jax.numpy as jnp

from nha_jax.ops import cudnn_pieces
from nha_jax.ops.cache import Cache
from nha_jax.ops.checks import Call
from nha_jax.ops.devices import nvidia_compute_capability
from nha_jax.ops.rotary import rotate
from nha_jax.ops.rows import rows_of
from nha_jax.ops.xla import final_cache


def refusals(call: Call) -> list[str]:
    """Why the call is more than full attention, or cuDNN does not run here."""
    t, sizes = call.q.shape[1], (call.q.shape[3], call.v.shape[3])
    slots = call.log_decay.shape[3] > 0
    reasons = []
    if call.window < t:
        reasons.append(f"window={call.window} is shorter than T={t}")
    if slots and call.slot_lag < t:
        reasons.append(f"slot_lag={call.slot_lag} is less than T={t}: tokens retire into the slots")
    if slots and call.empty_slots != "mask":
        reasons.append("empty_slots='sink'")
    if call.segment_ids is not None:
        reasons.append("segment_ids")
    if _follows_a_cache(call):
        reasons += cudnn_pieces.refusals(call)
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"{call.q.dtype}: it takes bfloat16 and float16")
    if sizes[0] != sizes[1] or sizes[0] % 8 or sizes[0] > 128:
        reasons.append(f"K={sizes[0]}, V={sizes[1]}: it takes one size, a multiple of 8 up to 128")
    if (nvidia_compute_capability() or 0) < 8:
        reasons.append("no NVIDIA GPU of compute capability 8.0 or more")
    return reasons


def _follows_a_cache(call: Call) -> bool:
    return call.cache is not None and not call.cache.is_new


def cudnn(call: Call) -> tuple[jax.Array, jax.Array, Cache | None]:
    """Runs one checked call. Returns output [B,T,N,V], slot mass [B,T,N] and the final cache."""
    if _follows_a_cache(call):
        out, slot_mass = cudnn_pieces.attend(call)
    else:
        out = jax.nn.dot_product_attention(
            rotate(call.q, call.rope),
            rotate(call.k, call.rope),
            call.v,
            scale=call.scale,
            is_causal=True,
            implementation="cudnn",
        )
        # The slots are empty and masked.
        slot_mass = jnp.zeros(out.shape[:3], call.state_dtype)
    final = None
    if call.return_cache:
        log_decay = call.log_decay.astype(call.state_dtype)
        rotated_k = rotate(call.k, call.rope)
        final = final_cache(call, rows_of(call), None, rotated_k, call.k, call.v, log_decay)
    return out, slot_mass, final
