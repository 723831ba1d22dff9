"""The run log: records, resuming, the log line, TensorBoard, the environment."""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from nha_jax.models import ModelConfig
from train.baselines import EntropyBaselines
from train.config import DataConfig, LogConfig, PretrainConfig, ScheduleConfig, ValidationConfig
from train.evaluation import ValidationResult
from train.logging import RunLog, describe_step, drop_records_after, read_records
from train.metrics import Throughput
from train.resume import ResumeError
from train.run_files import RunFileError

LENGTHS = np.bincount([16] * 8).astype(np.int64)


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    model = ModelConfig(
        vocab_size=32, num_layers=2, width=8, num_heads=2, num_kv_heads=1, mlp_width=8, num_slots=2
    )
    return PretrainConfig(
        name="run",
        steps=20,
        batch_size=4,
        context=16,
        model=model,
        data=DataConfig(directory="data"),
        schedule=ScheduleConfig(learning_rate=1e-3),
        validation=ValidationConfig(every_steps=5),
        log=LogConfig(every_steps=4),
        runs_directory=str(tmp_path),
    )


def open_log(config: PretrainConfig, start_step: int = 0) -> RunLog:
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    return RunLog(config, mesh, LENGTHS, start_step=start_step)


@pytest.mark.parametrize("mask_documents", [True, False])
def test_flops_are_those_of_the_texts_that_are_read(config, monkeypatch, mask_documents) -> None:
    seen = []
    monkeypatch.setattr(
        "train.logging.training_flops_per_token", lambda model, lengths: seen.append(lengths) or 1.0
    )
    data = dataclasses.replace(config.data, mask_documents=mask_documents)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    documents = np.bincount([4] * 32, minlength=17)
    RunLog(dataclasses.replace(config, data=data), mesh, documents, start_step=0).__exit__()
    assert np.flatnonzero(seen[0]).tolist() == [4 if mask_documents else 16]


def metrics_of(step: int) -> dict:
    return {
        "loss": np.float32(4 - step / 10),
        "learning_rate": np.float32(1e-3),
        "gradient_norm": np.float32(0.5),
        "num_targets": np.float32(60),
        "waited_seconds": 0.0,
        "gradient_norms": {"mlp": np.array([0.25, 0.5], np.float32), "final_norm": np.float32(1)},
        "parameter_norms": {"mlp": np.array([1, 2], np.float32), "final_norm": np.float32(3)},
    }


def result_of(loss: float) -> ValidationResult:
    return ValidationResult(
        loss=loss,
        perplexity=np.exp(loss).item(),
        bits_per_byte=loss / 0.7,
        slot_mass=(0.25, 0.5),
        num_targets=100,
    )


def records_of(config: PretrainConfig, kind: str) -> list[dict]:
    found = read_records(config.directory / "metrics.jsonl")
    return [record for record in found if record["kind"] == kind]


def test_every_step_is_recorded(config: PretrainConfig, capsys: pytest.CaptureFixture) -> None:
    with open_log(config) as log:
        log.validation(0, result_of(5.0))
        for step in range(1, 21):
            log.step(step, metrics_of(step))
        log.validation(20, result_of(3.0))
        log.baselines(EntropyBaselines(4.0, 3.5, 5.75, 5.0))
    train = records_of(config, "train")
    assert [record["step"] for record in train] == list(range(1, 21))
    # The decimal digits restore the float32 exactly.
    assert [np.float32(record["loss"]) for record in train] == [
        metrics_of(step)["loss"] for step in range(1, 21)
    ]
    assert {"learning_rate", "gradient_norm", "num_targets", "waited_seconds"} <= set(train[0])
    assert train[5]["tokens_per_second"] > 0 and train[5]["mfu"] is None
    assert train[3]["gradient_norms"] == {"mlp": [0.25, 0.5], "final_norm": [1.0]}
    assert "gradient_norms" not in train[4]
    first, last = records_of(config, "validation")
    assert (first["step"], last["step"]) == (0, 20)
    assert last["slot_mass"] == [0.25, 0.5] and last["bits_per_byte"] == 3.0 / 0.7
    (baselines,) = records_of(config, "baselines")
    assert baselines["bigram_bits_per_byte"] == 5.0
    printed = capsys.readouterr().out.splitlines()
    steps = [line for line in printed if line.startswith("step")]
    assert [int(line.split()[1].split("/")[0]) for line in steps] == [1, 4, 8, 12, 16, 20]
    for word in ("loss 2.0000", "lr 1.00e-03", "grad 0.500", "tokens/s", "data wait", "MFU n/a"):
        assert word in steps[-1]
    assert "ETA 0:00" in steps[-1]
    assert any("slots by layer: 0.250 0.500" in line for line in printed)


def test_a_resumed_run_goes_on_without_duplicates(config: PretrainConfig) -> None:
    with open_log(config) as log:
        log.validation(0, result_of(5.0))
        for step in range(1, 14):
            log.step(step, metrics_of(step))
            if step % 5 == 0:
                log.validation(step, result_of(4.0))
        log.baselines(EntropyBaselines(4.0, 3.5, 5.75, 5.0))
    path = config.directory / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 14, "lo')  # Killed while writing.
    with open_log(config, start_step=10) as log:
        log.validation(10, result_of(4.0))
        for step in range(11, 16):
            log.step(step, metrics_of(step) | {"loss": np.float32(9)})
        log.validation(15, result_of(3.5))
        log.baselines(EntropyBaselines(4.0, 3.5, 5.75, 5.0))
    train = records_of(config, "train")
    assert [record["step"] for record in train] == list(range(1, 16))
    assert [record["loss"] == 9 for record in train] == [False] * 10 + [True] * 5
    assert [record["step"] for record in records_of(config, "validation")] == [0, 5, 10, 15]
    assert len(records_of(config, "baselines")) == 1


