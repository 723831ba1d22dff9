"""Whether a checkpoint may go on under a configuration, and what has changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What makes the run what it is: other values here and the checkpoint is of another run.
# Everything else may change on resume. The optimizer's numbers, the schedule and the number of
# steps take effect from the next step on; mesh, microbatches, loss chunks and rematerialisation
# change only how the same numbers are computed.
IDENTITY_SECTIONS = ("model",)
IDENTITY_KEYS = ("context", "batch_size", "seed", "data.mask_documents")
FREE_MODEL_KEYS = ("remat", "implementation")


class ResumeError(ValueError):
    """The checkpoint is of another run; the message says where they differ."""


def check_resumable(
    saved_config: Mapping[str, Any],
    config: Mapping[str, Any],
    saved_data: Mapping[str, Any],
    data: Mapping[str, Any],
) -> list[str]:
    """Compare a checkpoint with the configuration and the data that are to continue it.

    Args:
        saved_config: Resolved configuration in the checkpoint.
        config: Resolved configuration now.
        saved_data: Identity of the data in the checkpoint.
        data: Identity of the data now.

    Returns:
        The differences that are allowed, a line each.

    Raises:
        ResumeError: The model or the data differ.
    """
    allowed: list[str] = []
    forbidden: list[str] = []
    for key, before, now in _differences(saved_config, config):
        line = f"{key}: {before!r} in the checkpoint, {now!r} now"
        (forbidden if _is_identity(key) else allowed).append(line)
    for key, before, now in _differences(saved_data, data):
        forbidden.append(f"data {key}: {before!r} in the checkpoint, {now!r} now")
    if forbidden:
        raise ResumeError(
            "the checkpoint is of another model or other data:\n  "
            + "\n  ".join(forbidden)
            + "\nGive the run another --name, or set the old one aside with --resume never."
        )
    return allowed


def arguments_to_go_on(arguments: Sequence[str], resume: str) -> list[str]:
    """Arguments with which a run that was stopped goes on.

    Args:
        arguments: Those it was started with.
        resume: What they, or the file that they name, say of ``resume``.

    Returns:
        The same, but a run that was to start anew (``never``) goes on (``must``).
    """
    if resume != "never":
        return list(arguments)
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--resume":
            next(rest)
        elif not argument.startswith("--resume="):
            kept.append(argument)
    return [*kept, "--resume", "must"]


def _is_identity(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section in IDENTITY_SECTIONS:
        return rest not in FREE_MODEL_KEYS
    return key in IDENTITY_KEYS


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in [*before, *(name for name in now if name not in before)]:
        a, b = before.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}", a, b
