"""The program from end to end: files, results, resuming, faults."""

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nha_jax import models
from train import pretrain
from train.command_line import load_config
from train.logging import RunLog
from train.loop import StopRequested, TrainingDiverged
from train.resume import ResumeError, arguments_to_go_on


@pytest.fixture
def make_run(make_config, shared_compilations):
    def make(**changes):
        return make_config(compilation_cache=shared_compilations, **changes)

    return make


@pytest.fixture
def main(make_run, tmp_path):
    """The command line on a small run, with overrides."""
    file = tmp_path / "small.yaml"
    file.write_text(make_run().to_yaml())
    return lambda *overrides: pretrain.main(["--config", str(file), *overrides])


def records(config, kind: str) -> dict[int, dict]:
    lines = (config.directory / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] == kind]
    assert len({record["step"] for record in found}) == len(found)
    return {record["step"]: record for record in found}


def checkpoint_steps(config) -> list[int]:
    folder = config.directory / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_a_run_leaves_all_its_files_and_learns(make_run, main, capsys) -> None:
    config = make_run()
    assert main() == 0
    train, validation = records(config, "train"), records(config, "validation")
    assert list(train) == [1, 2, 3, 4, 5, 6]
    assert list(validation) == [0, 3, 6]
    assert validation[6]["loss"] < 0.9 * validation[0]["loss"]
    assert len(validation[6]["slot_mass"]) == config.model.num_layers
    assert checkpoint_steps(config) == [3, 6]
    for name in ("loss.png", "slot_mass.png", "environment.json", "config.yaml", "result.json"):
        assert (config.directory / name).stat().st_size > 0, name
    assert load_config(config.directory / "config.yaml") == config

    out = capsys.readouterr().out
    assert out.index("memory per device") < out.index("step 1/6")
    result = json.loads((config.directory / "result.json").read_text())
    assert result["validation"]["bits_per_byte"] == validation[6]["bits_per_byte"]
    for name in ("unigram", "bigram"):
        assert f"{result['baselines'][f'{name}_bits_per_byte']:.3f}" in out
    assert f"model    {validation[6]['bits_per_byte']:.3f}" in out

    loaded = models.load(config.directory)
    assert loaded.step == 6 and loaded.config == config.model

    # A result that was cut off, by a kill or a full disk, is made again.
    (config.directory / "result.json").write_text("")
    assert main() == 0
    assert "result.json is damaged" in capsys.readouterr().out
    assert json.loads((config.directory / "result.json").read_text())["step"] == 6

    # Again: finished. Longer: goes on.
    assert main() == 0
    again = capsys.readouterr().out
    assert "small has finished: 6 of 6 steps" in again and "--name" in again
    assert f"model    {validation[6]['bits_per_byte']:.3f}" in again
    assert records(config, "train") == train
    assert main("--steps", "8", "--resume", "must") == 0
    longer = capsys.readouterr().out
    assert "changed since step 6: steps: 6 in the checkpoint, 8 now" in longer
    assert list(records(config, "train")) == [1, 2, 3, 4, 5, 6, 7, 8]

    # Another model or other data: refused, with the difference.
    assert main("--steps", "8", "--model.num_slots", "8") == pretrain.EXIT_BAD_INPUT
    assert "model.num_slots: 4 in the checkpoint, 8 now" in capsys.readouterr().err
    assert main("--steps", "8", "--context", "16") == pretrain.EXIT_BAD_INPUT
    assert "context: 32 in the checkpoint, 16 now" in capsys.readouterr().err


def test_must_resume_and_never_resume(make_run, main, capsys) -> None:
    config = make_run()
    assert main("--resume", "must") == pretrain.EXIT_BAD_INPUT
    assert "holds no checkpoint" in capsys.readouterr().err
    earlier = config.directory / "earlier"
    earlier.touch()
    assert main("--resume", "never") == 0
    assert not earlier.exists()
    assert (config.directory.with_name("small.1") / "earlier").exists()


