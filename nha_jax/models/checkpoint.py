"""A trained model from a checkpoint, with nothing else needed."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from nha_jax.layers.checks import Window
from nha_jax.layers.rotary import RopeScaling
from nha_jax.models import checkpoint_files as files
from nha_jax.models.config import ModelConfig
from nha_jax.models.language_model import LanguageModel
from nha_jax.models.windows import parse_windows
from nha_jax.ops.api import ImplementationName
from nha_jax.tokenizer import Tokenizer, load_tokenizer

_MODEL_ITEMS = (files.PARAMS_ITEM, files.CONFIG_ITEM)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What ``load`` found.

    Attributes:
        model: The model with the trained parameters.
        config: Its configuration, with the windows and the implementation that ``load`` was asked
            for.
        tokenizer: The tokenizer it was trained with, or the one that ``load`` was given.
        step: Optimizer steps it was trained for.
    """

    model: LanguageModel
    config: ModelConfig
    tokenizer: Tokenizer
    step: int


def load(
    path: str | os.PathLike[str],
    *,
    windows: Window | str | Sequence[Window | str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    implementation: ImplementationName | None = None,
) -> LoadedModel:
    """Load a trained model.

    The files that are read are verified against the checkpoint's manifest first.

    Args:
        path: The folder of one step, ``runs/<name>/checkpoints/<step>``; or ``runs/<name>`` or its
            ``checkpoints``, for the newest sound checkpoint.
        windows: Instead of those it was trained with: tokens, "full", a list, or text such as
            "64x7,full" (``nha_jax.models.windows``); repeated to the depth. The parameters do not
            depend on them.
        tokenizer: Instead of the checkpoint's, which is then not read: a JSON file, a folder with a
            ``tokenizer.json``, or "bytes" (``nha_jax.tokenizer.load_tokenizer``).
        implementation: Of the operator; None: the fastest on the devices at hand, whatever the run
            named for those that it had.

    Returns:
        The model, its parameters on the first local device, in the dtype they were saved in.

    Raises:
        FileNotFoundError: There is no checkpoint.
        DamagedCheckpointError: A file is missing or has changed; names it. Given a run, the newest
            damaged checkpoints are passed over with a warning, and this is raised when none is
            sound.
        ValueError: The configuration is not one of a model; these windows do not fit it; or the
            tokenizer is missing, cannot be read, or has more ids than the model has tokens.
    """
    pattern = None if windows is None else parse_windows(windows)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    items = _MODEL_ITEMS if given else (*_MODEL_ITEMS, files.TOKENIZER_ITEM)
    checkpoint = _find(Path(path).absolute(), items)
    try:
        config = _model_config(_read_json(checkpoint, files.CONFIG_ITEM))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{checkpoint}: its configuration is none of a model that is known here ({reason})"
        ) from None
    config = dataclasses.replace(config, implementation=implementation)
    if pattern is not None:
        config = dataclasses.replace(config, windows=pattern)
    used = _read_tokenizer(checkpoint) if given is None else given
    if used.vocab_size > config.vocab_size:
        source = f"{checkpoint}: its tokenizer" if given is None else f"tokenizer {tokenizer}: it"
        raise ValueError(
            f"{source} has {used.vocab_size:,} ids, the model has {config.vocab_size:,} tokens"
        )
    model = _build(config, checkpoint)
    return LoadedModel(model, config, used, step=int(checkpoint.name))


def _find(path: Path, items: Sequence[str]) -> Path:
    if (path / files.MANIFEST).exists() or path.name.isdigit():
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such checkpoint")
        files.verify(path, items)
        return path
    root = path / files.CHECKPOINTS_DIRECTORY
    steps = files.step_directories(root if root.is_dir() else path)
    if not steps:
        raise FileNotFoundError(f"{path}: neither a checkpoint nor a run that has one")
    damage: files.DamagedCheckpointError | None = None
    oldest = next(iter(steps.values()))
    for checkpoint in reversed(steps.values()):
        try:
            files.verify(checkpoint, items)
        except files.DamagedCheckpointError as error:
            if checkpoint != oldest:
                warnings.warn(f"{error}; trying the one before", stacklevel=3)
            damage = damage or error
        else:
            return checkpoint
    assert damage is not None
    raise damage


def _model_config(config: dict[str, Any]) -> ModelConfig:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["model"].items()
    }
    if values.get("rope_scaling") is not None:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    return ModelConfig(**values)


def _build(config: ModelConfig, checkpoint: Path) -> LanguageModel:
    import orbax.checkpoint as ocp

    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        nnx.to_pure_dict(params),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            checkpoint,
            args=ocp.args.Composite(**{files.PARAMS_ITEM: ocp.args.StandardRestore(shapes)}),
        )
    nnx.replace_by_pure_dict(params, restored[files.PARAMS_ITEM])
    return nnx.merge(graphdef, params)


def _read_tokenizer(checkpoint: Path) -> Tokenizer:
    hint = "give another one as tokenizer: a JSON file, its folder, or 'bytes'"
    if not (checkpoint / files.TOKENIZER_ITEM).is_dir():
        raise ValueError(f"{checkpoint}: it has no tokenizer; {hint}")
    saved = _read_json(checkpoint, files.TOKENIZER_ITEM)
    if not isinstance(saved, dict) or not isinstance(saved.get("json"), str):
        raise ValueError(f"{checkpoint}: its tokenizer cannot be read; {hint}")
    try:
        return Tokenizer.from_json(saved["json"])
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}; {hint}") from None


def _read_json(checkpoint: Path, item: str) -> Any:
    import orbax.checkpoint as ocp

    return ocp.JsonCheckpointHandler().restore(checkpoint / item)
