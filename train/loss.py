"""Cross-entropy that never holds the float32 logits of a whole batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LossSums(NamedTuple):
    """Sums over the valid targets of a batch.

    Attributes:
        nats: Negative log-likelihood, in nats.
        z_squared: Squared log-partition function.
    """

    nats: Float[Array, ""]
    z_squared: Float[Array, ""]


def chunked_cross_entropy(
    readout: Callable[[Float[Array, "B C D"]], Float[Array, "B C P"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    chunk_size: int,
) -> LossSums:
    """Sum the cross-entropy of next-token predictions over the valid targets.

    The logits exist for ``chunk_size`` time steps at once, forward and backward (they are computed
    again in the backward pass). Time is cut rather than the batch, so that a batch sharded over
    devices stays as it is.

    Args:
        readout: From hidden states to float32 logits.
        hidden: Hidden states after the final norm.
        targets: The token that each position predicts; any valid token where the mask is False.
        loss_mask: Which predictions count.
        chunk_size: Time steps in a chunk (C).

    Returns:
        Float32 sums; divide by the number of valid targets for a mean.
    """
    length = hidden.shape[1]
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length

    def to_chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], num_chunks, chunk_size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def chunk_sums(hidden_BCD: Array, targets_BC: Array, mask_BC: Array) -> LossSums:
        logits_BCP = readout(hidden_BCD)
        log_z_BC = jax.nn.logsumexp(logits_BCP, axis=-1)
        # A sum over the vocabulary instead of a gather: it stays local when the vocabulary is
        # sharded.
        vocabulary_P = jnp.arange(logits_BCP.shape[-1], dtype=targets_BC.dtype)
        is_target_BCP = vocabulary_P == targets_BC[..., None]
        target_logit_BC = jnp.sum(jnp.where(is_target_BCP, logits_BCP, 0.0), axis=-1)
        nats_BC = jnp.where(mask_BC, log_z_BC - target_logit_BC, 0.0)
        z_squared_BC = jnp.where(mask_BC, jnp.square(log_z_BC), 0.0)
        return LossSums(jnp.sum(nats_BC), jnp.sum(z_squared_BC))

    def add_chunk(sums: LossSums, chunk: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, sums, chunk_sums(*chunk)), None

    zero = jnp.zeros((), jnp.float32)
    chunks = (to_chunks(hidden), to_chunks(targets), to_chunks(loss_mask))
    sums, _ = jax.lax.scan(add_chunk, LossSums(zero, zero), chunks)
    return sums
