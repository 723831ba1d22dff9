"""Measures cells of one architecture in a process of its own.

    python -m nha_jax.inference.benchmarks.worker '{"settings": ..., "cells": [...]}'

Reports one JSON object a line on standard output: what the device is, which cell begins, and what
became of it.
"""

import gc
import json
import math
import sys
from dataclasses import asdict, replace
from typing import Any

import jax

from nha_jax.inference.benchmarks.cells import LARGEST, MORE_MAY_FIT, Cell, Result, weight_bytes
from nha_jax.inference.benchmarks.noise import abstract_model, noise_model
from nha_jax.inference.benchmarks.programs import Decoding, Prefill, attempt, median
from nha_jax.inference.benchmarks.settings import Settings, measure_machine, memory_limit
from nha_jax.inference.state import cache_bytes
from pallas_kernels.benchmarks.errors import in_one_line

# Longer prompts are read in pieces of at most this many tokens.
_LONGEST_PIECE = 2**17
_SHORTEST_PIECE = 512


class Worker:
    """Measures cells one after another; the weights are made once, when the first cell fits."""

    def __init__(self, settings: Settings, cells: list[Cell]) -> None:
        self._settings = settings
        [name] = {cell.architecture for cell in cells}
        self._config = settings.config(name)
        self._limit = memory_limit(settings)
        self._graph, self._shapes = abstract_model(self._config)
        self._made: Any = None

    def measure(self, cell: Cell) -> Result:
        """Whatever happens, a result."""
        try:
            rows = max(cell.batch, 1)
            least = weight_bytes(self._config) + cache_bytes(self._config, rows, cell.context)
            if least > self._limit:
                return self._too_large(cell, rows, "weights and cache", least)
            result = self._prefill(cell) if cell.measure == "prefill" else self._decode(cell)
            stats = jax.devices()[0].memory_stats() or {}
            return replace(result, process_peak_bytes=stats.get("peak_bytes_in_use"))
        except Exception as error:
            return Result(cell, "failed", in_one_line(error))
        finally:
            gc.collect()

    def _parameters(self) -> Any:
        if self._made is None:
            self._made = noise_model(self._config)[1]
        return self._made

    def _run_decoding(self, decoding: Decoding) -> tuple[list[float], int]:
        return decoding.run(self._parameters())

    def _run_prefill(self, prefill: Prefill) -> tuple[list[float], int, str]:
        return prefill.run(self._parameters(), self._settings.runs)

    def _too_large(self, cell: Cell, rows: int, what: str, size: int) -> Result:
        reason = f"{what} {size / 2**30:.1f} GiB, limit {self._limit / 2**30:.1f} GiB"
        return Result(cell, "does not fit", reason, batch=rows, program_bytes=size)

    def _decode(self, cell: Cell) -> Result:
        most = self._settings.max_batch
        batch = cell.batch or self._most_rows(cell.context)
        while True:
            decoding = Decoding(
                self._config,
                self._graph,
                self._shapes,
                batch=batch,
                context=cell.context,
                block=self._settings.block,
                blocks=self._settings.blocks,
            )
            size = decoding.program.bytes
            fits = size <= self._limit
            measured = attempt(self._run_decoding, decoding) if fits else None
            if measured is not None:
                samples, held = measured
                return Result(
                    cell,
                    "ok",
                    batch=batch,
                    milliseconds=median(samples),
                    samples=tuple(samples),
                    cache_bytes=held,
                    program_bytes=size,
                    compile_seconds=decoding.program.compile_seconds,
                    note=MORE_MAY_FIT if cell.batch == LARGEST and batch == most else "",
                )
            if cell.batch != LARGEST or batch == 1:
                return self._too_large(cell, batch, "program" if fits else "program needs", size)
            batch = self._fewer_rows(batch, size)

    def _most_rows(self, context: int) -> int:
        """No more rows than these fit: caches alone, each once."""
        free = self._limit - weight_bytes(self._config)
        rows = free // cache_bytes(self._config, 1, context)
        return round_batch(max(1, min(self._settings.max_batch, rows)))

    def _fewer_rows(self, batch: int, size: int) -> int:
        weights = weight_bytes(self._config)
        rows = math.floor(batch * (self._limit - weights) / (size - weights))
        return round_batch(max(1, min(rows, batch - max(1, batch // 16))))

    def _prefill(self, cell: Cell) -> Result:
        settings, context = self._settings, cell.context
        piece = min(context, settings.piece or _LONGEST_PIECE)
        while True:
            prefill = Prefill(self._config, self._graph, self._shapes, context=context, piece=piece)
            size = prefill.program.bytes
            fits = size <= self._limit
            measured = attempt(self._run_prefill, prefill) if fits else None
            if measured is not None:
                samples, held, note = measured
                return Result(
                    cell,
                    "ok",
                    batch=1,
                    milliseconds=median(samples),
                    samples=tuple(samples),
                    cache_bytes=held,
                    program_bytes=size,
                    piece=piece,
                    compile_seconds=prefill.program.compile_seconds,
                    note=note,
                )
            if settings.piece is not None or piece // 2 < _SHORTEST_PIECE:
                return self._too_large(cell, 1, f"pieces of {piece} tokens:", size)
            piece = 1 << (piece - 1).bit_length() - 1


def round_batch(rows: int) -> int:
    """The largest number of rows up to this that is worth a program: all to 16, then in steps."""
    step = 1 << max(0, rows.bit_length() - 4)
    return rows - rows % step


def main(arguments: list[str]) -> None:
    """Measures what the one argument, JSON, asks for; writes a line of JSON for each event."""
    job = json.loads(arguments[0])
    settings = Settings(**job["settings"])
    cells = [Cell(**cell) for cell in job["cells"]]
    if job["measure_machine"]:
        _report("machine", **asdict(measure_machine(settings)))
    worker = Worker(settings, cells)
    for number, cell in enumerate(cells):
        _report("begin", number=number)
        _report("result", **worker.measure(cell).as_json())


def _report(event: str, **values: Any) -> None:
    print(json.dumps({"event": event} | values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
