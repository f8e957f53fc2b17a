"""GGUF files of others: what the head says is held to what the file has, and every weight comes from the file."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_ft import sources
from lora_ft.errors import LoraFtError
from lora_ft.foreign import gguf
from tests.reliability import hostile_gguf
from tests.reliability.cases import Good
from tests.reliability.hostile_gguf import SHAPES, TOKENS, gguf_bombs, gguf_heads, without, write_gguf

NOWHERE = Good(Path(), Path(), Path())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_sound_file_is_read_with_its_words(tmp_path: Path) -> None:
    source = sources.resolve(str(write_gguf(tmp_path / "a.gguf")))
    held = load_file(source.folder / "model.safetensors")
    assert {tuple(tensor.shape) for tensor in held.values()} == set(SHAPES.values())
    _, tokenizer = gguf.load(tmp_path / "a.gguf")
    assert tokenizer.convert_ids_to_tokens(range(len(TOKENS))) == TOKENS


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"token_embd.weight"}))
def test_a_weight_that_is_not_there_is_never_made_up(tmp_path: Path, name: str) -> None:
    file = write_gguf(tmp_path / "a.gguf", shapes=without(name))
    with pytest.raises(LoraFtError, match=r"a\.gguf: it holds no tensor for .*(layers\.0|norm)"):
        sources.resolve(str(file))


@pytest.mark.parametrize("seed", range(2))
def test_what_a_file_does_not_hold_is_refused_with_the_reason_at_once(tmp_path: Path, home: Path, seed: int) -> None:
    """Hardly any time, and no model as large as the head says."""
    for what, phrase, make in (
        *gguf_bombs(NOWHERE, random.Random(seed), 0),
        *gguf_heads(NOWHERE, random.Random(seed), 0),
    ):
        make(tmp_path)
        began = time.process_time()
        with pytest.raises(LoraFtError, match=phrase):
            sources.resolve(str(tmp_path / "evil.gguf"))
        assert time.process_time() - began < 1.5, what
    assert not list((home / "gguf").glob("*"))


def test_files_beside_it_are_none_of_it(tmp_path: Path) -> None:
    """Without a vocabulary in the file, transformers would take the tokenizer of the folder."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"tokenizer_class": 5, "auto_map": {"AutoTokenizer": [null, "evil.T"]}}')
    _, tokenizer = gguf.load(write_gguf(tmp_path / "a.gguf"))
    assert tokenizer.convert_ids_to_tokens(range(len(TOKENS))) == TOKENS


def test_the_kinds_of_tensors_are_those_of_the_library() -> None:
    from gguf import GGML_QUANT_SIZES

    assert {int(kind): size for kind, size in GGML_QUANT_SIZES.items()} == gguf.BLOCKS


def test_the_harness_writes_what_the_names_say(tmp_path: Path) -> None:
    """A hostile file differs from the sound one, and each is made."""
    sound = write_gguf(tmp_path / "sound.gguf").read_bytes()
    for what, _, make in gguf_bombs(NOWHERE, random.Random(0), 0):
        make(tmp_path)
        assert (tmp_path / "evil.gguf").read_bytes() != sound, what
    assert hostile_gguf.SETTINGS["vocab_size"] == len(TOKENS)
