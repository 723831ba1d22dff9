"""What is done about checkpoints at start-up, before any is read: leftovers, damage, room.

Everything here works on folders and is done by one process.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from nha_jax.models.checkpoint_files import (
    DamagedCheckpointError,
    step_directories,
    sync_directory,
    verify,
)

ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
UNFINISHED = ".unfinished"
DELETING = ".deleting"
DAMAGED = ".damaged"
LOCK_FILE = ".lock"


class NoSoundCheckpointError(Exception):
    """There are checkpoints, but none that can be trusted."""


class DirectoryInUseError(Exception):
    """Another process holds the folder of checkpoints."""


class DiskFullError(OSError):
    """A checkpoint would not fit on the disk."""


def lock_directory(directory: Path) -> int:
    """Claim a folder of checkpoints for this process, until it ends or closes the descriptor.

    Args:
        directory: The folder, which exists.

    Returns:
        The open descriptor that holds the claim.

    Raises:
        DirectoryInUseError: Another process has it.
    """
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise DirectoryInUseError(
                f"{directory} is in use by another process that trains this run; stop it first"
            ) from None
        raise
    return descriptor


def remove_leftovers(directory: Path, report: Callable[[str], None]) -> list[Path]:
    """Remove what interrupted saves and interrupted deletions left, with a line for each.

    Args:
        directory: The folder of checkpoints; it may be missing.
        report: Called with the lines.

    Returns:
        What was removed.
    """
    if not directory.is_dir():
        return []
    removed = []
    for path in sorted(directory.iterdir()):
        kind = _leftover_kind(path.name)
        if kind is not None and path.is_dir():
            # Writers of a save that failed in this process may still be at it, under the old name.
            doomed = path.with_name(f"{path.name}{DELETING}")
            shutil.rmtree(path if doomed.exists() else path.rename(doomed))
            report(f"Removed {path}: {kind}")
            removed.append(path)
    return removed


def _leftover_kind(name: str) -> str | None:
    if ORBAX_TEMPORARY in name or name.endswith(UNFINISHED):
        return "left by a save that was interrupted"
    if name.endswith(DELETING):
        return "left by a deletion that was interrupted"
    return None


def newest_sound(directory: Path, report: Callable[[str], None]) -> int | None:
    """Find the newest checkpoint whose every byte is as written; set damaged newer ones aside.

    A damaged checkpoint is kept, under the name ``<step>.damaged``.

    Args:
        directory: The folder of checkpoints; it may be missing.
        report: Called with a line for each damaged checkpoint, naming the file.

    Returns:
        The step, or None when there was never a checkpoint.

    Raises:
        NoSoundCheckpointError: All that there are, or were at an earlier start, are damaged.
    """
    for step, path in reversed(step_directories(directory).items()):
        try:
            verify(path)
        except DamagedCheckpointError as error:
            aside = set_aside(path)
            report(f"{error}; kept as {aside}")
        else:
            return step
    damaged = sorted(directory.glob(f"*{DAMAGED}*")) if directory.is_dir() else []
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise NoSoundCheckpointError(
            f"every checkpoint in {directory} is damaged ({names}): nothing to continue from. "
            "Restore one from a backup, or start anew with --resume never"
        )
    return None


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nothing reads, overwrites or deletes it.

    Args:
        path: Its folder.

    Returns:
        The new path.
    """
    aside, count = path.with_name(f"{path.name}{DAMAGED}"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}{DAMAGED}-{count}")
    path.rename(aside)
    sync_directory(path.parent)
    return aside


def retire(directory: str | os.PathLike[str]) -> Path | None:
    """Move a folder out of the way, to start anew under its name.

    Args:
        directory: The folder; it may be missing.

    Returns:
        Where it is now, or None when there was none.
    """
    path = Path(directory)
    if not path.exists():
        return None
    count = 1
    while (aside := path.with_name(f"{path.name}.{count}")).exists():
        count += 1
    shutil.move(path, aside)
    return aside


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. Interrupted at any point, it leaves a leftover, never a damaged one.

    Args:
        path: Its folder.
    """
    doomed = path.with_name(f"{path.name}{DELETING}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def check_free_space(directory: Path, needed: int) -> None:
    """Refuse a save that would fill the disk.

    Args:
        directory: Where the checkpoint will be written.
        needed: Bytes of the arrays.

    Raises:
        DiskFullError: Names the folder, the bytes needed and the bytes free.
    """
    # Metadata, JSON items and the store's own structure come on top of the arrays.
    needed += needed // 20 + 2**22
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DiskFullError(
            errno.ENOSPC,
            f"a checkpoint needs {needed:,} bytes, the disk has {free:,} bytes free",
            str(directory),
        )
