"""Loading a base: what is quantized and what is not, that it stays as it was stored, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lora_ft import base
from lora_ft.errors import LoraFtError, SourceError, UnsupportedModelError
from lora_ft.model import four_bits
from tests import tiny

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the tiny model of an architecture, made once; to be read only."""
    root = tmp_path_factory.mktemp("bases")

    def made(architecture: str) -> Path:
        folder = root / architecture
        return folder if folder.is_dir() else tiny.model_folder(folder, architecture)

    return made


@pytest.fixture
def llama(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """Returns a llama to be changed."""
    return Path(shutil.copytree(folders("llama"), tmp_path / "llama"))


def load(folder: Path, quant: str = "none", dtype: str = "float32", **more: Any) -> base.Base:
    return base.load(str(folder), quant=quant, dtype=dtype, device="cpu", **more)  # type: ignore[arg-type]


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def dequantized(module: Any) -> torch.Tensor:
    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def refused(folder: Path, kind: type[LoraFtError] = UnsupportedModelError, **more: Any) -> str:
    """Returns the message that `load` refuses with."""
    with pytest.raises(kind) as raised:
        load(folder, **more)
    assert type(raised.value) is kind
    return str(raised.value)


# What is quantized

WO = [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)]
WO += [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(2)]
CLASSIFY = AutoModelForSequenceClassification
WHOLE = [
    ("llama", AutoModelForCausalLM, {"lm_head"}, ()),
    ("llama-untied", AutoModelForCausalLM, {"lm_head"}, ()),
    ("llama", CLASSIFY, {"score"}, ("score",)),
    ("gpt2", AutoModelForCausalLM, {"lm_head"}, ()),
    ("gpt2", CLASSIFY, {"score"}, ("score",)),
    ("gpt-neox", AutoModelForCausalLM, {"lm_head"}, ()),
    ("bert", CLASSIFY, {"classifier"}, ("classifier",)),
    # transformers keeps T5's `wo` whole: in float16 it overflows.
    ("t5", AutoModelForSeq2SeqLM, {"lm_head", *WO}, ()),
]


