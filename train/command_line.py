"""From ``--config file.yaml --dotted.key value …`` to a checked ``PretrainConfig``.

jsonargparse knows the types and fills the dataclasses. What it leaves open is settled here:

* the command line wins over the file, wherever ``--config`` stands;
* ``model.preset`` stands for the values of that preset, at the place where it is named: in a file,
  the file's other ``model`` keys win over it; on the command line it replaces the file's whole
  model, and the command line's other ``model`` keys win over it. The resolved configuration states
  every value and no preset;
* a key that is unknown, given twice, or of another type than its value is an error that names it:
  in a file ``"320"`` is text and no number;
* every error is one line.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from nha_jax.models import PRESETS
from train.config import PretrainConfig
from train.schema import (
    ConfigError,
    check_values,
    field_type,
    read_file,
    read_option,
    split_options,
)

_PRESET_KEY = "model.preset"


def parse_command_line(arguments: Sequence[str]) -> PretrainConfig:
    """Read ``--config FILE`` and dotted overrides into a configuration.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: One line naming the keys and values at fault.
        SystemExit: After ``--help``.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        _parser().print_help()
        raise SystemExit(0)
    options = split_options(arguments)
    file, preset = options.pop("config", None), options.pop(_PRESET_KEY, None)
    values = _expand_preset({} if file is None else read_file(Path(file)))
    check_values(PretrainConfig, values)
    given = {key: read_option(PretrainConfig, key, text) for key, text in options.items()}
    if preset is not None:
        values = {**values, "model": _preset_values(preset)}
    for key, value in given.items():
        values = _with_override(values, key, value)
    return _parse(values)


def config_from_dict(values: dict[str, Any]) -> PretrainConfig:
    """The configuration that ``PretrainConfig.to_dict`` gave.

    Raises:
        ConfigError: One line naming the keys and values at fault.
    """
    values = _expand_preset(values)
    check_values(PretrainConfig, values)
    return _parse(values)


def load_config(path: str | Path) -> PretrainConfig:
    """The configuration of one YAML file.

    Raises:
        ConfigError: One line naming the keys and values at fault.
    """
    return parse_command_line(["--config", str(path)])


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m train.pretrain",
        description="Train a language model. Values on the command line win over the file's. "
        f"--{_PRESET_KEY} NAME starts from a model by name: {', '.join(PRESETS)}.",
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the keys below.")
    parser.add_class_arguments(PretrainConfig)
    return parser


def _with_override(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Nested values with another at a dotted key."""
    name, _, rest = key.partition(".")
    inner = _with_override(values.get(name) or {}, rest, value) if rest else value
    return {**values, name: inner}


def _expand_preset(values: dict[str, Any]) -> dict[str, Any]:
    model = values.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return values
    explicit = {key: value for key, value in model.items() if key != "preset"}
    return {**values, "model": {**_preset_values(model["preset"]), **explicit}}


def _preset_values(name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"{_PRESET_KEY}={name!r}: expected one of {', '.join(PRESETS)}")
    return dataclasses.asdict(PRESETS[name])


def _parse(values: dict[str, Any]) -> PretrainConfig:
    parser = _parser()
    try:
        parsed = parser.parse_args([f"--config={yaml.safe_dump(values, sort_keys=False)}"])
        parsed.pop("config")
        config = PretrainConfig(**vars(parser.instantiate(parsed)))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_one_line(str(error))) from error
    _check_kept(values, config.to_dict())
    return config


def _check_kept(given: dict[str, Any], read: dict[str, Any], prefix: str = "") -> None:
    """Raise ``ConfigError`` for text where null may stand too that was read as null."""
    for key, value in given.items():
        if isinstance(value, dict):
            _check_kept(value, read[key], f"{prefix}{key}.")
        elif read[key] is None and value is not None:
            raise ConfigError(f"{prefix}{key}={value!r}: reads as null; give another")


def _one_line(message: str) -> str:
    """jsonargparse's message, of which only what an optional section says of itself is kept."""
    inner = re.search(r"- ([\w.]+)(=\S+)?: expected ([^\n]+)", message)
    if inner and "Union subtypes" in message:
        return f"{_whole_key(inner[1])}{inner[2] or ''}: expected {inner[3]}"
    return " ".join(message.split())


def _whole_key(name: str) -> str:
    """The dotted key that ends in a section's own name for it."""
    for section in ("", *(f"{field.name}." for field in dataclasses.fields(PretrainConfig))):
        try:
            field_type(PretrainConfig, section + name)
        except ConfigError:
            continue
        return section + name
    return name
