"""A small corpus, a small run, and a cache of compiled programs that tests of the loop share."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from train.command_line import config_from_dict
from train.config import PretrainConfig
from train.prepare_data import PrepareConfig, prepare


@pytest.fixture(scope="session")
def prepared_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    choose = random.Random(0)
    words = ["a ", "sliding ", "window ", "of ", "exact ", "keys ", "and ", "slots ", "é "]
    for index in range(80):
        text = "".join(choose.choices(words, k=choose.randint(5, 60)))
        (root / f"{index}.txt").write_text(text, encoding="utf-8")
    output = root / "prepared"
    prepare(
        PrepareConfig(input=(str(root),), output=str(output), validation_fraction=0.2),
        progress=False,
        log=lambda line: None,
    )
    return output


@pytest.fixture
def make_config(prepared_text: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Makes the configuration of a small run, with dotted keys (``__`` for the dot) on top."""

    def make(**changes: Any) -> PretrainConfig:
        values: dict[str, Any] = {
            "name": "small",
            "steps": 6,
            "batch_size": 8,
            "context": 32,
            "model": {
                "vocab_size": 258,
                "num_layers": 2,
                "width": 32,
                "num_heads": 4,
                "num_kv_heads": 2,
                "mlp_width": 48,
                "num_slots": 4,
                "windows": [4],
            },
            "data": {"directory": str(prepared_text)},
            "schedule": {"learning_rate": 0.01, "warmup_steps": 2},
            "validation": {"every_steps": 3},
            "checkpoint": {"every_steps": 3, "every_minutes": None, "keep_last": 9},
            "sample": {"num_tokens": 4},
            "log": {"every_steps": 1, "progress_bar": False},
            "mesh": {"data": 1},
            "runs_directory": str(tmp_path / "runs"),
            "compilation_cache": None,
        }
        for key, value in changes.items():
            *sections, name = key.split("__")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
        return config_from_dict(values)

    return make


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def shared_compilations(compiled_programs: Path) -> Iterator[str]:
    """A folder for ``compilation_cache``; what JAX was told about it is taken back."""
    directory = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    compilation_cache.reset_cache()
    yield str(compiled_programs)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()
