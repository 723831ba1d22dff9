"""Runs cells in fresh processes, one architecture each, so that the weights are made once in each.

Peaks do not mix all the same: a cell's memory is that of its own compiled program.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from nha_jax.inference.benchmarks.cells import Cell, Result
from nha_jax.inference.benchmarks.settings import Machine, Settings

# Of the device's memory, for JAX to manage; libraries keep some of their own.
_MEMORY_FRACTION = "0.94"


def run_cells(
    settings: Settings, cells: list[Cell], cache: str, *, machine: bool
) -> Iterator[Machine | Result]:
    """Measures cells of one architecture, in order, and yields each result when it is there.

    A process that dies costs the cell that it was at; another one goes on with the rest.

    Args:
      settings: of all cells.
      cells: what to measure.
      cache: folder for compiled programs.
      machine: whether to measure the device first, too; it is yielded before the cells.

    Raises:
      RuntimeError: a process died before its first cell.
    """
    while cells or machine:
        begun = done = 0
        with _start(settings, cells, cache, machine) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    event = _event(line)
                    match event.pop("event", None):
                        case "machine":
                            machine = False
                            yield Machine(**event)
                        case "begin":
                            begun = event["number"] + 1
                            print(f"{cells[begun - 1].label} ...", file=sys.stderr, flush=True)
                        case "result":
                            done += 1
                            yield Result.from_json(event)
            finally:
                if process.poll() is None and done < len(cells):
                    process.terminate()
        status = process.returncode
        if status and not begun:
            raise RuntimeError(f"a process that measures ended with status {status} at its start")
        if begun > done:
            yield Result(cells[done], "failed", f"its process ended with status {status}")
            done += 1
        cells = cells[done:]


def _event(line: str) -> dict:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) else {}  # a library's own output


def _start(
    settings: Settings, cells: list[Cell], cache: str, machine: bool
) -> subprocess.Popen[str]:
    job = {
        "settings": asdict(settings),
        "cells": [asdict(cell) for cell in cells],
        "measure_machine": machine,
    }
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": _MEMORY_FRACTION,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "nha_jax.inference.benchmarks.worker", json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment | os.environ,
    )
