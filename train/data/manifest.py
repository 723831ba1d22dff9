"""The manifest of a prepared data directory: what it holds, and whether it is all there.

A data directory is written once by `train.prepare_data` and only read afterwards:

    manifest.json               counts, sizes and hashes of everything below
    tokenizer.json              the tokenizer the tokens came from
    {train,validation}-lengths.npy         tokens per document, uint32
    {train,validation}-00000.arrayrecord   the tokens

A document is `BOS tokens EOS`, cut into records of at most `record_tokens` tokens so that
reading a piece of a long document does not read all of it. No record holds two documents.
"""

import dataclasses
import hashlib
import itertools
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT = "nha-data-1"
SPLITS = ("train", "validation")
# Where there is no manifest that could say with which settings.
_PREPARE_ANEW = "prepare the data again with `python -m train.prepare_data ... --overwrite true`"


class DataError(ValueError):
    """Something is wrong with the data or its configuration; the message is one line."""


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of the data directory: its name, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileEntry":
        """The entry of an existing file."""
        return cls(path.name, path.stat().st_size, sha256_of_file(path))


@dataclasses.dataclass(frozen=True)
class SplitEntry:
    """One split: counts of documents, tokens (BOS and EOS included) and UTF-8 bytes of text.

    `content_sha256` hashes the documents' tokens themselves, whatever the files around them.
    """

    documents: int
    tokens: int
    text_bytes: int
    records: int
    content_sha256: str
    lengths: FileEntry
    shards: tuple[FileEntry, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything known about a data directory."""

    dtype: str
    record_tokens: int
    vocab_size: int
    tokenizer_sha256: str
    splits: dict[str, SplitEntry]
    preparation: dict[str, Any]
    format: str = FORMAT

    @property
    def hash(self) -> str:
        """SHA-256 of the content: equal for the same tokens in the same order.

        How and from where the data was prepared does not enter.
        """
        content = {
            "format": self.format,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer_sha256,
            "splits": {name: self.splits[name].content_sha256 for name in sorted(self.splits)},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps({"hash": self.hash} | dataclasses.asdict(self), indent=2) + "\n"


def read_manifest(directory: str | Path) -> Manifest:
    """Reads `manifest.json`.

    Raises:
      DataError: no data directory there, another format, or a manifest that was changed.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"data: {directory} holds no {MANIFEST_NAME}; prepare it with"
            f" `python -m train.prepare_data --input ... --output {directory}`"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise DataError(
                f"data: {path} has format {data['format']!r}, this version reads {FORMAT!r};"
                f" {_PREPARE_ANEW}"
            )
        recorded = data.pop("hash")
        splits = {
            name: SplitEntry(
                **entry
                | {
                    "lengths": FileEntry(**entry["lengths"]),
                    "shards": tuple(FileEntry(**shard) for shard in entry["shards"]),
                }
            )
            for name, entry in data.pop("splits").items()
        }
        manifest = Manifest(splits=splits, **data)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"data: {path} is not a manifest ({type(error).__name__}: {error}); {_PREPARE_ANEW}"
        ) from None
    if manifest.hash != recorded:
        raise DataError(
            f"data: {path} was changed: its hash is not the one it records; {_PREPARE_ANEW}"
        )
    return manifest


def find_damage(
    directory: Path,
    manifest: Manifest,
    names: Iterable[str] | None = None,
    *,
    read_shards: bool = False,
) -> str | None:
    """What is wrong with the tokenizer and the files of splits (None: of all), or None.

    Without `read_shards`, of the shards only the sizes are looked at.
    """
    splits = manifest.splits.values() if names is None else [manifest.splits[n] for n in names]
    tokenizer = _other_content(directory / TOKENIZER_NAME, manifest.tokenizer_sha256)
    damage = (problem for split in splits for problem in _damage_of(directory, split, read_shards))
    return next(itertools.chain(tokenizer, damage), None)


def _damage_of(directory: Path, split: SplitEntry, read_shards: bool) -> Iterator[str]:
    yield from _other_content(directory / split.lengths.name, split.lengths.sha256)
    for shard in split.shards:
        path = directory / shard.name
        if not path.is_file():
            yield f"shard {path} is missing"
        elif (size := path.stat().st_size) != shard.size:
            kind = "truncated" if size < shard.size else "too long"
            yield f"shard {path} is {kind}: {size:,} bytes, the manifest says {shard.size:,}"
        elif read_shards:
            yield from _other_content(path, shard.sha256)


def _other_content(path: Path, expected: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing"
    elif (found := sha256_of_file(path)) != expected:
        yield (
            f"the content of {path} has changed: SHA-256 {found[:16]}…,"
            f" the manifest says {expected[:16]}…"
        )


def verify(directory: str | Path) -> Manifest:
    """Reads every file of a data directory and compares its SHA-256 with the manifest's.

    Raises:
      DataError: naming the first file that is missing or differs.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if (problem := find_damage(directory, manifest, read_shards=True)) is not None:
        raise damage_error(directory, manifest, problem)
    return manifest


def damage_error(directory: Path, manifest: Manifest, problem: str) -> DataError:
    """The error that tells a problem and the command that prepares the data again."""
    command = preparation_command(directory, manifest.preparation["config"])
    return DataError(f"data: {problem}; prepare the data again with `{command}`")


def preparation_command(directory: str | Path, settings: Mapping[str, Any]) -> str:
    """The command that prepares a directory, whatever it holds, with the settings of a manifest."""
    words = ["python", "-m", "train.prepare_data"]
    for key, value in settings.items():
        if value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--output", str(directory), "--overwrite", "true"])


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
