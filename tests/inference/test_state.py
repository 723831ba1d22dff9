"""The size of the cache, and states in files."""

import dataclasses
import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file
from small_models import WINDOWS, assert_same_state, make_config, make_model, prompts

from nha_jax.inference import SamplingConfig, cache_bytes, generate, load_state, prefill, save_state
from nha_jax.inference.state import empty_state
from nha_jax.inference.state_files import StateError, fingerprint
from nha_jax.models import LanguageModel, preset

COUNTERS = 3 * 4 + 1


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_those_allocated(windows, dtype):
    config = make_config(WINDOWS[windows], compute_dtype=dtype)
    model = make_model(WINDOWS[windows], compute_dtype=dtype)
    leaves = jax.tree.leaves(model.init_cache(3, max_length=100))
    jax.block_until_ready(leaves)
    assert cache_bytes(config, 3, 100) == sum(
        shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards
    )


def test_cache_bytes_at_the_8b_shape():
    config = preset("llama3_8b")  # G = 8, K = 128, M = 64
    size = 2  # bytes of bfloat16
    slots = 2 * 8 * 64 * 128 * 4
    window = 2 * 64 * 8 * 128 * size
    pending = 64 * 8 * (128 * size + 64 * 4)
    nha = slots + window + pending + COUNTERS
    full = 2 * 131_072 * 8 * 128 * size + COUNTERS
    assert cache_bytes(config, 1, 131_072, windows=64) == 32 * nha
    assert cache_bytes(config, 1, 131_072, windows="full") == 32 * full
    assert cache_bytes(config, 2, 131_072, windows="64x7,full") == 2 * (28 * nha + 4 * full)
    # Only full layers grow with the context, and no window keeps more than the text: nothing of it
    # can then retire into the slots.
    assert cache_bytes(config, 1, 64, windows=64) == 32 * nha
    short = slots + 2 * 8 * 8 * 128 * size + COUNTERS
    for window in (9, 64, 4096):
        assert cache_bytes(config, 1, 8, windows=window) == 32 * short
    kept = 2 * 16 * 8 * 128 * size + COUNTERS
    for window in (17, 64, 100_000):
        assert cache_bytes(config, 1, 16, windows=(window, "full")) == 16 * (slots + 2 * kept)


@pytest.mark.parametrize("windows", [(4096,), (64, 4), (0, 64), (16, 4), (64, "full")])
@pytest.mark.parametrize("lag", [None, 2, 32])
def test_a_state_with_max_length_takes_what_cache_bytes_says(windows, lag):
    if lag == 32:  # at most the shortest window
        windows = tuple(window for window in windows if window in ("full", 0, 64, 4096)) or (64,)
    model = make_model(windows, slot_lag=lag)
    state = empty_state(model, 2, max_length=16)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert taken == cache_bytes(model.config, 2, 16)
    rows = [leaf.shape[2] for leaf in jax.tree.leaves([s.window_k for s in state.cache.stacks])]
    assert max(rows) <= 16


@pytest.mark.parametrize(("batch", "context", "name"), [(0, 1, "batch=0"), (1, 0, "context=0")])
def test_bad_sizes_are_named(batch, context, name):
    with pytest.raises(ValueError, match=name):
        cache_bytes(make_config((16,)), batch, context)


@pytest.mark.parametrize(
    ("dtype", "windows"), [("float32", WINDOWS["mixed"]), ("bfloat16", (16, "full"))]
)
def test_a_saved_state_goes_on_bit_for_bit(tmp_path, dtype, windows):
    model = make_model(windows, compute_dtype=dtype)
    sampling = SamplingConfig(top_k=30, repetition_penalty=1.2)
    read = prefill(model, prompts(30, 4), max_length=64, piece=16, seed=5)
    save_state(tmp_path / "state", read, model)
    loaded = load_state(tmp_path / "state", model)
    assert_same_state(loaded, read)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    expected = generate(model, state=read, max_tokens=20, sampling=sampling)
    found = generate(model, state=loaded, max_tokens=20, sampling=sampling)
    assert found.tokens == expected.tokens
    assert found.log_probs == expected.log_probs
    assert_same_state(found.state, expected.state)
    # As if the prompt had just been read and not saved.
    direct = generate(
        model,
        prompts(30, 4),
        max_tokens=20,
        max_length=64,
        piece=16,
        sampling=dataclasses.replace(sampling, seed=5),
    )
    assert direct.tokens == found.tokens


def test_a_state_of_bounded_windows_is_saved_with_its_room(tmp_path):
    model = make_model((64, 4))
    read = prefill(model, prompts(20), max_length=32, piece=16)
    save_state(tmp_path / "state", read, model)
    loaded = load_state(tmp_path / "state", model)
    assert_same_state(loaded, read)
    options = dict(max_tokens=12, sampling=SamplingConfig(temperature=0.0))
    found = generate(model, state=loaded, **options)
    assert found.tokens == generate(model, state=read, **options).tokens
    with pytest.raises(ValueError, match="max_length=32 is too short: row 0 has 20 tokens and 13"):
        generate(model, state=loaded, max_tokens=13)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "state"
    model = make_model(WINDOWS["16"])
    save_state(path, prefill(model, prompts(5), max_length=64), model)
    return path


def test_states_of_other_models_are_refused(saved):
    with pytest.raises(StateError, match=r"windows 16,16,16,16; this model has 0,0,0,0"):
        load_state(saved, make_model(WINDOWS["0"]))
    with pytest.raises(StateError, match=r"another model, with num_slots=5 \(here 6\)"):
        load_state(saved, make_model(WINDOWS["16"], num_slots=6))
    with pytest.raises(StateError, match="other parameters"):
        load_state(saved, make_model(WINDOWS["16"], seed=1))