def test_two_halves_equal_one_run_bitwise(make_run) -> None:
    whole = make_run(name="whole")
    assert pretrain.run(whole) == 0

    halves = make_run(name="halves")

    def stop_during_step_4(step, state):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    with pytest.raises(StopRequested, match="saved in"):
        pretrain.run(halves, before_step=stop_during_step_4)
    stopped_at = checkpoint_steps(halves)[-1]
    assert 3 <= stopped_at < 6
    assert pretrain.run(halves) == 0

    for step in range(1, 7):
        a, b = records(whole, "train")[step], records(halves, "train")[step]
        for name in ("loss", "gradient_norm", "parameter_norm", "learning_rate", "num_targets"):
            assert a[name] == b[name], (step, name)
    a, b = (models.load(config.directory).model for config in (whole, halves))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(a), jax.tree.leaves(b))


def test_nan_at_the_step_of_a_save_stops_the_run_unsaved(make_run, main, monkeypatch, capsys):
    config = make_run()

    def poison(step, state):
        if step != 6:
            return state
        params = jax.tree.map(lambda leaf: leaf, state.params)
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(math.nan)
        return state._replace(params=params)

    with pytest.raises(TrainingDiverged) as caught:
        pretrain.run(config, before_step=poison)
    report = str(caught.value)
    assert "step 6: loss=nan" in report
    assert "gradient norms, layers: nan nan" in report
    assert "parameter norms, layers: " in report and "parameter norms, final_norm: nan" in report
    assert report.endswith(f"last good checkpoint: {config.directory.absolute()}/checkpoints/3")
    assert checkpoint_steps(config) == [3]

    run = pretrain.run
    monkeypatch.setattr(pretrain, "run", lambda config: run(config, before_step=poison))
    assert main() == pretrain.EXIT_DIVERGED
    assert "last good checkpoint" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_stops_the_run_saved(make_run, main, monkeypatch, capsys):
    config = make_run()
    logs = []

    class Log(RunLog):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            logs.append(self)

    def fill_disk(step, state):
        if step == 4:
            os.dup2(os.open("/dev/full", os.O_WRONLY), logs[0]._file.fileno())
        return state

    run = pretrain.run
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "RunLog", Log)
        patch.setattr(pretrain, "run", lambda config: run(config, before_step=fill_disk))
        assert main() == pretrain.EXIT_CHECKPOINT
    saved = checkpoint_steps(config)[-1]
    assert saved in (4, 5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {config.directory / 'metrics.jsonl'}: No space left on device; stopped after step "
        f"{saved}; saved in {config.directory.absolute() / 'checkpoints' / str(saved)}"
    )
    assert main() == 0
    assert checkpoint_steps(config)[-1] == 6


def test_a_file_that_cannot_be_written_is_one_line(make_run, main, capsys) -> None:
    directory = make_run().directory
    for name in ("config.yaml", "result.json"):
        (directory / name).mkdir(parents=True)
    assert main() == pretrain.EXIT_CHECKPOINT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {directory / 'config.yaml'}: Is a directory"
    (directory / "config.yaml").rmdir()
    assert main() == pretrain.EXIT_CHECKPOINT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {directory / 'result.json'}: Is a directory"
    # All was trained and saved. Pictures are an extra.
    (directory / "result.json").rmdir()
    (directory / "loss.png").unlink()
    (directory / "loss.png").mkdir()
    assert main() == 0
    warning = f"WARNING: the pictures cannot be drawn: {directory / 'loss.png'}: Is a directory"
    assert warning in capsys.readouterr().out
    assert json.loads((directory / "result.json").read_text())["pictures"] == []


@pytest.mark.wide
def test_a_worker_process_that_dies_stops_the_run_saved(make_run, main, monkeypatch, capsys):
    def kill_workers(step, state):
        for worker in multiprocessing.active_children() if step == 2 else ():
            worker.kill()
        return state

    # More steps than there are batches that have been read ahead.
    longer = ("--steps", "40", "--validation.every_steps", "40", "--sample.num_tokens", "0")
    run = pretrain.run
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "run", lambda config: run(config, before_step=kill_workers))
        assert main(*longer, "--data.num_workers", "1") == pretrain.EXIT_WORKER
    config = make_run()
    saved = checkpoint_steps(config)[-1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: data.num_workers=1: Worker process was terminated unexpectedly with exit code -9; "
        f"stopped after step {saved}; saved in {config.directory.absolute()}/checkpoints/{saved}"
    )
    assert 2 <= saved < 40
    assert main(*longer) == 0
    assert list(records(config, "train")) == list(range(1, 41))


