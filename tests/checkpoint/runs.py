"""Training runs in processes of their own, and what they leave behind."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml

PROGRAM = Path(__file__).with_name("interruptible_pretrain.py")
PATIENCE_SECONDS = 300

CONFIG = {
    "steps": 16,
    "batch_size": 4,
    "context": 32,
    "seed": 3,
    "model": {
        "vocab_size": 258,
        "num_layers": 2,
        "width": 32,
        "num_heads": 2,
        "num_kv_heads": 2,
        "mlp_width": 64,
        "num_slots": 4,
        "windows": [4],
    },
    "schedule": {"learning_rate": 0.01, "warmup_steps": 2},
    "validation": {"every_steps": 8, "batches": 2},
    "checkpoint": {"every_steps": 4, "every_minutes": None, "keep_last": 9, "keep_best": 0},
    "log": {"every_steps": 1, "tensorboard": False, "progress_bar": False},
    "sample": {"num_tokens": 0},
}


class Processes:
    """The processes of one run, with their output read as it comes."""

    def __init__(self, commands):
        self.processes = [
            subprocess.Popen(
                command,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for command, env in commands
        ]
        self.lines = [[] for _ in commands]
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in zip(self.processes, self.lines, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, process, lines):
        for line in process.stdout:
            with self._news:
                lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def output(self):
        return "".join(f"[{i}] {line}" for i, lines in enumerate(self.lines) for line in lines)

    def wait_for(self, pattern):
        """Until process 0 prints a line that matches."""

        def printed():
            return any(re.search(pattern, line) for line in self.lines[0])

        with self._news:
            ended = self._readers[0]
            self._news.wait_for(lambda: printed() or not ended.is_alive(), PATIENCE_SECONDS)
        assert printed(), f"no line matches {pattern!r}:\n{self.output}"

    def send_to_group(self, number):
        """As a terminal does with Ctrl-C: to process 0 and to what it has started."""
        os.killpg(self.processes[0].pid, number)

    def send(self, number, process=0):
        self.processes[process].send_signal(number)

    def finish(self):
        """Exit statuses; ends processes that do not end."""
        try:
            return [process.wait(PATIENCE_SECONDS) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.output}") from None
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
            for reader in self._readers:
                reader.join()


class Runs:
    """A folder in which runs of one configuration live; they share data and compiled programs."""

    def __init__(self, root, data):
        self.root = root
        config = CONFIG | {
            "name": "unnamed",
            "data": {"directory": str(data)},
            "runs_directory": str(root),
            "compilation_cache": str(root / "cache"),
        }
        self._config = root / "config.yaml"
        self._config.write_text(yaml.safe_dump(config))
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONUNBUFFERED": "1",
        }

    def command(self, name, *overrides, **environment):
        """Command and environment that start the run of this name, or go on with it."""
        command = [sys.executable, str(PROGRAM), "--config", str(self._config), "--name", name]
        env = self._environment | {key: str(value) for key, value in environment.items()}
        env["RECORD_BATCHES"] = str(self.root / f"{name}.batches")
        return [*command, *overrides], env

    def start(self, name, *overrides, processes=1, apart=(), **environment):
        """Start the run of this name, or go on with it; the last process with options `apart`."""
        command, env = self.command(name, *overrides, **environment)
        group = [{}]
        if processes > 1:
            address = f"127.0.0.1:{free_port()}"
            group = [
                {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(index),
                    "RECORD_BATCHES": str(self.root / f"{name}.batches{index}"),
                }
                for index in range(processes)
            ]
        commands = [*[command] * (len(group) - 1), [*command, *apart]]
        members = zip(commands, group, strict=True)
        return Processes([(command, env | member) for command, member in members])

    def finish(self, name, *overrides, **options):
        """Run until it ends by itself, which must be at its last step. Returns its output."""
        run = self.start(name, *overrides, **options)
        statuses = run.finish()
        assert statuses == [0] * len(statuses), f"{statuses}\n{run.output}"
        return run.output

    def checkpoints(self, name):
        return self.root / name / "checkpoints"

    def arrays(self, name, step):
        """Every array of a checkpoint on the host, by path."""
        found = {}
        for item in ("params", "training"):
            with ocp.PyTreeCheckpointer() as checkpointer:
                path = self.checkpoints(name) / str(step) / item
                shapes = checkpointer.metadata(path).item_metadata.tree
                restored = checkpointer.restore(
                    path,
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes
                    ),
                )
            for key, value in jax.tree.leaves_with_path(restored):
                found[item + jax.tree_util.keystr(key)] = np.asarray(value)
        return found

    def losses(self, name):
        """Loss and gradient norm of every step, in the order of the file."""
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [
            (record["step"], record["loss"], record["gradient_norm"])
            for record in records
            if record["kind"] == "train"
        ]

    def batches(self, name):
        """Hash of the batch of each step; a step that was repeated had the same batch each time."""
        found = {}
        for line in (self.root / f"{name}.batches").read_text().splitlines():
            step, value = line.split()
            assert found.setdefault(int(step), value) == value, f"another batch in step {step}"
        return found

    def assert_identical(self, name, other, step):
        """Bit by bit the same parameters, optimizer, losses and batches."""
        arrays, others = self.arrays(name, step), self.arrays(other, step)
        assert arrays.keys() == others.keys() and len(arrays) > 20
        for key, value in arrays.items():
            assert value.dtype == others[key].dtype and value.tobytes() == others[key].tobytes(), (
                key
            )
        assert self.losses(name) == self.losses(other)
        assert [step for step, _, _ in self.losses(name)] == list(range(1, step + 1))
        assert self.batches(name) == self.batches(other)


def interrupt(run, number, first, last, process=0):
    """Send a signal at a random moment after a random step from ``first`` to ``last``."""
    step = random.randint(first, last)
    run.wait_for(rf"^step +{step}/")
    threading.Event().wait(random.uniform(0, 0.05))
    run.send(number, process)
    if number == signal.SIGKILL:
        assert run.finish()[process] == -signal.SIGKILL, run.output


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
