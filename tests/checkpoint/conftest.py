"""Data and an uninterrupted run that the interrupted ones are compared with."""

import random

import pytest
from runs import Runs

from train.prepare_data import PrepareConfig, prepare


@pytest.fixture(scope="session")
def prepared_text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    choose = random.Random(0)
    words = ["a ", "sliding ", "window ", "of ", "exact ", "keys ", "and ", "slots "]
    for index in range(60):
        text = "".join(choose.choices(words, k=choose.randint(5, 60)))
        (root / f"{index}.txt").write_text(text)
    config = PrepareConfig(
        input=(str(root),), output=str(root / "prepared"), validation_fraction=0.2
    )
    prepare(config, progress=False, log=lambda line: None)
    return root / "prepared"


@pytest.fixture(scope="session")
def runs(tmp_path_factory, prepared_text):
    """A folder of runs, with ``whole``: trained to the end without an interruption."""
    runs = Runs(tmp_path_factory.mktemp("runs"), prepared_text)
    runs.finish("whole")
    return runs
