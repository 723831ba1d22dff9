"""A state of generation in a file, to read a long prompt once.

The file is safetensors: the leaves of the state by path (`cache.0.slots_k`, ..., `logits`,
`counts`, `keys`, `recent`), and in its metadata what the state belongs to: the model's
configuration, the windows, the room, and a fingerprint of the parameters.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.inference.checks import check_state
from nha_jax.inference.layout import Layout
from nha_jax.inference.state import GenerationState, empty_state
from nha_jax.layers.checks import Window
from nha_jax.models.config import ModelConfig
from nha_jax.models.language_model import LanguageModel

# The number rises with every change of what is stored, the fingerprint's making included: a state
# from before is then refused for what it is, and not for belonging to another model.
_FORMAT_NAME = "nha-state-"
_FORMAT = f"{_FORMAT_NAME}3"
# They change neither what the state means nor its shape; windows are compared on their own.
_FREE_FIELDS = ("windows", "remat", "implementation")


class StateError(ValueError):
    """A file does not hold a state of this model."""


def save_state(path: str | os.PathLike[str], state: GenerationState, model: LanguageModel) -> None:
    """Writes a state; generation from it goes on as from the state itself, bit for bit.

    Args:
      path: the file, replaced only once the new one is complete; its mode is the umask's.
      state: to save.
      model: that made it. It is loaded with a model of the state's windows: if `windows` was given
        when the text was read, with `nha_jax.models.load(..., windows=)`.

    Raises:
      ValueError: the state is one of another model, by its arrays' shapes.
      OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.flax import save_file

    check_state(model, state)
    path = Path(path)
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(_identity(model.config)),
        "fingerprint": fingerprint(model),
        "windows": json.dumps(state.cache.windows),
        "max_length": json.dumps(state.cache.max_length),
    }
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # of a new file; the library's own are the user's alone
        save_file(_leaves(state), os.fspath(temporary), metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # before the name moves: after a power cut there is one of both
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)  # left by an error, or by Ctrl-C


def load_state(path: str | os.PathLike[str], model: LanguageModel) -> GenerationState:
    """Reads a state that `save_state` wrote.

    Args:
      path: the file.
      model: the model that made the state, with the same parameters and windows.

    Raises:
      StateError: (a ValueError) not such a file, one of another format, or the state of another
        model, of other parameters or of other windows; says what differs.
      OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # On the host first: on a mesh, no device may have room for all of it.
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata.get("format", ""))
            _check_origin(path, metadata, model)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StateError(f"{path}: not a sound safetensors file ({error})") from None
    windows, max_length = _written(path, metadata)[1:]
    batch = found["logits"].shape[0] if "logits" in found else 1
    like = jax.eval_shape(lambda: empty_state(model, batch, max_length=max_length, windows=windows))
    expected = _leaves(like)
    for name in sorted(expected.keys() ^ found.keys()):
        raise StateError(f"{path}: {name} is {'missing' if name in expected else 'unknown'}")
    for name, leaf in expected.items():
        value = found[name]
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise StateError(
                f"{path}: {name} is {value.dtype}{list(value.shape)}, expected "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
    # The order of `expected` is that of the tree.
    state = jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected])
    layout = Layout.of(model, like)
    # Copies: what is donated later must not be the file's buffers.
    if layout is None:
        return jax.tree.map(jnp.array, state)
    return jax.device_put(state, layout.state, may_alias=False)


def fingerprint(model: LanguageModel) -> str:
    """A checksum of the parameters: 64 hexadecimal digits; other parameters, another one.

    It is made of sums of integers on the device, so it depends neither on the order of summation
    nor on how the parameters are sharded, and sums are those of single layers, so it does not
    depend on `LanguageModel.unstack` either.
    """
    sums = {}
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        stacked = path[0] == "blocks" and not isinstance(path[2], int)
        total = jax.vmap(_weighted_sum) if stacked else _weighted_sum
        sums[path] = total(parameter.get_value())
    named: dict[str, int] = {}
    for path, found in jax.device_get(sums).items():
        for layer, value in enumerate(found.ravel().tolist()):
            place = (*path[:2], layer, *path[2:]) if found.ndim else path
            named[".".join(map(str, place))] = value
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


@functools.partial(jax.jit)
def _weighted_sum(leaf: jax.Array) -> jax.Array:
    """Sum of the elements' bits, each weighted by its place, modulo 2^32."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    weight = jnp.uint32(1)
    for axis in range(leaf.ndim):
        weight = weight * jnp.uint32(1_000_003) + jax.lax.broadcasted_iota(
            jnp.uint32, leaf.shape, axis
        )
    # Odd: an even weight would lose the highest bit, the sign.
    return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)


def _identity(config: ModelConfig) -> dict[str, Any]:
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_FIELDS}
    return json.loads(json.dumps(values))  # as a file gives it back: tuples are lists


def _check_format(path: Any, found: str) -> None:
    if not found.startswith(_FORMAT_NAME):
        raise StateError(f"{path}: not a state that save_state wrote")
    if found != _FORMAT:
        raise StateError(
            f"{path}: a state of format {found}, which another version of this package wrote; this "
            f"one reads {_FORMAT}: read the text again and save the state anew"
        )


def _written(path: Any, metadata: dict[str, str]) -> tuple[dict, tuple[Window, ...], int | None]:
    """The model, the windows and the room that the metadata name."""
    try:
        names = ("model", "windows", "max_length")
        saved, windows, max_length = (json.loads(metadata[name]) for name in names)
        sound = isinstance(saved, dict) and isinstance(windows, list)
        if sound and (max_length is None or isinstance(max_length, int)):
            return saved, tuple(windows), max_length
    except (KeyError, ValueError):
        pass
    raise StateError(f"{path}: its metadata cannot be read")


def _check_origin(path: Any, metadata: dict[str, str], model: LanguageModel) -> None:
    saved, windows, _ = _written(path, metadata)
    ours = _identity(model.config)
    differing = [name for name in sorted(saved.keys() | ours) if saved.get(name) != ours.get(name)]
    if differing:
        pairs = ", ".join(f"{n}={saved.get(n)} (here {ours.get(n)})" for n in differing)
        raise StateError(f"{path}: the state of another model, with {pairs}")
    expected: tuple[Window, ...] = tuple(layer.window for layer in model.config.layers())
    if windows != expected:
        raise StateError(
            f"{path}: a state for the windows {_text(windows)}; this model has {_text(expected)}"
        )
    if metadata.get("fingerprint") != fingerprint(model):
        raise StateError(f"{path}: the state of a model with other parameters")


def _text(windows: tuple[Window, ...]) -> str:
    return ",".join(map(str, windows))


def _leaves(state: GenerationState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: Any) -> str:
    # `stacks` is the only field of the model's cache that holds arrays: not worth its place.
    parts = [str(getattr(key, "name", getattr(key, "idx", key))) for key in path]
    return ".".join(part for part in parts if part != "stacks")
