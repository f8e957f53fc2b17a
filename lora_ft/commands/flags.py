"""A configuration file as the flags that it stands for."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from lora_ft.errors import ConfigError
from lora_ft.foreign import strictyaml
from lora_ft.foreign.files import text_of
from lora_ft.foreign.strictjson import shown


def at(argv: Sequence[str]) -> int | None:
    """Returns the place of the first word that names a configuration file, None where there is none."""
    return next((i for i, word in enumerate(argv) if word == "--config" or word.startswith("--config=")), None)


def of_file(cls: Any, path: Path) -> Iterator[str]:
    """Yields the flags that a configuration file of `cls` stands for.

    Raises:
        ConfigError: it is missing, is not a mapping, or holds an unknown key or what would be read as an option.
    """
    yield from _flags(cls, _read_yaml(path), path)


def _read_yaml(path: Path) -> Any:
    if not path.exists():
        raise ConfigError(f"--config: there is no file {path}.")
    try:
        tree = strictyaml.loads(text_of(path, strictyaml.MAX_BYTES, ConfigError))
    except strictyaml.YamlError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    return {} if tree is None else tree


def _flags(cls: Any, tree: Any, path: Path, prefix: str = "") -> Iterator[str]:
    """Yields the flags that the mapping `tree` stands for; positional fields come bare."""
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected `key: value` lines{f' under {prefix[:-1]}' if prefix else ''}, got {shown(tree)}."
        )
    hints = typing.get_type_hints(cls, include_extras=True)
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean `{prefix}{close[0]}`?" if close else f"known: {', '.join(hints)}."
            raise ConfigError(f"{path}: unknown key `{name}`; {hint}")
        flag = "--" + name.replace("_", "-")
        for word in _items(value):
            if word.startswith("-"):
                raise ConfigError(f"{path}: {name} holds {shown(word)}, which would be read as an option: take it out.")
        if dataclasses.is_dataclass(hints[key]):
            yield from _flags(hints[key], value, path, f"{name}.")
        elif tyro.conf.Positional in typing.get_args(hints[key]) or "Positional" in repr(hints[key]):
            yield str(value)
        elif hints[key] is bool and isinstance(value, bool):
            head, _, last = flag.rpartition(".")
            yield flag if value else (f"{head}.no-{last}" if head else f"--no-{last[2:]}")
        elif isinstance(value, dict):
            yield flag
            for item in value.items():
                yield from map(str, item)
        elif isinstance(value, list):
            yield flag
            yield from map(str, value)
        else:
            yield f"{flag}={value}"


def _items(value: Any) -> list[str]:
    """Returns the words that stand by themselves in what a value of a file becomes."""
    if isinstance(value, dict):
        return [str(word) for item in value.items() for word in item if isinstance(word, str)]
    found = value if isinstance(value, list) else [value]
    return [word for word in found if isinstance(word, str)]
