"""How sentence-transformers makes a vector of a text: read of a base, written beside an adapter or a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_ft.errors import SourceError, UnsupportedModelError
from lora_ft.foreign.files import object_of, text_of
from lora_ft.foreign.strictjson import JsonError, loads, shown

# As sentence-transformers calls them: the mean of the tokens' states; the state of the first token, or the last; the
# mean in which a token counts by its place.
POOLINGS = ("mean", "cls", "lasttoken", "weightedmean")
MODULES, READING, POOLING = FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
# How its earlier versions write them, which later ones read too.
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
MAX_BYTES = 1 << 16


def pooling_of(folder: Path, reads_both_ways: bool) -> str:
    """Returns how a base was made to pool; where it does not say, what suits its kind.

    That is the mean of an encoder (Reimers and Gurevych 2019, arXiv 1908.10084, table 6), and of a decoder, whose later
    tokens have seen more, the mean by place (Muennighoff 2022, arXiv 2202.08904, section 3.1).

    Raises:
        UnsupportedModelError: it makes its vectors in another way than by pooling alone.
        SourceError: a file that says so cannot be read.
    """
    if (folder / MODULES).is_file():
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in _modules(folder / MODULES)]
        if other := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
            raise UnsupportedModelError(
                f"{folder.name}: {MODULES} names {shown(other[0])} among what makes a vector; choose a base that "
                "pools the states of tokens and does no more with them."
            )
    if not (folder / POOLING).is_file():
        return "mean" if reads_both_ways else "weightedmean"
    told = object_of(folder / POOLING, SourceError)
    named = told.get("pooling_mode", [mode for mode, flag in FLAGS.items() if told.get(flag) is True] or "mean")
    modes = [named] if isinstance(named, str) else named
    if len(modes) == 1 and modes[0] in POOLINGS:
        return str(modes[0])
    raise UnsupportedModelError(
        f"{folder.name}: {POOLING} pools by {', '.join(map(str, modes))}; {', '.join(POOLINGS)} can be trained."
    )


def files(pooling: str, width: int, max_length: int) -> dict[str, Any]:
    """Returns the files by which sentence-transformers makes the vectors of a task, by name, as JSON."""
    package = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    return {
        MODULES: [
            {"idx": i, "name": str(i), "path": path, "type": f"{package}.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        READING: {"max_seq_length": max_length, "do_lower_case": False},
        POOLING: {"word_embedding_dimension": width} | {flag: mode == pooling for mode, flag in FLAGS.items()},
    }


def _modules(file: Path) -> list[dict[str, Any]]:
    try:
        found = loads(text_of(file, MAX_BYTES, SourceError))
    except JsonError as why:
        raise SourceError(f"{file}: cannot be read: {why}.") from None
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise SourceError(f"{file}: it is no list of modules, as sentence-transformers writes it.")
    return found
