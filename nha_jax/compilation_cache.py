"""Compiled programs kept in a folder, for training and generation alike."""

import os
from pathlib import Path

import jax

DEFAULT_COMPILATION_CACHE = "~/.cache/nha_jax/compilation"

# Loading a program takes about a tenth of this.
_LEAST_SECONDS = 0.5


def use_compilation_cache(directory: str | None) -> None:
    """Keeps what takes half a second or more to compile, so that the next process loads it.

    The environment's `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` is taken instead of that time.

    Args:
      directory: the folder, made when missing, with `~` for the home folder; None: keep nothing.
    """
    folder = None if directory is None else str(Path(directory).expanduser())
    jax.config.update("jax_compilation_cache_dir", folder)
    if folder is not None and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
