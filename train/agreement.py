"""Whether the processes of a job were started alike: each reads its own configuration and data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

from train.schema import ConfigError

# What may differ from host to host: where things lie, how this host prepares and reads them (what
# comes of it, the identity of the data, must agree), and what process 0 alone prints.
PER_PROCESS_SECTIONS = ("log",)
PER_PROCESS_KEYS = (
    "runs_directory",
    "compilation_cache",
    "data.directory",
    "data.input",
    "data.tokenizer",
    "data.text_key",
    "data.validation_fraction",
    "data.max_bytes",
    "data.num_workers",
)
_DIGEST_BYTES = 8


def check_agreement(values: Mapping[str, Any]) -> None:
    """Compare values with those of the other processes, which must call this with the same keys.

    Args:
        values: Values that JSON can hold, by the name that an error gives them.

    Raises:
        ConfigError: They differ; on every process the same line, which names processes and keys.
    """
    if jax.process_count() == 1:
        return
    digests = np.asarray(multihost_utils.process_allgather(digest_values(values)))
    difference = describe_difference(list(values), digests)
    if difference is not None:
        raise ConfigError(difference)


def shared_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same on all processes, by dotted key.

    Args:
        config: ``PretrainConfig.to_dict()``.
    """
    values: dict[str, Any] = {}
    for name, value in config.items():
        # One level only: the sections are there on every process, a value in them may be null.
        if isinstance(value, Mapping):
            values |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            values[name] = value
    return {
        key: value
        for key, value in values.items()
        if key not in PER_PROCESS_KEYS and key.partition(".")[0] not in PER_PROCESS_SECTIONS
    }


def digest_values(values: Mapping[str, Any]) -> UInt8[np.ndarray, "keys bytes"]:
    """A hash of each value."""
    texts = [json.dumps(value, sort_keys=True).encode() for value in values.values()]
    digests = [hashlib.sha256(text).digest()[:_DIGEST_BYTES] for text in texts]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, _DIGEST_BYTES)


def describe_difference(
    keys: Sequence[str], digests: UInt8[np.ndarray, "processes keys bytes"]
) -> str | None:
    """One line about the processes whose values are not those of process 0, or None.

    Args:
        keys: Names of the values.
        digests: ``digest_values`` of each process.
    """
    differs = np.any(digests != digests[0], axis=-1)
    parts = [
        f"process {process} has another {', '.join(np.array(keys)[differs[process]].tolist())}"
        for process in np.flatnonzero(differs.any(axis=-1))
    ]
    if not parts:
        return None
    return f"all processes must be started alike: {'; '.join(parts)} than process 0"
