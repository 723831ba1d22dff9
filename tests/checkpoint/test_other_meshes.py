"""The state of a real model, from one mesh to another, bit by bit."""

import dataclasses

import jax
import numpy as np
import pytest

from nha_jax.models import ModelConfig
from train.checkpoints import CheckpointConfig, CheckpointMetadata, CheckpointStore
from train.config import DataConfig, MeshConfig, PretrainConfig, ScheduleConfig, ValidationConfig
from train.sharding import make_mesh
from train.step import make_trainer

MODEL = ModelConfig(
    vocab_size=256,
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=128,
    num_slots=4,
    windows=(4,),
    tie_embeddings=False,
)
CONFIG = PretrainConfig(
    name="meshes",
    steps=10,
    batch_size=8,
    context=16,
    model=MODEL,
    data=DataConfig(directory="unused"),
    schedule=ScheduleConfig(learning_rate=1e-3),
    validation=ValidationConfig(every_steps=5),
)
ONE, CUBE = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)


def abstract_state(sizes):
    config = dataclasses.replace(CONFIG, mesh=sizes)
    return make_trainer(config, make_mesh(config)).abstract_state


@pytest.mark.parametrize("saved_on, restored_on", [(CUBE, ONE), (ONE, CUBE)])
def test_state_moves_between_meshes(tmp_path, saved_on, restored_on):
    random = np.random.default_rng(0)
    before, after = abstract_state(saved_on), abstract_state(restored_on)
    numbers = jax.tree.map(lambda x: random.integers(0, 99, x.shape).astype(x.dtype), before)
    state = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), numbers, before)
    every = CheckpointConfig(every_steps=None, every_minutes=None)
    with CheckpointStore(tmp_path, every) as store:
        store.prepare()
        store.save(3, state, CheckpointMetadata({}, {}, ""), {"loss": 1.0, "gradient_norm": 1.0})
        store.wait()
        restored, _ = store.restore(3, after)
    assert jax.tree.structure(restored) == jax.tree.structure(after)
    for array, shape, expected in zip(
        *map(jax.tree.leaves, (restored, after, numbers)), strict=True
    ):
        assert array.sharding.is_equivalent_to(shape.sharding, array.ndim)
        np.testing.assert_array_equal(array, expected)
    sharded = [not x.sharding.is_fully_replicated for x in jax.tree.leaves((before, after))]
    assert any(sharded)
