"""The mesh, and where each array lives on it.

Parameters carry logical axis names; ``LOGICAL_AXIS_RULES`` is the one place where these meet the
axes of the mesh. The mesh's axes are ``Auto``: the compiler moves data, the table only says where
parameters, optimizer state and batches lie between steps.
"""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.config import PretrainConfig, check_batch
from train.schema import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis. Tensor parallelism cuts heads, feed-forward width and
# vocabulary; fsdp cuts the model width of the same matrices, so that every large parameter is cut
# both ways.
LOGICAL_AXIS_RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "head_size": None,
    "slots": None,
    "layers": None,
}

# A batch is cut along its rows over replicas and over shards of the parameters alike.
BATCH_SPEC = PartitionSpec(("data", "fsdp"))


def make_mesh(config: PretrainConfig) -> Mesh:
    """The mesh over all devices, with axes ``data``, ``fsdp`` and ``tensor``.

    Raises:
        ConfigError: The devices cannot be arranged so, or the batch does not divide over them.
    """
    mesh, num_devices = config.mesh, jax.device_count()
    rest, remainder = divmod(num_devices, mesh.fsdp * mesh.tensor)
    data = rest if mesh.data == "auto" else mesh.data
    needed = data * mesh.fsdp * mesh.tensor
    unequal = needed != num_devices
    if needed > num_devices or data == 0 or (remainder and mesh.data == "auto"):
        raise ConfigError(
            f"mesh.data={mesh.data}, mesh.fsdp={mesh.fsdp}, mesh.tensor={mesh.tensor} do not fit "
            f"{num_devices} {jax.default_backend()} device(s)"
        )
    if unequal and jax.process_count() > 1:
        raise ConfigError(
            f"mesh.data={data}, mesh.fsdp={mesh.fsdp}, mesh.tensor={mesh.tensor} use {needed} of "
            f"{num_devices} devices; with several processes all must be used"
        )
    check_batch(config, data)
    return jax.make_mesh(
        (data, mesh.fsdp, mesh.tensor),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=jax.devices()[:needed] if unequal else None,
    )


def cuts_vocabulary(mesh: Mesh, vocab_size: int) -> bool:
    """Whether embedding and readout are cut along the vocabulary: if the mesh axis divides it.

    Vocabularies have odd sizes more often than heads and widths, and they are not worth an error.
    """
    axis = LOGICAL_AXIS_RULES["vocab"]
    return axis is None or vocab_size % mesh.shape[axis] == 0


def partition_spec(
    mesh: Mesh, logical_axes: tuple[str, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """Mesh axes of a parameter with these logical axes.

    A mesh axis cuts an array once: at the first logical axis that maps to it.

    Raises:
        ValueError: A logical axis is not in the table.
    """
    spec: list[str | None] = []
    for name, size in zip(logical_axes, shape, strict=True):
        if name not in LOGICAL_AXIS_RULES:
            raise ValueError(
                f"logical axis {name!r}: expected one of {', '.join(LOGICAL_AXIS_RULES)}"
            )
        whole = name == "vocab" and not cuts_vocabulary(mesh, size)
        axis = None if whole else LOGICAL_AXIS_RULES[name]
        spec.append(None if axis in spec else axis)
    return PartitionSpec(*spec)


def parameter_shardings(mesh: Mesh, logical_axes: Any, params: Any) -> Any:
    """Sharding of each parameter.

    Args:
        mesh: The mesh.
        logical_axes: Logical axes of each parameter, tuples in a pytree like the parameters.
        params: The parameters, or their shapes.

    Raises:
        ValueError: A logical axis is not in the table.
    """
    return jax.tree.map(
        lambda leaf, axes: NamedSharding(mesh, partition_spec(mesh, axes, leaf.shape)),
        params,
        logical_axes,
    )


def optimizer_shardings(
    mesh: Mesh, optimizer: optax.GradientTransformation, abstract_state: Any, params: Any
) -> Any:
    """Sharding of each array of the optimizer's state: its parameter's, else replicated.

    Args:
        mesh: The mesh.
        optimizer: The optimizer.
        abstract_state: Its state, as arrays or shapes.
        params: Shardings of the parameters.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract_state,
        params,
        transform_non_params=lambda _: replicated(mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows cut over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, BATCH_SPEC)


def process_block(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which contiguous block of the rows of a global batch this process feeds, as (index, count).

    Processes that share their rows (because ``tensor`` spans them) get the same block.

    Raises:
        ConfigError: The rows on this process's devices are not one block of an equal cut.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    starts_stops = [index[0].indices(batch_size)[:2] for index in indices.values() if index]
    rows = np.zeros(batch_size, bool)
    for start, stop in starts_stops:
        rows[start:stop] = True
    size, first = int(rows.sum()), int(rows.argmax())
    if not rows[first : first + size].all() or batch_size % size or first % size:
        raise ConfigError(
            f"mesh.data={mesh.shape['data']}, mesh.fsdp={mesh.shape['fsdp']}: the rows on the "
            f"devices of process {jax.process_index()} are not one block of the batch"
        )
    return first // size, batch_size // size


def to_global_batch(
    mesh: Mesh, local_batch: dict[str, np.ndarray], batch_size: int
) -> dict[str, jax.Array]:
    """Global arrays from the block of rows that this process feeds (see ``process_block``)."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in local_batch.items()
    }


def abstract_arrays(shapes: Any, shardings: Any) -> Any:
    """Shapes and dtypes joined with shardings, to lower or to restore against."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )
