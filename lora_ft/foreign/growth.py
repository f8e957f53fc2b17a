"""A tokenizer's steps held to how far they can stretch a text: each may be a program that turns a word into gigabytes.

`tokenizers` applies them without any limit, and ends the process where the memory does. A step is an object of
`tokenizer.json` (github.com/huggingface/tokenizers, tokenizers/src/normalizers and processors).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lora_ft.errors import LoraFtError
from lora_ft.foreign.files import MAX_TOKENIZER_BYTES, text_of
from lora_ft.foreign.strictjson import JsonError, loads, shown

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Characters of a character, over all steps; byte-level and sentencepiece tokenizers have 3.
MAX_GROWTH = 100.0
# Characters or tokens that are put before or behind a text.
MAX_ADDED = 256
# Unicode's longest is 18 characters of 3 bytes.
MAX_MAPPED_BYTES = 256


def check(file: Path, error: type[LoraFtError]) -> None:
    """Raises `error` where a `tokenizer.json` is none, or its steps stretch a text out of all measure."""
    stat = file.stat()
    kind: Any = error
    for problem in _read(file, stat.st_size, stat.st_mtime_ns, kind):
        raise error(f"{file}: {problem}: take the tokenizer from its makers, or mend the file.")


@cache
def _read(file: Path, size: int, time_ns: int, error: Any) -> tuple[str, ...]:
    """Returns the problems of a file, read once: the largest take a second."""
    try:
        found = loads(text_of(file, MAX_TOKENIZER_BYTES, error), any_number=True)
    except JsonError as why:
        return (f"cannot be read: it {why}",)
    if not isinstance(found, dict):
        return (f"it holds a {type(found).__name__}, not an object",)
    return tuple(problems({part: found.get(part) for part in PARTS}))


def problems_of(tokenizer: Any) -> Iterator[str]:
    """Yields what is wrong with the steps of a tokenizer that transformers has loaded."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    held = {part: step for part in PARTS if (step := getattr(inner, part, None)) is not None}
    yield from problems({part: loads(step.__getstate__().decode(), any_number=True) for part, step in held.items()})


def problems(parts: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the steps of a tokenizer, by part."""
    for part, tree in parts.items():
        growth = 1.0
        for step in _steps(tree):
            kind = step.get("type")
            if kind == "Replace":
                growth *= _growth(step)
            added = [step.get("prepend"), step.get("content") if kind != "Replace" else None, step.get("prefix")]
            if kind == "TemplateProcessing":
                added += [step.get("single"), step.get("pair")]
                tokens = step.get("special_tokens")
                added += (
                    [one.get("ids") for one in tokens.values() if isinstance(one, dict)]
                    if isinstance(tokens, dict)
                    else []
                )
            if any(isinstance(one, str | list) and len(one) > MAX_ADDED for one in added):
                yield f"{part} has a {shown(kind)} that adds more than {MAX_ADDED} to a text"
            if kind == "Precompiled" and _longest(step.get("precompiled_charsmap")) > MAX_MAPPED_BYTES:
                yield f"{part} has a table that turns a character into more than {MAX_MAPPED_BYTES} bytes"
        if growth > MAX_GROWTH:
            yield f"{part} turns a character into {growth:,.0f}, and {MAX_GROWTH:.0f} is the most of any tokenizer"


def _steps(tree: Any) -> Iterator[dict[str, Any]]:
    """Yields each step, also those within sequences."""
    todo = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            yield value
            todo += [inner for inner in value.values() if isinstance(inner, list)]
        elif isinstance(value, list):
            todo += [inner for inner in value if isinstance(inner, dict | list)]


def _growth(step: dict[str, Any]) -> float:
    """Returns the most characters that a Replace makes of one."""
    content, pattern = step.get("content"), step.get("pattern")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0  # `tokenizers` refuses it
    text = pattern.get("String")
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    try:
        nothing = re.compile(str(pattern.get("Regex", ""))).search("") is not None
    # Of another kind of expressions than Python's.
    except (re.error, RecursionError, OverflowError):
        nothing = False
    return float(len(content) + 1 if nothing else max(1, len(content)))


def _longest(table: Any) -> int:
    """Returns the most bytes that a table of sentencepiece has for a character: a trie with its size, then texts."""
    try:
        data = base64.b64decode(table) if isinstance(table, str) else bytes(table or b"")
    except (binascii.Error, ValueError, TypeError):
        return 0
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=0)
