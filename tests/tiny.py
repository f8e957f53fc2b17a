"""Small random models with tokenizers, and short runs on them, for tests of the whole path from base to folder."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora_ft import adapters, base, config, saved, seal, tasks, train
from lora_ft.proof import environment
from lora_ft.settings import to_yaml

WORDS = 290
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>")
VOCAB = len(SPECIALS) + WORDS
LABELS = ("bad", "good", "plain")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }} {{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Wide enough that a few steps on an adapter change what the model says.
SPREAD = 0.25

_SMALL = {"vocab_size": VOCAB, "initializer_range": SPREAD, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_BERT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
# Its own spread is drawn by `init_std`.
_BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 512,
    "init_std": SPREAD,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-untied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 32}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "head_dim": 16, "sliding_window": 256}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_LLAMA, "residual_multiplier": 0.3}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT),
    "bert": ("BertModel", "BertConfig", _BERT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
}
"""Name -> model class, configuration class and its small sizes."""


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a word-level tokenizer over `w0 w1 ...` with a chat template."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *(f"w{i}" for i in range(WORDS))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    made.chat_template = TEMPLATE
    return made


def model_folder(
    folder: Path, architecture: str = "llama", *, seed: int = 0, dtype: str = "float32", **sizes: Any
) -> Path:
    """Returns `folder` holding a random model: config, safetensors and tokenizer."""
    model_name, config_name, small = ARCHITECTURES[architecture]
    transformers.set_seed(seed)
    settings = getattr(transformers, config_name)(**{**_SMALL, **small, **sizes})
    model = getattr(transformers, model_name)(settings)
    if architecture == "t5":
        # T5 draws by a rule of its own; without more spread its answers hardly depend on the source.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def split(folder: Path, shards: int) -> None:
    """Rewrites the weights in `folder` as `shards` files with an index, the way large models come."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[i::shards]
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()


def rows(task_name: str, count: int = 12, seed: int = 0) -> list[tasks.Features]:
    """Returns features of a task that can be learned: the answer follows from the first word."""
    rng = random.Random(seed)
    made: list[tasks.Features] = []
    for _ in range(count):
        words = [rng.randrange(len(SPECIALS), VOCAB) for _ in range(rng.randrange(4, 10))]
        kind = words[0] % len(LABELS)
        if task_name == "classify":
            ids = [1, *words, 2]
            made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": kind})
        elif task_name == "tag":
            # Of each word alone, so that a decoder can know it too.
            tags = [-100, *(word % len(LABELS) for word in words), -100]
            made.append({"input_ids": [1, *words, 2], "attention_mask": [1] * len(tags), "labels": tags})
        elif task_name == "seq2seq":
            made.append({"input_ids": [*words, 2], "labels": [10 + kind, 20 + kind, 30 + kind, 2]})
        else:
            answer = [10 + kind, 20 + kind, 30 + kind, 2]
            made.append({"input_ids": [1, *words, *answer], "labels": [-100] * (len(words) + 1) + answer})
    return made


TASK_OF = {"bert": "classify", "t5": "seq2seq", "bart": "seq2seq"}


@dataclass
class Run:
    """A finished run: the adapter folder and what was live when it was written."""

    folder: Path
    base_folder: Path
    base: base.Base
    model: Any
    task: tasks.Task
    rows: list[tasks.Features]
    seal: seal.Seal | None = field(default=None)


def run(
    out: Path,
    base_folder: Path,
    *,
    task: str = "complete",
    quant: str = "nf4",
    dtype: str = "float32",
    device: str = "cpu",
    steps: int = 20,
    lr: float = 5e-3,
    packing: bool = False,
    special_tokens: tuple[str, ...] = (),
    features: list[tasks.Features] | None = None,
    facts: dict[str, Any] | None = None,
    sealed: bool = True,
    **lora: Any,
) -> Run:
    """Returns a run of a few steps, written into `out` the way `lora_ft.runs` writes it."""
    settings = config.RunConfig(
        task=task,  # type: ignore[arg-type]
        base=str(base_folder),
        out=out,
        quant=quant,  # type: ignore[arg-type]
        lora=config.LoraConfig(**{"rank": 4, "alpha": 16.0, **lora}),
        data=config.DataConfig(special_tokens=special_tokens, packing=packing),
        train=config.TrainConfig(steps=steps, lr=lr, batch_size=6, dtype=dtype, warmup=0.0),  # type: ignore[arg-type]
    )
    if facts is None:
        facts = {"labels": list(LABELS)} if task in ("classify", "tag") else {}
    made = tasks.get(task, facts)
    loaded = base.load(
        str(base_folder),
        quant=settings.quant,
        model_class=made.model_class,
        dtype=dtype,
        device=device,
        config_changes=made.config_changes(),
    )
    made.tokenizer = loaded.tokenizer  # type: ignore[attr-defined]
    features = rows(task) if features is None else features
    if special_tokens:
        loaded.tokenizer.add_tokens(list(special_tokens), special_tokens=True)
        added = loaded.tokenizer.convert_tokens_to_ids(special_tokens[0])
        for row in features:
            row["input_ids"] = [row["input_ids"][0], added, *row["input_ids"][1:]]
            row["labels"] = [-100, added, *row["labels"][1:]]
    model = adapters.attach(
        loaded,
        settings.lora,
        peft_task=made.peft_task,
        special_tokens=special_tokens,
        batches=[{k: v for k, v in made.collate(features[:6]).items() if k != "labels"}] * 8,
    )
    train.fit(made, loaded, model, features, [], settings)
    write(out, loaded, model, made, settings)
    done = Run(out, base_folder, loaded, model, made, features)
    if sealed:
        done.seal = seal.make(made, loaded, model, features, out)
    return done


def write(out: Path, loaded: base.Base, model: Any, task: tasks.Task, settings: config.RunConfig) -> None:
    """Writes an adapter folder, all of it but the seal."""
    out.mkdir(parents=True, exist_ok=True)
    saved.save(model, out)
    loaded.tokenizer.save_pretrained(out)
    environment.write(out, environment.describe(loaded, task=task.facts()))
    (out / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
