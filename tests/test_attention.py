"""Examples that share a row are computed as alone, in every kind of decoder, or the model is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface

from lora_ft import adapters, base, config, tasks
from lora_ft.model import attention, modes
from lora_ft.model.head import Head
from lora_kernels import backend, reference
from tests import fake_gpu, tiny

SMALL = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.25}
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "mistral, a window of 4": ("Mistral", {**LLAMA, "sliding_window": 4}),
    "gemma 2": ("Gemma2", {**LLAMA, "head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0,
                           "final_logit_softcapping": 3.0}),
    "qwen 3": ("Qwen3", {**LLAMA, "head_dim": 16}),
    "granite": ("Granite", {**LLAMA, "logits_scaling": 4.0, "attention_multiplier": 0.1}),
    "cohere": ("Cohere", {**LLAMA, "logit_scale": 0.25}),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 4}),
    "gpt-2": ("GPT2", {**GPT, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}  # fmt: skip


def model_of(kind: str, **settings: Any) -> Any:
    names = {"GPT2": "GPT2LMHeadModel"}
    transformers.set_seed(0)
    made = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
    return getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(made)


def task() -> Any:
    made = tasks.get("complete")
    made.tokenizer = tiny.tokenizer()
    return made


def rows() -> list[tasks.Features]:
    return [row | {"labels": [-100, *row["input_ids"][1:]]} for row in tiny.rows("complete", 5)]


def gradients(model: Any, batches: list[tasks.Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = [task().loss(model, batch) for batch in batches]
    torch.stack(losses).sum().backward()
    return float(sum(losses)), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", PACKED)
def test_gradients_are_those_of_rows_one_by_one(kind: str, checkpointing: bool) -> None:
    model = model_of(PACKED[kind][0], **PACKED[kind][1])
    assert attention.refusal(model) is None
    assert Head.of(model) is not None
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    wanted_loss, wanted = gradients(model, [task().collate([row]) for row in rows()])
    with attention.packed(model):
        loss, found = gradients(model, [task().end_to_end(rows())])
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("kind", ["llama", "mistral, a window of 4", "gpt-2"])
def test_in_16_bits_a_row_is_filled_up_and_nothing_else_comes_of_it(kind: str) -> None:
    """Products of as many tokens as before are not compiled anew."""
    model = model_of(PACKED[kind][0], **PACKED[kind][1]).to(torch.bfloat16)
    batch, seen = task().end_to_end(rows()), []
    watch = model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    found = {}
    with attention.packed(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_cpu_multiplies", lambda dtype: True)
        for alike in (1, backend.ALIKE):
            patch.setattr(backend, "ALIKE", alike)
            found[alike] = gradients(model, [batch])
        # There is no model without this position.
        assert not attention.filled_up(model, batch)["position_ids"][0, batch["input_ids"].shape[1] :].any()
    watch.remove()
    tokens = batch["input_ids"].shape[1]
    assert tokens % backend.ALIKE
    assert seen[-2:] == [tokens, tokens + -tokens % backend.ALIKE]
    (wanted_loss, wanted), (loss, filled) = found.values()
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    for name, gradient in wanted.items():
        assert float((filled[name] - gradient).norm()) <= 0.02 * float(gradient.norm()), name


def test_in_float32_a_row_is_as_long_as_its_examples() -> None:
    model, batch, seen = model_of("Llama", **LLAMA), task().end_to_end(rows()), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    with attention.packed(model):
        gradients(model, [batch])
    assert seen[-1] == batch["input_ids"].shape[1]


def test_the_model_has_its_own_attention_again() -> None:
    model = model_of("Llama", **LLAMA)
    with attention.packed(model):
        assert model.config._attn_implementation == attention.NAME
        with attention.unpacked(model):
            model(input_ids=torch.tensor([[5, 6]]))
        with pytest.raises(ValueError, match="must hold where examples begin"):
            model(input_ids=torch.tensor([[5, 6]]))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("OpenAIGPT", GPT, "its attention is its own"),
        ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, "its attention is its own"),
        ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2}, "layers of linear_attention"),
    ],
)
def test_architectures_that_would_leak_are_refused(kind: str, settings: dict[str, Any], reason: str) -> None:
    names = {"OpenAIGPT": "OpenAIGPTLMHeadModel"}
    made = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
    found = attention.refusal(getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(made))
    assert found is not None
    assert reason in found


def test_a_base_in_8_bits_is_refused_where_rows_choose_its_columns_together() -> None:
    model = model_of("Llama", **LLAMA)
    for threshold, refused in ((6.0, True), (0.0, False)):
        model.model.layers[1].mlp.up_proj = bnb.nn.Linear8bitLt(4, 4, threshold=threshold)
        assert ("LLM.int8" in (attention.structural_refusal(model) or "")) == refused


@contextmanager
def planted(attend: Any) -> Iterator[None]:
    AttentionInterface.register(attention.NAME, attend)
    try:
        yield
    finally:
        AttentionInterface.register(attention.NAME, attention._attend)


def test_a_leak_is_seen() -> None:
    def leaky(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        whole = torch.tensor([0, q.shape[2]], dtype=torch.int32)[None, None, None]
        return attention._attend(module, q, k, v, whole, **options)

    with planted(leaky):
        assert attention.refusal(model_of("Llama", **LLAMA)) == "an example sees those before it"


def test_a_layer_that_mixes_tokens_elsewhere_is_seen() -> None:
    model = model_of("Llama", **LLAMA)
    # As a convolution or a recurrent state would.
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out + 0.1 * out.cumsum(1))
    assert attention.refusal(model) == "an example sees those before it"


def test_wrong_places_are_seen() -> None:
    model = model_of("Llama", **LLAMA)
    forward = model.model.rotary_emb.forward

    def from_the_start_of_the_row(x: Any, position_ids: Any) -> Any:
        return forward(x, position_ids=torch.arange(x.shape[1])[None] ** 2)

    model.model.rotary_emb.forward = from_the_start_of_the_row
    found = attention.refusal(model)
    assert found is not None
    assert "not answered as alone" in found


def test_dropout_on_attention_stays_within_examples() -> None:
    model = model_of("GPT2", **{**GPT, "attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}).train()
    batch = task().end_to_end(rows())
    with attention.packed(model):
        states = []
        for first in (9, 10):
            batch["input_ids"][0, 0] = first
            torch.manual_seed(0)
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            states.append(model.transformer(**inputs)[0])
        undropped = model.eval().transformer(**inputs)[0]
    length = len(rows()[0]["input_ids"])
    assert not torch.equal(states[0][:, :length], states[1][:, :length])
    assert torch.equal(states[0][:, length:], states[1][:, length:])
    assert not torch.equal(states[1], undropped)


def test_an_adapter_on_a_quantized_base_and_under_autocast(tmp_path: Any) -> None:
    folder = tiny.model_folder(tmp_path / "base")
    loaded = base.load(str(folder), dtype="bfloat16", device="cpu")
    model = adapters.attach(loaded, config.LoraConfig(rank=4), peft_task="CAUSAL_LM")
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    assert attention.refusal(model) is None
    with modes.mixed_precision(model):
        wanted_loss, wanted = gradients(model, [task().collate([row]) for row in rows()])
        with attention.packed(model):
            loss, found = gradients(model, [task().end_to_end(rows())])
    assert loss == pytest.approx(wanted_loss, rel=2e-2)
    off = [float((found[n] - g).norm() / g.norm()) for n, g in wanted.items()]
    assert sorted(off)[len(off) // 2] < 0.1


def documented_varlen(q: Any, k: Any, v: Any, begins: Any, _: Any, longest: int, *rest: Any, **options: Any) -> Any:
    """Computes what the documentation of `torch.nn.attention.varlen.varlen_attn` says, for tensors [T, H, D]."""
    left, right = options["window_size"]
    assert right == 0
    assert options["enable_gqa"]
    assert begins.dtype == torch.int32
    assert longest >= int(begins.diff().max())
    heads = (x.transpose(0, 1) for x in (q, k, v))
    window = left + 1 if left >= 0 else None
    return reference.packed_attention(*heads, begins.tolist(), scale=options["scale"], window=window).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_the_kernel_of_torch_is_told_the_same(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented_varlen)
    lengths = (4, 9, 1)
    q, k, v = (torch.randn(1, sum(lengths), heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    ends = attention.bounds(lengths)
    wanted, _ = attention._attend(None, q, k, v, ends, scaling=0.3, sliding_window=window)
    found = attention._on_gpu(q, k, v, ends, 0.3, window)
    torch.testing.assert_close(found, wanted)
    assert found.shape == (1, sum(lengths), 4, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels themselves run")
@pytest.mark.filterwarnings("ignore")
def test_a_packed_step_on_a_gpu_that_is_not_there(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    loaded = base.load(str(tiny.model_folder(tmp_path, dtype="bfloat16")), dtype="bfloat16", device="cpu")
    model = adapters.attach(loaded, config.LoraConfig(rank=4), peft_task="CAUSAL_LM")
    batch = task().end_to_end(rows())
    with fake_gpu.fake_gpu(), attention.packed(model):
        fake_gpu.move(model)
        inputs = {key: fake_gpu.like(value) for key, value in batch.items() if key != "labels"}
        with modes.mixed_precision(model):
            states = modes.unwrapped(model).base_model(**inputs, use_cache=False)[0]
        fake_gpu.backward(states.float().sum())
        for name, parameter in adapters.trained(model).items():
            assert parameter.grad is not None, name
            assert (parameter.grad.dtype, parameter.grad.device.type) == (torch.float32, "cuda"), name
