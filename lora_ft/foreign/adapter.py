"""`adapter_config.json` held to what PEFT's LoRA is made of, and to limits; what names code or files is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ft.errors import AdapterError
from lora_ft.foreign.cell import Cell, DiedError, RaisedError, StoppedError
from lora_ft.foreign.strictjson import bare, quoted, shown

MAX_RANK = 4096
MAX_ALPHA = 1e6
# Above any model's layers, one by one; PEFT compares each with every module.
MAX_ENTRIES = 5000
MAX_WHOLE = 256
MAX_ROWS = 100_000
# Python keeps so many expressions compiled; with more, PEFT compiles each anew for every module. A model with more
# modules may have as many, for EVA gives each a rank of its own.
MAX_PATTERNS = 512
MAX_NAME_CHARS = 256
MAX_PATTERN_CHARS = 2000
MATCHING_S = 1.0
MATCHING_BYTES = 128 * 2**20

# PEFT adds both to whatever classifies, though a model has but one of them.
HEADS = ("classifier", "score")
# Names and ends of names: nothing in them can be tried in more than one way.
PLAIN = re.compile(r"[\w.-]*")
# A name of a tensor of LoRA in PEFT's file.
TENSOR = re.compile(r"base_model\.model\.[\w.-]+", re.ASCII)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARS and value.isprintable()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value <= MAX_ALPHA


def is_pattern(value: Any) -> bool:
    """Returns whether `value` is a regular expression, and not too long a one."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_PATTERN_CHARS or not value.isprintable():
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_list(value: Any, of: Callable[[Any], bool], most: int = MAX_ENTRIES) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(of, value))


def _is_mapping(value: Any, key: Callable[[Any], bool], of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_ENTRIES and all(key(k) and of(v) for k, v in value.items())


def _is_rows(value: Any) -> bool:
    def listed(rows: Any) -> bool:
        return _is_list(rows, _is_count, MAX_ROWS)

    return listed(value) or (_is_mapping(value, _is_text, listed) and len(value) <= MAX_WHOLE)


TEXT = (_is_text, f"a string of at most {MAX_NAME_CHARS} characters that print")
BOOL = (_is_bool, "true or false")
NAMES = (lambda value: _is_list(value, _is_text, MAX_WHOLE), f"a list of at most {MAX_WHOLE} names")
TARGETS = (
    lambda value: _is_list(value, _is_text) or is_pattern(value),
    f"a list of at most {MAX_ENTRIES} names, or a regular expression of at most {MAX_PATTERN_CHARS} characters",
)
ROWS = (_is_rows, "a list of token ids, or one for each embedding")
RANK = (_is_rank, f"a whole number from 1 to {MAX_RANK}")
ALPHA = (_is_alpha, f"a number above 0, up to {MAX_ALPHA:,.0f}")
SHARE = (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1")

SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha_pattern": (
        lambda value: _is_mapping(value, is_pattern, _is_alpha),
        f"an object of at most {MAX_ENTRIES} patterns and alphas",
    ),
    "base_model_name_or_path": TEXT,
    "bias": (lambda value: value == "none", "none"),
    "ensure_weight_tying": BOOL,
    "exclude_modules": NAMES,
    "fan_in_fan_out": BOOL,
    "inference_mode": BOOL,
    "init_lora_weights": (lambda value: _is_bool(value) or _is_text(value), "true, false or a name"),
    "lora_alpha": ALPHA,
    "lora_bias": BOOL,
    "lora_dropout": SHARE,
    "modules_to_save": NAMES,
    "peft_type": (lambda value: value == "LORA", "LORA"),
    "peft_version": TEXT,
    "qalora_group_size": (_is_count, "a whole number"),
    "r": RANK,
    "rank_pattern": (
        lambda value: _is_mapping(value, is_pattern, _is_rank),
        f"an object of at most {MAX_ENTRIES} patterns and ranks",
    ),
    "revision": TEXT,
    "target_modules": TARGETS,
    "target_parameters": NAMES,
    "task_type": TEXT,
    "trainable_token_indices": ROWS,
    "use_dora": BOOL,
    "use_qalora": (lambda value: value is False, "false"),
    "use_rslora": BOOL,
}
"""Every key that lora-ft loads: whether a value fits, and what it must be. Null stands for PEFT's default."""

NAMING_CODE = {
    "auto_mapping": "names a class to import",
    "megatron_config": "has PEFT import the module that megatron_core names",
    "corda_config": "names files that PEFT opens as pickles",
    "lora_ga_config": "names a file that PEFT opens as a pickle",
    "eva_config": "starts an adapter anew",
    "loftq_config": "starts an adapter anew",
    "layer_replication": "copies layers of the base as often as it says",
}
"""Keys that are refused wherever they say anything, and why."""
# PEFT writes its default into every file, and reads it only beside `megatron_config`.
UNREAD = ("megatron_core", "runtime_config")


