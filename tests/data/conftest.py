"""A small corpus, prepared once."""

from pathlib import Path

import pytest
from corpus import make_texts, quiet, write_texts

from train.data import Split, open_split
from train.prepare_data import PrepareConfig, prepare


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(120)


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The texts, prepared as bytes in several shards; read it, don't change it."""
    root = tmp_path_factory.mktemp("data")
    write_texts(root / "texts", texts)
    config = PrepareConfig(
        input=(str(root / "texts"),),
        output=str(root / "prepared"),
        validation_fraction=0.2,
        shard_tokens=20_000,
    )
    prepare(config, progress=False, log=quiet)
    return root / "prepared"


@pytest.fixture(scope="session")
def split(data_directory: Path) -> Split:
    """The training split in rows of 128."""
    return open_split(data_directory, "train", context=128, seed=7)
