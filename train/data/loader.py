"""Batches by step: a Grain `MapDataset` over the rows of a split.

There is no iterator state: the batch of a step is a function of the split, the global batch
size and the step, and each process builds its own contiguous block of it. So the global batch is
the same array on any number of processes, and a resumed run starts at its step at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from train.data.manifest import DataError
from train.data.split import Batch, Split

# Steps; never reached.
_ENDLESS = 2**40
_THREADS = 2
_BUFFERED_BATCHES = 8


def make_loader(
    split: Split,
    *,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_epochs: int | None = None,
) -> "Loader":
    """Iterates over the batches of a split from a step on, prefetching in the background.

    Args:
      split: from `open_split`.
      batch_size: rows in the global batch, a multiple of `process_count`.
      start_step: first step to yield, at least 0.
      process_index: which contiguous block of each global batch to yield.
      process_count: number of blocks.
      num_workers: Grain worker processes; 0 prefetches with threads of this process.
      num_epochs: stop after so many passes; rows of padding complete the last batch.
        None: never stop.

    Returns:
      An iterator of dicts of arrays `[batch_size / process_count, context]`: see `Split.row`.
      Use it as a context manager, or call `close`.

    Raises:
      DataError: the numbers do not fit together.
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise DataError(
            f"data: batch_size={batch_size} must be a positive multiple of the"
            f" {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"data: process_index={process_index} is not in [0, {process_count})")
    if start_step < 0 or num_workers < 0 or (num_epochs is not None and num_epochs < 1):
        raise DataError(
            f"data: start_step={start_step} and num_workers={num_workers} must be at least 0,"
            f" num_epochs={num_epochs} at least 1"
        )
    import grain
    from absl import flags

    steps = _Steps(split, batch_size, process_index, process_count, num_epochs)
    dataset = grain.MapDataset.source(steps).slice(slice(start_step, len(steps)))
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BUFFERED_BATCHES)
    batches = dataset.to_iter_dataset(options)
    if num_workers:
        # Grain reads its absl flags there, which only absl's own entry point parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Started now because, in older Pythons, its start unblocks the signals of `Loader`.
        resource_tracker.ensure_running()
        # Through pipes: shared memory that is still in flight at the end is reported as leaked.
        batches = grain.experimental.WithOptionsIterDataset(
            batches, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        )
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=_prepare_worker,
        )
    return Loader(batches)


class Loader(Iterator[Batch]):
    """An iterator over batches that can be closed. Use `make_loader`.

    Raises:
      DataError: at a batch, a record of the data is damaged.
    """

    def __init__(self, batches: Any):
        self._iterator = iter(batches)
        self._started = False

    def __next__(self) -> Batch:
        if self._started:
            return next(self._iterator)
        self._started = True
        # Worker processes start here and inherit the mask: a Ctrl-C in the terminal or a
        # scheduler's SIGTERM to the whole group is for this process, which closes them in order.
        stopping = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
        try:
            return next(self._iterator)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Stops prefetching and ends the worker processes."""
        self._iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Steps:
    """The batches of one process by step: the random-access source of the dataset."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        process_index: int,
        process_count: int,
        num_epochs: int | None,
    ):
        block = batch_size // process_count
        self._split = split
        self._batch_size = batch_size
        self._rows = np.arange(process_index * block, (process_index + 1) * block)
        self._num_positions = None if num_epochs is None else num_epochs * split.num_rows

    def __len__(self) -> int:
        if self._num_positions is None:
            return _ENDLESS
        return -(-self._num_positions // self._batch_size)

    def __getitem__(self, step: int) -> Batch:
        positions = self._rows + int(step) * self._batch_size
        if self._num_positions is not None:
            positions = np.where(positions < self._num_positions, positions, -1)
        return self._split.batch(positions)

    def __repr__(self) -> str:
        return f"steps({self._split.name})"


def _prepare_worker(index: int, count: int) -> None:
    """Lets a worker process end with its parent even when that one is killed."""
    del index, count
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
