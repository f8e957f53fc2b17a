"""Who takes an adapter as it is, and why others do not: told from its settings alone, before a training or after it.

What each program takes was read in its source: vLLM's `lora/peft_helper.py` and `config/lora.py`, llama.cpp's
`llama-adapter.cpp` and `convert_lora_to_gguf.py`, PEFT's `config.py` from 0.13.2 to 0.21. That Ollama takes none any
more is what generative-computing/mellea#1651 found of ollama/ollama#14969, that vLLM leaves out what it finds no layer
for is vllm-project/vllm#34186.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ft import base as bases
from lora_ft import saved, sources, tasks
from lora_ft.config import COMPUTED, RunConfig
from lora_ft.errors import AdapterError, UnsupportedModelError
from lora_ft.export import vocabulary
from lora_ft.export.model import Described
from lora_ft.foreign import tensors
from lora_ft.foreign.adapter import HEADS
from lora_ft.proof import recorded

# vLLM's --max-lora-rank is one of these, the second unless it is said.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_UNASKED = 16
# The first that leaves out settings it does not know; those before it refuse the file. Rows of tokens came later.
PEFT_LEAST, PEFT_TOKENS = "0.14", "0.15"
EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Traits:
    """What of an adapter decides who takes it."""

    task: tasks.Task
    rank: int
    """The largest of any layer."""
    rslora: bool
    dora: bool
    patterns: bool
    """Whether layers have ranks or alphas of their own."""
    whole: tuple[str, ...]
    """Modules that are trained and saved whole, without the task's own head."""
    token_rows: int
    """Rows of embeddings that are trained alone."""
    targets: tuple[str, ...]
    quant: str
    unsupported: str
    """Why its base is no model that is written as GGUF, empty where it is."""
    tied: bool
    """Whether its base has one matrix for input and output embeddings."""
    exports: bool
    """Whether base and tokenizer can be written as GGUF once it is merged."""


@dataclass
class Answer:
    """Whether a program takes the adapter as it is."""

    program: str
    why: list[str] = field(default_factory=list)
    """Why it does not; empty where it does."""
    how: str = ""
    """How it is given the adapter, or what it is given instead."""
    notes: list[str] = field(default_factory=list)
    """What to know of an adapter that it does take."""

    @property
    def takes(self) -> bool:
        return not self.why


def answers(what: Path | RunConfig, base_name: str | None = None) -> list[Answer]:
    """Returns the answer of each program on an adapter folder, or on a run to come.

    Args:
        what: of a run that goes on from an adapter, with the shape of that one (`origin.adopted`).
        base_name: where to find the base, when it has moved.

    Raises:
        AdapterError: the folder is no adapter.
        SourceError: the base cannot be found; no weights are fetched for a run to come.
    """
    return _all(_of_folder(what, base_name) if isinstance(what, Path) else _of_config(what, base_name))


def _all(traits: Traits) -> list[Answer]:
    return [_vllm(traits), _llama_cpp(traits), _ollama(traits), _peft(traits)]


def _of_config(config: RunConfig, base_name: str | None) -> Traits:
    lora, data = config.lora, config.data
    source = sources.describe(base_name or config.base, None if base_name else config.revision)
    return Traits(
        task=tasks.of(config),
        rank=most_rank(lora.rank, lora.rank_pattern, lora.init),
        rslora=lora.uses_rslora,
        dora=lora.dora,
        patterns=bool(lora.rank_pattern or lora.alpha_pattern or lora.init == "eva"),
        whole=lora.save_modules,
        token_rows=len(data.special_tokens) + len(lora.train_tokens),
        targets=lora.targets,
        quant=config.quant,
        **_of_base(source.folder),
    )


def _of_folder(folder: Path, base_name: str | None) -> Traits:
    record, settings = recorded.read(folder), saved.lora_settings(folder)
    _, task = recorded.task(folder, record)
    source = saved.find_base(folder, record["base"], base_name)
    header = tensors.header(folder / saved.WEIGHTS, AdapterError)[1]
    ranks = [spec["shape"][0] for name, spec in header.items() if ".lora_A." in name or ".lora_embedding_A" in name]
    rows = settings.trainable_token_indices or []
    targets = settings.target_modules
    return Traits(
        task=task,
        rank=max(ranks, default=settings.r),
        rslora=settings.use_rslora,
        dora=settings.use_dora,
        patterns=bool(settings.rank_pattern or settings.alpha_pattern),
        whole=tuple(name for name in settings.modules_to_save or () if name not in HEADS),
        token_rows=max(map(len, rows.values())) if isinstance(rows, dict) else len(rows),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets or ())),
        quant=record["quant"],
        **_of_base(source.folder),
    )


def _of_base(folder: Path) -> dict[str, Any]:
    config = bases.read_config(folder)
    try:
        found = {"unsupported": "", "tied": Described.of(folder).is_tied()}
    except UnsupportedModelError:
        found = {"unsupported": config.model_type, "tied": False}
    try:
        vocabulary.check(folder.name, bases.load_tokenizer(folder), config.get_text_config().vocab_size)
    except UnsupportedModelError:
        return found | {"exports": False}
    return found | {"exports": not found["unsupported"]}


