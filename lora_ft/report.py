"""`README.md`, the card, and `report.html`, the page: what a run did, from the numbers it left behind.

Both are pure functions of a `Summary` and `metrics.jsonl`: the same run gives the same bytes.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from lora_ft import atomicio
from lora_ft.class_metrics import TABLES
from lora_ft.curves import confusion, curves, number
from lora_ft.redaction import redacted

METRICS = "metrics.jsonl"
CARD = "README.md"
PAGE = "report.html"

# The hub's name for what a task does, and the class that plain transformers loads its base with.
TASKS = {
    "chat": ("text-generation", "AutoModelForCausalLM"),
    "complete": ("text-generation", "AutoModelForCausalLM"),
    "classify": ("text-classification", "AutoModelForSequenceClassification"),
    "seq2seq": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "tag": ("token-classification", "AutoModelForTokenClassification"),
}
# Metrics of which less is better; of all others more is.
FALLING = ("loss", "perplexity", "error", "kl", "wer", "cer", "ter", "brier", "mse", "mae")
# What is measured on general text, and not on held-out rows.
DRIFT = "drift."
# Settings that say where a run wrote or how it was called, not what it did.
NOT_SETTINGS = ("task", "base", "out", "resume", "dry_run")

CARD_SAMPLES = 3
# A sample is there to be read; longer texts are cut, which also bounds the quadratic comparison of words.
PAGE_CHARS = 2400
CARD_CHARS = 700
# Share of words in common from which marking the others helps to read; below it the whole text would be tinted.
ALIKE = 0.35


@dataclass(frozen=True)
class Summary:
    """What a run hands over when it ends, as plain data."""

    title: str
    task: str
    base: dict[str, Any]
    """The `base` record of environment.json: name, source, repo, revision, origin, weights_sha256."""
    config: dict[str, Any]
    """`config.plain` of the run's configuration."""
    environment: dict[str, Any]
    data: dict[str, Any]
    """`train` and `eval` (or None), each with name, rows and sha256."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of `base` and `adapter`; empty without held-out rows.

    `NAME_change_interval` beside an adapter's `NAME` is the 95% interval of its change from the base.
    """
    fit: dict[str, Any] = field(default_factory=dict)
    """steps, tokens, seconds, tokens_per_s, peak_bytes."""
    seal: dict[str, Any] = field(default_factory=dict)
    """kl_effect in nats and rows; kl_live in nats and passed where the saved files were loaded and replayed."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """prompt, expected, before and after."""
    combined: dict[str, Any] = field(default_factory=dict)
    """Of an adapter that was combined and not trained: method, rank, and `parts`, `combine.Kept` of each."""
    adapter_bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)
    """Name and sha256 of the files of the adapter folder."""


def write(folder: Path, summary: Summary) -> None:
    """Writes the card and the page of a run into its adapter folder; the curves come from its `metrics.jsonl`."""
    path = folder / METRICS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    for name, made in ((CARD, card(summary)), (PAGE, page(summary, lines))):
        atomicio.write(folder / name, redacted(made).encode("utf-8", errors="replace"))


def card(summary: Summary) -> str:
    """Returns the text of the card: metadata in YAML, then Markdown."""
    made = _templates(escaped=False).get_template("card.md.jinja").render(
        **_view(summary),
        metadata=yaml.safe_dump(metadata(summary), sort_keys=False, allow_unicode=True),
        snippet=snippet(summary),
        samples=[_cut_sample(sample, CARD_CHARS) for sample in summary.samples[:CARD_SAMPLES]],
    )  # fmt: skip
    return made.strip("\n") + "\n"


def page(summary: Summary, lines: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns one HTML file that loads nothing else.

    Args:
        lines: those of `metrics.jsonl`, in their order.
    """
    samples = [_cut_sample(sample, PAGE_CHARS) for sample in summary.samples]
    for sample in samples:
        sample["same"] = sample["expected"] != "" and sample["after"].strip() == sample["expected"].strip()
        sample["before"], sample["after"] = marked(sample["before"], sample["after"])
    told = summary.metrics.get("adapter", {})
    counts = told.get("confusion_matrix")
    return _templates(escaped=True).get_template("report.html.jinja").render(
        **_view(summary), curves=list(curves(lines, summary.metrics, summary.fit.get("steps", 0))), samples=samples,
        matrix=confusion(counts, list(told["per_class"])) if counts else None,
    )  # fmt: skip


