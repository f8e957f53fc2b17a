"""The configuration of a foreign base and of its tokenizer: what makes transformers fetch or run code is refused."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.errors import LoraFtError, SourceError
from lora_ft.foreign import growth
from lora_ft.foreign.files import is_plain_name, object_of, refuse_links_out, text_of
from lora_ft.foreign.reading import opened
from lora_ft.foreign.strictjson import bare, quoted
from lora_ft.foreign.templates import MAX_CHARS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

IMPLEMENTATIONS = tuple(
    f"{before}{what}_implementation{after}"
    for what in ("attn", "experts")
    for before, after in (("", ""), ("_", ""), ("_", "_internal"))
)
"""Keys that may name a way of computing, which is not heeded, but no repository to fetch one from (CVE-2026-4372)."""
# Transformers builds so many modules or names, whatever the files hold; far above any model there is.
MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), 1000),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 1000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 10_000),
    "num_labels": 100_000,
}
# What every configuration may have beside its fields, most of it from earlier versions of transformers.
ALWAYS = frozenset({
    "model_type", "num_labels", "torch_dtype", "quantization_config", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "attn_implementation", "_attn_implementation", "output_attentions", "pad_token_id",
    "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "layer_types",
})  # fmt: skip
# Left out without a word: what was written down of a model, and settings of `generate`, which has a file of its own.
SAYING_NOTHING = frozenset({
    "_name_or_path", "auto_map", "transformers_version", "task_specific_params", "finetuning_task", "tokenizer_class",
    "_commit_hash", "transformers_weights", "prefix", "pruned_heads", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "transformers.js_config", "unsloth_version", "unsloth_fixed",
})  # fmt: skip
SMALL_FILES = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def check_config(folder: Path, error: type[LoraFtError] = SourceError) -> None:
    """Raises `error` where a key of `config.json`, however deep, names code, a repository or what fills the memory."""
    file = folder / "config.json"
    config = object_of(file, error, any_number=True)
    problems = [problem for place, key, value in _settings(config) for problem in _problems(place, key, value)]
    if not isinstance(config.get("model_type"), str):
        problems.append("model_type is missing, so nothing says what kind of model this is")
    weights = config.get("transformers_weights")
    if weights not in (None, "model.safetensors", "model.safetensors.index.json"):
        problems.append(f"transformers_weights names {quoted(str(weights))}, not the files that are checked")
    if problems:
        raise error(f"{file}: {'; '.join(problems[:8])}: take the base from its makers, or mend the file.")
    if "auto_map" in config:
        _tell_of_code(file)


def open_config(folder: Path, error: type[LoraFtError] = SourceError) -> PreTrainedConfig:
    """Returns the configuration of the model in `folder`, of what its class knows.

    transformers makes an attribute of every key, and reads some from there that no class of a model has: how to spread
    the model over machines, which layers to replace by others. Objects, lists and texts under other keys are left out;
    numbers stay, for older models have some that their classes do not list. Raises `error` as `check_config` does, and
    what transformers raises.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_config(folder, error)
    found = object_of(folder / "config.json", error, any_number=True)
    if found["model_type"] not in CONFIG_MAPPING:
        return opened(AutoConfig, folder, ValueError)  # it says why not
    kind = CONFIG_MAPPING[found["model_type"]]
    kept = known(kind, found)
    left_out = sorted(found.keys() - kept.keys() - SAYING_NOTHING)
    if left_out:
        told, model_type = ", ".join(map(bare, left_out[:8])), found["model_type"]
        _tell_once(f"{folder.name}: config.json: {told} is nothing that a {model_type} model knows, and is not heeded")
    return kind.from_dict(kept)


