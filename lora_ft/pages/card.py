"""`README.md`, the card of an adapter: metadata that a model hub reads, and what people should know of it.

In the folder of a run it holds no times, so that the same run writes the same card. What is published says more: the
repository it is in, the licence of its base, and what the run took.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import yaml

from lora_ft import tasks
from lora_ft.export.portable import most_rank, vllm_rank, why_not_vllm
from lora_ft.pages.summary import DRIFT, Summary, clean, cut, flattened, problem_type, templates, view
from lora_ft.system.redaction import portable

FILE = "README.md"
PICTURE = "loss.png"

# The hub's name for what a task does, and the class that plain transformers loads its base with.
TASKS = {
    "chat": ("text-generation", "AutoModelForCausalLM"),
    "prefer": ("text-generation", "AutoModelForCausalLM"),
    "complete": ("text-generation", "AutoModelForCausalLM"),
    "classify": ("text-classification", "AutoModelForSequenceClassification"),
    "seq2seq": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "tag": ("token-classification", "AutoModelForTokenClassification"),
    "reason": ("text-generation", "AutoModelForCausalLM"),
    "embed": ("sentence-similarity", "AutoModel"),
}
SAMPLES = 3
# A sample is there to be read; longer texts are cut.
SAMPLE_CHARS = 700
# What a hub data set is called: its owner and name, and the split.
HUB_DATA = re.compile(r"([\w.-]+/[\w.-]+)(:[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Published:
    """What is only known where an adapter is published."""

    repo: str
    """The repository it goes to, `NAMESPACE/NAME`."""
    base: str
    """Hub id of its base, unquantized."""
    license: dict[str, str] = field(default_factory=dict)
    """`license`, and of one that the hub does not know `license_name` and `license_link`: the base's."""
    data_licenses: dict[str, str] = field(default_factory=dict)
    """Of hub data sets, by `train` and `eval`."""

    @property
    def title(self) -> str:
        """What it is called: the repository's name."""
        return self.repo.split("/")[1]


def card(summary: Summary, published: Published | None = None, picture: bool = False) -> str:
    """Returns the text of the card: metadata in YAML, then Markdown.

    Args:
        picture: whether the loss by step is drawn in `loss.png` beside it.
    """
    made = _templates().get_template("card.md.jinja").render(
        **view(summary),
        metadata=yaml.safe_dump(metadata(summary, published), sort_keys=False, allow_unicode=True),
        snippet=snippet(summary, published),
        auto_class=TASKS[summary.task][1],
        vllm=vllm(summary, published),
        samples=[cut(sample, SAMPLE_CHARS) for sample in summary.samples[:SAMPLES]],
        picture=PICTURE if picture else None,
        published=published,
        place="adapter" if published else ".",
        converses=converses(summary),
    )  # fmt: skip
    return made.strip("\n") + "\n"


def converses(summary: Summary) -> bool:
    """Returns whether what the adapter is asked goes through the chat template, as its rows did."""
    if summary.task == "reason":
        return summary.environment.get("task", {}).get("prompts") != "text"
    return summary.task in ("chat", "prefer")


def metadata(summary: Summary, published: Published | None = None) -> dict[str, Any]:
    """Returns the card's metadata; what is not known, such as a licence or a base's repository, is left out."""
    repo = published.base if published else summary.base.get("repo")
    tags = ["lora", "peft", "lora-ft", "transformers", summary.task]
    if summary.config["quant"] == "nf4":
        tags.append("qlora")
    data_sets = [hub_data(rows) for rows in summary.data.values() if rows and hub_data(rows)]
    results = list(_results(summary))
    return {
        "library_name": "peft",
        **({"base_model": repo} if repo else {}),
        "base_model_relation": "adapter",
        "pipeline_tag": TASKS[summary.task][0],
        **(published.license if published else {}),
        "tags": tags,
        **({"datasets": list(dict.fromkeys(data_sets))} if data_sets else {}),
        **({"metrics": list(dict.fromkeys(result["type"].split(".")[0] for result in results))} if results else {}),
        **({"model-index": [_index(summary, published, results)]} if results else {}),
    }