def metadata(summary: Summary) -> dict[str, Any]:
    """Returns the card's metadata; what is not known, such as a licence or a base's repository, is left out."""
    repo = summary.base.get("repo")
    known = {"base_model": repo} if repo else {}
    tags = ["lora", "peft", "lora-ft", "transformers", summary.task]
    if summary.config["quant"] == "nf4":
        tags.append("qlora")
    return {
        "library_name": "peft",
        **known,
        "base_model_relation": "adapter",
        "pipeline_tag": TASKS[summary.task][0],
        "tags": tags,
    }


def snippet(summary: Summary) -> str:
    """Returns a Python program that loads the adapter with plain transformers and PEFT and runs it once."""
    auto_class = TASKS[summary.task][1]
    dtype = f"torch.{summary.environment.get('dtype', 'float32')}"
    quant = summary.config["quant"]
    base, resolved = summary.base, not summary.base.get("repo") and summary.base["source"] in ("wheel", "gguf")
    arguments = ["base"]
    if base["source"] == "hub" and base.get("repo") and base.get("revision"):
        arguments.append(f"revision={_literal(base['revision'])}")
    arguments += [f"dtype={dtype}", 'device_map="auto"']
    if summary.task in ("classify", "tag"):
        labels = summary.environment.get("task", {}).get("labels")
        arguments += [f"num_labels={len(labels)}", f"id2label=dict(enumerate({_literal(labels)}))"] if labels else []
        arguments += ["num_labels=1"] if _problem(summary) == "regression" else []
    if quant != "none":
        arguments.append("quantization_config=quantization")
    imported = [auto_class, "AutoTokenizer"] + (["BitsAndBytesConfig"] if quant != "none" else [])
    ours = ["from lora_ft import environment, sources"] if resolved else []
    out = (["from pathlib import Path", ""] if resolved else []) + ["import torch", *ours, "from peft import PeftModel"]
    out += [f"from transformers import {', '.join(imported)}", ""]
    out += ['adapter = "."  # this folder; elsewhere its path, or the repository it was published to']
    out += [_base_line(base, resolved), ""]
    if quant != "none":
        heads = [name for name in summary.environment.get("left_whole", ()) if not re.search(r"\.\d+\.", name)]
        skipped = [f"llm_int8_skip_modules={_literal(heads)}"] if heads else []
        kind = ["load_in_8bit=True"] if quant == "int8" else [
            "load_in_4bit=True", 'bnb_4bit_quant_type="nf4"', "bnb_4bit_use_double_quant=True",
            f"bnb_4bit_compute_dtype={dtype}"]  # fmt: skip
        out += _call("quantization = BitsAndBytesConfig", kind + skipped)
    out.append("tokenizer = AutoTokenizer.from_pretrained(adapter)")
    out += _call(f"model = {auto_class}.from_pretrained", arguments)
    if summary.config["data"].get("special_tokens"):
        out.append("model.resize_token_embeddings(len(tokenizer), mean_resizing=False)")
    if summary.task == "classify":
        out.append("model.config.pad_token_id = tokenizer.pad_token_id  # by which a decoder finds the last token")
    out += ["model = PeftModel.from_pretrained(model, adapter).eval()", "", *_use(summary)]
    return "\n".join(out)


def marked(before: str, after: str) -> tuple[Markup, Markup]:
    """Returns both texts as HTML, the words that only one of them has in `<del>` and `<ins>`.

    Where they have little in common nothing is marked: all of it would be.
    """
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < ALIKE:
        return escape(before), escape(after)
    left, right = Markup(""), Markup("")
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        gone, come = "".join(old[i1:i2]), "".join(new[j1:j2])
        left += Markup("<del>{}</del>").format(gone) if kind != "equal" and gone else escape(gone)
        right += Markup("<ins>{}</ins>").format(come) if kind != "equal" and come else escape(come)
    return left, right


# What both say


