"""A random model two layers deep in the place of a base, of the same architecture, made without fetching anything.

Where the files of the base are on this machine, its configuration is made small and its tokenizer is taken. Elsewhere
a usual architecture for the task stands in, with a byte-level tokenizer learned from the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from lora_ft import base as bases
from lora_ft import sources
from lora_ft.config import RunConfig
from lora_ft.data.examples import Example
from lora_ft.sources import Source
from lora_ft.system import atomicio
from lora_ft.tasks import Task

LAYERS, HEADS = 2, 2
# Of the weights. As narrow as pre-trained models begin, such a model says nearly the same of every row.
SPREAD = 0.1
SEED = 0
HEAD_DIM = 32
VOCABULARY = 600
POSITIONS = 8192

LAYER_COUNTS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
HEAD_COUNTS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
WIDTHS = ("hidden_size", "word_embed_proj_dim")
INNER_WIDTHS = (
    "intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
)  # fmt: skip
EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
MOST_EXPERTS = 16

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of a stand-in: its special tokens by what they are for, and how a text is put between them.
TURN = "<|im_start|>"
SPECIALS = {
    "llama": {"pad": "<pad>", "eos": "<|im_end|>"},
    "t5": {"pad": "<pad>", "eos": "</s>"},
    "bert": {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]"},
}
BETWEEN = {"t5": ("$A </s>", None), "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")}
STAND_INS = {AutoModelForCausalLM: "llama", AutoModelForSeq2SeqLM: "t5"}
OTHER_STAND_IN = "bert"


@dataclass(frozen=True)
class Miniature:
    """What was made."""

    kind: str
    """The architecture, as `model_type` names it."""
    weights: int
    of_files: bool
    """Whether it was made of the base's own files."""

    def __str__(self) -> str:
        how = "its configuration made small, its tokenizer" if self.of_files else (
            "a stand-in, for its files are not on this machine, with a tokenizer learned from the rows"
        )  # fmt: skip
        return f"a random {self.kind} of {LAYERS} layers and {self.weights:,} weights: {how}"


def make(folder: Path, config: RunConfig, task: Task, examples: Sequence[Example]) -> Miniature:
    """Returns what was made in `folder`, a base as any other, in float32.

    Args:
        examples: rows whose text the tokenizer of a stand-in is learned from.

    Raises:
        UnsupportedModelError: the base does not suit the task, or its architecture cannot be made this small.
    """
    files = sources.at_hand(config.base, config.revision) if config.base else None
    if files is not None:
        settings = bases.text_config(Source(config.base, "folder", files), task.model_class)
        _shrink(settings)
        tokenizer: Any = bases.load_tokenizer(files)
    else:
        kind = STAND_INS.get(task.model_class, OTHER_STAND_IN)
        tokenizer = _tokenizer(kind, examples)
        tokenizer.add_tokens(list(config.lora.train_tokens))
        settings = _stand_in(kind, tokenizer)
    maker = _maker(settings)
    bases.skeleton(config.base or settings.model_type, settings, maker)
    set_seed(SEED)
    disable_progress_bar()
    model = maker.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, SPREAD)
    with atomicio.cached(folder) as fresh:
        fresh.library(model.save_pretrained)
        fresh.library(tokenizer.save_pretrained)
    return Miniature(settings.model_type, model.num_parameters(), files is not None)


def _maker(settings: PreTrainedConfig) -> Any:
    """Returns the class that such models are published as: with the head they were trained with, if they generate."""
    if settings.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    generates = type(settings) in AutoModelForCausalLM._model_mapping
    return (
        AutoModelForCausalLM if generates and type(settings) not in AutoModelForMaskedLM._model_mapping else AutoModel
    )


def _shrink(settings: Any) -> None:
    """Makes a configuration that of a small model; what depends on the width of a head stays as it is."""
    before = settings.num_hidden_layers
    head = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    grouped = getattr(settings, "num_key_value_heads", None) not in (None, settings.num_attention_heads)
    sizes = dict.fromkeys(LAYER_COUNTS, LAYERS) | dict.fromkeys(HEAD_COUNTS, HEADS)
    sizes |= dict.fromkeys(WIDTHS, HEADS * head) | dict.fromkeys(INNER_WIDTHS, 2 * HEADS * head)
    sizes |= dict.fromkeys(EXPERT_WIDTHS, head)
    sizes |= {name: min(getattr(settings, name, None) or 0, MOST_EXPERTS) for name in EXPERT_COUNTS}
    sizes["num_key_value_heads"] = 1 if grouped else HEADS
    for name, value in list(vars(settings).items()):
        if isinstance(value, list | tuple) and len(value) == before:
            # One for each layer; of layers of several kinds, one of each.
            kinds = list(dict.fromkeys(value))
            setattr(settings, name, kinds[:LAYERS] if len(kinds) >= LAYERS else list(value[:LAYERS]))
    for name, size in sizes.items():
        if isinstance(getattr(settings, name, None), int):
            setattr(settings, name, size)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config


def _stand_in(kind: str, tokenizer: Any) -> Any:
    settings = AutoConfig.for_model(kind)
    _shrink(settings)
    settings.hidden_size = HEADS * HEAD_DIM
    settings.vocab_size = len(tokenizer)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(settings, name, getattr(tokenizer, name))
    if kind == "t5":
        settings.d_kv, settings.d_ff, settings.decoder_start_token_id = HEAD_DIM, 4 * HEAD_DIM, tokenizer.pad_token_id
    else:
        settings.intermediate_size, settings.max_position_embeddings = 4 * HEAD_DIM, POSITIONS
    if kind == "llama":
        settings.head_dim, settings.tie_word_embeddings = HEAD_DIM, True
    return settings


def _tokenizer(kind: str, examples: Sequence[Example]) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer that has merged what is frequent in the rows."""
    specials = SPECIALS[kind]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(specials.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator((text for example in examples for text in _texts(dataclasses.astuple(example))), trainer)
    if kind in BETWEEN:
        single, pair = BETWEEN[kind]
        named = [(token, inner.token_to_id(token)) for token in specials.values()]
        inner.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=named)
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_input_names=inputs, **{f"{what}_token": token for what, token in specials.items()}
    )
    if kind == "llama":
        made.add_tokens([TURN], special_tokens=True)
        made.chat_template = CHATML
    return made


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in what a row is made of."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _texts(part)