def hub_data(rows: Mapping[str, Any]) -> str | None:
    """Returns the hub id of the data set that rows came from; None where they are of a file, whose folder is not kept.

    Args:
        rows: what the record says of them.
    """
    found = HUB_DATA.fullmatch(str(rows["name"]))
    return found[1] if found else None


def _results(summary: Summary) -> Iterator[dict[str, Any]]:
    """Yields what was measured of the adapter, one number each, as the hub's `model-index` names it."""
    if not summary.data.get("eval"):
        return
    told = {k: v for k, v in summary.metrics.get("adapter", {}).items() if k not in ("per_class", "rows")}
    for name, value in flattened(told).items():
        if name.startswith(DRIFT):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield {"type": _line(name), "value": value}


def _index(summary: Summary, published: Published | None, results: list[dict[str, Any]]) -> dict[str, Any]:
    rows = view(summary)["held_out"]
    kind = hub_data(summary.data["eval"]) or "held-out-rows"
    task = {"type": TASKS[summary.task][0]}
    name = published.title if published else _line(summary.title)
    return {"name": name, "results": [{"task": task, "dataset": {"type": kind, "name": _line(rows["name"])},
                                       "metrics": results}]}  # fmt: skip


def _line(text: str) -> str:
    """Returns the text on one line, so that none of it can end the metadata."""
    return " ".join(clean(text).split())


# The programs in the card


def vllm(summary: Summary, published: Published | None = None) -> str | None:
    """Returns the command that serves the adapter with vLLM; None where that knows no such adapter or base.

    vLLM takes low-rank matrices of linear layers alone (its documentation of LoRA adapters, "Limitations").
    """
    lora, base = summary.config["lora"], published.base if published else summary.base.get("repo")
    rank = most_rank(lora["rank"], lora["rank_pattern"], lora["init"])
    if base is None or why_not_vllm(
        tasks.get(summary.task).peft_task,
        rank=rank,
        dora=lora["dora"],
        whole=lora.get("save_modules", ()),
        token_rows=len(lora.get("train_tokens", ())) + len(summary.config["data"]["special_tokens"]),
    ):
        return None
    name = published.title if published else "adapter"
    exact = summary.base["source"] == "hub" and summary.base.get("repo") == base and summary.base.get("revision")
    revision = f" --revision {summary.base['revision']}" if exact else ""
    adapter = published.repo if published else "."
    return (
        f"vllm serve {base}{revision} \\\n"
        f"    --enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules {name}={adapter}"
    )  # fmt: skip


def snippet(summary: Summary, published: Published | None = None) -> str:
    """Returns a Python program that loads the adapter with plain transformers and PEFT and runs it once."""
    auto_class = TASKS[summary.task][1]
    dtype = f"torch.{summary.environment.get('dtype', 'float32')}"
    quant = summary.config["quant"]
    base, resolved = summary.base, not summary.base.get("repo") and summary.base["source"] in ("wheel", "gguf")
    # Who downloads an adapter has no such file: the unquantized weights come closest.
    resolved = resolved and not (published and base["source"] == "gguf")
    arguments = ["base"]
    if base["source"] == "hub" and base.get("repo") and base.get("revision"):
        arguments.append(f"revision={_literal(base['revision'])}")
    arguments += [f"dtype={dtype}", 'device_map="auto"']
    if summary.task in ("classify", "tag"):
        labels = summary.environment.get("task", {}).get("labels")
        arguments += [f"num_labels={len(labels)}", f"id2label=dict(enumerate({_literal(labels)}))"] if labels else []
        arguments += ["num_labels=1"] if problem_type(summary) == "regression" else []
    if quant != "none":
        arguments.append("quantization_config=quantization")
    imported = [auto_class, "AutoTokenizer"] + (["BitsAndBytesConfig"] if quant != "none" else [])
    fetched = resolved and published is not None
    ours = ["from lora_ft import sources", "from lora_ft.proof import environment"] if resolved else []
    out = (["from pathlib import Path", ""] if resolved else []) + ["import torch"]
    out += (["from huggingface_hub import snapshot_download"] if fetched else []) + [
        *ours,
        "from peft import PeftModel",
    ]
    out += [f"from transformers import {', '.join(imported)}", ""]
    if published:
        out += [
            f"adapter = {f'snapshot_download({_literal(published.repo)})' if fetched else _literal(published.repo)}"
        ]
    else:
        out += ['adapter = "."  # this folder; elsewhere its path, or the repository it was published to']
    out += [_base_line(base, resolved, published), ""]
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


