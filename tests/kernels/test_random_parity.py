"""Random shapes and options against the definition in float64."""

import concurrent.futures
import functools
import multiprocessing
import os

import parity
import pytest

SHAPES, DRAWS = 104, 5


def _check(draws: list[parity.Draw], capsys) -> None:
    with capsys.disabled():
        print(f"\nrandom parity: {parity.report(draws)}")
    failures = [(draw.failures, draw.gates, draw.shape) for draw in draws if draw.failures]
    assert not failures, "\n".join(map(str, failures[:20]))


@pytest.mark.gpu
def test_random_parity(capsys, monkeypatch):
    """Tracing holds Python's lock, so shapes are compiled in processes."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    monkeypatch.setenv("XLA_FLAGS", flags)
    workers = max(1, min(13, (os.cpu_count() or 2) - 2))
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        run = functools.partial(parity.run, "pallas_triton", DRAWS)
        draws = [draw for found in pool.map(run, range(SHAPES)) for draw in found]
    assert len(draws) >= 500
    _check(draws, capsys)


@pytest.mark.wide
def test_random_parity_interpreted(capsys):
    _check([d for seed in range(6) for d in parity.run("pallas_triton_interpret", 1, seed)], capsys)
