"""The train step: one loss however the batch is cut, and metrics per layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nha_jax.compilation_cache import use_compilation_cache
from train.compilation import compile_ahead, memory_report
from train.sharding import make_mesh, replicated, to_global_batch
from train.step import TrainState, initialise_state, make_train_step, make_trainer

# No slots: they compile for long, and nothing here depends on the kind of layer.
PLAIN = {"model__layer_kinds": ["swa"]}
MIXED = {"model__layer_kinds": ["full", "swa"], "model__num_layers": 4}


def uneven_batch(rows: int, context: int) -> dict[str, np.ndarray]:
    """Random tokens with very different numbers of valid targets per row."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, context + 1, rows)
    lengths[:2] = context, 0
    valid = np.arange(context) < lengths[:, None]
    return {
        "tokens": rng.integers(0, 256, (rows, context)).astype(np.int32),
        "targets": rng.integers(0, 256, (rows, context)).astype(np.int32),
        "loss_mask": valid & (rng.random((rows, context)) < 0.8),
        "segment_ids": valid.astype(np.int32),
        "positions": np.broadcast_to(np.arange(context, dtype=np.int32), (rows, context)).copy(),
    }


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    return uneven_batch(8, 32)


@pytest.fixture(autouse=True)
def share_compilations(shared_compilations) -> None:
    """Programs that several tests need are compiled once."""
    use_compilation_cache(shared_compilations)


def one_step(config, batch, change=lambda state: state):
    mesh = make_mesh(config)
    trainer = make_trainer(config, mesh)
    step = jax.jit(make_train_step(trainer))
    state = change(initialise_state(trainer))
    state, metrics = step(state, to_global_batch(mesh, batch, 8))
    return jax.device_get(state), jax.device_get(metrics)


def test_accumulation_does_not_change_loss_gradient_or_update(make_config, batch) -> None:
    results = [
        one_step(make_config(grad_accumulation=count, loss__z_loss=1e-3, **PLAIN), batch)
        for count in (1, 2, 4)
    ]
    whole_state, whole = results[0]
    for state, metrics in results[1:]:
        for name in ("loss", "z_loss", "gradient_norm", "num_targets"):
            np.testing.assert_allclose(metrics[name], whole[name], rtol=2e-6, err_msg=name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            optax.tree_utils.tree_get(state.opt_state, "mu"),
            optax.tree_utils.tree_get(whole_state.opt_state, "mu"),
        )


def test_loss_is_the_mean_over_the_valid_targets_of_the_batch(make_config, batch) -> None:
    config = make_config(grad_accumulation=4, loss__chunk_size=5, **PLAIN)
    trainer = make_trainer(config, make_mesh(config))
    params = initialise_state(trainer).params

    @jax.jit
    def plain(params):
        arrays = jax.tree.map(jnp.asarray, batch)
        logits = trainer.model(params)(
            arrays["tokens"], segment_ids=arrays["segment_ids"], positions=arrays["positions"]
        )
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, arrays["targets"])
        return jnp.sum(nats * arrays["loss_mask"]) / jnp.sum(arrays["loss_mask"])

    _, metrics = one_step(config, batch)
    np.testing.assert_allclose(metrics["loss"], plain(params), rtol=1e-6)
    assert metrics["num_targets"] == np.sum(batch["loss_mask"])


def test_norms_are_per_layer_and_add_up(make_config, batch) -> None:
    def enlarge_last_layer(state):
        # The second layer of the second kind is the fourth of the model.
        scale = state.params["blocks"]["swa"]["mlp_norm"]["scale"]
        state.params["blocks"]["swa"]["mlp_norm"]["scale"] = scale.at[1].add(1000.0)
        return state

    _, metrics = one_step(make_config(**MIXED), batch, enlarge_last_layer)
    for kind in ("gradient", "parameter"):
        norms = metrics[f"{kind}_norms"]
        assert set(norms) == {"embedding", "layers", "final_norm"}
        assert norms["layers"].shape == (4,)
        total = np.sqrt(sum(np.sum(np.square(values)) for values in norms.values()))
        np.testing.assert_allclose(metrics[f"{kind}_norm"], total, rtol=1e-5)
    assert np.argmax(metrics["parameter_norms"]["layers"]) == 3


def test_compiled_step_takes_one_shape_and_reuses_the_state(make_config, batch) -> None:
    config = make_config(**PLAIN)
    mesh = make_mesh(config)
    trainer = make_trainer(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state)
    global_batch = to_global_batch(mesh, batch, 8)
    step = compile_ahead(
        make_train_step(trainer),
        trainer.abstract_state,
        global_batch,
        donate_argnums=(0,),
        out_shardings=(shardings, replicated(mesh)),
    )
    state = initialise_state(trainer)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    report = memory_report(step, mesh)
    # Updated in place: the new state takes no room beside the old one.
    assert size <= report.arguments < 1.5 * size
    new_state, _ = step(state, global_batch)
    assert isinstance(new_state, TrainState) and int(new_state.step) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    shorter = {name: rows[:, :16] for name, rows in global_batch.items()}
    with pytest.raises(TypeError):
        step(new_state, shorter)


def test_gates_and_norms_take_no_weight_decay(make_config) -> None:
    """Without gradients, what still moves is what decays."""
    config = make_config(optimizer__weight_decay=0.5)
    trainer = make_trainer(config, make_mesh(config))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape), trainer.abstract_state.params)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = trainer.optimizer.update(zeros, trainer.optimizer.init(params), params)
    still = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, update in jax.tree.leaves_with_path(updates)
        if not np.any(update)
    }
    expected = {"attention.gate", "attention_norm.scale", "mlp_norm.scale"}
    assert still == {"final_norm.scale"} | {f"blocks.nha.{name}" for name in expected}


@pytest.mark.parametrize("mask_documents", [True, False])
def test_documents_of_a_row_are_apart_unless_told_otherwise(make_config, mask_documents) -> None:
    config = make_config(data__mask_documents=mask_documents, **PLAIN)
    first, second, padding = slice(0, 12), slice(12, 24), slice(24, 32)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_mask": np.zeros((8, 32), bool),
        "segment_ids": np.zeros((8, 32), np.int32),
        "positions": np.tile(np.arange(32, dtype=np.int32) % 12, (8, 1)),
    }
    for number, place in enumerate((first, second), start=1):
        batch["segment_ids"][:, place] = number
    batch["loss_mask"][:, second] = True

    def loss(changed: slice) -> float:
        other = batch["tokens"].copy()
        other[:, changed] = (other[:, changed] + 1) % 256
        return float(one_step(config, batch | {"tokens": other})[1]["loss"])

    unchanged = loss(slice(0, 0))
    assert loss(padding) == unchanged
    assert (loss(first) == unchanged) is mask_documents
    assert loss(second) != unchanged
