"""A small byte-level tokenizer with a chat template, as programs other than ours have it, for the tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB = 320
SPECIALS = ("<|pad|>", "<|start|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|start|>system\nBe brief.<|end|>\n' }}"
    "{% endif %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TEXTS = ("The quick brown fox jumps over 12 lazy dogs, doesn't it?\n\n", "Ask me 3 things: what, when and where?  ")
BY_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": BY_WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BY_WORDS]),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
"""By llama.cpp's name of it, how a text is split into words."""


def tokenizer(split: str = "smollm") -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer of 320 tokens that splits words as llama.cpp's `split` does."""
    inner = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    inner.pre_tokenizer, inner.decoder = SPLITS[split], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 4, trainer)
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", bos_token="<|start|>", eos_token="<|end|>"
    )
    made.chat_template = TEMPLATE
    return made


def put(folder: Path, split: str = "smollm") -> Path:
    """Returns a model's folder, the tokenizer written over its own."""
    tokenizer(split).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def with_bos() -> processors.TemplateProcessing:
    """Returns what puts the BOS before every text."""
    return processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