def known(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Returns what of the keys of a configuration its class, `kind`, knows."""
    names = _names(kind)
    kept = {}
    for key, value in found.items():
        plain = isinstance(value, bool | int | float) and not key.startswith("_") and not hasattr(kind, key)
        if key in names or plain:
            inner = kind.sub_configs_defaults.get(key)
            inner_kind = getattr(inner, "config_class", None)
            nested = isinstance(value, dict) and hasattr(inner_kind, "sub_configs_defaults")
            kept[key] = known(inner_kind, value) if nested else value
    return kept


@cache
def _names(kind: Any) -> frozenset[str]:
    """Returns the keys that a class of configurations knows: its fields, their other names, and what it converts."""
    names = {field.name for field in dataclasses.fields(kind)} | kind.attribute_map.keys() | ALWAYS
    for part in kind.__mro__:
        if "__post_init__" in vars(part):
            # Names of older versions, which a class takes out of the rest: `kwargs.pop("rope_theta", None)`.
            names |= set(re.findall(r'kwargs(?:\.\w+\(|\[)\s*"(\w+)"', inspect.getsource(vars(part)["__post_init__"])))
    return frozenset(names)


def check_tokenizer(folder: Path, error: type[LoraFtError] = SourceError) -> None:
    """Raises `error` where a file of the tokenizer in `folder` is too large, links out of it or names code or files."""
    refuse_links_out(folder, error)
    for name in SMALL_FILES:
        if (folder / name).exists():
            object_of(folder / name, error, any_number=True)
    if (folder / "tokenizer.json").exists():
        growth.check(folder / "tokenizer.json", error)
    for template in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
        text_of(template, MAX_CHARS, error)
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return
    config = object_of(file, error, any_number=True)
    problems = [problem for place, key, value in _settings(config) for problem in _problems(place, key, value)]
    if config.get("init_inputs"):
        problems.append("init_inputs would be given to the tokenizer's class unseen; it must be empty")
    kind = config.get("tokenizer_class")
    if kind is not None and not (isinstance(kind, str) and kind.isidentifier()):
        problems.append(f"tokenizer_class is {quoted(str(kind))}, which is no class")
    problems += _template_problems(config.get("chat_template"))
    if problems:
        raise error(f"{file}: {'; '.join(problems[:8])}: take the tokenizer from its makers, or mend the file.")
    if "auto_map" in config:
        _tell_of_code(file)


def _tell_of_code(file: Path) -> None:
    """Logs once that a file names code: many a base that transformers knows by now does."""
    _tell_once(f"{file} names code of its own (auto_map), which is never run")


@cache
def _tell_once(told: str) -> None:
    log.info("%s", told)


def _settings(tree: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields each key of the objects in `tree`, however deep, with its place and value."""
    todo: list[tuple[str, Any]] = [(place, tree)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield f"{place}{key}", key, inner
                todo.append((f"{place}{key}.", inner))
        elif isinstance(value, list):
            todo += [(place, inner) for inner in value if isinstance(inner, dict | list)]


def _problems(place: str, key: str, value: Any) -> Iterator[str]:
    if key == "trust_remote_code" and value not in (None, False):  # CVE-2026-5241
        yield f"{quoted(place)} has transformers fetch and run code, and no code from a base is ever run"
    elif key in IMPLEMENTATIONS:
        named = value.values() if isinstance(value, dict) else [value]
        if not all(one is None or (isinstance(one, str) and one.replace("_", "").isalnum()) for one in named):
            yield f"{quoted(place)} names code to fetch, {quoted(str(value))}, and no code from a base is ever run"
    elif key in MOST and isinstance(value, int | float) and value > MOST[key]:
        yield f"{quoted(place)} is {value:g}, and {MOST[key]:,} is the most of any model"


def _template_problems(templates: Any) -> Iterator[str]:
    """Yields what is wrong with the templates in a tokenizer's configuration; their names become those of files."""
    if isinstance(templates, dict):
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    elif isinstance(templates, str):
        templates = [{"name": "default", "template": templates}]
    elif templates is None:
        return
    if not isinstance(templates, list) or not all(isinstance(one, dict) for one in templates):
        yield "chat_template is neither text nor a list of named ones"
        return
    for one in templates:
        if not is_plain_name(one.get("name")):
            yield f"chat_template has a name that is none of a file, {quoted(str(one.get('name')))}"
        if not isinstance(one.get("template"), str) or len(one["template"]) > MAX_CHARS:
            yield f"a chat_template is no text of at most {MAX_CHARS:,} characters"
