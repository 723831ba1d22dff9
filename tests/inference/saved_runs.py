"""Runs on disk with a small model of bytes, and a clock, for the tests of the command line."""

import dataclasses
import types

import jax.numpy as jnp
from flax import nnx
from small_models import make_model

from train.checkpoints import CheckpointConfig, CheckpointMetadata, CheckpointStore
from train.step import TrainState

WINDOWS = (16, "full")


def run_model():
    return make_model(WINDOWS, vocab_size=258, num_layers=2)


def save_run(directory, tokenizer):
    model = run_model()
    config = {"model": dataclasses.asdict(model.config), "name": "run"}
    keep = CheckpointConfig(every_steps=None, every_minutes=None)
    with CheckpointStore(directory / "checkpoints", keep) as store:
        store.prepare()
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        state = TrainState(jnp.asarray(7, jnp.int32), params, {"mu": jnp.zeros(1)})
        metrics = {"loss": 1.0, "gradient_norm": 1.0}
        store.save(7, state, CheckpointMetadata(config, {}, tokenizer), metrics)
    return directory


def clock(*seconds):
    """In place of a module's `time`: a clock that shows these times, one after the other."""
    return types.SimpleNamespace(perf_counter=map(float, seconds).__next__)
