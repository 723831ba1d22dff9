"""Real training processes, killed, stopped and damaged: they end as if nothing had happened."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from runs import PATIENCE_SECONDS, Runs, interrupt

from train.prepare_data import PrepareConfig, prepare
from train.pretrain import EXIT_BAD_INPUT
from train.signals import EXIT_RESUMABLE

SLOW = {"SECONDS_PER_STEP": 0.1}


def test_interrupted_in_every_way_ends_bit_by_bit_the_same(runs):
    name = "interrupted"

    # Ctrl-C while the program is being traced and compiled.
    run = runs.start(name, **SLOW)
    run.wait_for("baselines on the validation split")
    run.send(signal.SIGINT)
    assert run.finish() == [EXIT_RESUMABLE], run.output
    assert "Traceback" not in run.output
    assert "stopped after step 0" in run.output and "python -m train.pretrain" in run.output

    # Killed while the checkpoint of step 8 is being written.
    run = runs.start(name, KILL_IN_SAVE_OF=8)
    assert run.finish() == [-signal.SIGKILL], run.output
    assert "resumed after step 0" in run.output
    left = {path.name for path in runs.checkpoints(name).iterdir() if path.is_dir()}
    assert {"0", "4"} <= left

    # Killed at some moment between two steps, in a save, in the validation.
    run = runs.start(name, **SLOW)
    interrupt(run, signal.SIGKILL, first=9, last=12)
    resumed = "8" if "8" in left else "4"  # the save may just have been completed
    assert f"resumed after step {resumed}" in run.output
    for leftover in left - {"0", "4", "8"}:
        assert f"{leftover}: left by a save that was interrupted" in run.output

    # Told to stop at some moment.
    run = runs.start(name, **SLOW)
    interrupt(run, signal.SIGTERM, first=13, last=14)
    assert run.finish() == [EXIT_RESUMABLE], run.output
    assert "Traceback" not in run.output

    runs.finish(name)
    runs.assert_identical(name, "whole", step=16)


def test_a_reader_of_the_output_that_dies_takes_nothing_with_it(runs):
    """As ``| tee log`` does at a Ctrl-C, or by itself."""
    name = "unread"
    command, env = runs.command(name, **SLOW)
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert any(re.search(r"^step +5/", line) for line in process.stdout)
        process.stdout.close()
        while process.poll() is None and not (runs.checkpoints(name) / "8").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(PATIENCE_SECONDS) == EXIT_RESUMABLE, errors
    (line,) = errors.strip().splitlines()
    assert line.startswith("SIGINT: saving a checkpoint")
    saved = max(int(path.name) for path in runs.checkpoints(name).iterdir() if path.is_dir())
    assert saved > 8


def test_damaged_newest_is_set_aside_and_the_one_before_used(runs):
    name = "damaged"
    shutil.copytree(runs.root / "whole", runs.root / name)
    shutil.copy(runs.root / "whole.batches", runs.root / f"{name}.batches")
    newest = runs.checkpoints(name) / "16"
    file = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    output = runs.finish(name)
    assert f"{newest} is damaged: {file.relative_to(newest)} has changed bytes" in output
    assert f"kept as {newest}.damaged" in output and "resumed after step 12" in output
    aside = newest.with_name("16.damaged")
    assert (aside / file.relative_to(newest)).read_bytes() == content
    runs.assert_identical(name, "whole", step=16)


def test_no_sound_checkpoint_stops_with_an_error(runs):
    name = "ruined"
    shutil.copytree(runs.root / "whole", runs.root / name)
    for step in runs.checkpoints(name).iterdir():
        if step.is_dir():
            (step / "params" / "_METADATA").unlink()
    before = (runs.root / name / "metrics.jsonl").read_bytes()
    run = runs.start(name)
    assert run.finish() == [4], run.output
    assert "every checkpoint" in run.output and "params/_METADATA is missing" in run.output
    assert "Traceback" not in run.output
    assert (runs.root / name / "metrics.jsonl").read_bytes() == before
    assert len(list(runs.checkpoints(name).glob("*.damaged"))) == 4


def test_not_finite_at_the_step_of_a_save(runs):
    name = "diverged"
    run = runs.start(name, NAN_AT=8)
    assert run.finish() == [3], run.output
    assert "step 8: loss=nan" in run.output and "Traceback" not in run.output
    assert f"last good checkpoint: {runs.checkpoints(name) / '4'}" in run.output
    assert sorted(path.name for path in runs.checkpoints(name).iterdir()) == [".lock", "4"]


def test_two_processes_train_are_stopped_and_resume(runs):
    """And a copy goes on with one process, to the same losses."""
    name, alone = "two", "two-then-one"
    # On CPUs only process 0 finds its programs in the cache, so here the layer is a small one.
    small = ("--model.layer_kinds", "[swa]")
    anew = ("--resume", "never")
    run = runs.start(name, *anew, *small, processes=2, SECONDS_PER_STEP=0.4)
    # One process is told, and it takes a second, or more where much else runs, to tell the other.
    interrupt(run, signal.SIGTERM, first=2, last=4, process=1)
    assert run.finish() == [EXIT_RESUMABLE] * 2, run.output
    assert run.output.count("To go on") == 1 and "Traceback" not in run.output
    (command,) = re.findall("To go on: (.*)", run.output)
    assert command.endswith(shlex.join([*small, "--resume", "must"])) and "never" not in command
    steps = [int(path.name) for path in runs.checkpoints(name).iterdir() if path.name.isdigit()]
    assert 2 <= max(steps) < 16
    shutil.copytree(runs.root / name, runs.root / alone)

    runs.finish(name, *small, processes=2)
    runs.finish(alone, *small)
    assert_parity(runs, name, alone)
    # Each process reads its own half of the batch.
    halves = [(runs.root / f"{name}.batches{index}").read_text() for index in range(2)]
    assert len(set(halves)) == 2


@pytest.mark.parametrize("differs", ["schedule.learning_rate", "data manifest_hash"])
def test_processes_that_are_not_alike_end_with_one_line(prepared_text, tmp_path, differs):
    apart = ["--schedule.learning_rate", "0.5"]
    if differs.startswith("data"):
        text, other = tmp_path / "other.txt", tmp_path / "other"
        text.write_text("another text\n" * 40)
        config = PrepareConfig(input=(str(prepared_text.parent), str(text)), output=str(other))
        prepare(config, progress=False, log=lambda line: None)
        apart = ["--data.directory", str(other)]
    run = Runs(tmp_path, prepared_text).start("unlike", processes=2, apart=apart)
    assert run.finish() == [EXIT_BAD_INPUT] * 2, run.output
    line = f"all processes must be started alike: process 1 has another {differs} than process 0"
    assert [lines.count(f"error: {line}\n") for lines in run.lines] == [1, 1]
    assert "Traceback" not in run.output


def assert_parity(runs, name, other="whole"):
    expected, found = np.asarray(runs.losses(other)), np.asarray(runs.losses(name))
    np.testing.assert_array_equal(expected[:, 0], range(1, 17))
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=2e-5)


@pytest.mark.wide
def test_interrupt_that_reaches_the_worker_processes_too(runs):
    name, workers = "workers", ("--data.num_workers", "1")
    run = runs.start(name, *workers, **SLOW)
    run.wait_for("^step +5/")
    run.send_to_group(signal.SIGINT)
    assert run.finish() == [EXIT_RESUMABLE], run.output
    assert "Traceback" not in run.output
    runs.finish(name, *workers)
    assert runs.losses(name) == runs.losses("whole")


@pytest.mark.wide
def test_one_process_then_two(runs):
    name = "one-then-two"
    run = runs.start(name, **SLOW)
    interrupt(run, signal.SIGTERM, first=5, last=9)
    assert run.finish() == [EXIT_RESUMABLE], run.output
    runs.finish(name, processes=2)
    assert_parity(runs, name)


@pytest.mark.wide
def test_two_processes_one_killed(runs):
    """The other one ends too, with an error, and both resume from the last checkpoint."""
    name = "one-of-two-killed"
    run = runs.start(name, processes=2, **SLOW)
    run.wait_for("^step +9/")
    run.send(signal.SIGKILL, process=1)
    statuses = run.finish()
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, EXIT_RESUMABLE), run.output
    runs.finish(name, processes=2)
    assert_parity(runs, name)


@pytest.mark.wide
@pytest.mark.parametrize("first, second", [(8, 1), (1, 8)])
def test_another_mesh(runs, first, second):
    """Eight simulated devices as data, fsdp and tensor of 2 each, and one device."""
    name = f"mesh-{first}-{second}"
    meshes = {
        1: {},
        8: {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    }
    overrides = {1: (), 8: ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")}
    run = runs.start(name, *overrides[first], **SLOW, **meshes[first])
    interrupt(run, signal.SIGTERM, first=5, last=9)
    assert run.finish() == [EXIT_RESUMABLE], run.output
    runs.finish(name, *overrides[second], **meshes[second])
    assert_parity(runs, name)


@pytest.mark.wide
def test_killed_at_random_moments(prepared_text, tmp_path):
    runs = Runs(tmp_path, prepared_text)
    runs.finish("whole")
    for attempt in range(4):
        name = f"killed-{attempt}"
        run = runs.start(name, **SLOW)
        interrupt(run, signal.SIGKILL, first=1, last=15)
        runs.finish(name)
        runs.assert_identical(name, "whole", step=16)
        results = [
            json.loads((tmp_path / each / "result.json").read_text())["validation"]
            for each in (name, "whole")
        ]
        assert results[0] == results[1]
