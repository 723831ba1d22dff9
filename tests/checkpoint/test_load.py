"""`nha_jax.models.load` rebuilds a trained model from its checkpoint alone."""

import dataclasses
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nha_jax.layers.rotary import RopeScaling
from nha_jax.models import LanguageModel, ModelConfig, load
from nha_jax.models.checkpoint_files import DamagedCheckpointError
from nha_jax.tokenizer import Tokenizer
from train.checkpoints import CheckpointConfig, CheckpointMetadata, CheckpointStore
from train.step import TrainState

CONFIG = ModelConfig(
    vocab_size=300,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=48,
    num_slots=4,
    windows=(3, "full"),
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    tie_embeddings=False,
)


def parameters(seed):
    """Random numbers in the shapes of the model: initialising it would have to be compiled."""
    model = nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    )


def save_run(directory, steps, config=CONFIG, devices=1):
    """A run whose parameters at each step are those of the seed ``step``."""
    mesh = jax.make_mesh((devices,), ("fsdp",), devices=jax.devices()[:devices])

    def shard(x):
        spec = PartitionSpec("fsdp") if x.ndim and x.shape[0] % devices == 0 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    metadata = CheckpointMetadata(
        config={"model": dataclasses.asdict(config), "name": "run"},
        data={},
        tokenizer=Tokenizer.bytes().to_json(),
    )
    keep_all = CheckpointConfig(every_steps=None, every_minutes=None, keep_last=9)
    with CheckpointStore(directory / "checkpoints", keep_all) as store:
        store.prepare()
        for step in steps:
            params = jax.tree.map(shard, parameters(step))
            optimizer = {"mu": jax.tree.map(jnp.zeros_like, params)}
            state = TrainState(jnp.asarray(step, jnp.int32), params, optimizer)
            store.save(step, state, metadata, {"loss": 1.0, "gradient_norm": 1.0})


def assert_holds(loaded, step):
    assert loaded.step == step
    assert loaded.config == CONFIG
    assert loaded.tokenizer.to_json() == Tokenizer.bytes().to_json()
    found = nnx.to_pure_dict(nnx.state(loaded.model, nnx.Param))
    expected = parameters(step)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    save_run(directory, [10, 20])
    return directory


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/20"])
def test_a_run_its_checkpoints_or_one_step(run, inside):
    assert_holds(load(run / inside), 20)


def test_an_older_step_by_name(run):
    assert_holds(load(run / "checkpoints" / "10"), 10)


def test_the_model_computes_what_it_did(run):
    loaded = load(run)
    tokens = jnp.arange(2 * 8).reshape(2, 8)
    graphdef, params = nnx.split(loaded.model)
    logits = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens))
    found = logits(params)
    assert found.shape == (2, 8, 300) and bool(jnp.all(jnp.isfinite(found)))
    nnx.replace_by_pure_dict(params, parameters(20))
    np.testing.assert_array_equal(found, logits(params))


def test_the_implementation_is_chosen_anew(tmp_path):
    """A run on a GPU may name kernels that the machine at hand has not."""
    save_run(tmp_path, [5], dataclasses.replace(CONFIG, implementation="pallas_triton"))
    assert_holds(load(tmp_path), 5)
    loaded = load(tmp_path, implementation="reference")
    assert loaded.config.implementation == "reference"
    assert loaded.model(jnp.ones((1, 4), jnp.int32)).shape == (1, 4, 300)


def test_saved_on_eight_devices_loads_on_one(tmp_path):
    save_run(tmp_path, [5], devices=8)
    loaded = load(tmp_path)
    assert_holds(loaded, 5)
    for leaf in jax.tree.leaves(nnx.state(loaded.model, nnx.Param)):
        assert len(leaf.sharding.device_set) == 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_damaged_newest_of_a_run_is_passed_over_with_a_warning(tmp_path):
    save_run(tmp_path, [1, 2])
    damaged = largest_file(tmp_path / "checkpoints" / "2" / "params")
    flip(damaged)
    with pytest.warns(UserWarning, match=damaged.name):
        assert_holds(load(tmp_path), 1)
    assert (tmp_path / "checkpoints" / "2").is_dir()  # reading changes nothing
    with pytest.raises(DamagedCheckpointError, match=damaged.name):
        load(tmp_path / "checkpoints" / "2")
    flip(largest_file(tmp_path / "checkpoints" / "1" / "params"))
    with warnings.catch_warnings(action="ignore"), pytest.raises(DamagedCheckpointError):
        load(tmp_path)


def test_a_lost_manifest_is_damage(tmp_path):
    save_run(tmp_path, [1])
    (tmp_path / "checkpoints" / "1" / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is missing"):
        load(tmp_path / "checkpoints" / "1")


@pytest.mark.parametrize("inside", ["", "nowhere", "checkpoints/99"])
def test_nothing_there_is_an_error_that_names_the_path(tmp_path, inside):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / inside)):
        load(tmp_path / inside)


def test_loading_needs_nothing_of_train(run):
    program = (
        "import sys\n"
        "sys.modules['train'] = None\n"  # importing it would fail
        "from nha_jax.models import load\n"
        "assert 'orbax' not in sys.modules\n"
        "print(load(sys.argv[1]).step)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, env=environment
    )
    assert result.stdout == "20\n", result.stderr
