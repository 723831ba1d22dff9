"""A run on disk and the command that reads it."""

import os

import pytest
from saved_runs import save_run

from nha_jax.generate import main
from nha_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), Tokenizer.bytes().to_json())


@pytest.fixture
def command(run, capsys):
    # What JAX was told about its cache stays as it is.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")

    def execute(*arguments, status=0, checkpoint=run):
        options = ["--checkpoint", str(checkpoint), "--compilation-cache", cache]
        assert main([*options, *arguments]) == status
        return capsys.readouterr()

    return execute
