"""Writing the documents of a split to shards; what is written is described in the manifest."""

import array
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from train.data.manifest import DataError, FileEntry, SplitEntry

RECORD_TOKENS = 2**14
_WRITER_OPTIONS = "group_size:1,zstd:1"


class SplitWriter:
    """Writes the documents of a split to shards."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int):
        self._folder, self._name, self._dtype = folder, name, dtype
        self._shard_tokens = shard_tokens
        self._content = hashlib.sha256()
        self._lengths = array.array("I")
        self._shards: list[Path] = []
        self._writer: Any = None
        self._in_shard = 0
        self._tokens = self._text_bytes = self._records = 0

    def write(self, document: Integer[np.ndarray, " tokens"], text_bytes: int) -> None:
        """Appends `BOS tokens EOS`, which stands for `text_bytes` bytes of text."""
        self._lengths.append(len(document))
        self._tokens += len(document)
        self._text_bytes += text_bytes
        self._content.update(len(document).to_bytes(8, "little"))
        stored = document.astype(self._dtype.newbyteorder("<"), copy=False)
        for start in range(0, len(document), RECORD_TOKENS):
            payload = stored[start : start + RECORD_TOKENS].tobytes()
            self._content.update(payload)
            self._shard().write(payload)
            self._in_shard += len(payload) // self._dtype.itemsize
            self._records += 1

    def _shard(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._writer is not None and self._in_shard >= self._shard_tokens:
            self._close_shard()
        if self._writer is None:
            path = self._folder / f"{self._name}-{len(self._shards):05d}.arrayrecord"
            self._writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
            self._shards.append(path)
            self._in_shard = 0
        return self._writer

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _check_written(self) -> None:
        # The writer keeps quiet about a full disk.
        from array_record.python.array_record_module import ArrayRecordReader

        found = 0
        for path in self._shards:
            reader = ArrayRecordReader(str(path))
            found += reader.num_records()
            reader.close()
        if found != self._records:
            raise DataError(
                f"data: {self._folder} holds {found:,} {self._name} records of"
                f" {self._records:,}; is the disk full?"
            )

    def abandon(self) -> None:
        """Lets go of an unfinished shard; of a closed writer, of nothing."""
        self._close_shard()

    def close(self) -> SplitEntry:
        """Finishes the last shard and the table of lengths.

        Raises:
          DataError: not all that was written is there, as on a full disk.
        """
        self._close_shard()
        self._check_written()
        path = self._folder / f"{self._name}-lengths.npy"
        np.save(path, np.frombuffer(self._lengths, np.uint32))
        return SplitEntry(
            documents=len(self._lengths),
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            records=self._records,
            content_sha256=self._content.hexdigest(),
            lengths=FileEntry.of(path),
            shards=tuple(FileEntry.of(shard) for shard in self._shards),
        )