@pytest.mark.parametrize(("architecture", "model_class", "whole", "task_heads"), WHOLE)
@pytest.mark.parametrize(("quant", "kind"), [("nf4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt)])
def test_every_linear_layer_but_the_heads_is_quantized(
    folders: Callable[[str], Path],
    architecture: str,
    model_class: Any,
    whole: set[str],
    task_heads: tuple[str, ...],
    quant: str,
    kind: type,
) -> None:
    plain = load(folders(architecture), model_class=model_class)
    loaded = load(folders(architecture), quant, model_class=model_class)
    names = linears(plain.model).keys()
    quantized = {n for n, m in loaded.model.named_modules() if isinstance(m, kind)}
    assert quantized == names - whole
    assert len(quantized) >= 8
    assert set(loaded.left_whole) == whole
    assert plain.left_whole == ()
    assert loaded.task_heads == plain.task_heads == task_heads
    assert (loaded.quant, loaded.source.kind) == (quant, "folder")


def test_nf4_has_double_quantization(folders: Callable[[str], Path]) -> None:
    layers = [m for m in load(folders("llama"), "nf4").model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.nested, state.quant_type, layer.compute_dtype) == (True, "nf4", torch.float32)
        assert (state.absmax.dtype, layer.weight.dtype) == (torch.uint8, torch.uint8)


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_of_the_file(folders: Callable[[str], Path], quant: str, dtype: str) -> None:
    loaded = load(folders("llama"), quant, dtype)
    compute = getattr(torch, dtype)
    assert loaded.dtype == compute
    state, stored = loaded.model.state_dict(), load_file(folders("llama") / "model.safetensors")
    for name, tensor in stored.items():
        module = loaded.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, bnb.nn.Linear4bit):
            error, bound = dequantized(module).float() - tensor, 0.15
        elif isinstance(module, bnb.nn.Linear8bitLt):
            error, bound = module.weight.data.float() * module.weight.SCB[:, None] / 127 - tensor, 0.02
        else:
            assert torch.equal(state[name], tensor.to(compute))
            continue
        assert 0 < error.norm() / tensor.norm() < bound
    assert {p.dtype for p in loaded.model.parameters()} == {compute} | {
        "nf4": {torch.uint8},
        "int8": {torch.int8},
        "none": set(),
    }[quant]


def test_layers_of_gpt2_are_turned_round_when_quantized(folders: Callable[[str], Path]) -> None:
    name = "transformer.h.0.attn.c_proj"
    plain, quantized = load(folders("gpt2")), load(folders("gpt2"), "nf4")
    layer = plain.model.get_submodule(name)
    assert isinstance(layer, Conv1D)
    assert sum(isinstance(m, Conv1D) for m in plain.model.modules()) == 8
    weight, read = layer.weight.detach(), dequantized(quantized.model.get_submodule(name))
    assert (read - weight.T).norm() / weight.norm() < 0.15
    assert (read - weight).norm() / weight.norm() > 1
    inputs = torch.randn(5, 64)
    outputs = quantized.model.get_submodule(name)(inputs)
    torch.testing.assert_close(outputs, inputs @ read.T + layer.bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_the_base_is_frozen(folders: Callable[[str], Path], quant: str) -> None:
    model = load(folders("bert"), quant, model_class=CLASSIFY).model
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_new_head_follows_the_seed_alone(folders: Callable[[str], Path]) -> None:
    def head(seed: int, quant: str = "nf4") -> torch.Tensor:
        torch.rand(7)
        changes = {"num_labels": 3}
        loaded = load(folders("llama"), quant, model_class=CLASSIFY, seed=seed, config_changes=changes)
        return loaded.model.score.weight.detach()

    first = head(1)
    assert first.shape == (3, 64)
    assert first.std() > 0.01
    assert torch.equal(first, head(1))
    assert torch.equal(first, head(1, "none"))
    assert not torch.equal(first, head(2))


# Weights stay in place


def test_no_layer_may_repack_its_weights(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = load(folders("llama"), "nf4").model
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert flags == [False] * 14


def use(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights of a layer before and after the model was used and then set to train."""
    before = dequantized(model.get_submodule(UP))
    model.eval()
    with torch.no_grad():
        model(torch.arange(10, 40)[None])
    model.train()
    return before, dequantized(model.get_submodule(UP))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_leaves_the_weights_as_they_were(folders: Callable[[str], Path], dtype: str) -> None:
    before, after = use(load(folders("llama"), "nf4", dtype).model)
    assert torch.equal(before, after)


def test_without_the_switch_evaluation_spoils_the_weights(folders: Callable[[str], Path]) -> None:
    """The mutation of the test above, on processors where bitsandbytes repacks."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes never repacks weights on it")
    model = load(folders("llama"), "nf4", "bfloat16").model
    for layer in linears(model).values():
        layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    before, after = use(model)
    assert not torch.equal(before, after)


def test_layers_that_bitsandbytes_would_misread_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.model_folder(tmp_path / "base", intermediate_size=96)
    monkeypatch.setattr(four_bits, "misreads_crossed_blocks", lambda: False)
    quantized = load(folder, "nf4")
    assert quantized.left_whole == ("lm_head",)
    quantized.model.save_pretrained(tmp_path / "stored")
    quantized.tokenizer.save_pretrained(tmp_path / "stored")
    monkeypatch.setattr(four_bits, "misreads_crossed_blocks", lambda: True)
    with caplog.at_level("INFO"):
        whole = load(folder, "nf4")
    assert set(whole.left_whole) == {"lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))}
    assert "2 layers stay whole" in caplog.text
    with pytest.raises(UnsupportedModelError, match=r"misreads .* as of model.layers.0.mlp.down_proj: use the unquant"):
        load(tmp_path / "stored", "nf4")


def test_whether_bitsandbytes_misreads_is_seen_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, state = bnb.functional.quantize_4bit(torch.randn(64, 96), quant_type="nf4")
    right = four_bits.unpacked(packed, state)
    for told, wrong in ((right, False), (right * 1.25, True)):
        monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *_, told=told: told)
        monkeypatch.setattr(four_bits, "unpacked", lambda *_: right)
        assert four_bits.misreads_crossed_blocks.__wrapped__() is wrong


# Bases stored in a quantization


@pytest.fixture(scope="module")
def stored(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a llama that transformers saved in a quantization."""
    root = tmp_path_factory.mktemp("stored")

    def made(quant: str) -> Path:
        if not (root / quant).is_dir():
            loaded = load(folders("llama"), quant)
            loaded.model.save_pretrained(root / quant)
            loaded.tokenizer.save_pretrained(root / quant)
        return root / quant

    return made


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_base_stored_quantized_is_the_same_base(
    folders: Callable[[str], Path], stored: Callable[[str], Path], quant: str
) -> None:
    fresh, again = load(folders("llama"), quant), load(stored(quant), quant)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        assert torch.equal(fresh.model(ids).logits, again.model(ids).logits)
    assert again.left_whole == fresh.left_whole
    assert not [n for n, p in again.model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_base_stored_quantized_computes_in_the_dtype_asked_for(stored: Callable[[str], Path], quant: str) -> None:
    loaded = load(stored(quant), quant, "bfloat16")
    assert {p.dtype for p in loaded.model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert loaded.model(torch.arange(10, 20)[None]).logits.dtype == torch.bfloat16
    fours = [m.compute_dtype for m in loaded.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert fours == [torch.bfloat16] * (14 if quant == "nf4" else 0)


@pytest.mark.parametrize(("held", "asked"), [("nf4", "int8"), ("nf4", "none"), ("int8", "nf4")])
def test_a_stored_quantization_is_not_another(stored: Callable[[str], Path], held: str, asked: str) -> None:
    message = refused(stored(held), SourceError, quant=asked)
    assert message.endswith(f"is stored as {held}, but --quant is {asked}: use --quant {held}.")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "stored in gptq quantization"),
        ({"quant_method": "gptq", "bits": 4, "load_in_4bit": True}, "stored in gptq quantization"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "stored in fp4"),
        ({"quant_method": "bitsandbytes"}, "stored in unknown"),
    ],
)
def test_other_quantizations_are_refused(llama: Path, settings: dict[str, Any], told: str) -> None:
    change_json(llama / "config.json", quantization_config=settings)
    message = refused(llama, quant="nf4")
    assert told in message
    assert "Use the unquantized model" in message


# What is not a base for this task


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llava", "vision_config": {}, "text_config": {}},
        {"model_type": "qwen2_vl", "vision_config": {}},
        {"model_type": "whisper"},
        {"model_type": "clip"},
    ],
)
def test_models_of_images_and_sound_are_refused(llama: Path, fields: dict[str, Any]) -> None:
    change_json(llama / "config.json", **fields)
    message = refused(llama)
    assert f"is a {fields['model_type']} model with a" in message
    assert "use a text-only base" in message


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "frobnicator"}, "has model type `frobnicator`"),
        ({"model_type": ""}, "does not know this model"),
    ],
)
def test_an_unknown_model_is_refused(llama: Path, fields: dict[str, Any], told: str) -> None:
    change_json(llama / "config.json", **fields)
    message = refused(llama)
    assert told in message
    assert "\n" not in message


def test_a_configuration_that_is_no_json(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    assert "config.json: cannot be read: is not JSON at character 2" in refused(llama, SourceError)


@pytest.mark.parametrize(
    ("architecture", "model_class", "told"),
    [
        ("t5", AutoModelForCausalLM, "is a t5 model, which has no ModelForCausalLM form"),
        ("llama", AutoModelForSeq2SeqLM, "is a llama model, which has no ModelForSeq2SeqLM form"),
        ("bert", AutoModelForSeq2SeqLM, "is a bert model, which has no ModelForSeq2SeqLM form"),
        # There is a BertLMHeadModel, but unless its base was trained as a decoder each position sees the next.
        ("bert", AutoModelForCausalLM, "is a bert model, which sees the words it would have to predict"),
    ],
)
def test_a_task_that_the_model_cannot_do(
    folders: Callable[[str], Path], architecture: str, model_class: Any, told: str
) -> None:
    message = refused(folders(architecture), model_class=model_class)
    assert told in message
    assert "a task that fits it" in message


def test_a_bert_trained_as_a_decoder_generates(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("bert"), tmp_path / "decoder"))
    settings = transformers.BertConfig.from_pretrained(folder, is_decoder=True)
    transformers.BertLMHeadModel(settings).save_pretrained(folder)
    model = load(folder).model
    ids = torch.arange(10, 30)[None]
    changed = ids.clone()
    changed[0, -1] = 50
    with torch.no_grad():
        assert torch.equal(model(ids).logits[0, :-1], model(changed).logits[0, :-1])


# Weights that do not fill the model


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_a_missing_weight_is_never_made_up(llama: Path, quant: str) -> None:
    held = load_file(llama / "model.safetensors")
    del held[f"{UP}.weight"]
    save_file(held, llama / "model.safetensors", metadata={"format": "pt"})
    message = refused(llama, SourceError, quant=quant)
    assert f"{UP}.weight, which config.json and the task call for, is not there in its weight files" in message


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_a_weight_of_another_shape_is_refused(llama: Path, quant: str) -> None:
    change_json(llama / "config.json", intermediate_size=48)
    message = refused(llama, SourceError, quant=quant)
    assert "model.layers.0.mlp.down_proj.weight and 5 more" in message
    assert "are of another shape in its weight files" in message


def test_a_classifier_may_be_taught_other_classes(llama: Path, tmp_path: Path) -> None:
    first = load(llama, model_class=CLASSIFY, config_changes={"num_labels": 2})
    first.model.save_pretrained(tmp_path / "two")
    first.tokenizer.save_pretrained(tmp_path / "two")
    changes = {"num_labels": 3}
    second = load(tmp_path / "two", model_class=CLASSIFY, config_changes=changes, seed=5)
    assert torch.equal(
        second.model.score.weight, load(llama, model_class=CLASSIFY, config_changes=changes, seed=5).model.score.weight
    )
    same = load(tmp_path / "two", model_class=CLASSIFY, config_changes={"num_labels": 2}, seed=5)
    assert torch.equal(same.model.score.weight, first.model.score.weight)


# The tokenizer


def test_a_tokenizer_without_padding_pads_with_its_end(llama: Path) -> None:
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    change_json(llama / "config.json", pad_token_id=None)
    loaded = load(llama)
    assert (loaded.tokenizer.pad_token, loaded.tokenizer.pad_token_id) == ("</s>", 2)
    assert loaded.model.config.pad_token_id == 2


def test_a_padding_token_of_its_own_stays(folders: Callable[[str], Path]) -> None:
    loaded = load(folders("llama"))
    assert (loaded.tokenizer.pad_token_id, loaded.model.config.pad_token_id) == (0, 0)


@pytest.mark.parametrize(
    ("architecture", "model_class"),
    [
        ("llama", AutoModelForCausalLM),
        ("gpt2", AutoModelForCausalLM),
        ("bert", CLASSIFY),
        ("t5", AutoModelForSeq2SeqLM),
    ],
)
def test_a_base_without_a_tokenizer(
    folders: Callable[[str], Path], tmp_path: Path, architecture: str, model_class: Any
) -> None:
    folder = Path(shutil.copytree(folders(architecture), tmp_path / "mute"))
    for file in [*folder.glob("*token*"), *folder.glob("*.jinja")]:
        file.unlink()
    assert "mute: the base has no tokenizer" in refused(folder, SourceError, model_class=model_class)


# The dtype


@pytest.mark.parametrize(
    ("asked", "device", "bf16_gpu", "avx512", "amx", "dtype", "why"),
    [
        ("auto", "cuda", True, False, False, torch.bfloat16, "this GPU multiplies bfloat16 natively"),
        ("auto", "cuda:1", False, True, True, torch.float16, "this GPU has no native bfloat16"),
        ("auto", "cpu", True, True, False, torch.bfloat16, "this processor multiplies bfloat16 natively"),
        ("auto", "cpu", True, False, True, torch.bfloat16, "this processor multiplies bfloat16 natively"),
        ("auto", "cpu", True, False, False, torch.float32, "no bfloat16 instructions"),
        ("auto", "mps", True, True, True, torch.float32, "the safe choice on mps"),
        ("float16", "cpu", False, False, False, torch.float16, "asked for"),
    ],
)
def test_the_dtype_and_its_reason(
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    device: str,
    bf16_gpu: bool,
    avx512: bool,
    amx: bool,
    dtype: torch.dtype,
    why: str,
) -> None:
    # Emulated bfloat16 does not count.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16_gpu
    )
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    chosen, reason = base.choose_dtype(asked, device)
    assert chosen == dtype
    assert why in reason


# A hostile base


def plant(folder: Path, canary: Path) -> None:
    """Puts code into the folder under every name that its settings may point to."""
    code = f"open({str(canary)!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n"
    for name in ("evil.py", "configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(code)


AUTO_MAP = {
    "AutoConfig": "configuration_evil.C",
    "AutoModelForCausalLM": "modeling_evil.M",
    "AutoTokenizer": [None, "tokenization_evil.T"],
}


@pytest.mark.parametrize("trust", [False, True])
def test_code_in_an_unknown_model_is_refused(llama: Path, tmp_path: Path, trust: bool) -> None:
    plant(llama, tmp_path / "canary")
    more = {"trust_remote_code": True} if trust else {}
    change_json(llama / "config.json", model_type="evil", auto_map=AUTO_MAP, **more)
    assert "no code from a base is ever run" in refused(llama, SourceError if trust else UnsupportedModelError)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("where", ["", "evil/repo--"])
def test_code_in_a_known_model_is_not_looked_at(llama: Path, tmp_path: Path, where: str) -> None:
    plant(llama, tmp_path / "canary")
    named = {name: f"{where}{code}" for name, code in AUTO_MAP.items() if isinstance(code, str)}
    change_json(llama / "config.json", auto_map=named, trust_remote_code=False)
    loaded = load(llama)
    assert type(loaded.model) is transformers.LlamaForCausalLM
    assert type(loaded.model.config) is transformers.LlamaConfig
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_tokenizer(llama: Path, tmp_path: Path, known: bool) -> None:
    plant(llama, tmp_path / "canary")
    fields = {} if known else {"tokenizer_class": "T"}
    change_json(llama / "tokenizer_config.json", auto_map={"AutoTokenizer": AUTO_MAP["AutoTokenizer"]}, **fields)
    if known:
        assert len(load(llama).tokenizer) == tiny.VOCAB
    else:
        assert "has no tokenizer" in refused(llama, SourceError)
    assert not (tmp_path / "canary").exists()


def test_the_planted_code_would_run_if_it_were_trusted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation of the tests above: the canary sings."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    plant(llama, tmp_path / "canary")
    change_json(llama / "config.json", model_type="evil", auto_map=AUTO_MAP)
    with pytest.raises(AttributeError):  # the planted class is no configuration
        transformers.AutoConfig.from_pretrained(llama, trust_remote_code=True)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "field",
    [
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
    ],
)
@pytest.mark.parametrize("kernel", ["evil/kernel", "kernels-community/flash-attn2", "flash_attention_2"])
def test_a_base_cannot_name_kernels_to_fetch(
    llama: Path, monkeypatch: pytest.MonkeyPatch, field: str, kernel: str
) -> None:
    # What fetches and imports them, where the package `kernels` is installed.
    fetch = lambda *_, **__: pytest.fail("a kernel was asked for")  # noqa: E731
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", fetch)
    change_json(llama / "config.json", **{field: kernel})
    if "/" in kernel:
        assert "names code to fetch" in refused(llama, SourceError)
        change_json(llama / "config.json", **{field: {"text_config": kernel}})
        assert "names code to fetch" in refused(llama, SourceError)
        return
    loaded = load(llama)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.model.config._experts_implementation != kernel


def test_plain_attention_stays_as_the_base_has_it(llama: Path) -> None:
    change_json(llama / "config.json", attn_implementation="eager")
    assert load(llama).model.config._attn_implementation == "eager"


def test_weights_in_a_pickle_are_not_opened(llama: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "canary"), "w"))

    torch.save(Evil(), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert "a pickle" in refused(llama, SourceError)
    assert not (tmp_path / "canary").exists()


# Memory

MEASURE = """
import re, sys, threading, time
from lora_ft import base
from lora_ft.model import four_bits

def anonymous():
    text = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", text)[1]) * 1024

base.load(sys.argv[1], quant="nf4", dtype="bfloat16", device="cpu")
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
loaded = base.load(sys.argv[2], quant="nf4", dtype="bfloat16", device="cpu")
done.set()
watcher.join()
print(peak - before, anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc, which is not here")
def test_a_large_base_is_quantized_tensor_by_tensor(folders: Callable[[str], Path], tmp_path: Path) -> None:
    small, large = folders("llama"), tmp_path / "large"
    shutil.copytree(small, large)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "head_dim": 256}
    change_json(large / "config.json", **sizes)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(large))
    drawn = torch.randn(4096 * 1024).bfloat16()
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    save_file({n: drawn[: s.numel()].reshape(s).clone() for n, s in shapes.items()}, large / "model.safetensors")
    stored_bytes = (large / "model.safetensors").stat().st_size
    tiny.split(large, 4)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True, check=True
    )
    peak, kept = map(int, run.stdout.split()[-2:])
    assert stored_bytes > 256 << 20
    # 4 bits and one scale of 8 for each 64 weights are 0.258 of 16 bits; the rest is the tensor being quantized.
    assert 0.2 < kept / stored_bytes < 0.4
    assert peak / stored_bytes < 0.65


def test_dense_stand_ins_say_what_the_4_bit_layers_say_and_leave_no_trace(tmp_path):
    loaded = base.load(str(tiny.model_folder(tmp_path / "base", "llama")))
    ids = torch.randint(6, 200, (3, 11))
    names = [name for name, _ in loaded.model.named_modules()]
    with torch.no_grad():
        before = loaded.model(ids).logits
        with four_bits.dequantized(loaded.model):
            stand_ins = [m for m in loaded.model.modules() if isinstance(m, four_bits.Dequantized)]
            torch.testing.assert_close(loaded.model(ids).logits, before, rtol=1e-5, atol=1e-5)
        assert len(stand_ins) == 14
        assert torch.equal(loaded.model(ids).logits, before)
    assert [name for name, _ in loaded.model.named_modules()] == names
    assert not any(isinstance(m, four_bits.Dequantized) for m in loaded.model.modules())


def test_a_model_too_large_for_dense_stand_ins_has_none(tmp_path, monkeypatch):
    loaded = base.load(str(tiny.model_folder(tmp_path / "base", "llama")))
    monkeypatch.setattr(four_bits, "DENSE_LIMIT", 1000)
    for cache, stand_ins in (("auto", 0), ("on", 14), ("off", 0)):
        four_bits.choose_cache(loaded.model, cache)
        with four_bits.dequantized(loaded.model):
            assert sum(isinstance(m, four_bits.Dequantized) for m in loaded.model.modules()) == stand_ins
    monkeypatch.undo()
    with four_bits.dequantized(loaded.model):
        assert not any(isinstance(m, four_bits.Dequantized) for m in loaded.model.modules())


@pytest.mark.parametrize(
    ("config", "held"),
    [
        # Its first row of positions is of the padding, and the one before that of nothing.
        (transformers.RobertaConfig(max_position_embeddings=514, num_hidden_layers=1), 512),
        (transformers.BertConfig(num_hidden_layers=1), 512),
        (transformers.BartConfig(encoder_layers=1, decoder_layers=1), 1024),
        (transformers.GPT2Config(n_positions=128), 128),
        (transformers.LlamaConfig(max_position_embeddings=512), 512),
        (transformers.T5Config(), None),
        (transformers.BloomConfig(), None),
        (transformers.XLNetConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_the_positions_of_a_base(config: transformers.PreTrainedConfig, held: int | None) -> None:
    assert base.positions(config, "a base") == held
    if isinstance(config, transformers.RobertaConfig):
        model = transformers.RobertaModel(config).eval()
        model(input_ids=torch.full((1, 512), 5))
        with pytest.raises(RuntimeError, match="out of bounds"):
            model(input_ids=torch.full((1, 513), 5))