def checked(settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Returns the settings that PEFT may have. Raises AdapterError naming each that is not for it or out of limits."""
    problems, kept = [], {}
    for key, value in settings.items():
        # What is null, false or empty says nothing, whoever wrote it.
        if key in UNREAD or (key not in SETTINGS and (value is None or value is False or value in ({}, []))):
            continue
        if key in NAMING_CODE:
            problems.append(f"{key} {NAMING_CODE[key]}, which a foreign adapter may not ask for")
        elif key not in SETTINGS:
            problems.append(f"{bare(key)} is no setting that lora-ft loads")
        elif value is None:
            continue
        elif not SETTINGS[key][0](value):
            problems.append(f"{key} is {shown(value)}, not {SETTINGS[key][1]}")
        else:
            kept[key] = value
    if problems:
        told = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if problems[8:] else "")
        raise AdapterError(f"{file}: {told}: the file was damaged, or is not of lora-ft.")
    return kept


def refuse_patterns(settings: Mapping[str, Any], model: Any, where: str) -> None:
    """Raises AdapterError where a pattern of the settings takes too long on the names in the model, or fits none.

    A pattern such as `(a+)+b` takes years on a name of forty letters, and PEFT would try it on every module.
    """
    # Of parameters too: experts that transformers joins are no modules.
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    patterns = list({pattern for key in ("rank_pattern", "alpha_pattern") for pattern in settings.get(key) or ()})
    modules = sum(1 for _ in model.named_modules())
    _require_few(patterns, modules, where)
    targets = settings.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        patterns.append(targets)
    lost = _matched(unmatched, patterns, names, where)
    whole = [name for name in settings.get("modules_to_save") or () if name not in HEADS]
    lost += [name for name in whole if not any(module.endswith(name) for module in names)]
    if lost:
        raise AdapterError(f"{where}: no module of the base is called {', '.join(map(shown, lost[:8]))}.")


def patterns_of(patterns: Iterable[str], names: Sequence[str], where: str) -> dict[str, str]:
    """Returns the pattern that PEFT applies to each name that one fits.

    Raises:
        AdapterError: to match them takes too long.
    """
    patterns = list(patterns)
    _require_few(patterns, len(names), where)
    fitting = _matched(first_fits, patterns, names, where)
    return {name: pattern for name, pattern in zip(names, fitting, strict=True) if pattern is not None}


def _require_few(patterns: Sequence[str], modules: int, where: str) -> None:
    if len(patterns) > max(MAX_PATTERNS, modules):
        raise AdapterError(
            f"{where}: rank_pattern and alpha_pattern have {len(patterns):,} patterns, more than {MAX_PATTERNS} and "
            f"than the {modules:,} modules that they are for: one that fits many modules will do."
        )


def _matched(answer: Callable[[list[Any]], Any], patterns: Sequence[str], names: Sequence[str], where: str) -> Any:
    """Returns the answer to patterns and names, within limits. Raises AdapterError where it takes too much."""
    cell = Cell(answer, seconds=MATCHING_S, memory_bytes=MATCHING_BYTES)
    try:
        simple = all(PLAIN.fullmatch(pattern) for pattern in patterns)
        return (answer if simple else cell.ask)([patterns, names])
    except DiedError as why:
        raise AdapterError(f"{where}: its patterns were not matched with the names of modules: {why}.") from None
    except (StoppedError, RaisedError) as why:
        raise AdapterError(
            f"{where}: to match its patterns ({shown(patterns[0])}) with the names of modules {why}: "
            "name the modules instead."
        ) from None
    finally:
        cell.close()


def _forms(patterns: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """Returns the patterns the way PEFT fits them."""
    return {pattern: re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns}


def unmatched(question: list[Any]) -> list[str]:
    """Returns which of the patterns fit none of the names."""
    patterns, names = question
    return [pattern for pattern, form in _forms(patterns).items() if not any(form.match(name) for name in names)]


def first_fits(question: list[Any]) -> list[str | None]:
    """Returns the first of the patterns that fits each name, None where none does."""
    patterns, names = question
    forms = _forms(patterns)
    return [next((pattern for pattern, form in forms.items() if form.match(name)), None) for name in names]


def refuse_names(names: Iterable[str], file: Path) -> None:
    """Raises AdapterError where a tensor of the adapter's file has a name that PEFT would not give it."""
    for name in names:
        if not TENSOR.fullmatch(name):
            raise AdapterError(f"{file}: {quoted(name)} is no name of a tensor of an adapter: the file was damaged.")
