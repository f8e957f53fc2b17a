"""Tokenizers whose steps stretch a text are refused before any text is given to them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers

from lora_ft import base as bases
from lora_ft.errors import SourceError
from lora_ft.foreign import growth
from tests import tiny
from tests.reliability.cases import change


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


TABLE = base64.b64encode((0).to_bytes(4, "little") + b"ab\0" + b"x" * 5000 + b"\0").decode()
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("part", "step", "told"),
    [
        ("normalizer", sequence(*[replace("w" * 1000, String="w")] * 3), "turns a character into 1,000,000,000"),
        ("normalizer", sequence(sequence(replace("w" * 20, String="w")), replace("w" * 20, String="w")), "into 400"),
        ("normalizer", replace("w" * 200, Regex="[a-z]"), "into 200"),
        ("normalizer", replace("w" * 200, Regex="x*"), "into 201"),
        ("normalizer", {"type": "Prepend", "prepend": "w" * 1000}, "adds more than 256"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": TABLE}, "a table that turns a character"),
        ("decoder", {"type": "Sequence", "decoders": [replace("w" * 1000, String="w")]}, "decoder turns a character"),
        ("post_processor", {**TEMPLATE, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 9999}, "adds more than"),
    ],
)
def test_a_step_that_stretches_a_text_is_refused(tmp_path: Path, part: str, step: dict[str, Any], told: str) -> None:
    folder = tiny.model_folder(tmp_path / "base")
    change(folder / "tokenizer.json", **{part: step})
    with pytest.raises(SourceError, match=told):
        bases.load_tokenizer(folder)


@pytest.mark.parametrize(
    "made",
    [
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
        normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")] * 12),
        normalizers.BertNormalizer(),
        normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD()]),
    ],
)
def test_steps_of_tokenizers_in_use_pass(made: Any) -> None:
    assert not list(growth.problems({"normalizer": json.loads(made.__getstate__())}))


def test_what_transformers_makes_of_other_files_is_looked_at_too(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny.model_folder(tmp_path / "base")
    change(folder / "tokenizer.json", normalizer=replace("w" * 1000, String="w"))
    monkeypatch.setattr(growth, "check", lambda *_: None)
    with pytest.raises(SourceError, match="the tokenizer's normalizer turns a character into 1,000"):
        bases.load_tokenizer(folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"normalizer": 5, "normalizer": null}', '{"a": NaN}'])
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    folder = tiny.model_folder(tmp_path / "base")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(SourceError, match=r"tokenizer\.json: "):
        bases.load_tokenizer(folder)
