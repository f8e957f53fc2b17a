"""Merging: what is written equals PEFT's own merge, and what training computed with, for every kind of change."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file

from lora_ft import adapters, base, config, merge, saved, seal, tasks
from lora_ft.errors import AdapterError, ProofError, SourceError, UnsupportedModelError
from lora_ft.model import modes
from lora_ft.model.weights import Weights
from lora_ft.proof import replies
from tests import tiny


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("llama", "llama-untied", "gpt2", "bert", "t5", "gpt-neox")
    return {name: tiny.model_folder(tmp_path_factory.mktemp("bases") / name, name) for name in names}


@pytest.fixture(scope="module")
def quantized(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    return tiny.run(tmp_path_factory.mktemp("runs") / "adapter", bases["llama"], quant="nf4")


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 2.0}}),
        ("llama", {"dora": True}),
        ("llama", {"save_modules": ("lm_head",)}),
        ("llama", {"save_modules": ("embed_tokens",)}),
        ("llama", {"train_tokens": ("w5", "w7")}),
        ("llama", {"special_tokens": ("<|call|>", "<|back|>")}),
        ("llama-untied", {"targets": ("q_proj", "embed_tokens", "lm_head")}),
        ("llama-untied", {"special_tokens": ("<|call|>",)}),
        ("gpt2", {"dora": True}),
        ("gpt-neox", {}),
        ("bert", {"task": "classify"}),
        ("gpt2", {"task": "classify"}),
        ("t5", {"task": "seq2seq"}),
        ("bert", {"task": "tag"}),
        ("llama", {"task": "tag"}),
    ],
    ids=str,
)
def test_equals_the_merge_of_peft(
    bases: dict[str, Path], tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    run = tiny.run(tmp_path / "adapter", bases[architecture], quant="none", **options)
    report = merge.merge(run.folder, tmp_path / "merged")
    assert report["passes"]
    assert report["delta_survival"]["min"] == pytest.approx(1, abs=1e-4)
    verdict = seal.verify(run.folder, model_folder=tmp_path / "merged")
    assert verdict.passed, verdict.checks
    merged, wanted = seal.load_merged(run.task, tmp_path / "merged", "cpu")[0], run.model.merge_and_unload()
    assert type(merged) is type(wanted)
    found, expected = merged.state_dict(), wanted.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", ("q_proj", "lm_head")), ("llama", ("q_proj", "embed_tokens")), ("gpt2", ("c_attn", "wte"))],
)
def test_low_rank_change_of_one_of_two_tied_weights(
    bases: dict[str, Path], tmp_path: Path, architecture: str, targets: tuple[str, ...]
) -> None:
    """PEFT merges such a change into both; what was trained is a change of one."""
    run = tiny.run(tmp_path / "adapter", bases[architecture], quant="none", targets=targets)
    merge.merge(run.folder, tmp_path / "merged")
    verdict = seal.verify(run.folder, model_folder=tmp_path / "merged")
    assert verdict.passed, verdict.checks
    merged = seal.load_merged(run.task, tmp_path / "merged", "cpu")[0]
    torch.testing.assert_close(_logits(run, merged), _logits(run, run.model), atol=1e-4, rtol=1e-4)


def test_equals_the_merge_of_peft_with_a_bias_on_b(bases: dict[str, Path], tmp_path: Path) -> None:
    loaded = base.load(str(bases["gpt2"]), quant="none", dtype="float32", device="cpu")
    model = peft.get_peft_model(
        loaded.model,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["c_attn"], lora_bias=True, init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    )
    for parameter in adapters.trained(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    run = _sealed(tmp_path / "adapter", bases["gpt2"], loaded, model, "none")
    merge.merge(run.folder, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    for kind in ("weight", "bias"):
        name = f"transformer.h.1.attn.c_attn.{kind}"
        torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dequantized_weights_are_bit_for_bit_those_of_training(
    bases: dict[str, Path], architecture: str, quant: str, dtype: str
) -> None:
    loaded = base.load(str(bases[architecture]), quant=quant, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    with torch.device("meta"):
        skeleton = type(loaded.model)(type(loaded.model.config).from_pretrained(bases[architecture]))
    weights = Weights(bases[architecture], skeleton, quant, loaded.dtype, set(loaded.left_whole))
    layers = {n: m for n, m in loaded.model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert layers.keys() == weights.quantized
    with weights.opened() as reader:
        for name, module in layers.items():
            if quant == "int8":
                module.init_8bit_state()
            live = dequantize_module_weight(module)
            live = live.T if name in weights.transposed else live
            assert torch.equal(reader.dequantized(f"{name}.weight"), live)
        for name, parameter in loaded.model.named_parameters():
            if name.rpartition(".")[0] not in layers and name in weights.stored_name:
                assert torch.equal(reader.dequantized(name), parameter)


def test_every_quantized_layer_is_dequantized_not_only_adapted_ones(bases: dict[str, Path], tmp_path: Path) -> None:
    run = tiny.run(tmp_path / "adapter", bases["llama"], quant="nf4", targets=("q_proj",))
    merge.merge(run.folder, tmp_path / "merged", onto="dequantized")
    found = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    live = run.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    assert torch.equal(found, dequantize_module_weight(live))


def test_report_says_what_was_measured(quantized: tiny.Run, tmp_path: Path) -> None:
    report = merge.merge(quantized.folder, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / merge.REPORT).read_text()) == report
    assert report["onto"] == "dequantized"
    assert report["candidates"]["dequantized"]["kl"] < report["candidates"]["original"]["kl"]
    assert report["dtype"] == "float32"
    assert report["threshold"] == pytest.approx(0.1 * report["kl_effect"])
    assert report["base"]["weights_sha256"] == quantized.seal.record["base_sha256"]  # type: ignore[union-attr]


def test_tokenizer_template_and_settings_come_along(quantized: tiny.Run, tmp_path: Path) -> None:
    merge.merge(quantized.folder, tmp_path / "merged", dtype="bfloat16")
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["dtype"] == "bfloat16"
    assert settings["architectures"] == ["LlamaForCausalLM"]
    tokenizer = base.load_tokenizer(tmp_path / "merged")
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert (tmp_path / "merged" / "generation_config.json").is_file()
    assert not list(tmp_path.glob(".merge-*"))


def test_tied_embeddings_are_written_once(quantized: tiny.Run, tmp_path: Path) -> None:
    merge.merge(quantized.folder, tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_change_to_one_of_two_tied_weights_unties_them(bases: dict[str, Path], tmp_path: Path) -> None:
    run = tiny.run(tmp_path / "adapter", bases["llama"], quant="none", save_modules=("lm_head",))
    merge.merge(run.folder, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_untying_a_t5_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    run = tiny.run(tmp_path / "adapter", bases["t5"], task="seq2seq", quant="none", targets=("q", "lm_head"))
    with pytest.raises(AdapterError, match="tied"):
        merge.merge(run.folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_t5_with_a_head_of_its_own_keeps_it(bases: dict[str, Path], tmp_path: Path) -> None:
    """Its configuration calls the head tied whatever the files hold."""
    folder = Path(shutil.copytree(bases["t5"], tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"]) * 0.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = tiny.run(tmp_path / "adapter", folder, task="seq2seq", quant="nf4")
    merge.merge(run.folder, tmp_path / "merged")
    verdict = seal.verify(run.folder, model_folder=tmp_path / "merged")
    assert verdict.passed, verdict.checks
    merged = seal.load_merged(run.task, tmp_path / "merged", "cpu")[0]
    torch.testing.assert_close(_logits(run, merged), _logits(run, run.model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("targets", "named"), [(("all-linear",), "MixtralTopKRouter"), (("q_proj",), "joins into .*experts")]
)
def test_experts_that_transformers_joins_are_refused(tmp_path: Path, targets: tuple[str, ...], named: str) -> None:
    folder = tiny.model_folder(tmp_path / "base", "mixtral")
    run = tiny.run(tmp_path / "adapter", folder, quant="nf4", targets=targets)
    with pytest.raises(UnsupportedModelError, match=named):
        merge.merge(run.folder, tmp_path / "merged")


def test_shards_keep_their_names_and_give_the_same_model(quantized: tiny.Run, tmp_path: Path) -> None:
    sharded = Path(shutil.copytree(quantized.base_folder, tmp_path / "base"))
    tiny.split(sharded, 3)
    merge.merge(quantized.folder, tmp_path / "one")
    merge.merge(quantized.folder, tmp_path / "three", base_name=str(sharded))
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "three").glob("*.safetensors"))
    assert files == sorted(p.name for p in sharded.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))
    pieces = {k: t for name in files for k, t in load_file(tmp_path / "three" / name).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in pieces.values())
    assert pieces.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(pieces[k], whole[k]) for k in whole)
    assert seal.verify(quantized.folder, model_folder=tmp_path / "three").passed


def _without_prefix(name: str) -> str:
    return name.removeprefix("transformer.")


def _old_names(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _with_prefix(name: str) -> str:
    return f"bert.{name}"


def _embed_out(name: str) -> str:
    return name.replace("lm_head.", "embed_out.")


@pytest.mark.parametrize(
    ("architecture", "task", "rename", "written"),
    [
        ("gpt2", "complete", _without_prefix, "transformer.h.0.attn.c_attn.weight"),
        ("bert", "classify", _with_prefix, "bert.encoder.layer.0.output.dense.weight"),
        ("bert", "classify", _old_names, "bert.encoder.layer.0.output.LayerNorm.weight"),
        # Pythia's own name for its head, which other programs expect; transformers renames it as it loads.
        ("gpt-neox", "complete", _embed_out, "embed_out.weight"),
    ],
)
def test_names_in_the_files_may_differ_from_those_of_the_model(
    bases: dict[str, Path], tmp_path: Path, architecture: str, task: str, rename: Any, written: str
) -> None:
    folder = Path(shutil.copytree(bases[architecture], tmp_path / "base"))
    tensors = {rename(name): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = tiny.run(tmp_path / "adapter", folder, task=task, quant="nf4")
    merge.merge(run.folder, tmp_path / "merged")
    assert written in load_file(tmp_path / "merged" / "model.safetensors")
    verdict = seal.verify(run.folder, model_folder=tmp_path / "merged")
    assert verdict.passed, verdict.checks


def test_a_tied_head_that_is_stored_too_stays_tied(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = tiny.run(tmp_path / "adapter", folder, quant="nf4")
    merge.merge(run.folder, tmp_path / "merged")
    assert seal.verify(run.folder, model_folder=tmp_path / "merged").passed
    held = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert len(held & {"lm_head.weight", "model.embed_tokens.weight"}) == 1


def test_weights_of_another_head_are_named_in_the_report(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["bert"], tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "cls.predictions.bias": torch.zeros(4)}, folder / "model.safetensors")
    run = tiny.run(tmp_path / "adapter", folder, task="classify", quant="none")
    report = merge.merge(run.folder, tmp_path / "merged")
    assert any("cls.predictions.bias" in note for note in report["notes"])


@pytest.mark.parametrize(("architecture", "quant"), [("llama", "nf4"), ("gpt2", "nf4"), ("gpt2", "int8")])
def test_a_base_stored_quantized(bases: dict[str, Path], tmp_path: Path, architecture: str, quant: str) -> None:
    stored = base.load(str(bases[architecture]), quant=quant, dtype="float32", device="cpu")  # type: ignore[arg-type]
    stored.model.save_pretrained(tmp_path / "base")
    stored.tokenizer.save_pretrained(tmp_path / "base")
    run = tiny.run(tmp_path / "adapter", tmp_path / "base", quant=quant)
    with pytest.raises(AdapterError, match="no original weights"):
        merge.merge(run.folder, tmp_path / "merged", onto="original")
    report = merge.merge(run.folder, tmp_path / "merged")
    assert report["onto"] == "dequantized"
    assert report["dtype"] == "float32"
    assert seal.verify(run.folder, model_folder=tmp_path / "merged").passed


def test_a_delta_that_rounding_swallows_is_noticed(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "base", dtype="bfloat16")
    run = tiny.run(tmp_path / "adapter", folder, quant="none", dtype="float32", steps=4, lr=2e-5)
    with pytest.raises(ProofError, match="Rounding to bfloat16 loses part of the adapter: try --dtype"):
        merge.merge(run.folder, tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / merge.REPORT).read_text())
    assert report["dtype"] == "bfloat16"
    assert report["passes"] is False
    assert report["delta_survival"]["median"] < 0.5
    assert report["delta_survival"]["worst"].endswith(".weight")
    better = merge.merge(run.folder, tmp_path / "float32", dtype="float32")
    assert better["passes"]
    assert better["delta_survival"]["min"] > 0.99


def test_rounding_is_blamed_only_where_it_is_to_blame(
    quantized: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "drift", lambda *_: 0.399)
    for onto, told in (
        ("original", "the original weights are not the quantized ones that training saw. Try --onto auto"),
        ("dequantized", "all weights are rounded to float16: try --dtype float32. Try --onto auto"),
    ):
        with pytest.raises(ProofError, match=told) as caught:
            merge.merge(quantized.folder, tmp_path / onto, onto=onto, dtype="float16")  # type: ignore[arg-type]
        assert "loses part of the adapter" not in str(caught.value)
        report = json.loads((tmp_path / onto / merge.REPORT).read_text())
        assert report["delta_survival"]["min"] > merge.ENOUGH_SURVIVES


def test_float16_that_overflows_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = tiny.run(tmp_path / "adapter", folder, quant="none")
    with pytest.raises(AdapterError, match="bfloat16"):
        merge.merge(run.folder, tmp_path / "merged", dtype="float16")


def test_an_out_that_is_not_empty_is_refused(quantized: tiny.Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="not an empty folder"):
        merge.merge(quantized.folder, tmp_path)
    (tmp_path / "empty").mkdir()
    assert merge.merge(quantized.folder, tmp_path / "empty")["passes"]


def test_nothing_of_the_adapter_is_dropped(quantized: tiny.Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized.folder, tmp_path / "adapter"))
    tensors = load_file(folder / saved.WEIGHTS)
    moved = {k.replace("layers.1.", "layers.7."): t for k, t in tensors.items()}
    save_file(moved, folder / saved.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"layers\.1.*is missing"):
        merge.merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_that_lacks_an_adapted_weight_is_refused(
    quantized: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(quantized.base_folder, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    short = saved.sources.resolve(str(folder))
    monkeypatch.setattr(saved, "find_base", lambda folder, record, base_name=None: short)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj"):
        merge.merge(quantized.folder, tmp_path / "merged")


def test_another_base_is_refused(quantized: tiny.Run, tmp_path: Path) -> None:
    other = tiny.model_folder(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="its own base"):
        merge.merge(quantized.folder, tmp_path / "merged", base_name=str(other))


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation_internal", "experts_implementation"])
def test_a_base_cannot_name_kernels_to_fetch(
    quantized: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Its settings are not part of the digest of its weights, so they may have changed since the training."""
    # The folder is not to be remembered as the one with these weights.
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "home"))
    fetch = lambda *_, **__: pytest.fail("a kernel was asked for")  # noqa: E731
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", fetch)
    folder = Path(shutil.copytree(quantized.base_folder, tmp_path / "base"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, field: "evil/kernel"}))
    with pytest.raises(SourceError, match='names code to fetch, "evil/kernel"'):
        merge.merge(quantized.folder, tmp_path / "merged", base_name=str(folder))
    (folder / "config.json").write_text(json.dumps({**settings, field: "flash_attention_2"}))
    merge.merge(quantized.folder, tmp_path / "merged", base_name=str(folder))
    assert "flash" not in (tmp_path / "merged" / "config.json").read_text()


