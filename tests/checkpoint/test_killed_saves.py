"""Processes killed with SIGKILL in every stage of a save, on a small state."""

import json
import os
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.models.checkpoint_files import verify
from train.checkpoints import CheckpointConfig, CheckpointStore

# One program imports everything, then forks a child for each way to be killed: JAX starts its
# threads in the children only.
PROGRAM = """
import json, os, random, signal, sys, threading, time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint

from train import checkpoints, integrity
from train.checkpoints import CheckpointConfig, CheckpointMetadata, CheckpointStore

class State(NamedTuple):
    step: Any
    params: Any

def die(*ignored):
    os.kill(os.getpid(), signal.SIGKILL)

def before(module, name, count):
    original, calls = getattr(module, name), 0
    def counting(*arguments):
        nonlocal calls
        calls += 1
        if calls == count:
            die()
        return original(*arguments)
    setattr(module, name, counting)

def save_three(directory, stage):
    if stage == "manifest":
        before(checkpoints.files, "write_manifest", 3)
    elif stage == "rename":
        # The third manifest is written, its folder does not have its name yet.
        write = checkpoints.files.write_manifest
        def write_and_die(path):
            write(path)
            if path.name.startswith("3"):
                die()
        checkpoints.files.write_manifest = write_and_die
    elif stage == "deletion":
        before(integrity.shutil, "rmtree", 1)
    config = CheckpointConfig(every_steps=None, every_minutes=None, keep_last=2, keep_best=0)
    store = CheckpointStore(directory, config)
    store.prepare()
    for step in (1, 2, 3):
        params = {"w": jnp.arange(4096.0) * step}
        store.save(step, State(jnp.asarray(step), params), CheckpointMetadata({}, {}, ""),
                   {"loss": 1.0, "gradient_norm": 1.0})
        if step == 3:
            if stage == "writing":
                die()
            if stage == "soon":
                time.sleep(random.uniform(0, 0.05))
                die()
    store.close()

for stage in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        save_three(sys.argv[2] + "/" + stage, stage.partition("-")[0])
        os._exit(0)
    print(stage, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

STAGES = ["none", "writing", "manifest", "rename", "deletion", *(f"soon-{i}" for i in range(4))]
# Which checkpoints are there to resume from afterwards, and whether the third is.
SURVIVE = {"none": 3, "writing": 2, "manifest": 2, "rename": 2, "deletion": 3}


class State(NamedTuple):
    step: Any
    params: Any


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(STAGES), str(root)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    statuses = dict(line.split() for line in result.stdout.splitlines())
    assert set(statuses) == set(STAGES), result.stderr
    for stage in STAGES:
        expected = 0 if stage == "none" else -signal.SIGKILL
        assert int(statuses[stage]) == expected, (stage, result.stderr)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_there_is_complete(killed, stage):
    lines = []
    config = CheckpointConfig(every_steps=None, every_minutes=None, keep_last=2)
    with CheckpointStore(killed / stage, config, lines.append) as store:
        newest = store.prepare()
        if stage in SURVIVE:
            assert newest == SURVIVE[stage]
            assert store.steps() == [newest - 1, newest]
            assert len(lines) == (0 if stage == "none" else 1)
        # Killed between the last name and the deletion, one too many is left; the next save counts.
        assert store.steps() in ([1, 2], [2, 3], [1, 2, 3])
        assert newest == store.steps()[-1]
        assert all("interrupted" in line for line in lines)
        for step in store.steps():
            verify(store.directory / str(step))
        others = {path.name for path in store.directory.iterdir()} - {"1", "2", "3", ".lock"}
        assert not others
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        w = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=sharding)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
        state, _ = store.restore(newest, State(step, {"w": w}))
    assert int(state.step) == newest
    np.testing.assert_array_equal(state.params["w"], np.arange(4096, dtype=np.float32) * newest)
