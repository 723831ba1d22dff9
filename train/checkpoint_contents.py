"""What stands in a checkpoint: arrays by folder, and JSON items."""

import dataclasses
from pathlib import Path
from typing import Any

from nha_jax.models import checkpoint_files as files


class CheckpointError(Exception):
    """A checkpoint could not be written or read."""


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """What makes a checkpoint self-contained, besides the state.

    Attributes:
        config: The resolved configuration.
        data: Identity of the data: manifest hash, seed, context, global batch.
        tokenizer: The tokenizer as JSON text.
    """

    config: dict[str, Any]
    data: dict[str, Any]
    tokenizer: str

    def items(self) -> dict[str, Any]:
        """The JSON items of a checkpoint that hold it."""
        return {
            files.CONFIG_ITEM: self.config,
            files.DATA_ITEM: self.data,
            files.TOKENIZER_ITEM: {"json": self.tokenizer},
        }


def _fields(state: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(state):
        return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return dict(state._asdict())


def to_items(state: Any) -> dict[str, Any]:
    """The arrays of a train state by the folders they are kept in.

    Parameters apart, so that reading a model does not read the optimizer.
    """
    values = _fields(state)
    return {files.PARAMS_ITEM: values.pop("params"), files.TRAINING_ITEM: values}


def from_items(items: Any, abstract_state: Any) -> Any:
    """The train state of the type of `abstract_state` that `to_items` took apart."""
    values = {**items[files.TRAINING_ITEM], "params": items[files.PARAMS_ITEM]}
    return type(abstract_state)(**values)


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """What `CheckpointMetadata.items` was written as.

    Raises:
        CheckpointError: It is not there or cannot be read.
    """
    return CheckpointMetadata(
        config=read_json(checkpoint, files.CONFIG_ITEM),
        data=read_json(checkpoint, files.DATA_ITEM),
        tokenizer=read_json(checkpoint, files.TOKENIZER_ITEM)["json"],
    )


def read_json(checkpoint: Path, item: str) -> Any:
    """One of a checkpoint's JSON items.

    Raises:
        CheckpointError: It is not there or cannot be read.
    """
    import orbax.checkpoint as ocp

    try:
        return ocp.JsonCheckpointHandler().restore(checkpoint / item)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint}: {item} cannot be read: {error}") from error
