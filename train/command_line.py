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

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from nha_jax.models import PRESETS
from train.config import ConfigError, PretrainConfig

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
    file, overrides = _split(arguments)
    values = _read_file(Path(file)) if file is not None else {}
    _check_values(values)
    values = _expand_preset(values)
    preset = overrides.pop(_PRESET_KEY, None)
    given = {key: _read_override(key, text) for key, text in overrides.items()}
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
    _check_values(values)
    return _parse(_expand_preset(values))


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


def _split(arguments: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The file and the overrides by key, both still text."""
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not re.match(r"--\w", option):
            raise ConfigError(f"{option!r} on the command line: expected --key value")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not rest or re.match(r"--\w", rest[0]):
                raise ConfigError(f"--{key}: a value is missing")
            value = rest.pop(0)
        for earlier in values:
            if f"{key}.".startswith(f"{earlier}.") or f"{earlier}.".startswith(f"{key}."):
                both = f"--{key}" if key == earlier else f"--{earlier} and --{key}"
                raise ConfigError(f"{both}: given twice, with {values[earlier]!r} and {value!r}")
        values[key] = value
    return values.pop("config", None), values


def _read_override(key: str, text: str) -> Any:
    """A value of the command line: YAML as in a file, but text stands as it is."""
    kind = _field_type(key)
    value: Any = text
    if text == "null":
        value = None
    elif _dataclass_of(kind):
        raise ConfigError(f"--{key}: a section; give its keys one by one")
    elif not _fits(text, kind):
        with contextlib.suppress(yaml.YAMLError, ConfigError):
            value = yaml.load(text, Loader=_UniqueKeyLoader)
            value = text if value is None else value
    if not _fits(value, kind):
        shown = " ".join(text.split()) or "''"
        raise ConfigError(f"{key}={shown}: expected {_describe(kind)}")
    return value


def _with_override(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Nested values with another at a dotted key."""
    name, _, rest = key.partition(".")
    inner = _with_override(values.get(name) or {}, rest, value) if rest else value
    return {**values, name: inner}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key is a word and stands only once in a mapping, and ``1e-3`` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {line}: expected a key's name, found a list or section")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"key {key!r} is given twice, in lines {seen[key]} and {line}")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
# YAML 1.1 reads 10:15 as a number to the base of 60, here it is a range of steps; and 2026-01-31 as
# a date, here it may be a name.
for _digit in "0123456789":
    _UniqueKeyLoader.yaml_implicit_resolvers[_digit].insert(
        0, ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$|\d+-\d+-\d+"))
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected keys and values, found {values!r}")
    return values


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


def _check_values(values: dict[str, Any], prefix: str = "") -> None:
    """Refuse unknown keys and values of another type than theirs, by dotted name."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key == _PRESET_KEY:
            continue
        if "." in str(name):
            raise ConfigError(f"unknown key {key!r}: sections are nested in files, not dotted")
        kind = _field_type(key)
        if not _fits(value, kind):
            raise ConfigError(f"{key}={_show(value)}: expected {_describe(kind)}")
        if isinstance(value, dict):
            _check_values(value, f"{key}.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type. Integers are numbers too; nothing else is of two types."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return type(value) in ((int, float) if kind is float else (kind,))


def _show(value: Any) -> str:
    """A value as a file has it, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return " ".join(text.removesuffix("...\n").split())


def _field_type(key: str) -> Any:
    """The type of a dotted key."""
    kind: Any = PretrainConfig
    names = str(key).split(".")
    for depth, name in enumerate(names):
        kind = _dataclass_of(kind)
        known = [field.name for field in dataclasses.fields(kind)] if kind else []
        if name not in known:
            prefix = ".".join(names[:depth])
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {'.'.join([*names[:depth], near[0]])}?" if near else ""
            place = f" in {prefix!r}" if prefix else ""
            raise ConfigError(f"unknown key {key!r}{place and f': no {name!r}{place}'}{hint}")
        kind = typing.get_type_hints(kind)[name]
    return kind


def _dataclass_of(kind: Any) -> Any:
    """The dataclass in ``kind`` or in its union with None, else None."""
    for candidate in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _parse(values: dict[str, Any]) -> PretrainConfig:
    parser = _parser()
    try:
        parsed = parser.parse_args([f"--config={yaml.safe_dump(values, sort_keys=False)}"])
        parsed.pop("config")
        return PretrainConfig(**vars(parser.instantiate(parsed)))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_one_line(str(error))) from error


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
            _field_type(section + name)
        except ConfigError:
            continue
        return section + name
    return name


def _describe(kind: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"a list, each entry {_describe(arguments[0])}"
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if kind is type(None):
        return "null"
    return words.get(kind, "keys and values" if dataclasses.is_dataclass(kind) else str(kind))
