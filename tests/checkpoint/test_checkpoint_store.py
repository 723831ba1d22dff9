"""The store on small trees: what is saved comes back, what is kept, what errors do."""

import dataclasses
import json
import os
import signal
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nha_jax.models.checkpoint_files import step_directories, verify
from train import checkpoint_policy, checkpoints, integrity
from train.checkpoints import (
    CheckpointConfig,
    CheckpointError,
    CheckpointMetadata,
    CheckpointStore,
    NotFiniteError,
)


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


METADATA = CheckpointMetadata(
    config={"model": {"windows": [4, "full"]}, "name": "ü", "clip": None},
    data={"manifest": "12ab", "seed": 2**32 - 1},
    tokenizer='{"kind": "bytes", "text": "\\u00e9 é"}',
)
GOOD = {"loss": 1.5, "gradient_norm": 0.5}
MANUAL = CheckpointConfig(every_steps=None, every_minutes=None)


def make_state(step=3, scale=1.0):
    params = {
        "embedding": {"kernel": scale * jnp.arange(512.0).reshape(16, 32)},
        "norm": {"scale": jnp.full(32, scale, jnp.bfloat16)},
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), {"embedding": True, "norm": False}),
    )
    return State(jnp.asarray(step, jnp.int32), params, optimizer.init(params))


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save(store, step, state=None, **metrics):
    return store.save(step, state or make_state(step), METADATA, {**GOOD, **metrics})


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "checkpoints", MANUAL) as store:
        assert store.prepare() is None
        yield store


def test_state_and_metadata_come_back(store):
    state = make_state()
    assert save(store, 3, state)
    store.wait()
    verify(store.directory / "3")
    restored, metadata = store.restore(3, abstract(state))
    assert isinstance(restored, State)
    assert_same(restored, state)
    assert metadata == METADATA
    assert store.metrics(3) == GOOD


