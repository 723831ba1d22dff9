"""The loader: batches by step, blocks per process, workers, the end of an epoch."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from train.data import DataError, Split, make_loader, open_split

NAMES = ("tokens", "targets", "loss_mask", "segment_ids", "positions")


def take(split: Split, count: int, **settings) -> list[dict[str, np.ndarray]]:
    with make_loader(split, **settings) as loader:
        return list(itertools.islice(loader, count))


def assert_same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> None:
    assert len(a) == len(b) > 0
    for first, second in zip(a, b, strict=True):
        assert set(first) == set(second) == set(NAMES)
        for name in NAMES:
            assert first[name].dtype == second[name].dtype
            np.testing.assert_array_equal(first[name], second[name])


def test_batches_are_the_rows_of_their_step(split: Split) -> None:
    for step, batch in enumerate(take(split, 5, batch_size=6)):
        for i in range(6):
            row = split.row(*divmod(step * 6 + i, split.num_rows))
            for name in NAMES:
                np.testing.assert_array_equal(batch[name][i], row[name])
        assert batch["tokens"].shape == (6, 128)
        assert batch["tokens"].dtype == np.int32 and batch["loss_mask"].dtype == bool


def test_starting_at_a_step_equals_going_there(split: Split) -> None:
    steps = 2 * split.num_rows // 8 + 5  # Across two ends of epochs.
    everything = take(split, steps, batch_size=8)
    for start in (1, steps // 2, steps - 2):
        assert_same(take(split, steps - start, batch_size=8, start_step=start), everything[start:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_processes(
    split: Split, process_count: int
) -> None:
    steps = split.num_rows // 8 + 3
    whole = take(split, steps, batch_size=8, start_step=2)
    blocks = [
        take(
            split,
            steps,
            batch_size=8,
            start_step=2,
            process_index=index,
            process_count=process_count,
        )
        for index in range(process_count)
    ]
    joined = [
        {name: np.concatenate([block[name] for block in parts]) for name in NAMES}
        for parts in zip(*blocks, strict=True)
    ]
    assert_same(joined, whole)


def test_a_finite_pass_pads_its_last_batch(split: Split) -> None:
    batch_size = 8
    assert split.num_rows % batch_size
    for process_count in (1, 2):
        targets = rows = steps = 0
        for index in range(process_count):
            batches = take(
                split,
                10**6,
                batch_size=batch_size,
                num_epochs=1,
                process_index=index,
                process_count=process_count,
            )
            steps = max(steps, len(batches))
            assert len(batches) == -(-split.num_rows // batch_size)
            rows += sum(int((batch["segment_ids"].max(1) > 0).sum()) for batch in batches)
            targets += sum(int(batch["loss_mask"].sum()) for batch in batches)
        assert (rows, targets) == (split.num_rows, split.num_targets)
    assert len(take(split, 10**6, batch_size=batch_size, num_epochs=3)) == -(
        -3 * split.num_rows // batch_size
    )


def test_workers_give_the_same_batches(split: Split) -> None:
    expected = take(split, 9, batch_size=4, start_step=11)
    with make_loader(split, batch_size=4, start_step=11, num_workers=2) as loader:
        found = [next(loader)]
        workers = worker_processes()
        assert len(workers) == 2
        for worker in workers:  # A Ctrl-C in the terminal reaches them too.
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGTERM)
        found += list(itertools.islice(loader, 8))
        assert_same(found, expected)
        # The parent's own signals are as they were.
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not worker_processes()


def worker_processes(parent: int | None = None) -> list[int]:
    """Children that run a spawned worker."""
    parent = os.getpid() if parent is None else parent
    found = []
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            command = Path(f"/proc/{child}/cmdline").read_text()
            if "spawn_main" in command:
                found.append(child)
    return found


def test_workers_end_when_their_parent_is_killed(data_directory: Path) -> None:
    program = textwrap.dedent(
        f"""
        import time
        from train.data import make_loader, open_split

        if __name__ == "__main__":
            split = open_split({str(data_directory)!r}, "train", context=128, seed=7)
            loader = make_loader(split, batch_size=4, num_workers=1)
            next(loader)
            print("ready", flush=True)
            time.sleep(600)
        """
    )
    script = data_directory.parent / "killed_parent.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        (worker,) = worker_processes(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 .* multiple of the 4 processes"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "process_index=2"),
        ({"batch_size": 4, "start_step": -1}, "start_step=-1"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers=-1"),
        ({"batch_size": 4, "num_epochs": 0}, "num_epochs=0"),
    ],
)
def test_impossible_settings(split: Split, settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_loader(split, **settings)


def test_damage_surfaces_in_the_loop(data_directory: Path, tmp_path: Path) -> None:
    import shutil

    directory = Path(shutil.copytree(data_directory, tmp_path / "copy"))
    split = open_split(directory, "train", context=128, seed=7)
    for shard in directory.glob("train-*.arrayrecord"):
        content = bytearray(shard.read_bytes())
        content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
        shard.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        take(split, split.num_rows, batch_size=1)
