"""Learning rate, clipping and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config import OptimizerConfig, ScheduleConfig
from train.optimizer import learning_rate_schedule, make_optimizer


def rates(config: ScheduleConfig, steps: int) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(learning_rate_schedule(config, steps)))(jnp.arange(steps)))


def test_cosine_rises_to_the_peak_and_ends_at_the_final_value() -> None:
    config = ScheduleConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    rate = rates(config, 20)
    np.testing.assert_allclose(rate[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate[11], (2.0 + 0.2) / 2, rtol=1e-6)  # half-way down
    np.testing.assert_allclose(rate[-1], 0.2, rtol=1e-6)
    assert np.all(np.diff(rate[3:]) < 0)


def test_wsd_is_flat_and_then_falls_linearly() -> None:
    config = ScheduleConfig(
        learning_rate=1.0, kind="wsd", warmup_steps=2, decay_fraction=0.25, final_fraction=0.0
    )
    rate = rates(config, 20)
    np.testing.assert_allclose(rate[:2], [0.5, 1.0])
    np.testing.assert_allclose(rate[2:15], 1.0)
    np.testing.assert_allclose(rate[15:], [0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-6)


def test_adamw_equals_optax_adamw() -> None:
    params = {"w": jnp.arange(6.0).reshape(2, 3), "norm": jnp.ones(3)}
    mask = {"w": True, "norm": False}
    gradients = jax.tree.map(lambda p: 0.1 * p + 0.3, params)
    config = OptimizerConfig(clip_norm=None, weight_decay=0.5)
    schedule = learning_rate_schedule(ScheduleConfig(learning_rate=0.1), 10)
    theirs = optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.5, mask=mask)
    ours = make_optimizer(config, schedule, mask)
    results = []
    for optimizer in (ours, theirs):
        state, updated = optimizer.init(params), params
        for _ in range(3):
            updates, state = jax.jit(optimizer.update)(gradients, state, updated)
            updated = optax.apply_updates(updated, updates)
        results.append(updated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *results)


def test_a_layer_of_a_stack_can_be_left_out_of_decay() -> None:
    params = {"stack": jnp.ones((3, 2, 2))}
    mask = {"stack": jnp.asarray([1.0, 0.0, 1.0]).reshape(3, 1, 1)}
    config = OptimizerConfig(weight_decay=0.5)
    optimizer = make_optimizer(config, lambda count: 0.1, mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["stack"][:, 0, 0], [-0.05, 0.0, -0.05], rtol=1e-6)


@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, 0.2), (10.0, 1.0), (None, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, scale) -> None:
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}
    config = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.0)
    optimizer = make_optimizer(config, lambda count: 0.1, {"a": True, "b": True})
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(first_moment["b"], [0.1 * 4.0 * scale], rtol=1e-6)
