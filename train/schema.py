"""Values from files and command lines, held to a dataclass, before anything is made of them.

The dataclass is the schema: its fields are the keys, dataclasses among their types are sections.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line naming keys and values."""


def split_options(arguments: Sequence[str], lists: Collection[str] = ()) -> dict[str, Any]:
    """Take a command line of ``--key value`` and ``--key=value`` apart.

    Args:
        arguments: The command line without the program's name.
        lists: Keys that take all words up to the next key.

    Returns:
        The values by key, still text; those of ``lists`` as lists of words.

    Raises:
        ConfigError: A key without a value, a value without a key, or a key given twice.
    """
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not re.match(r"--\w", option):
            raise ConfigError(f"{option!r} on the command line: expected --key value")
        key, equals, text = option[2:].partition("=")
        words = [text] if equals else []
        while rest and not re.match(r"--\w", rest[0]) and (not words or key in lists):
            words.append(rest.pop(0))
        if not words:
            raise ConfigError(f"--{key}: a value is missing")
        value = words if key in lists else words[0]
        for earlier in values:
            if f"{key}.".startswith(f"{earlier}.") or f"{earlier}.".startswith(f"{key}."):
                both = f"--{key}" if key == earlier else f"--{earlier} and --{key}"
                raise ConfigError(f"{both}: given twice, with {values[earlier]!r} and {value!r}")
        values[key] = value
    return values


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
# YAML 1.1 reads 10:15 as a number to the base of 60, here it is a range of steps; 2026-01-31 as
# a date, here it may be a name; and 010 as 8, here it is no number.
for _first in "-+0123456789":
    _UniqueKeyLoader.yaml_implicit_resolvers[_first].insert(
        0, ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$|\d+-\d+-\d+|[-+]?0[\d_]+$"))
    )


def read_file(path: Path) -> dict[str, Any]:
    """Read keys and values from a YAML file.

    Raises:
        ConfigError: There is no such file, or it is not YAML, or has a key twice.
    """
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


def check_values(schema: Any, values: dict[str, Any], prefix: str = "") -> None:
    """Hold nested values to a schema.

    Raises:
        ConfigError: A key is unknown, or a value of another type than its key; by dotted name.
    """
    for name, value in values.items():
        key = f"{prefix}{name}"
        if "." in str(name):
            raise ConfigError(f"unknown key {key!r}: sections are nested in files, not dotted")
        kind = field_type(schema, key)
        if not _fits(value, kind):
            raise ConfigError(f"{key}={_show(value)}: expected {_describe(kind)}")
        if isinstance(value, dict):
            check_values(schema, value, f"{key}.")


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


def field_type(schema: Any, key: str) -> Any:
    """The type of a dotted key.

    Raises:
        ConfigError: There is no such key; names the nearest one.
    """
    kind: Any = schema
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


def read_option(schema: Any, key: str, text: str) -> Any:
    """A value of the command line: YAML as in a file, but text stands as it is.

    Raises:
        ConfigError: The key is unknown or a section, or the value is of another type than the key.
    """
    kind = field_type(schema, key)
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