def test_code_in_a_base_is_refused(quantized: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "home"))
    folder = Path(shutil.copytree(quantized.base_folder, tmp_path / "base"))
    settings = json.loads((folder / "config.json").read_text())
    hostile = {**settings, "model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.C"}}
    (folder / "config.json").write_text(json.dumps(hostile))
    with pytest.raises(AdapterError, match=r"belongs to .* with config\.json"):
        merge.merge(quantized.folder, tmp_path / "merged", base_name=str(folder))


def test_only_the_chosen_weights_must_pass(
    quantized: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([float("nan"), 1e-9, float("nan"), 1e9])
    monkeypatch.setattr(seal, "drift", lambda *_: next(found))
    report = merge.merge(quantized.folder, tmp_path / "one")
    assert report["onto"] == "original"
    assert report["candidates"]["dequantized"] == {"kl": None, "passes": False}
    with pytest.raises(ProofError, match="1e\\+09 nats"):
        merge.merge(quantized.folder, tmp_path / "two")


@pytest.mark.parametrize("file", ["environment.json", "adapter_config.json"])
def test_a_damaged_adapter_says_where(quantized: tiny.Run, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(quantized.folder, tmp_path / "adapter"))
    (folder / file).write_text("{}")
    with pytest.raises(AdapterError, match=rf"{file}: .* is missing"):
        merge.merge(folder, tmp_path / "merged")


def test_rows_of_tokens_that_nothing_trained_are_the_same_everywhere(tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the base has rows for; those rows are no one's, and weigh in all logits."""
    folder = tiny.model_folder(tmp_path / "base", vocab_size=tiny.VOCAB - 3, seed=2)
    rows = [r for r in tiny.rows("complete", 40) if max(r["input_ids"]) < tiny.VOCAB - 3][:12]
    run = tiny.run(tmp_path / "adapter", folder, quant="none", special_tokens=("<|call|>",), features=rows)
    assert seal.verify(run.folder).passed
    merge.merge(run.folder, tmp_path / "merged")
    assert seal.verify(run.folder, model_folder=tmp_path / "merged").passed
    merged = seal.load_merged(run.task, tmp_path / "merged", "cpu")[0]
    assert merged.config.vocab_size == len(run.base.tokenizer) == tiny.VOCAB + 1
    torch.testing.assert_close(_logits(run, merged), _logits(run, run.model), atol=1e-4, rtol=1e-4)


MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(2)
from lora_ft import merge

def anonymous_bytes():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

before, peak, running = anonymous_bytes(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.01)
thread = threading.Thread(target=watch)
thread.start()
merge.merge(Path(sys.argv[1]), Path(sys.argv[2]), onto=sys.argv[3])
running = False
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_one_shard_and_not_of_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 32, "num_attention_heads": 4}
    folder = tiny.model_folder(
        tmp_path / "base", dtype="bfloat16", num_key_value_heads=4, initializer_range=0.03, **sizes
    )
    tiny.split(folder, 4)
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    loaded = base.load(str(folder), quant="int8", dtype="bfloat16", device="cpu")
    settings = config.LoraConfig(rank=4, targets=("q_proj", "down_proj"))
    model = adapters.attach(loaded, settings, peft_task="CAUSAL_LM")
    for name, parameter in adapters.trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    run = _sealed(tmp_path / "adapter", folder, loaded, model, "int8", dtype="bfloat16", rows=1)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(run.folder), str(tmp_path / "merged"), "auto"],
        capture_output=True,
        text=True,
        check=False,
        # Else glibc keeps what was freed, up to the size of a shard again, and the reading is of its habits.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    # The test is worth something only where the whole model would not fit under the bound.
    assert peak < shard + (64 << 20) < 0.6 * total


