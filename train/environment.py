"""`environment.json`: what a run ran on."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

ENVIRONMENT_FILE = "environment.json"
_PACKAGES = (
    "nha-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array-record",
    "numpy",
    "tokenizers",
)
_SOURCE = Path(__file__).resolve().parents[1]


def describe_environment(mesh: Mesh) -> dict[str, Any]:
    """Versions, devices, commit and command of this process.

    Args:
      mesh: the devices that train.

    Returns:
      JSON values only.
    """
    devices = list(mesh.devices.flat)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(sys.orig_argv),
        "commit": source_commit(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "devices": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "mesh": {name: int(size) for name, size in mesh.shape.items()},
            "processes": jax.process_count(),
        },
        "host": {
            "platform": platform.platform(),
            "cpus": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


def write_environment(directory: Path, mesh: Mesh, *, start_step: int) -> None:
    """Writes `environment.json`; what it said before a resume is kept under "earlier".

    Args:
      directory: of the run.
      mesh: the devices that train.
      start_step: steps done already; 0 begins the file anew.
    """
    path = directory / ENVIRONMENT_FILE
    earlier: list[Any] = []
    if start_step and path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*before.pop("earlier", []), before]
        except (json.JSONDecodeError, AttributeError):
            earlier = []
    record = {"start_step": start_step} | describe_environment(mesh) | {"earlier": earlier}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def source_commit() -> str | None:
    """The git commit of this source tree, "+changes" appended if files differ from it.

    None when the package is not in a work tree of its own.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != _SOURCE:
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit if commit is None or not changes else f"{commit}+changes"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_SOURCE), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