def test_state_may_be_donated_while_it_is_written(store):
    """The copy is taken before `save` returns, whatever the next step does to the buffers."""
    state = make_state()
    state = state._replace(params={"large": jnp.arange(2.0**20).reshape(1024, 1024)})
    before = jax.tree.map(lambda x: np.array(x, copy=True), state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    shapes = abstract(state)
    jax.block_until_ready(overwrite(jax.tree.map(jnp.copy, state)))  # compiled beforehand
    save(store, 3, state)
    jax.block_until_ready(overwrite(state))
    store.wait()
    restored, _ = store.restore(3, shapes)
    assert_same(restored, before)


@pytest.mark.parametrize("saved_on, restored_on", [(1, 8), (8, 1), (8, 2)])
def test_restores_onto_another_mesh(store, saved_on, restored_on):
    def sharding(count):
        mesh = jax.make_mesh((count,), ("fsdp",), devices=jax.devices()[:count])
        return lambda x: NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim else PartitionSpec())

    state = make_state()
    saved = jax.tree.map(lambda x: jax.device_put(x, sharding(saved_on)(x)), state)
    save(store, 3, saved)
    store.wait()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(restored_on)(x)), state
    )
    restored, _ = store.restore(3, shapes)
    assert_same(restored, state)
    kernel = restored.params["embedding"]["kernel"]
    assert len(kernel.addressable_shards) == restored_on
    assert kernel.addressable_shards[0].data.shape == (16 // restored_on, 32)


def test_another_model_is_an_error_that_says_so(store):
    state = make_state()
    save(store, 3, state)
    store.wait()
    other = state._replace(params={"embedding": {"kernel": jnp.zeros((16, 33))}})
    with pytest.raises(CheckpointError, match="does not hold the arrays of this model"):
        store.restore(3, abstract(other))


def test_newest_and_best_are_kept_when_the_loss_rises(tmp_path):
    config = dataclasses.replace(MANUAL, keep_last=2, keep_best=1)
    directory = tmp_path / "checkpoints"
    with CheckpointStore(directory, config) as store:
        store.prepare()
        for step in range(1, 7):
            save(store, step, validation_loss=float(step))
    assert list(step_directories(directory)) == [1, 5, 6]
    with CheckpointStore(directory, config) as store:
        assert store.prepare() == 6
        assert int(store.restore(6, abstract(make_state()))[0].step) == 6
        for step in (7, 8):  # the best of before the restart is still known
            save(store, step, validation_loss=float(step))
    assert list(step_directories(directory)) == [1, 7, 8]


def test_best_and_last_may_be_the_same_checkpoints(tmp_path):
    config = dataclasses.replace(MANUAL, keep_last=1, keep_best=2)
    with CheckpointStore(tmp_path, config) as store:
        store.prepare()
        for step, loss in enumerate([4.0, 1.0, 3.0, 2.0, 5.0, 0.5], start=1):
            save(store, step, validation_loss=loss)
        store.wait()
        assert store.steps() == [2, 6]


def test_without_validation_loss_only_the_newest_are_kept(tmp_path):
    with CheckpointStore(tmp_path, dataclasses.replace(MANUAL, keep_last=1)) as store:
        store.prepare()
        save(store, 1, validation_loss=1.0)
        for step in (2, 3, 4):
            save(store, step)
        store.wait()
        assert store.steps() == [1, 4]


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    config = dataclasses.replace(MANUAL, keep_last=1, keep_best=0)
    seen = []
    with CheckpointStore(tmp_path, config) as store:
        store.prepare()
        save(store, 1)
        store.wait()

        def delete(path):
            seen.append(path.name)
            verify(tmp_path / "2")

        monkeypatch.setattr(integrity, "delete_checkpoint", delete)
        save(store, 2)
        store.wait()
    assert seen == ["1"]


def test_manifest_is_written_off_the_training_thread(tmp_path, monkeypatch):
    threads = []
    write = checkpoints.files.write_manifest
    monkeypatch.setattr(
        checkpoints.files,
        "write_manifest",
        lambda path: (threads.append(threading.current_thread()), write(path)),
    )
    with CheckpointStore(tmp_path, MANUAL) as store:
        store.prepare()
        save(store, 1)
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_a_step_is_saved_once(store):
    assert save(store, 3)
    assert not save(store, 3, make_state(scale=2.0))
    store.wait()
    restored, _ = store.restore(3, abstract(make_state()))
    assert_same(restored, make_state())


def test_a_step_that_was_resumed_from_is_not_saved_again(store):
    save(store, 3)
    store.wait()
    assert store.prepare() == 3
    assert not save(store, 3)
    assert not store.should_save(3)


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "validation_loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_and_nothing_is_written(store, name, value):
    save(store, 3)
    store.wait()
    with pytest.raises(NotFiniteError, match=rf"step 4 .*{name}={value}.*{store.directory}/3"):
        save(store, 4, **{name: value})
    store.wait()
    assert store.steps() == [3]
    assert not list(store.directory.glob("4*"))


def test_full_disk_is_found_before_anything_is_written(store, monkeypatch):
    save(store, 3)
    store.wait()
    usage = integrity.shutil.disk_usage(store.directory)._replace(free=1000)
    monkeypatch.setattr(integrity.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=f"1,000 bytes free.*{store.directory}/3"):
        save(store, 4)
    assert store.steps() == [3]
    assert not list(store.directory.glob("4*"))


@pytest.fixture
def file_size_limit():
    """Files over 64 KiB cannot be written: what a disk that fills up meanwhile looks like."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def large_state():
    """Beyond the limit of `file_size_limit`: noise does not compress."""
    noise = jax.random.normal(jax.random.key(0), (256, 1024))
    return make_state()._replace(params={"noise": noise})


def test_background_error_surfaces_and_earlier_checkpoints_stay(tmp_path, file_size_limit):
    state = large_state()
    every_step = CheckpointConfig(every_steps=1, every_minutes=None)
    with pytest.raises(CheckpointError), CheckpointStore(tmp_path, every_step) as store:
        store.prepare()
        save(store, 3, state)
        store.wait()
        assert not store.should_save(3)
        file_size_limit()
        save(store, 4, state)
        store._thread.join()
        with pytest.raises(CheckpointError, match=rf"saving step 4 failed: .*{tmp_path}/3"):
            store.check()
        store.check()  # raised once
        assert store.should_save(4)  # not taken for saved
        save(store, 5, state)
        # leaving the block waits for the save in progress, and its error is not lost
    assert list(step_directories(tmp_path)) == [3]
    verify(tmp_path / "3")
    lines = []
    with CheckpointStore(tmp_path, MANUAL, lines.append) as store:
        assert store.prepare() == 3
    assert lines and all("interrupted" in line for line in lines)


def test_a_save_that_fails_at_once_is_not_taken_for_saved(tmp_path, file_size_limit, monkeypatch):
    """However early the thread that completes it fails."""
    state = large_state()
    start = threading.Thread.start

    def start_and_finish(thread):
        start(thread)
        if thread.name == "checkpoint":
            thread.join()

    monkeypatch.setattr(threading.Thread, "start", start_and_finish)
    every_step = CheckpointConfig(every_steps=1, every_minutes=None)
    with CheckpointStore(tmp_path, every_step) as store:
        store.prepare()
        file_size_limit()
        save(store, 4, state)
        assert store.should_save(4)
        with pytest.raises(CheckpointError, match="saving step 4 failed"):
            store.check()


def test_leftovers_and_damage_at_start(tmp_path):
    with CheckpointStore(tmp_path, MANUAL) as store:
        store.prepare()
        for step in (1, 2):
            save(store, step)
    (tmp_path / "3.unfinished").mkdir()
    largest = max((tmp_path / "2").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    lines = []
    with CheckpointStore(tmp_path, MANUAL, lines.append) as store:
        assert store.prepare() == 1
        assert store.steps() == [1]
        save(store, 2)  # the step is free again
    assert "3.unfinished" in lines[0]
    assert str(largest.relative_to(tmp_path / "2")) in lines[1]
    assert (tmp_path / "2.damaged").is_dir() and (tmp_path / "2").is_dir()


def test_none_sound_is_an_error(tmp_path):
    with CheckpointStore(tmp_path, MANUAL) as store:
        store.prepare()
        save(store, 1)
    (tmp_path / "1" / "params" / "_METADATA").unlink()
    for _ in range(2):
        with (
            CheckpointStore(tmp_path, MANUAL) as store,
            pytest.raises(integrity.NoSoundCheckpointError),
        ):
            store.prepare()


def test_orbax_alone_would_restore_flipped_bytes_or_fail_without_a_name(tmp_path):
    """Why there is a manifest: flip every file's middle byte, each is found and named."""
    with CheckpointStore(tmp_path, MANUAL) as store:
        store.prepare()
        save(store, 1)
    for path in sorted((tmp_path / "1").rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(checkpoints.files.DamagedCheckpointError) as caught:
            verify(tmp_path / "1")
        assert caught.value.file == str(path.relative_to(tmp_path / "1"))
        path.write_bytes(content)
    verify(tmp_path / "1")


def test_should_save_by_steps(tmp_path):
    config = CheckpointConfig(every_steps=5, every_minutes=None)
    with CheckpointStore(tmp_path, config) as store:
        store.prepare()
        assert [step for step in range(1, 16) if store.should_save(step)] == [5, 10, 15]


def test_should_save_by_minutes(tmp_path, monkeypatch):
    """A step takes 7 seconds: due at the first step after 60, counted from the last save."""
    now = 0.0
    monkeypatch.setattr(checkpoint_policy.time, "monotonic", lambda: now)
    asked = []
    monkeypatch.setattr(
        checkpoint_policy, "from_process_zero", lambda value: (asked.append(value), value)[1]
    )
    config = CheckpointConfig(every_steps=None, every_minutes=1.0)
    saved = []
    with CheckpointStore(tmp_path, config) as store:
        store.prepare()
        asked.clear()
        for step in range(1, 41):
            now += 7.0
            if store.should_save(step):
                save(store, step)
                saved.append(step)
    assert saved == [9, 18, 27, 36]
    assert len(asked) < 30  # the clock is not asked at every step


def test_should_save_by_minutes_finds_a_slower_pace(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoint_policy.time, "monotonic", lambda: now)
    config = CheckpointConfig(every_steps=None, every_minutes=1.0)
    with CheckpointStore(tmp_path, config) as store:
        store.prepare()
        for step in range(1, 200):
            now += 0.1 if step < 100 else 10.0
            if store.should_save(step):
                break
    assert 60 <= now <= 60 + 16 * 10


@pytest.mark.parametrize(
    "values, message",
    [
        ({"every_steps": 0}, "checkpoint.every_steps=0"),
        ({"every_minutes": 0.0}, "checkpoint.every_minutes=0.0"),
        ({"every_minutes": float("nan")}, "checkpoint.every_minutes=nan"),
        ({"keep_last": 0}, "checkpoint.keep_last=0"),
        ({"keep_best": -1}, "checkpoint.keep_best=-1"),
    ],
)
def test_impossible_configuration_names_the_key(values, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**values)


def test_items_are_readable_json(store):
    save(store, 3)
    store.wait()
    config = store.directory / "3" / "config" / "metadata"
    assert json.loads(config.read_text()) == METADATA.config


def test_retire_moves_a_folder_out_of_the_way(tmp_path):
    for count in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log").write_text(str(count))
        moved = integrity.retire(tmp_path / "run")
        assert moved == tmp_path / f"run.{count}"
        assert (moved / "log").read_text() == str(count)
    assert integrity.retire(tmp_path / "run") is None
