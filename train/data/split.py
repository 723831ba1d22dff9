"""A split of a data directory as rows of packed documents, addressed by step."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from nha_jax.tokenizer import Tokenizer, load_tokenizer
from train.data.manifest import (
    SPLITS,
    TOKENIZER_NAME,
    DataError,
    Manifest,
    damage_error,
    find_damage,
    read_manifest,
)
from train.data.packing import PLAN_VERSION, RowPlan, load_plan, plan_rows, save_plan
from train.data.permutation import mix_key, permute

logger = logging.getLogger(__name__)

Row = dict[str, Int32[np.ndarray, " context"] | Bool[np.ndarray, " context"]]
Batch = dict[str, Int32[np.ndarray, "batch context"] | Bool[np.ndarray, "batch context"]]


def open_split(directory: str | Path, name: str, *, context: int, seed: int) -> "Split":
    """Opens a split of a prepared data directory and plans its rows.

    The plan is kept in `directory/plans` and found there the next time. Where that folder cannot
    be written, the plan is made in memory.

    Args:
      directory: what `train.prepare_data` wrote.
      name: "train" or "validation".
      context: positions per row (T).
      seed: chooses which pieces share a row, and the order of rows.

    Raises:
      DataError: the directory is not prepared, a file of it is missing, truncated or changed,
        the split is empty, or `context` is too small.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if name not in manifest.splits:
        raise DataError(f"data: {directory} has no split {name!r}; it has {', '.join(SPLITS)}")
    entry = manifest.splits[name]
    if entry.documents == 0:
        raise DataError(
            f"data: the {name} split of {directory} is empty; prepare it with more text or"
            " another validation_fraction"
        )
    if (problem := find_damage(directory, manifest, [name])) is not None:
        raise damage_error(directory, manifest, problem)
    lengths = np.load(directory / entry.lengths.name, mmap_mode="r")
    text = json.dumps([PLAN_VERSION, manifest.hash, name, context, seed])
    key = hashlib.sha256(text.encode()).hexdigest()
    path = directory / "plans" / f"{name}-context{context}-seed{seed}-{key[:16]}.npy"
    plan = load_plan(path)
    if plan is None:
        if path.exists():
            logger.warning("data: the stored plan %s is damaged and is made again", path)
        plan = plan_rows(np.asarray(lengths), context, int(key[:16], 16))
        try:
            save_plan(path, plan)
        except OSError as error:
            logger.warning("data: the plan of rows stays in memory: %s", error)
    return Split(directory, name, context, seed, manifest, plan, path)