def _view(summary: Summary) -> dict[str, Any]:
    """Returns what both templates read."""
    environment = summary.environment
    measured = list(_evaluation(summary.metrics))
    evaluation = [row for row in measured if not row["name"].startswith(DRIFT)]
    data = {kind: {**rows, "name": _portable(str(rows["name"]))} for kind, rows in summary.data.items() if rows}
    if "eval" in data and re.fullmatch(r"0?\.\d+", data["eval"]["name"]):
        data["eval"]["name"] = f"{100 * float(data['eval']['name']):g}% of {data['train']['name']}"
    return {
        "title": summary.title,
        "task": summary.task,
        "base": {**summary.base, "name": _portable(str(summary.base["name"]))},
        "device": environment.get("device"),
        "dtype": environment.get("dtype"),
        "system": environment.get("task", {}).get("system"),
        "versions": environment.get("versions", {}),
        "init_from": environment.get("init_from"),
        "quant": summary.config["quant"],
        "data": data,
        "held_out": data.get("eval"),
        "fit": summary.fit,
        "seal": {"passed": None, "kl_live": None, **summary.seal} if summary.seal else {},
        # What a combined adapter was made by; no training of the rest made it.
        "settings": dict(_settings({k: v for k, v in summary.combined.items() if k != "parts"} or summary.config)),
        "parts": summary.combined.get("parts", []),
        "max_length": summary.config["data"].get("max_length"),
        "variants": _variants(summary.metrics),
        "evaluation": evaluation,
        "drift": [row for row in measured if row["name"].startswith(DRIFT)],
        "loss": next((row for row in evaluation if row["name"] == "loss" and row["change"]), None),
        "unsure": [r["name"] for r in evaluation if r["interval"] and not r["verdict"]],
        "unit": _unit(summary),
        "classes": _weakest(summary.metrics),
        "has_matrix": "confusion_matrix" in summary.metrics.get("adapter", {}),
        "adapter_bytes": summary.adapter_bytes,
        "files": dict(sorted(summary.files.items())),
    }


def _problem(summary: Summary) -> str:
    """Returns what a classifier learned; the record of an early one does not say it."""
    return str(summary.environment.get("task", {}).get("problem_type", "single_label_classification"))


def _unit(summary: Summary) -> str:
    if summary.task != "classify":
        return "nats per scored token"
    if _problem(summary) == "regression":
        return "squared units of the label, in the mean"
    return "nats per row" if _problem(summary) == "single_label_classification" else "nats per row and label"


