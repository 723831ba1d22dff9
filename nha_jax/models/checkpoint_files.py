"""The files of a checkpoint: their layout, the manifest of checksums, verification.

A run's folder holds ``checkpoints/<step>/``, one folder a checkpoint::

    <step>/params/       the model's parameters (Orbax)
    <step>/training/     the step and the optimizer state (Orbax)
    <step>/config/       the resolved configuration (JSON)
    <step>/data/         the identity of the data (JSON)
    <step>/metrics/      loss and validation loss of that step (JSON)
    <step>/tokenizer/    the tokenizer (JSON)
    <step>/manifest.json size and SHA-256 of every other file

A folder gets its name ``<step>`` only when it is complete, manifest included: so a folder of that
name without a sound manifest is damaged, never unfinished.

Only the standard library is needed here.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

CHECKPOINTS_DIRECTORY = "checkpoints"
MANIFEST = "manifest.json"
PARAMS_ITEM = "params"
TRAINING_ITEM = "training"
CONFIG_ITEM = "config"
DATA_ITEM = "data"
METRICS_ITEM = "metrics"
TOKENIZER_ITEM = "tokenizer"

_FORMAT = 1
_HASH_THREADS = 8


class DamagedCheckpointError(Exception):
    """A file of a checkpoint is missing or is not what was written."""

    def __init__(self, checkpoint: Path, file: str, reason: str):
        super().__init__(f"checkpoint {checkpoint} is damaged: {file} {reason}")
        self.checkpoint = checkpoint
        self.file = file
        self.reason = reason


def step_directories(directory: str | os.PathLike[str]) -> dict[int, Path]:
    """The checkpoints in a folder, by step, oldest first; leftovers and damaged ones not included.

    Args:
        directory: The folder that holds the folders of the steps; it may be missing.

    Returns:
        Step → folder, in the order of the steps.
    """
    root = Path(directory)
    if not root.is_dir():
        return {}
    steps = {int(path.name): path for path in root.iterdir() if _is_step(path.name)}
    return dict(sorted(steps.items()))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name))


def write_manifest(checkpoint: str | os.PathLike[str]) -> None:
    """Write the manifest of a folder's files and bring all of it to stable storage.

    Args:
        checkpoint: The folder; nothing may write to it any more.

    Raises:
        OSError: A file cannot be read or the manifest cannot be written.
    """
    root = Path(checkpoint)
    names = [name for name in _files(root) if name != MANIFEST]
    with _pool() as pool:
        digests = pool.map(lambda name: _checksum(root / name, durable=True), names)
        files = {
            name: {"sha256": digest, "size": size}
            for name, (digest, size) in zip(names, digests, strict=True)
        }
    temporary = root / f"{MANIFEST}.tmp"
    with temporary.open("wb") as stream:
        stream.write(_serialise(files))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(root / MANIFEST)
    for folder, _, _ in os.walk(root):
        sync_directory(folder)


def verify(
    checkpoint: str | os.PathLike[str], items: Collection[str] | None = None
) -> dict[str, Any]:
    """Compare every file of a checkpoint with the manifest: present, same size, same bytes.

    Args:
        checkpoint: The folder of one step.
        items: Names of the items to read, such as ``params``; the files beside the items and the
            manifest are always read. None: all.

    Returns:
        The manifest's entries that were compared, by file name.

    Raises:
        DamagedCheckpointError: Names the first file at fault and says what is wrong with it.
        OSError: A file cannot be read.
    """
    root = Path(checkpoint)
    files = _read_manifest(root)
    if items is not None:
        files = {
            name: entry
            for name, entry in files.items()
            if "/" not in name or name.partition("/")[0] in items
        }
    for name, entry in files.items():
        path = root / name
        if not path.is_file():
            raise DamagedCheckpointError(root, name, "is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            reason = f"has {size:,} bytes instead of {entry['size']:,}"
            raise DamagedCheckpointError(root, name, reason)
    with _pool() as pool:
        digests = pool.map(lambda name: _checksum(root / name)[0], files)
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["sha256"]:
                raise DamagedCheckpointError(root, name, "has changed bytes (SHA-256 differs)")
    return files


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Bring a folder's entries (new and renamed files) to stable storage."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(root: Path) -> list[str]:
    found = []
    for folder, _, names in os.walk(root):
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
    return sorted(found)


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    # hashlib and file reads release the interpreter lock, so threads do work side by side.
    threads = min(_HASH_THREADS, os.cpu_count() or 1)
    return concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="checksum")


def _checksum(path: Path, durable: bool = False) -> tuple[str, int]:
    with path.open("rb") as stream:
        if durable:
            os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return digest, stream.tell()


def _serialise(files: dict[str, Any]) -> bytes:
    # The manifest carries a checksum of itself, so that changed bytes in it are known for what
    # they are and do not accuse another file.
    body = {"files": files, "format": _FORMAT}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1)
    return f"{text}\n".encode()


def _read_manifest(root: Path) -> dict[str, Any]:
    try:
        content = (root / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpointError(root, MANIFEST, "is missing") from None
    try:
        manifest = json.loads(content)
        intact = _serialise(manifest["files"]) == content
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DamagedCheckpointError(root, MANIFEST, "is truncated or has changed bytes")
    return manifest["files"]