def test_nothing_is_compiled_after_the_first_step(make_run) -> None:
    """A validation and a save lie between the steps that are looked at."""
    compilations: list[int] = []
    counts: dict[int, int] = {}

    def listener(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(1)

    def count(step, state):
        counts[step] = len(compilations)
        return state

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        pretrain.run(make_run(sample__num_tokens=0), before_step=count)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert counts[1] > 0
    assert counts[6] == counts[2]


def test_every_step_takes_its_own_time(make_run) -> None:
    """Those before a validation and the last one too, which are looked at at once."""

    def wait(step, state):
        jax.block_until_ready(state)  # the step before has finished when this one begins
        time.sleep(0.2)
        return state

    config = make_run(sample__num_tokens=0)
    pretrain.run(config, before_step=wait)
    for step, record in records(config, "train").items():
        assert record["seconds"] > 0.15, step
        tokens = record["num_targets"] / record["seconds"]
        assert record["tokens_per_second"] == pytest.approx(tokens)


def test_profile_of_the_steps_that_were_asked_for(make_run, monkeypatch, capsys) -> None:
    begun: list[int] = []
    bounds: list[int] = []

    def note(function):
        def noted(*args, **kwargs):
            bounds.append(begun[-1])
            return function(*args, **kwargs)

        return noted

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, note(getattr(jax.profiler, name)))
    config = make_run(profile__steps="2:4", sample__num_tokens=0)
    assert pretrain.run(config, before_step=lambda step, state: begun.append(step) or state) == 0
    assert bounds == [2, 4]
    assert list((config.directory / "profile").rglob("*.xplane.pb"))
    assert f"profile: {config.directory / 'profile'}" in capsys.readouterr().out


def test_a_run_goes_on_with_other_numbers_of_the_optimizer(make_run, main, capsys) -> None:
    """Clipping or not is no other optimizer; fewer steps than are done is no run."""
    config = make_run()
    small = ("--model.layer_kinds", "[swa]", "--log.baseline_tokens", "0")
    assert main("--steps", "3", *small) == 0
    changes = ("--optimizer.clip_norm", "null", "--schedule.kind", "wsd")
    assert main("--resume", "must", *small, *changes) == 0
    out = capsys.readouterr().out
    assert "optimizer.clip_norm: 1.0 in the checkpoint, None now" in out
    assert list(records(config, "train")) == [1, 2, 3, 4, 5, 6]

    assert main("--steps", "4", *small, *changes) == 0
    assert "finished: 6 of 4 steps" in capsys.readouterr().out
    (config.directory / "result.json").unlink()  # as if stopped before the end
    assert main("--steps", "4", *small, *changes) == pretrain.EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: steps=4: the run has taken 6 steps already")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU refuses")
@pytest.mark.parametrize("name", ["cudnn", "pallas_triton"])
def test_an_implementation_that_does_not_run_here_is_one_line(main, capsys, name: str) -> None:
    assert main("--model.implementation", name) == pretrain.EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: model.implementation='{name}'")


def test_interrupted_sample_is_made_on_resume(make_run, monkeypatch) -> None:
    config = make_run()
    monkeypatch.setattr(pretrain, "generate", lambda *_, **__: None)
    with pytest.raises(StopRequested, match="without the sample"):
        pretrain.run(config)
    assert not (config.directory / "result.json").exists()
    monkeypatch.undo()
    assert pretrain.run(config) == 0
    assert json.loads((config.directory / "result.json").read_text())["sample"] is not None


def test_data_that_is_not_there_is_one_line(main, capsys, tmp_path: Path) -> None:
    status = main("--data.directory", str(tmp_path / "nowhere"))
    assert status == pretrain.EXIT_BAD_INPUT
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]


def test_resume_error_is_of_its_own_kind(make_run) -> None:
    config = make_run(resume="must")
    with pytest.raises(ResumeError, match="resume=must"):
        pretrain.run(config)


@pytest.mark.parametrize(
    ("resume", "given", "expected"),
    [
        ("auto", "--config a.yaml --steps 9", "--config a.yaml --steps 9"),
        ("must", "--resume must --steps 9", "--resume must --steps 9"),
        ("never", "--resume never --steps 9", "--steps 9 --resume must"),
        ("never", "--steps 9 --resume=never", "--steps 9 --resume must"),
        ("never", "--config never.yaml", "--config never.yaml --resume must"),
    ],
)
def test_a_run_that_began_anew_goes_on_with_the_command_that_is_printed(resume, given, expected):
    assert arguments_to_go_on(given.split(), resume) == expected.split()
