"""What an adapter and a run are bound to: weights, configuration and tokenizer, each change of which is noticed."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from lora_ft import base, saved, seal, sources
from lora_ft.errors import AdapterError
from lora_ft.proof import environment
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    folder = tmp_path_factory.mktemp("environment")
    made = tiny.run(folder / "run", tiny.model_folder(folder / "base"), quant="none", steps=2)
    record = environment.read(made.folder)
    record["tokenizer_sha256"] = environment.tokenizer_sha256(base.load_tokenizer(made.folder))
    environment.write(made.folder, record)
    return made


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


CONFIG = {
    "rms_norm_eps": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}, "hidden_act": "gelu",
    "attention_bias": None, "attention_multiplier": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIG)
def test_another_configuration_of_the_same_weights_is_refused(run: tiny.Run, tmp_path: Path, key: str) -> None:
    other = shutil.copytree(run.base_folder, tmp_path / "base")
    saved.find_base(run.folder, environment.read(run.folder)["base"], str(other))
    change(other / "config.json", **{key: CONFIG[key]})
    assert sources.weights_digest(other) == sources.weights_digest(run.base_folder)
    with pytest.raises(
        AdapterError, match=r"but that of base \(a local folder\) is .*: with the same weights it comput"
    ):
        saved.load(run.folder, str(other), "cpu")
    assert sources.resolve(str(other)).record() != sources.resolve(str(run.base_folder)).record()


def test_the_same_weights_seen_elsewhere_with_another_configuration_are_not_taken(
    run: tiny.Run, tmp_path: Path
) -> None:
    other = shutil.copytree(run.base_folder, tmp_path / "base")
    change(other / "config.json", rms_norm_eps=0.5)
    sources.resolve(str(other)).record()
    assert sources.recall(environment.read(run.folder)["base"]).folder == run.base_folder.resolve()


def test_what_is_not_computed_with_makes_no_other_configuration(run: tiny.Run, tmp_path: Path) -> None:
    other = shutil.copytree(run.base_folder, tmp_path / "base")
    file = other / "config.json"
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items()))))
    change(file, transformers_version="4.0", _name_or_path="/home/me", dtype="bfloat16")
    saved.load(run.folder, str(other), "cpu")


def test_a_record_of_before_is_accepted_with_one_line(run: tiny.Run, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="lora_ft")
    folder = shutil.copytree(run.folder, tmp_path / "run")
    record = environment.read(folder)
    del record["base"]["config_sha256"], record["tokenizer_sha256"]
    environment.write(folder, record)
    saved.load(folder, str(run.base_folder), "cpu")
    assert caplog.text.count("is bound to the weights of its base only, as adapters once were") == 1
    record["base"]["config_sha256"] = 7
    environment.write(folder, record)
    with pytest.raises(AdapterError, match=r"base\.config_sha256 is 7, not a string"):
        saved.load(folder, str(run.base_folder), "cpu")


def test_the_configuration_of_a_base_converted_here_may_come_out_otherwise(run: tiny.Run, tmp_path, caplog) -> None:
    record = {**environment.read(run.folder)["base"], "config_sha256": "0" * 64}
    source = sources.resolve(str(run.base_folder))
    converted = sources.Source(**{**vars(source), "kind": "gguf", "origin": "x.gguf, dequantized to bfloat16"})
    saved._compare_configs(record, converted)
    assert "is not the one the adapter was made on: another transformers wrote it" in caplog.text
    with pytest.raises(AdapterError):
        saved._compare_configs(record, source)


RULES = {
    "normalizer": {"type": "Replace", "pattern": {"String": "w1"}, "content": "w2"},
    "pre_tokenizer": {"type": "Whitespace"},
    "decoder": {"type": "Fuse"},
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_of_a_tokenizer_is_noticed(run: tiny.Run, tmp_path: Path, rule: str, monkeypatch, caplog) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    before = environment.tokenizer_sha256(base.load_tokenizer(folder))
    change(folder / "tokenizer.json", **{rule: RULES[rule]})
    assert environment.tokenizer_sha256(base.load_tokenizer(folder)) != before
    with pytest.raises(AdapterError, match="its tokenizer or chat template is not the one the adapter was saved with"):
        saved.load(folder, str(run.base_folder), "cpu")
    assert not seal.verify(folder).passed
    # Another version may tell the same rules in other words.
    monkeypatch.setattr(environment, "versions", lambda: {"tokenizers": "99"})
    saved.load(folder, str(run.base_folder), "cpu")
    assert "told it in other words" in caplog.text


def test_how_a_batch_is_padded_and_cut_is_no_rule(run: tiny.Run) -> None:
    tokenizer = base.load_tokenizer(run.folder)
    before = environment.tokenizer_sha256(tokenizer)
    tokenizer(["w1", "w1 w2 w3"], padding="max_length", truncation=True, max_length=2)
    assert environment.tokenizer_sha256(tokenizer) == before


def test_a_tokenizer_written_in_python_is_told_by_what_it_does() -> None:
    class Written:
        bos_token = eos_token = chat_template = None

        def __init__(self, lower: bool) -> None:
            self.lower = lower

        def get_vocab(self):
            return {"a": 0, "A": 1}

        def __call__(self, text: str):
            return {"input_ids": [ord(c) for c in (text.lower() if self.lower else text)]}

    assert environment.tokenizer_sha256(Written(True)) != environment.tokenizer_sha256(Written(False))