def _base_line(base: Mapping[str, Any], resolved: bool, published: Published | None) -> str:
    name = portable(str(base["name"]))
    if resolved:
        return 'base = sources.recall(environment.read(Path(adapter))["base"]).folder  # the very weights trained on'
    repo = base.get("repo") or (published.base if published else None)
    if repo:
        note = "" if base["source"] == "hub" else "  # not the weights trained on: see Base below"
        return f"base = {_literal(repo)}{note}"
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


def _vectors(pooling: str, prompt: str) -> list[str]:
    """Returns the lines that print how alike two texts are by their vectors."""
    weights = ["weights = inputs.attention_mask"] + (
        ["weights = weights * weights.cumsum(dim=1)"] if pooling == "weightedmean" else []
    )
    pooled = {
        "cls": ["vectors = states[:, 0]"],
        "lasttoken": ["vectors = states[range(len(states)), inputs.attention_mask.sum(dim=1) - 1]"],
    }.get(
        pooling,
        [*weights, "vectors = (states * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)"],
    )
    return [
        'tokenizer.padding_side = "right"',
        f'texts = [{prompt}, "How do I get there?"]',
        'inputs = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)',
        "with torch.no_grad():",
        "    states = model(**inputs).last_hidden_state.float()",
        *pooled,
        "vectors = torch.nn.functional.normalize(vectors, dim=-1)",
        "print(vectors @ vectors.T)",
    ]


def _use(summary: Summary) -> list[str]:
    """Returns the lines that run the model on a prompt of the samples, else on one of our own."""
    prompts = (s.get("prompt") for s in summary.samples)
    ours = "Where is the nearest post office?"
    prompt = _literal(next((clean(p) for p in prompts if isinstance(p, str) and 0 < len(p) <= 200), ours))
    forward = "with torch.no_grad():"
    generated = "    output = model.generate(**inputs, max_new_tokens=200)"
    plain = f'inputs = tokenizer({prompt}, return_tensors="pt").to(model.device)'
    tail = 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    if summary.task == "classify":
        shown = {
            "single_label_classification": "print(model.config.id2label[logits.argmax().item()])",
            "multi_label_classification": "print([model.config.id2label[i] for i, z in enumerate(logits) if z > 0])",
            "regression": "print(logits.item())",
        }[problem_type(summary)]
        return [plain, forward, "    logits = model(**inputs).logits[0]", shown]
    if summary.task == "tag":
        shown = "for token, tag in zip(inputs.tokens(), logits.argmax(dim=-1).tolist()):"
        return [plain, forward, "    logits = model(**inputs).logits[0]", shown,
                "    print(token, model.config.id2label[tag])"]  # fmt: skip
    if summary.task == "embed":
        return _vectors(summary.environment.get("task", {}).get("pooling", "mean"), prompt)
    if summary.task == "seq2seq":
        return [plain, forward, generated, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]
    if converses(summary):
        render = ["messages", "add_generation_prompt=True", "return_dict=True", 'return_tensors="pt"']
        turns = [f'{{"role": "user", "content": {prompt}}}']
        if system := summary.environment.get("task", {}).get("system"):
            turns.insert(0, f'{{"role": "system", "content": {_literal(clean(system))}}}')
        messages = _call("messages = ", turns, "[]")
        call = _call("inputs = tokenizer.apply_chat_template", render)
        return [*messages, *call, "inputs = inputs.to(model.device)", forward, generated, tail]
    return [plain, forward, generated, tail]


# Escapes


def _md_text(value: Any) -> str:
    """Returns Markdown that shows the text as it is, on one line; safe in a table."""
    text = " ".join(clean(str(value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", text)


def _md_code(value: Any, cell: bool = False) -> str:
    """Returns a code span on one line, whatever backticks are in the text; `cell` guards the pipes in a table."""
    text = " ".join(clean(str(value)).split())
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
def _templates() -> jinja2.Environment:
    return templates(escaped=False, text=_md_text, code=_md_code, block=_md_block)