def _weakest(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """Returns what there is to say of each class, those with the lowest F1 first."""
    found = metrics.get("adapter", {}).get("per_class", {})
    # Of a class without a held-out row nothing is known.
    order = sorted(found, key=lambda label: (found[label]["support"] == 0, found[label]["f1"]))
    return [(label, {key: number(value) for key, value in found[label].items()}) for label in order]


def _evaluation(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields one row for each metric: its value in every variant, the adapter's change and its interval."""
    names = _variants(metrics)
    flat = {name: _flat({k: v for k, v in metrics[name].items() if k not in TABLES}) for name in names}
    order = dict.fromkeys(
        key for name in names for key in flat[name] if not key.endswith("_interval") and key != "rows"
    )
    for key in order:
        cells = [number(flat[name][key]) if key in flat[name] else "" for name in names]
        row = {"name": key, "cells": cells, "change": "", "interval": "", "verdict": ""}
        before, after = (flat.get(name, {}).get(key) for name in ("base", "adapter"))
        if isinstance(before, int | float) and isinstance(after, int | float):
            row["change"] = number(after - before, signed=True)
        interval = flat.get("adapter", {}).get(f"{key}_change_interval")
        if interval:
            low, high = interval
            row["interval"] = f"{number(low, signed=True)} to {number(high, signed=True)}"
            if low > 0 or high < 0:
                falling = any(word in FALLING for word in re.split(r"[_.\s]", key))
                row["verdict"] = "better" if (high < 0) == falling else "worse"
        if any(cells):
            yield row


def _variants(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the names of what was evaluated, the base first."""
    return [name for name in ("base", "adapter") if metrics.get(name)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns numbers, texts and intervals by dotted name; other lists are for programs, not for a table."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif key.endswith("_interval") if isinstance(value, list | tuple) else value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields each setting that is set by its dotted name, as it would be typed, and its value in words."""
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", "-")
        if (prefix == "" and key in NOT_SETTINGS) or value is None or value in ((), [], {}):
            continue
        if isinstance(value, Mapping) and prefix == "":
            yield from _settings(value, f"{key}.")
        elif isinstance(value, Mapping):
            yield name, ", ".join(f"{k}={_portable(str(v))}" for k, v in value.items())
        elif isinstance(value, list | tuple):
            yield name, ", ".join(_portable(str(item)) for item in value)
        else:
            yield name, ("yes" if value else "no") if isinstance(value, bool) else _portable(str(value))


def _cut_sample(sample: Mapping[str, Any], limit: int) -> dict[str, Any]:
    texts = {}
    for key in ("prompt", "expected", "before", "after"):
        value = sample.get(key)
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = _clean(text)
        texts[key] = text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"
    return texts


def _portable(name: str) -> str:
    """Returns a name without any folder of this machine."""
    if PurePosixPath(name).is_absolute() or name.startswith(("~", "../")):
        return PurePosixPath(name).name
    return PureWindowsPath(name).name if PureWindowsPath(name).is_absolute() else name


# The program in the card


def _base_line(base: Mapping[str, Any], resolved: bool) -> str:
    name = _portable(str(base["name"]))
    if resolved:
        return 'base = sources.recall(environment.read(Path(adapter))["base"]).folder  # the very weights trained on'
    if base.get("repo"):
        note = "" if base["source"] == "hub" else "  # not the weights trained on: see Base below"
        return f"base = {_literal(base['repo'])}{note}"
    return f"base = {_literal(name)}  # the folder with the weights named under Base below"


def _literal(value: str | list[str]) -> str:
    """Returns JSON, which for texts and lists of them is Python too, in the quotes of the rest of the program."""
    return json.dumps(value, ensure_ascii=False)


def _call(head: str, arguments: Sequence[str], brackets: str = "()") -> list[str]:
    """Returns the lines of a call, or of a list, on one where it fits."""
    opening, closing = brackets[0], brackets[1]
    line = f"{head}{opening}{', '.join(arguments)}{closing}"
    if len(line) <= 88:
        return [line]
    return [f"{head}{opening}", *(f"    {argument}," for argument in arguments), closing]


def _use(summary: Summary) -> list[str]:
    """Returns the lines that run the model on a prompt of the samples, else on one of our own."""
    prompts = (s.get("prompt") for s in summary.samples)
    ours = "Where is the nearest post office?"
    prompt = _literal(next((_clean(p) for p in prompts if isinstance(p, str) and 0 < len(p) <= 200), ours))
    forward = "with torch.no_grad():"
    generated = "    output = model.generate(**inputs, max_new_tokens=200)"
    plain = f'inputs = tokenizer({prompt}, return_tensors="pt").to(model.device)'
    tail = 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    if summary.task == "classify":
        shown = {
            "single_label_classification": "print(model.config.id2label[logits.argmax().item()])",
            "multi_label_classification": "print([model.config.id2label[i] for i, z in enumerate(logits) if z > 0])",
            "regression": "print(logits.item())",
        }[_problem(summary)]
        return [plain, forward, "    logits = model(**inputs).logits[0]", shown]
    if summary.task == "tag":
        shown = "for token, tag in zip(inputs.tokens(), logits.argmax(dim=-1).tolist()):"
        return [plain, forward, "    logits = model(**inputs).logits[0]", shown,
                "    print(token, model.config.id2label[tag])"]  # fmt: skip
    if summary.task == "seq2seq":
        return [plain, forward, generated, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]
    if summary.task == "chat":
        render = ["messages", "add_generation_prompt=True", "return_dict=True", 'return_tensors="pt"']
        turns = [f'{{"role": "user", "content": {prompt}}}']
        if system := summary.environment.get("task", {}).get("system"):
            turns.insert(0, f'{{"role": "system", "content": {_literal(_clean(system))}}}')
        messages = _call("messages = ", turns, "[]")
        call = _call("inputs = tokenizer.apply_chat_template", render)
        return [*messages, *call, "inputs = inputs.to(model.device)", forward, generated, tail]
    return [plain, forward, generated, tail]


# The curves


def _size(count: float) -> str:
    """Returns a number of bytes in words."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.{2 if count < 10 * size else 1}f} {unit}"
    return f"{count:.0f} bytes"


def _duration(seconds: float) -> str:
    """Returns seconds in words, to about three digits."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _clean(text: str) -> str:
    """Returns text that UTF-8, HTML and Markdown can all hold: one kind of line end, no control characters."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", "\ufffd", text)


def _md_text(value: Any) -> str:
    """Returns Markdown that shows the text as it is, on one line; safe in a table."""
    text = " ".join(_clean(str(value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", text)


def _md_code(value: Any, cell: bool = False) -> str:
    """Returns a code span on one line, whatever backticks are in the text; `cell` guards the pipes in a table."""
    text = " ".join(_clean(str(value)).split())
    ticks = "`" * (_longest_ticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text.replace('|', chr(92) + '|') if cell else text}{space}{ticks}"


def _md_block(value: Any, language: str = "text") -> str:
    """Returns a fenced block that nothing in the text can close."""
    fence = "`" * max(3, _longest_ticks(str(value)) + 1)
    return f"{fence}{language}\n{value}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


@functools.cache
def _templates(*, escaped: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_ft"),
        autoescape=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, size=_size, duration=_duration)
    environment.filters.update(text=_md_text, code=_md_code, block=_md_block)
    return environment