class Split:
    """Rows of `context` positions, each holding whole documents or pieces of long ones.

    Attributes:
      directory, name, context, seed: as given to `open_split`.
      manifest: the data directory's manifest.
      manifest_hash: the hash that stands for the data's content.
      num_documents: documents in the split.
      num_tokens: their tokens, BOS and EOS included; all of them occur in the rows, once.
      num_bytes: UTF-8 bytes of their text.
      num_cut_documents: documents longer than the context.
      num_rows: rows in an epoch.
      num_segments: documents and pieces of documents in all rows.
      fill: share of positions that hold a token.
      num_targets: positions with a loss in an epoch: each segment's tokens but its last.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        context: int,
        seed: int,
        manifest: Manifest,
        plan: RowPlan,
        plan_path: Path,
    ):
        """Use `open_split`."""
        self.directory, self.name, self.context, self.seed = directory, name, context, seed
        self.manifest = manifest
        self.manifest_hash = manifest.hash
        entry = manifest.splits[name]
        self.num_documents, self.num_tokens = entry.documents, entry.tokens
        self.num_bytes = entry.text_bytes
        self._plan, self._plan_path = plan, plan_path
        self.num_rows, self.num_segments = plan.num_rows, plan.num_pieces
        self.fill = self.num_tokens / (self.num_rows * context)
        self.num_targets = self.num_tokens - self.num_segments
        self._open()
        self.num_cut_documents = int(np.count_nonzero(self._lengths > context))

    def _open(self) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        entry = self.manifest.splits[self.name]
        self._lengths = np.load(self.directory / entry.lengths.name, mmap_mode="r")
        records = -(-self._lengths.astype(np.int64) // self.manifest.record_tokens)
        self._first_record = np.cumsum(records) - records
        try:
            self._records = ArrayRecordDataSource(
                [str(self.directory / shard.name) for shard in entry.shards]
            )
        except Exception as error:  # The reader's own errors have no common type.
            raise self._damage(f"a shard of {self.directory} is unreadable: {error}") from None
        if len(self._records) != entry.records:
            raise self._damage(
                f"the shards of {self.directory} hold {len(self._records):,} {self.name}"
                f" records, the manifest says {entry.records:,}"
            )

    def _damage(self, problem: str) -> DataError:
        return damage_error(self.directory, self.manifest, problem)

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers map the files themselves instead of receiving copies.
        state = self.__dict__.copy()
        for mapped in ("_lengths", "_first_record", "_records", "tokenizer"):
            state.pop(mapped, None)
        if isinstance(self._plan.documents, np.memmap) or self._plan_path.exists():
            state["_plan"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if self._plan is None:
            plan = load_plan(self._plan_path, check=False)
            if plan is None:
                raise DataError(f"data: the plan {self._plan_path} disappeared")
            self._plan = plan
        self._open()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the data was prepared with.

        Raises:
          ValueError: its file cannot be read.
        """
        return load_tokenizer(self.directory / TOKENIZER_NAME)

    def identity(self) -> dict[str, Any]:
        """What decides the rows of every step, next to the global batch size."""
        return {"manifest_hash": self.manifest_hash, "context": self.context, "seed": self.seed}

    def summary(self) -> str:
        """One line for people: documents, cuts, rows and how full they are."""
        # Documents that fit are never cut, so lengths just above half a row leave gaps.
        hint = "" if self.fill >= 0.97 else " (another context would waste less)"
        return (
            f"{self.name}: {self.num_documents:,} documents ({self.num_cut_documents:,} longer than"
            f" {self.context:,} tokens and cut), {self.num_tokens:,} tokens,"
            f" {self.num_bytes:,} bytes of text; {self.num_segments:,} segments in"
            f" {self.num_rows:,} rows, {100 * self.fill:.2f} % full{hint}"
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises `DataError` unless a model with `vocab_size` ids can read the tokens."""
        if vocab_size < self.manifest.vocab_size:
            raise DataError(
                f"data: model.vocab_size={vocab_size} is smaller than the"
                f" {self.manifest.vocab_size} ids of the tokenizer of {self.directory};"
                f" set model.vocab_size to at least {self.manifest.vocab_size}"
            )

    def segment_lengths(self) -> Int64[np.ndarray, " {self.context}+1"]:
        """Number of segments of each length from 0 to `context`."""
        full, rest = np.divmod(self._lengths, np.uint32(self.context))
        counts = np.bincount(rest, minlength=self.context + 1)
        counts[0] = 0
        counts[self.context] = full.sum(dtype=np.int64)
        return counts

    def document(self, index: int) -> Integer[np.ndarray, " tokens"]:
        """The tokens of a document, BOS and EOS included, in the stored dtype.

        Raises:
          DataError: a record of the data is damaged.
        """
        return self._tokens(index, 0, int(self._lengths[index]))

    def documents(self) -> Iterator[Integer[np.ndarray, " tokens"]]:
        """All documents in stored order.

        Raises:
          DataError: a record of the data is damaged.
        """
        for index in range(self.num_documents):
            yield self.document(index)

    def _tokens(self, document: int, start: int, stop: int) -> Integer[np.ndarray, " _"]:
        size = self.manifest.record_tokens
        first, last = start // size, -(-stop // size)
        base = int(self._first_record[document])
        records = []
        for record in range(base + first, base + last):
            try:
                payload = self._records[record]
            except Exception as error:  # As above.
                raise self._damage(
                    f"record {record} of the {self.name} split of {self.directory} is damaged:"
                    f" {error}"
                ) from None
            records.append(np.frombuffer(payload, self.manifest.dtype))
        tokens = records[0] if len(records) == 1 else np.concatenate(records)
        tokens = tokens[start - first * size : stop - first * size]
        if len(tokens) != stop - start:
            raise self._damage(
                f"document {document} of the {self.name} split of {self.directory} is shorter"
                " than recorded"
            )
        return tokens

    def locate(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Rows of the plan at positions `epoch * num_rows + index` of an endless run, `[n]`.

        Each epoch is another permutation of all rows, so no row is left out and none waits:
        a batch may end one epoch and begin the next.
        """
        positions = np.asarray(positions, np.int64)
        epochs, indices = np.divmod(positions, self.num_rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            key = mix_key(self.seed, epoch)
            rows[epochs == epoch] = permute(indices[epochs == epoch], self.num_rows, key)
        return rows

    def batch_rows(self, step: int, batch_size: int) -> Int64[np.ndarray, " {batch_size}"]:
        """Rows of the plan in the global batch of a step: positions `step * batch_size + i`."""
        return self.locate(np.arange(batch_size) + step * batch_size)

    def segments(self, row: int) -> list[tuple[int, int, int]]:
        """The segments of a row of the plan: `(document, first token, number of tokens)`."""
        begin, end = int(self._plan.starts[row]), int(self._plan.starts[row + 1])
        found = []
        documents = self._plan.documents[begin:end].tolist()
        pieces = self._plan.pieces[begin:end].tolist()
        for document, piece in zip(documents, pieces, strict=True):
            start = piece * self.context
            length = min(self.context, int(self._lengths[document]) - start)
            found.append((document, start, length))
        return found

    def row(self, epoch: int, index: int) -> Row:
        """Row `index` of an epoch's permutation: `batch` of one, without its batch axis.

        Raises:
          DataError: a record of the data is damaged.
        """
        batch = self.batch(np.array([epoch * self.num_rows + index]))
        return {name: values[0] for name, values in batch.items()}

    def batch(self, positions: Int64[np.ndarray, " n"]) -> Batch:
        """The rows at positions `epoch * num_rows + index` of an endless run.

        Args:
          positions: `[n]`; a negative one gives a row of padding.

        Returns:
          Arrays `[n, context]`: "tokens", "targets", "segment_ids" (1, 2, ...; 0 is padding),
          "positions" (from 0 in each segment), all int32; "loss_mask", bool: True where the
          target is the next token of the same segment. Targets elsewhere are 0.

        Raises:
          DataError: a record of the data is damaged.
        """
        batch: Batch = {
            name: np.zeros((len(positions), self.context), np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions")
        }
        batch["loss_mask"] = np.zeros((len(positions), self.context), bool)
        (used,) = np.nonzero(positions >= 0)
        for i, plan_row in zip(used, self.locate(positions[used]).tolist(), strict=True):
            self._fill({name: values[i] for name, values in batch.items()}, plan_row)
        return batch

    def _fill(self, row: Row, plan_row: int) -> None:
        at = 0
        for number, (document, start, length) in enumerate(self.segments(plan_row), start=1):
            tokens = self._tokens(document, start, start + length)
            end = at + length
            row["tokens"][at:end] = tokens
            row["targets"][at : end - 1] = tokens[1:]
            row["loss_mask"][at : end - 1] = True
            row["segment_ids"][at:end] = number
            row["positions"][at:end] = np.arange(length)
            at = end
