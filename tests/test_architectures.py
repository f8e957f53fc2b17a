"""Small random models of each supported kind go the whole way: load, train, save, plain PEFT, merge, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import BitsAndBytesConfig

from lora_ft import base, merge, seal
from lora_ft.errors import AdapterError, ProofError
from lora_ft.model import four_bits, modes
from lora_ft.proof.verdict import Verdict
from tests import tiny

KINDS = [
    ("llama", "complete"),
    ("llama", "classify"),
    ("gpt2", "complete"),
    ("gpt2", "classify"),
    ("openai-gpt", "complete"),
    ("openai-gpt", "classify"),
    ("bert", "classify"),
    ("t5", "seq2seq"),
    ("bart", "seq2seq"),
    ("bert", "tag"),
    ("llama", "tag"),
]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = {name for name, _ in KINDS} | {"llama-untied", "gpt-neox"}
    return {name: tiny.model_folder(tmp_path_factory.mktemp("bases") / name, name) for name in names}


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize(("architecture", "task"), KINDS)
def test_whole_path(bases: dict[str, Path], tmp_path: Path, architecture: str, task: str, quant: str) -> None:
    run = tiny.run(tmp_path / "adapter", bases[architecture], task=task, quant=quant)
    _equal_in_plain_peft(run, quant)
    assert_passes(seal.verify(run.folder))
    live = _logits(run, run.model)
    for onto in ("auto", "original", "dequantized"):
        out = tmp_path / onto
        try:
            report = merge.merge(run.folder, out, onto=onto)  # type: ignore[arg-type]
        except ProofError:
            # NF4 can be further from the original weights than a tenth of what a short run learned.
            assert onto == "original"
            assert quant == "nf4"
            assert not seal.verify(run.folder, model_folder=out).passed
            continue
        assert_passes(seal.verify(run.folder, model_folder=out))
        assert_no_path(out, bases[architecture])
        if report["onto"] == ("original" if quant == "none" else "dequantized") and quant != "int8":
            merged = seal.load_merged(run.task, out, "cpu")[0]
            torch.testing.assert_close(_logits(run, merged), live, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "phi3", "qwen2", "qwen3", "mistral"])
def test_other_decoders_go_the_whole_way_in_four_bits(tmp_path: Path, architecture: str) -> None:
    run = tiny.run(tmp_path / "adapter", tiny.model_folder(tmp_path / "base", architecture))
    assert run.seal is not None
    assert run.seal.effect > 0.1
    assert_passes(seal.verify(run.folder))
    assert merge.merge(run.folder, tmp_path / "merged", onto="dequantized")["passes"]
    assert_passes(seal.verify(run.folder, model_folder=tmp_path / "merged"))


@pytest.mark.parametrize(
    ("architecture", "quant", "options"),
    [
        ("llama", "nf4", {"rslora": True}),
        ("llama", "nf4", {"dora": True}),
        ("gpt2", "none", {"dora": True}),
        ("llama", "nf4", {"plus_ratio": 16.0}),
        ("llama", "nf4", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 4.0}}),
        ("llama", "nf4", {"init": "eva"}),
        ("bert", "none", {"task": "classify", "init": "eva", "targets": ("query", "intermediate.dense")}),
        ("llama", "nf4", {"init": "loftq"}),
        ("llama", "none", {"init": "pissa", "rank_pattern": {"q_proj": 8}}),
        ("llama", "none", {"init": "olora", "rslora": True}),
        ("llama", "none", {"init": "pissa", "train_tokens": ("w5",)}),
        ("llama", "none", {"init": "olora", "special_tokens": ("<|call|>",)}),
        ("llama-untied", "none", {"init": "pissa", "save_modules": ("lm_head",)}),
        ("gpt2", "none", {"init": "pissa"}),
        ("bert", "none", {"task": "classify", "init": "pissa"}),
        ("bert", "none", {"task": "classify", "init": "olora"}),
        ("llama", "nf4", {"train_tokens": ("w5", "w7")}),
        ("llama-untied", "nf4", {"train_tokens": ("w5",)}),
        ("llama", "nf4", {"special_tokens": ("<|call|>", "<|back|>")}),
        ("llama-untied", "none", {"special_tokens": ("<|call|>",)}),
        ("gpt2", "none", {"special_tokens": ("<|call|>",)}),
        ("gpt-neox", "nf4", {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_options(
    bases: dict[str, Path], tmp_path: Path, architecture: str, quant: str, options: dict[str, Any]
) -> None:
    run = tiny.run(tmp_path / "adapter", bases[architecture], quant=quant, **options)
    _equal_in_plain_peft(run, quant)
    assert_passes(seal.verify(run.folder))
    merge.merge(run.folder, tmp_path / "merged")
    assert_passes(seal.verify(run.folder, model_folder=tmp_path / "merged"))
    merged = seal.load_merged(run.task, tmp_path / "merged", "cpu")[0]
    torch.testing.assert_close(_logits(run, merged), _logits(run, run.model), atol=1e-4, rtol=1e-4)


def test_olora_on_weights_that_lie_transposed_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"h\.0\.attn\.c_attn .* is a Conv1D.*use --lora\.init pissa"):
        tiny.run(tmp_path, bases["gpt2"], quant="none", init="olora")


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("bert", r"lora\.init=eva: \S*pooler\.dense is given one vector a row.*name other layers in lora\.targets"),
        ("t5", r"lora\.init=eva: t5 is a t5 model, whose encoder and decoder read different texts.*another lora\.init"),
    ],
)
def test_eva_says_what_it_cannot_start(bases: dict[str, Path], tmp_path: Path, architecture: str, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        tiny.run(tmp_path, bases[architecture], task=tiny.TASK_OF[architecture], quant="none", init="eva")


def test_dora_on_int8_on_a_cpu_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nf4"):
        tiny.run(tmp_path, bases["llama"], quant="int8", dora=True)


def test_loftq_starts_closer_to_the_original_than_nf4(bases: dict[str, Path], tmp_path: Path) -> None:
    plain = base.load(str(bases["llama"]), quant="none", dtype="float32", device="cpu").model
    run = tiny.run(tmp_path, bases["llama"], quant="nf4", init="loftq", rank=16, lr=1e-9, steps=1, sealed=False)
    layer = run.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    error = plain.model.layers[0].mlp.up_proj.weight - dequantize_module_weight(layer.base_layer)
    assert (error - layer.get_delta_weight("default")).norm() < 0.8 * error.norm()


def test_a_start_that_moves_the_base_leaves_its_replies_where_they_were(bases: dict[str, Path], tmp_path: Path) -> None:
    run = tiny.run(tmp_path, bases["llama"], quant="none", init="pissa", sealed=False)
    plain = base.load(str(bases["llama"]), quant="none", dtype="float32", device="cpu").model
    trained = _logits(run, run.model)
    with modes.without(run.model):
        torch.testing.assert_close(_logits(run, run.model), _logits(run, plain), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(_logits(run, run.model), trained, atol=0, rtol=0)


def assert_passes(verdict: Verdict) -> None:
    """Fails with the checks that failed."""
    assert verdict.passed, [check for check in verdict.checks if not check.passed]


def assert_no_path(folder: Path, base_folder: Path) -> None:
    """Fails where a text file of `folder` names a folder of this machine."""
    for file in folder.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert str(base_folder.parent) not in text, file.name
        assert str(folder) not in text, file.name


def _equal_in_plain_peft(run: tiny.Run, quant: str) -> None:
    """The folder gives the same logits to someone who has transformers and PEFT and not this library."""
    changes = run.task.config_changes()
    # A head that the base's files lack must be named, or transformers makes a quantized one that has no weights.
    skipped = list(run.base.task_heads) or None
    stock = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped),
        "none": None,
    }[quant]
    model = run.task.model_class.from_pretrained(
        run.base_folder, dtype=torch.float32, quantization_config=stock, device_map="cpu", **changes
    )
    model.config.pad_token_id = run.base.tokenizer.pad_token_id
    four_bits.keep_in_place(model)
    tokens = len(base.load_tokenizer(run.folder))
    if tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens)
    plain = peft.PeftModel.from_pretrained(model, run.folder)
    torch.testing.assert_close(_logits(run, plain), _logits(run, run.model), atol=1e-4, rtol=1e-4)
    assert_no_path(run.folder, run.base_folder)


def _logits(run: tiny.Run, model: Any) -> torch.Tensor:
    model.requires_grad_(False)
    with modes.evaluating(model):
        return run.task.score(model, run.task.collate(run.rows)).logits_NV
