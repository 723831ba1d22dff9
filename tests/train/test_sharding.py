"""Eight simulated devices: really sharded, and the same numbers as one."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from train.data import make_loader, open_split
from train.schema import ConfigError
from train.sharding import make_mesh, partition_spec, process_block, to_global_batch
from train.step import initialise_state, make_train_step, make_trainer

CUBE = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.fixture(autouse=True)
def eight_devices() -> None:
    if jax.device_count() != 8:
        pytest.skip("needs eight devices")


def losses(config, steps: int) -> tuple[list[float], object]:
    mesh = make_mesh(config)
    trainer = make_trainer(config, mesh)
    split = open_split(config.data.directory, "train", context=config.context, seed=config.seed)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state)
    step = jax.jit(make_train_step(trainer), donate_argnums=0, out_shardings=(shardings, None))
    state, found = initialise_state(trainer), []
    with make_loader(split, batch_size=config.batch_size) as batches:
        for _ in range(steps):
            batch = to_global_batch(mesh, next(batches), config.batch_size)
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    return found, state


def test_cube_of_devices_gives_the_losses_of_one(make_config) -> None:
    alone, _ = losses(make_config(), 20)
    cube, state = losses(make_config(**CUBE), 20)
    assert alone[-1] < 0.9 * alone[0]
    np.testing.assert_allclose(cube, alone, rtol=2e-5)
    for tree in (state.params, state.opt_state):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if leaf.size >= 1024:
                share = leaf.addressable_shards[0].data.size / leaf.size
                assert share <= 1 / 4, f"{jax.tree_util.keystr(path)}: {share} on one device"


def test_kernels_train_on_a_cube_of_devices(make_config) -> None:
    """The Pallas kernels, interpreted, each device its own shard: the losses of one device."""
    alone, _ = losses(make_config(), 4)
    cube, _ = losses(make_config(**CUBE, model__implementation="pallas_triton_interpret"), 4)
    np.testing.assert_allclose(cube, alone, rtol=2e-5)


def test_state_is_initialised_in_shards(make_config) -> None:
    config = make_config(**CUBE, model__width=256, model__mlp_width=512)
    trainer = make_trainer(config, make_mesh(config))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(trainer.abstract_state))
    state = initialise_state(trainer)
    per_device = {device: 0 for device in jax.devices()}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            per_device[shard.device] += shard.data.nbytes
    assert max(per_device.values()) < 0.3 * size


def test_parameters_do_not_depend_on_the_mesh(make_config) -> None:
    states = []
    for changes in ({}, CUBE):
        config = make_config(**changes)
        states.append(jax.device_get(initialise_state(make_trainer(config, make_mesh(config)))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), *states)


def test_table_cuts_each_axis_once(make_config) -> None:
    mesh = make_mesh(make_config(**CUBE))
    assert partition_spec(mesh, ("layers", "embed", "heads", "head_size"), (2, 32, 4, 8)) == (
        PartitionSpec(None, "fsdp", "tensor", None)
    )
    assert partition_spec(mesh, ("vocab", "embed"), (258, 32)) == PartitionSpec("tensor", "fsdp")
    assert partition_spec(mesh, ("vocab", "embed"), (259, 32)) == PartitionSpec(None, "fsdp")
    assert partition_spec(mesh, ("embed", "embed"), (32, 32)) == PartitionSpec("fsdp", None)
    with pytest.raises(ValueError, match="logical axis 'colour'"):
        partition_spec(mesh, ("colour",), (32,))


def test_one_process_feeds_the_whole_batch(make_config) -> None:
    assert process_block(make_mesh(make_config(**CUBE)), 8) == (0, 1)


def test_auto_takes_all_devices(make_config) -> None:
    mesh = make_mesh(make_config(mesh__data="auto", mesh__tensor=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert re.search("Auto", str(mesh.axis_types))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mesh__data": 8, "mesh__tensor": 2}, "mesh.data=8.* do not fit 8 cpu device"),
        ({"mesh__data": "auto", "batch_size": 12}, "batch_size=12 .*mesh.data=8"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(make_config, changes, expected) -> None:
    config = make_config(**changes)
    with pytest.raises(ConfigError, match=expected):
        make_mesh(config)