def test_a_run_that_begins_anew_keeps_nothing(config: PretrainConfig) -> None:
    with open_log(config) as log:
        log.validation(0, result_of(5.0))
        log.step(1, metrics_of(1))
    with open_log(config) as log:
        log.validation(0, result_of(6.0))
    assert [record["loss"] for record in records_of(config, "validation")] == [6.0]
    assert records_of(config, "train") == []


def test_what_is_not_finite_is_null(config: PretrainConfig) -> None:
    with open_log(config) as log:
        log.step(1, metrics_of(1) | {"parameter_norm": np.float32(np.inf)})
    (line,) = (config.directory / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["parameter_norm"] is None


@pytest.mark.parametrize("damage", [b"nonsense", b"7", b'{"kind": "train"}', b'{"kind": "\xff"}'])
def test_damage_in_the_middle_is_not_passed_over(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n%s\n{"kind": "train", "step": 2}\n' % damage)
    with pytest.raises(ResumeError, match=r"line 2 is not a record.*remove that line"):
        drop_records_after(path, 5)
    assert drop_records_after(tmp_path / "absent.jsonl", 5) == []


def test_a_last_line_of_any_bytes_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "tr\xff\x00')
    assert [record["step"] for record in read_records(path)] == [1]


def test_only_process_0_writes(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_log(config) as log:
        log.validation(0, result_of(5.0))
        log.step(1, metrics_of(1))
        log.baselines(EntropyBaselines(4.0, 3.5, 5.75, 5.0))
        log.print("a line")
    assert not config.directory.exists()
    assert capsys.readouterr().out == ""


def test_log_line() -> None:
    metrics = {"loss": 1.25, "learning_rate": 3e-4, "gradient_norm": 0.1}
    throughput = Throughput(0.5, 12_345.6, 0.021, 0.456)
    assert describe_step(7, 100, metrics, throughput, eta=65.0) == (
        "step   7/100  loss 1.2500  lr 3.00e-04  grad 0.100  12,346 tokens/s"
        "  data wait 2.1 %  MFU 45.6 %  ETA 1:05"
    )
    assert describe_step(1, 9, metrics, None, eta=None).endswith(
        "? tokens/s  data wait ?  MFU ?  ETA ?"
    )


def test_tensorboard_has_the_same_scalars(config: PretrainConfig) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    with open_log(config) as log:
        log.step(1, metrics_of(1))
        log.validation(1, result_of(5.0))
    (path,) = (config.directory / "tensorboard").iterdir()
    found = {}
    content = path.read_bytes()
    while content:
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        for value in event.summary.value:
            found[value.tag] = (event.step, value.simple_value)
    assert found["loss"] == (1, pytest.approx(3.9))
    assert found["validation/loss"] == (1, 5.0)
    assert found["validation/slot_mass/001"] == (1, 0.5)
    without = dataclasses.replace(config, name="no", log=LogConfig(tensorboard=False))
    open_log(without).close()
    assert not (without.directory / "tensorboard").exists()


def test_a_full_disk_ends_tensorboard_and_nothing_else(config, monkeypatch, capsys) -> None:
    """No thread and no queue is there that could make training wait."""

    def open_full(path):
        return open("/dev/full", "wb")

    monkeypatch.setattr("tensorboardX.record_writer.open_file", open_full)

    def run() -> None:
        with open_log(config) as log:
            for step in range(1, 21):
                log.step(step, metrics_of(step))

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(timeout=60)
    assert not running.is_alive()
    assert len(records_of(config, "train")) == 20
    out = capsys.readouterr().out
    assert out.count("WARNING: no TensorBoard from here on") == 1
    assert "tensorboard: No space left on device" in out


def test_a_full_disk_is_noted_and_not_raised(config, capsys) -> None:
    """The loop saves what was trained; closing must not hide the error that ends a run."""
    with pytest.raises(ZeroDivisionError), open_log(config) as log:
        log.step(1, metrics_of(1))
        assert log.failure is None
        os.dup2(os.open("/dev/full", os.O_WRONLY), log._file.fileno())
        log.step(2, metrics_of(2))
        log.validation(2, result_of(5.0))
        raise ZeroDivisionError
    expected = f"{config.directory / 'metrics.jsonl'}: No space left on device"
    assert str(log.failure) == expected
    assert capsys.readouterr().out.count(expected) == 1


@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl"])
def test_a_file_that_cannot_be_written_is_named(config, name: str) -> None:
    path = config.directory / name
    path.mkdir(parents=True)
    with pytest.raises(RunFileError, match=f"^{path}: Is a directory$"):
        open_log(config)


def test_environment(config: PretrainConfig) -> None:
    open_log(config).close()
    path = config.directory / "environment.json"
    first = json.loads(path.read_text())
    assert first["versions"]["jax"] == jax.__version__
    assert first["versions"]["python"].split(".")[:2] == [str(v) for v in sys.version_info[:2]]
    assert first["devices"]["count"] == 1 and first["devices"]["platform"] == "cpu"
    assert first["command"] == sys.orig_argv
    assert first["host"]["cpus"] == len(os.sched_getaffinity(0))
    assert first["commit"] is None or len(first["commit"].removesuffix("+changes")) == 40
    assert (first["start_step"], first["earlier"]) == (0, [])
    open_log(config, start_step=7).close()
    open_log(config, start_step=9).close()
    last = json.loads(path.read_text())
    assert [last["start_step"], *(e["start_step"] for e in last["earlier"])] == [9, 0, 7]
    open_log(config).close()
    assert json.loads(path.read_text())["earlier"] == []
