"""A file or a hub data set -> its rows, one at a time, each with its place; what cannot be read says why."""

from __future__ import annotations

import io
import re
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lora_ft.data.rows import CHUNK_BYTES, Reader, Row, Rows, first_line
from lora_ft.data.tables import csv, parquet
from lora_ft.data.texts import begin, json_list, jsonl, paragraphs, sentences
from lora_ft.errors import DataError
from lora_ft.foreign.strictjson import bare, flaws

READERS: dict[str, Reader] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_list,
    ".csv": csv,
    ".tsv": partial(csv, delimiter="\t"),
    ".parquet": parquet,
    ".txt": paragraphs,
    ".md": paragraphs,
    ".conll": sentences,
    ".bio": sentences,
}
KINDS = ", ".join(READERS)
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.:\[\]%+-]+)?", re.ASCII)


def rows(source: str, streaming: bool) -> Rows:
    """Yields each row of `source`, or what is wrong with it. Raises DataError where there is no reading on."""
    empty = True
    for row in _open(source, streaming):
        empty = False
        if isinstance(row, Row) and (broken := list(islice(flaws(row.fields), 20))):
            row = DataError([f"{row.where}: {place or 'the row'} {flaw}." for place, flaw in broken])
        yield row
    if empty:
        raise DataError([f"{bare(Path(source).name)}: holds no rows; a data set needs at least one."])


def _open(source: str, streaming: bool) -> Rows:
    path, name = Path(source), bare(source)
    try:
        if path.is_dir():
            raise DataError([f"{name}: is a folder; name one file in it ({KINDS})."])
        if path.exists():
            return _file_rows(path)
    except OSError as error:
        raise DataError([f"{name}: cannot be looked up: {error.strerror}."]) from None
    stem = source.partition(":")[0]
    # `datasets` takes a bare `json` or `csv` to mean every such file in the current folder.
    means_file = Path(stem).suffix.lower() in READERS or f".{stem}" in READERS or stem == "text"
    if means_file or not HUB_NAME.fullmatch(source):
        raise DataError([f"{name}: there is no such file; name one ({KINDS}), or a hub data set as ORG/NAME:SPLIT."])
    return _hub_rows(source, streaming)


def _file_rows(path: Path) -> Rows:
    name, suffix = bare(path.name), path.suffix.lower()
    if suffix not in READERS:
        raise DataError([f"{name}: its kind cannot be told from its ending; it must be one of {KINDS}."])
    reader = READERS[suffix]
    try:
        with io.BufferedReader(io.FileIO(path), CHUNK_BYTES) as file:
            if reader is not parquet:
                begin(file, name)
            yield from reader(file, name)
    except OSError as error:
        raise DataError([f"{name}: cannot be read: {first_line(error.strerror or error)}."]) from None


def _class_names(features: Any) -> dict[str, list[str]]:
    """Returns the names of the classes that a column holds lists of, by column."""
    # A list of one feature is how older versions of `datasets` write one of many.
    inner: dict[str, Any] = {
        key: value[0] if isinstance(value, list) else getattr(value, "feature", None)
        for key, value in (features or {}).items()
    }
    return {key: list(feature.names) for key, feature in inner.items() if type(feature).__name__ == "ClassLabel"}


def _named(value: Any, names: list[str]) -> Any:
    """Returns a list of classes by name; what is none stays, for whoever reads the row to refuse."""
    if not isinstance(value, list):
        return value
    return [names[item] if type(item) is int and 0 <= item < len(names) else item for item in value]


def _hub_rows(source: str, streaming: bool) -> Rows:
    """Yields the rows of a split of a hub data set, `train` where none is named."""
    import datasets

    name, _, split = source.partition(":")
    split = split or "train"
    try:
        # Iterating reaches for the network too when streaming.
        loaded = datasets.load_dataset(name, split=split, streaming=streaming)
        names = _class_names(getattr(loaded, "features", None))
        for number, fields in enumerate(loaded, 1):
            yield Row(f"{name}:row {number}", fields | {key: _named(fields.get(key), names[key]) for key in names})
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            [
                f'{source}: there is no such file, and the hub data set {name}, split "{split}", cannot be loaded: '
                f"{first_line(error)}; check the name, the split (NAME:SPLIT) and the network, or give a file."
            ]
        ) from None