def content(path):
    with safe_open(path, framework="numpy") as file:
        leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata(), leaves


# What the newest format stores of `model_of_integers`: never change this without another number.
FORMAT = "nha-state-3"
FINGERPRINT = "4bfa49b5dce478352c75614a4874bc3fa446b0c325a27903030f1d6a6becefb8"
COUNTERS_OF_A_LAYER = {
    "length": "int32[1, 1]",
    "segment_id": "int32[1, 1]",
    "segment_length": "int32[1, 1]",
    "slots_empty": "bool[1, 1]",
}
WITH_WINDOW = {
    "pending_k": "float32[1, 1, 16, 2, 8]",
    "pending_log_decay": "float32[1, 1, 16, 2, 5]",
    "slots_k": "float32[1, 1, 2, 5, 8]",
    "slots_v": "float32[1, 1, 2, 5, 8]",
    "window_k": "float32[1, 1, 16, 2, 8]",
    "window_v": "float32[1, 1, 16, 2, 8]",
}
FULL = {
    "pending_k": "float32[1, 1, 0, 2, 8]",
    "pending_log_decay": "float32[1, 1, 0, 2, 0]",
    "slots_k": "float32[1, 1, 2, 0, 8]",
    "slots_v": "float32[1, 1, 2, 0, 8]",
    "window_k": "float32[1, 1, 20, 2, 8]",
    "window_v": "float32[1, 1, 20, 2, 8]",
}
LEAVES = {
    **{f"cache.0.{name}": leaf for name, leaf in {**COUNTERS_OF_A_LAYER, **WITH_WINDOW}.items()},
    **{f"cache.1.{name}": leaf for name, leaf in {**COUNTERS_OF_A_LAYER, **FULL}.items()},
    "counts": "int32[1, 61]",
    "keys": "uint32[1, 2]",
    "logits": "float32[1, 61]",
    "recent": "int32[1, 11]",
}


def model_of_integers():
    """Every parameter is a place's number modulo 251: the same bits whatever draws parameters."""
    model = LanguageModel(make_config((16, "full"), num_layers=2), rngs=nnx.Rngs(0))
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shape, dtype = parameter.get_value().shape, parameter.get_value().dtype
        numbers = np.arange(np.prod(shape)).reshape(shape) % 251
        parameter.set_value(jnp.asarray(numbers, dtype))
    return model


def test_what_is_stored_changes_with_the_number_of_the_format_only(tmp_path):
    model = model_of_integers()
    save_state(tmp_path / "state", empty_state(model, 1, max_length=20), model)
    metadata, leaves = content(tmp_path / "state")
    found = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
    assert metadata["format"] == FORMAT, "put the new format, its fingerprint and leaves here"
    assert (metadata["fingerprint"], found) == (FINGERPRINT, LEAVES), (
        f"what a saved state stores has changed, and its format is still {FORMAT}: states saved "
        f"before would be called those of another model. Raise the number of _FORMAT in "
        f"nha_jax/inference/state_files.py, and put the new format, fingerprint and leaves here"
    )


def test_files_that_are_no_states_are_refused(saved, tmp_path):
    model = make_model(WINDOWS["16"])
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        load_state(tmp_path / "nowhere", model)
    (tmp_path / "short").write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(StateError, match="not a sound safetensors file"):
        load_state(tmp_path / "short", model)
    save_file({"x": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(StateError, match="not a state that save_state wrote"):
        load_state(tmp_path / "foreign", model)
    metadata, leaves = content(saved)
    save_file(leaves, tmp_path / "old", {**metadata, "format": "nha-state-1"})
    with pytest.raises(StateError, match=r"of format nha-state-1, .*; this one reads nha-state-3"):
        load_state(tmp_path / "old", model)
    save_file({k: v for k, v in leaves.items() if k != "keys"}, tmp_path / "lacking", metadata)
    with pytest.raises(StateError, match="keys is missing"):
        load_state(tmp_path / "lacking", model)
    save_file({**leaves, "keys": leaves["keys"][:, :1]}, tmp_path / "narrow", metadata)
    with pytest.raises(StateError, match=r"keys is uint32\[1, 1\], expected uint32\[1, 2\]"):
        load_state(tmp_path / "narrow", model)


def test_a_save_that_fails_leaves_the_file_before_it(saved, tmp_path, monkeypatch):
    model = make_model(WINDOWS["16"])
    state = load_state(saved, model)
    with pytest.raises(OSError, match=r"nowhere/state: .*No such file"):
        save_state(tmp_path / "nowhere" / "state", state, model)

    def interrupted(leaves, name, metadata):
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    save_state(tmp_path / "state", state, model)
    before = (tmp_path / "state").read_bytes()
    monkeypatch.setattr("safetensors.flax.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path / "state", state, model)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_bytes() == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_saved_state_has_the_mode_of_any_new_file(saved, tmp_path, umask, mode):
    model = make_model(WINDOWS["16"])
    state = load_state(saved, model)
    (tmp_path / "state.tmp").touch(0o600)  # left by a save that was killed
    before = os.umask(umask)
    try:
        save_state(tmp_path / "state", state, model)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == mode


def test_a_fingerprint_sees_every_bit_and_place():
    model = make_model(WINDOWS["16"], seed=7)
    before, table = fingerprint(model), model.embedding[...]
    assert fingerprint(model) == before
    for changed in (table.at[3, 4].multiply(-1), table.at[jnp.asarray([3, 4])].set(table[4:2:-1])):
        model.embedding[...] = changed
        assert fingerprint(model) != before
    model.embedding[...] = table
    assert fingerprint(model) == before
