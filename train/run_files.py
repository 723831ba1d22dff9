"""The files of a run beside its checkpoints: what an error in writing one becomes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class RunFileError(Exception):
    """A file of the run cannot be written; the message names it and the reason."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``RunFileError`` that names the file."""
    try:
        yield
    except OSError as error:
        # An error in writing, unlike one in opening, does not know the file's name.
        raise RunFileError(f"{path}: {error.strerror or error}") from error
