"""What an adapter folder records of the run that made it, checked before anything is done with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from lora_ft import tasks
from lora_ft.config import Quant, RunConfig
from lora_ft.errors import AdapterError
from lora_ft.foreign.strictjson import shown
from lora_ft.proof import environment
from lora_ft.settings import from_yaml

# What is read of a record, and of which type each must be.
RECORD: dict[str, Any] = {"base": dict, "dtype": str, "quant": str, "left_whole": list}
BASE_RECORD: dict[str, Any] = {
    "name": str, "source": str, "repo": str | None, "revision": str | None, "origin": str, "weights_sha256": str
}  # fmt: skip
# What records of earlier versions lack.
ADDED: dict[str, Any] = {"tokenizer_sha256": str, "versions": dict}
DTYPES = ("float32", "bfloat16", "float16")
MAX_LABELS = 100_000


def read(folder: Path) -> dict[str, Any]:
    """Returns the contents of `environment.json`. Raises AdapterError naming all that is missing or not as it was."""
    record = environment.read(folder)
    if not isinstance(record, dict):
        raise AdapterError(f"{folder / environment.FILE}: it holds a {type(record).__name__}, not an object.")
    problems = unlike(record, RECORD)
    if isinstance(record.get("base"), dict):
        problems += unlike(record["base"], BASE_RECORD, "base.")
        problems += unlike(record["base"], {"config_sha256": str} if "config_sha256" in record["base"] else {}, "base.")
    problems += unlike(record, {key: kind for key, kind in ADDED.items() if key in record})
    digest = record["base"].get("weights_sha256") if isinstance(record.get("base"), dict) else None
    # It becomes the name of a file that is looked for.
    if isinstance(digest, str) and not re.fullmatch("[0-9a-f]{64}", digest):
        problems.append(f"base.weights_sha256 is {shown(digest)}, not 64 hexadecimal digits")
    problems += [
        f"{key} is {shown(record[key])}, not one of {', '.join(allowed)}"
        for key, allowed in (("dtype", DTYPES), ("quant", get_args(Quant)))
        if isinstance(record.get(key), str) and record[key] not in allowed
    ]
    if problems:
        raise AdapterError(f"{folder / environment.FILE}: {'; '.join(problems)}: the file was damaged.")
    return record


def task(folder: Path, record: dict[str, Any]) -> tuple[RunConfig, tasks.Task]:
    """Returns the configuration of the run that made the adapter in `folder`, and its task.

    Args:
        record: of `read`; it holds what the task learned of the rows.

    Raises:
        AdapterError: what the record says of the task does not fit it.
        ConfigError: `config.yaml` is missing or wrong.
    """
    config = from_yaml(RunConfig, folder / "config.yaml")
    facts = record.get("task", {})
    place = f"{folder / environment.FILE}: task is {shown(facts)}, which does not fit {config.task}"
    if not isinstance(facts, dict) or not all(map(_is_fact, facts.values())):
        raise AdapterError(f"{place}: it is an object of texts, nulls, and lists of at most {MAX_LABELS:,} texts.")
    try:
        return config, tasks.of(config, facts)
    except TypeError as error:
        raise AdapterError(f"{place}: {shown(str(error))}.") from None


def _is_fact(value: Any) -> bool:
    """Returns whether a value is of a kind that some task learns of its rows: a text, none, or a list of labels."""
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, list) and len(value) <= MAX_LABELS and all(isinstance(label, str) for label in value)


def unlike(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns what is wrong with the keys of `found`: `wanted` holds the type, or a union of types, of each."""
    problems = [f"{prefix}{key} is missing" for key in wanted if key not in found]
    return problems + [
        f"{prefix}{key} is {shown(found[key])}, not {_kind(kind)}"
        for key, kind in wanted.items()
        if key in found and (not isinstance(found[key], kind) or (isinstance(found[key], bool) and kind is not bool))
    ]


def _kind(kind: Any) -> str:
    """Returns a type, or a union of types, in the words of JSON."""
    words = {str: "a string", dict: "an object", list: "a list", bool: "true or false", int: "a whole number"}
    words |= {float: "a number", type(None): "null"}
    return " or ".join(words[one] for one in get_args(kind) or (kind,))
