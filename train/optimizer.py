"""AdamW, its learning rate and what it decays."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import OptimizerConfig, ScheduleConfig


def learning_rate_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Learning rate of each update.

    Args:
        config: Kind, peak and lengths.
        steps: Updates in the whole run.

    Returns:
        A function from the number of updates already made (0 for the first) to the learning rate.
        Warm-up rises linearly to the peak at update ``warmup_steps``; the final value is reached at
        the last update.
    """
    warmup = config.warmup_steps
    decay_steps = round(config.decay_fraction * steps) if config.kind == "wsd" else steps - warmup
    decay_start = steps - decay_steps
    final = config.final_fraction

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(count, jnp.float32) + 1.0
        warm = jnp.minimum(update / max(warmup, 1), 1.0)
        progress = jnp.clip((update - decay_start) / max(decay_steps, 1), 0.0, 1.0)
        if config.kind == "cosine":
            progress = 0.5 * (1.0 - jnp.cos(jnp.pi * progress))
        return config.learning_rate * warm * (1.0 - (1.0 - final) * progress)

    return schedule


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, decay_mask: Any
) -> optax.GradientTransformation:
    """AdamW with clipping by global norm and decoupled weight decay where the mask says.

    Args:
        config: Moments, decay and clipping.
        schedule: Learning rate of each update.
        decay_mask: Pytree like the parameters: bools, or float arrays that broadcast against a
            parameter (1 where it decays, 0 where not), for stacks in which layers differ.
    """
    # A link of the chain either way: the state has one tree, and a run may go on with the other.
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        _add_masked_decay(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _add_masked_decay(weight_decay: float, decay_mask: Any) -> optax.GradientTransformation:
    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        decayed = jax.tree.map(
            lambda update, mask, param: (
                update + weight_decay * jnp.asarray(mask, param.dtype) * param
            ),
            updates,
            decay_mask,
            params,
        )
        return decayed, state

    return optax.GradientTransformation(init, update)
