"""Every file in ``configs/`` loads, and its model has a shape."""

import math
from pathlib import Path

import jax
import pytest
from flax import nnx

from nha_jax.models import PRESETS, LanguageModel, num_parameters
from train.command_line import load_config

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_there_are_files() -> None:
    names = {file.stem for file in FILES}
    assert {"nano", "nha_340m", "transformer_340m", "gsa_340m", "nha_1_3b"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_loads_and_its_model_is_shaped(file: Path) -> None:
    config = load_config(file)
    assert config.name == file.stem
    assert config.model == PRESETS[file.stem]
    assert config.warnings() == []
    model = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == num_parameters(config.model)
