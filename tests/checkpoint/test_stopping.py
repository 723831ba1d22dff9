"""Signals, in real processes: SIGTERM, Ctrl-C, a second Ctrl-C, early ones, two processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.signals import EXIT_RESUMABLE

PATIENCE_SECONDS = 120

WAITS = """
import sys, time
from train.signals import EXIT_RESUMABLE
from train.stopping import Stopper
with Stopper() as stopper:
    print("ready", flush=True)
    while not stopper.should_stop():
        time.sleep(0.01)
    assert stopper.should_stop()
    print("saved", flush=True)
sys.exit(EXIT_RESUMABLE)
"""

# Like a compilation: minutes of C++ on the main thread, in which Python runs no handler.
BUSY = """
import hashlib, sys
from train.signals import EXIT_RESUMABLE
from train.stopping import Stopper
with Stopper() as stopper:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha512", b"", b"", int(sys.argv[1]))
    assert stopper.should_stop()
sys.exit(EXIT_RESUMABLE)
"""

# As while it waits for the other processes of its job.
BLOCKED = """
import hashlib
from train.signals import exit_on_signals
exit_on_signals()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)  # an hour
"""

RESTORES = """
import signal
from train.stopping import Stopper
# Whoever started the tests in the background may have SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
with Stopper() as stopper:
    assert not stopper.should_stop()
assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
print("ready", flush=True)
signal.raise_signal(signal.SIGINT)
"""

FORKS = """
import os, signal, time
from train.stopping import Stopper
with Stopper() as stopper:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    time.sleep(0.2)
    assert not stopper.should_stop()
print("ready", flush=True)
"""

TWO = """
import sys, time
import jax
from train.distributed import initialise_distributed
from train.signals import EXIT_RESUMABLE
from train.stopping import Stopper
assert initialise_distributed()
with Stopper() as stopper:
    calls = 0
    while True:
        calls += 1
        time.sleep(0.01 * (1 + jax.process_index()))
        if stopper.should_stop():
            break
        if calls == 10:
            print("ready", flush=True)
    assert stopper.should_stop()
    print(f"stopped at {calls}", flush=True)
sys.exit(EXIT_RESUMABLE)
"""


def start(program, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def wait_until_caught(process, number):
    """Until the process has a handler for a signal."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)[1], 16)
        if caught >> (number - 1) & 1:
            return
        time.sleep(0.001)


def finish(process):
    """Exit status, what it printed since, and its error output."""
    try:
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    return process.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_asks_for_a_stop(number):
    process = start(WAITS)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    status, output, errors = finish(process)
    assert (status, output) == (EXIT_RESUMABLE, "saved\n")
    assert errors.count(number.name) == 1 and "saving a checkpoint" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", ["train.pretrain", "train.prepare_data"])
def test_a_signal_while_modules_are_imported_is_one_line(module, number):
    process = start(f"import runpy; runpy.run_module({module!r}, run_name='__main__')")
    wait_until_caught(process, signal.SIGTERM)  # that of Ctrl-C is set first
    process.send_signal(number)
    status, output, errors = finish(process)
    assert (status, output) == (EXIT_RESUMABLE, "")
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"{number.name}: stopped, with nothing left to save")


def test_a_signal_is_answered_while_a_start_is_blocked():
    process = start(BLOCKED)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == EXIT_RESUMABLE
    assert errors.count("SIGTERM") == 1


def test_second_interrupt_ends_a_busy_process_at_once():
    process = start(BUSY, str(2**31 - 1))  # an hour
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    announced = [process.stderr.readline() for _ in range(2)]  # while it is busy
    assert "Ctrl-C again stops at once" in announced[1]
    process.send_signal(signal.SIGINT)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGINT
    assert "Stopped at once" in errors


def test_an_interrupt_in_a_busy_process_counts_once():
    """Thread and handler both see it, the handler only after the busy part."""
    process = start(BUSY, "500000")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    status, _, errors = finish(process)
    assert status == EXIT_RESUMABLE
    assert errors.count("SIGINT") == 1


def test_handlers_are_restored():
    process = start(RESTORES)
    assert process.stdout.readline() == "ready\n"
    status, _, errors = finish(process)
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in errors


def test_signals_of_forked_children_are_their_own():
    status, output, errors = finish(start(FORKS))
    assert (status, output) == (0, "ready\n"), errors


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    "number, receiver",
    [(signal.SIGINT, 1), pytest.param(signal.SIGTERM, 0, marks=pytest.mark.wide)],
)
def test_two_processes_agree_when_one_is_told(number, receiver):
    group = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    processes = [start(TWO, **group, JAX_PROCESS_ID=str(index)) for index in range(2)]
    assert processes[receiver].stdout.readline() == "ready\n"
    processes[receiver].send_signal(number)
    results = [finish(process) for process in processes]
    assert [status for status, _, _ in results] == [EXIT_RESUMABLE] * 2, results
    stops = {output.splitlines()[-1] for _, output, _ in results}
    assert len(stops) == 1 and stops.pop().startswith("stopped at ")