def most_rank(rank: int, patterns: Mapping[str, int], init: str) -> int:
    """Returns the largest rank that a layer may have in the file of a run with such settings."""
    return max((rank, *patterns.values())) * (2 if init in COMPUTED else 1)


def why_not_vllm(peft_task: str, *, rank: int, dora: bool, whole: Sequence[str], token_rows: int) -> list[str]:
    """Returns why vLLM does not take an adapter, nothing where it does.

    Args:
        peft_task: PEFT's name of what its base does.
        whole: modules that are saved whole, without the task's own head.
    """
    why = []
    if peft_task == "SEQ_2_SEQ_LM":
        why.append("it serves no encoder-decoder text models")
    if peft_task in ("SEQ_CLS", "TOKEN_CLS"):
        why.append("the head is saved whole, and of such modules (modules_to_save) it takes none")
    if peft_task == "FEATURE_EXTRACTION":
        why.append("layers are called as in a model without a head, and where it finds none of a name it says nothing")
    if rank > VLLM_RANKS[-1]:
        why.append(f"rank {rank} is above the largest --max-lora-rank, {VLLM_RANKS[-1]}")
    if dora:
        why.append("it does not know DoRA")
    if whole:
        why.append(f"modules are saved whole: {', '.join(whole)}")
    if token_rows:
        why.append(
            f"rows of {token_rows} single tokens are trained, which only some versions take, started with "
            f"--max-lora-trainable-tokens {token_rows}"
        )
    return why


def vllm_rank(rank: int) -> int:
    """Returns the --max-lora-rank that has room for a rank that vLLM takes."""
    return next(most for most in VLLM_RANKS if rank <= most)


def _vllm(traits: Traits) -> Answer:
    kind = traits.task.peft_task
    why = why_not_vllm(kind, rank=traits.rank, dora=traits.dora, whole=traits.whole, token_rows=traits.token_rows)
    said = Answer("vLLM", why)
    if why:
        said.how = "lora-ft merge DIR --out MERGED, then vllm serve MERGED"
        return said
    at_least = "" if traits.rank <= VLLM_UNASKED else f" --max-lora-rank {vllm_rank(traits.rank)}"
    said.how = f"vllm serve BASE --enable-lora --lora-modules NAME=DIR{at_least}"
    if traits.patterns:
        said.notes.append("versions that do not know rank_pattern and alpha_pattern scale some layers wrongly")
    return _with_note_on_quantized_training(said, traits)


def _llama_cpp(traits: Traits) -> Answer:
    said = Answer("llama.cpp", _why_no_gguf(traits))
    if said.why:
        merged = traits.exports and traits.task.peft_task == "CAUSAL_LM"
        said.how = "lora-ft export DIR --format gguf, which is merged" if merged else ""
        return said
    said.how = "lora-ft export DIR --format gguf-lora --out FILE, then llama-server --model BASE.gguf --lora FILE"
    if traits.rslora or traits.patterns:
        said.notes.append(
            "its own converter does not know rsLoRA, nor alphas of single layers, and scales them wrongly; lora-ft "
            "export writes the scale into B"
        )
    return _with_note_on_quantized_training(said, traits)


def _ollama(traits: Traits) -> Answer:
    from_now_on = "from 0.34.1 on it builds no model with an adapter (ollama/ollama#14969)"
    merged = traits.exports and traits.task.peft_task == "CAUSAL_LM"
    how = "lora-ft export DIR --format ollama --out FOLDER, which is merged" if merged else ""
    return Answer("Ollama", [from_now_on, *_why_no_gguf(traits)], how)


def _peft(traits: Traits) -> Answer:
    least = PEFT_TOKENS if traits.token_rows else PEFT_LEAST
    return Answer(
        "PEFT",
        how=f"PeftModel.from_pretrained(base, DIR), from PEFT {least} on",
        notes=["earlier versions refuse settings that they do not know, though these are all empty"],
    )


def _why_no_gguf(traits: Traits) -> list[str]:
    """Returns why llama.cpp cannot put the adapter on its base, as `export.lora` would find it."""
    why = []
    if traits.task.peft_task != "CAUSAL_LM":
        why.append(f"{traits.task.name} is no task of a model that generates")
    elif traits.unsupported:
        why.append(f"a {traits.unsupported} model is not among those that lora-ft writes as GGUF")
    if traits.dora:
        why.append("it does not know DoRA")
    if traits.whole:
        why.append(f"modules are saved whole: {', '.join(traits.whole)}")
    if traits.token_rows:
        why.append(f"rows of {traits.token_rows} single tokens are trained")
    adapted = [name for name in EMBEDDINGS if any(target.endswith(name) for target in traits.targets)]
    if traits.tied and adapted:
        why.append(f"{adapted[0]} is one of two embeddings that are one and the same there")
    return why


def _with_note_on_quantized_training(said: Answer, traits: Traits) -> Answer:
    if traits.quant != "none":
        said.notes.append(
            f"it was trained on {traits.quant} weights, and answers slightly differently on others: lora-ft merge "
            "measures by how much"
        )
    return said
