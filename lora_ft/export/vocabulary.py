"""A tokenizer in a GGUF file, where llama.cpp has the very same one.

llama.cpp knows ways of splitting a text into words by name and has each in its own code. So a tokenizer is written only
where its rules are, letter by letter, those of a name: another split makes other tokens of the same text, and the model
answers worse without a word.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import gguf

from lora_ft.data.template import RefusedError, Template
from lora_ft.data.tokens import adds_bos
from lora_ft.errors import UnsupportedModelError

log = logging.getLogger(__name__)

_ENDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# Expressions of tokenizer.json; whether merges are left out for words that are tokens -> llama.cpp's name.
SPLITS = {
    (_CONTRACTIONS + _ENDS % "", False): "qwen2",
    (_CONTRACTIONS + _ENDS % "{1,3}", True): "llama-bpe",
    (_CONTRACTIONS + _ENDS % "{1,3}", False): "smaug-bpe",
}


def check(name: str, tokenizer: Any, rows: int) -> None:
    """Raises UnsupportedModelError where llama.cpp has no tokenizer that makes the same tokens.

    Args:
        name: of the model, for the message.
        rows: of its embeddings.
    """
    problems = _problems(tokenizer, rows)
    if problems:
        raise UnsupportedModelError(
            f"{name}: its tokenizer cannot be written as GGUF, for llama.cpp would make other tokens: "
            f"{'; '.join(problems)}. Serve the merged folder with transformers or vLLM instead."
        )


def add(writer: gguf.GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Writes the tokenizer and its chat template, of which `check` found nothing wrong."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in rules["added_tokens"]}
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    kinds = [_kind(index, words, added) for index in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(rules))
    # Embeddings may have more rows than there are tokens.
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([_merge(merge) for merge in rules["model"]["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(_adds_eos(tokenizer))
    if not isinstance(tokenizer.chat_template, str):
        return
    writer.add_chat_template(tokenizer.chat_template)
    try:
        writer.add_eot_token_id(Template(tokenizer, tokenizer.chat_template).end_id)
    except RefusedError as why:
        log.info("the end of a turn is left for llama.cpp to find: %s", why)


def _problems(tokenizer: Any, rows: int) -> list[str]:
    """Returns in what the rules of a tokenizer differ from any of llama.cpp's."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return ["it is written in Python"]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece's" if model.get("byte_fallback") else model["type"]
        return [f"it is {kind}, not a byte-level BPE"]
    problems = []
    if _split_name(rules) is None:
        problems.append(f"it splits texts in a way that has no name there: {json.dumps(rules['pre_tokenizer'])[:300]}")
    normalizer = rules["normalizer"]
    if normalizer is not None and normalizer != {"type": "NFC"}:
        problems.append(f"it changes texts first, by {normalizer['type']}")
    elif normalizer is not None:
        log.warning(
            "the tokenizer composes letters and accents first (NFC), and llama.cpp does not: compose them before asking"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        problems.append("it marks parts of words, or drops merges")
    stripping = [token["content"] for token in rules["added_tokens"] if token["lstrip"] or token["rstrip"]]
    if stripping:
        problems.append(f"the token {stripping[0]} swallows spaces")
    alone = [token["content"] for token in rules["added_tokens"] if token["single_word"]]
    if alone:
        problems.append(f"the token {alone[0]} is none within a word, and llama.cpp finds it there too")
    if len(tokenizer) > rows:
        problems.append(f"it has {len(tokenizer):,} tokens, and the model rows for {rows:,}")
    return problems


def _split_name(rules: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name of how the rules split a text into words, None where it has none."""
    steps = rules["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    # Neither changes what tokens a text becomes.
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    by_words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if steps == [by_words]:
        return "gpt-2" if not rules["model"].get("ignore_merges") else None
    if steps == [{"type": "Digits", "individual_digits": True}, by_words]:
        return "smollm" if not rules["model"].get("ignore_merges") else None
    if len(steps) != 2 or steps[1] != {**by_words, "use_regex": False}:
        return None
    first = steps[0]
    pattern = str((first.get("pattern") or {}).get("Regex"))
    if first.get("type") != "Split" or first.get("behavior") != "Isolated" or first.get("invert"):
        return None
    return SPLITS.get((pattern, bool(rules["model"].get("ignore_merges"))))


def _kind(index: int, words: dict[int, str], added: dict[int, dict[str, Any]]) -> gguf.TokenType:
    if index not in words:
        return gguf.TokenType.UNUSED
    if index not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _adds_eos(tokenizer: Any) -> bool:
    with_special, without = (
        tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False)
    )
    eos = tokenizer.eos_token_id
    return eos is not None and with_special[-1:] == [eos] != without[-1:]