def _logits(run: tiny.Run, model: Any) -> torch.Tensor:
    model.requires_grad_(False)
    with modes.evaluating(model):
        return run.task.score(model, run.task.collate(run.rows)).logits_NV


def _sealed(
    out: Path, folder: Path, loaded: base.Base, model: Any, quant: str, dtype: str = "float32", rows: int = 12
) -> tiny.Run:
    """Returns a run whose adapter was made by hand."""
    settings = config.RunConfig(
        task="complete",
        base=str(folder),
        out=out,
        quant=quant,  # type: ignore[arg-type]
        train=config.TrainConfig(dtype=dtype),  # type: ignore[arg-type]
    )
    task = tasks.get("complete")
    task.tokenizer = loaded.tokenizer  # type: ignore[attr-defined]
    tiny.write(out, loaded, model, task, settings)
    features = tiny.rows("complete", rows)
    return tiny.Run(out, folder, loaded, model, task, features, seal.make(task, loaded, model, features, out))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "openai-gpt", "t5", "bert"])
def test_a_16_bit_model_is_compared_in_float32(architecture, tmp_path, monkeypatch):
    """Only the weights are of 16 bits: no product of theirs is rounded to them where that would be emulated."""
    folder = tiny.model_folder(tmp_path / "base", architecture, dtype="bfloat16")
    kind = {"bert": "classify", "t5": "seq2seq"}.get(architecture, "complete")
    task = tasks.get(kind, {"labels": list(tiny.LABELS)} if kind == "classify" else None)
    task.prepare(base.load_tokenizer(folder), 64)
    batch = task.collate(tiny.rows(kind, 4))
    monkeypatch.setattr(base, "choose_dtype", lambda asked, device: (torch.float32, "for the test"))
    torch.manual_seed(0)
    narrow, _ = seal.load_merged(task, folder, "cpu")
    wide = copy.deepcopy(narrow)
    for module in wide.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    wide = wide.float()
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    (found,), (wanted,) = replies.ask(task, narrow, [batch]), replies.ask(task, wide, [batch])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
