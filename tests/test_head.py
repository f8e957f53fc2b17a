"""The loss at labelled positions: that of the model's own logits, whatever is done to them, and never all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_ft import adapters, base, config, tasks
from lora_ft.model import head, modes
from lora_ft.model.head import Head
from tests import tiny
from tests.test_attention import LLAMA, model_of, task


def wanted(model: Any, batch: tasks.Batch) -> torch.Tensor:
    """Returns the loss by the model's own forward."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:].flatten(), reduction="sum")


def batch() -> tasks.Batch:
    return task().collate(tiny.rows("complete", 4))


def compare(model: Any, loss: torch.Tensor) -> None:
    """Fails where a loss or one of its gradients is not that of the model's own forward."""
    trained = adapters.trained(model)
    found = torch.autograd.grad(loss, list(trained.values()))
    plain = wanted(model, batch())
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(plain, list(trained.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("kind", ["matrix", "LoRA in the head", "head trained whole", "a watched head"])
def test_loss_and_gradients_are_the_models_own(kind: str, tmp_path: Any) -> None:
    loaded = base.load(str(tiny.model_folder(tmp_path, "llama-untied")), quant="none", dtype="float32", device="cpu")
    settings = {
        "LoRA in the head": config.LoraConfig(rank=4, targets=("q_proj", "lm_head")),
        "head trained whole": config.LoraConfig(rank=4, save_modules=("lm_head",)),
    }.get(kind, config.LoraConfig(rank=4))
    model = adapters.attach(loaded, settings, peft_task="CAUSAL_LM")
    for name, parameter in adapters.trained(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    inner = modes.unwrapped(model)
    if kind == "a watched head":
        inner.lm_head.register_forward_hook(lambda _, __, out: out + 1)
    found = Head.of(inner)
    assert found is not None
    assert found.is_matrix is (kind == "matrix")
    compare(model, task().loss(model, batch()))


def test_a_head_that_does_more_than_is_known_is_run_by_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("Llama", **LLAMA)
    # As models do that shrink hidden states before the head.
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
    model.model.register_forward_hook(lambda _, __, out: out)
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        return out | {"logits": out.logits * 0.5} if isinstance(out, dict) else out

    model.forward = forward
    with caplog.at_level("INFO"):
        assert Head.of(model) is None
    assert "run by its own forward" in caplog.text
    compare(model, task().loss(model, batch()))


def test_a_head_is_looked_at_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Llama", **LLAMA)
    first = Head.of(model)
    monkeypatch.setattr(head, "states", lambda *_: pytest.fail("looked again"))
    assert Head.of(model) is first


@pytest.mark.parametrize("watched", [False, True])
def test_logits_never_exist_all_at_once(watched: bool) -> None:
    vocabulary, tokens = 8192, 1200
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    matrix = nn.Linear(8, vocabulary, bias=False)
    if watched:
        matrix.register_forward_hook(lambda _, __, out: out)
    h_NK = torch.randn(tokens, 8, requires_grad=True)
    labels_N = torch.randint(vocabulary, (tokens,))
    with Watch():
        Head(matrix).loss(h_NK, labels_N).backward()
    assert h_NK.grad is not None
    assert largest <= 256 * vocabulary < tokens * vocabulary


@pytest.mark.parametrize("kind", ["LoRA in the head", "matrix"])
def test_each_log_probability_has_its_own_gradient(kind: str, tmp_path: Any) -> None:
    loaded = base.load(str(tiny.model_folder(tmp_path, "llama-untied")), quant="none", dtype="float32", device="cpu")
    targets = ("q_proj", "lm_head") if kind == "LoRA in the head" else ("q_proj",)
    model = adapters.attach(loaded, config.LoraConfig(rank=4, targets=targets), peft_task="CAUSAL_LM")
    for name, parameter in adapters.trained(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    inner, made = modes.unwrapped(model), batch()
    inputs = {key: value for key, value in made.items() if key != "labels"}
    targets_BT = made["labels"][:, 1:]
    row_N, column_N = (targets_BT != -100).nonzero(as_tuple=True)
    labels_N = targets_BT[row_N, column_N]
    found = Head.of(inner)
    assert found is not None
    logp_N = found.log_probs(head.states(inner, inputs)[row_N, column_N], labels_N)
    plain_N = model(**inputs).logits[:, :-1].log_softmax(-1)[row_N, column_N, labels_N]
    torch.testing.assert_close(logp_N, plain_N)
    # Each its own weight: of one for all of them the gradient is known from the sum.
    weight_N = torch.linspace(-1, 2, len(labels_N))
    learned = list(adapters.trained(model).values())
    ours, theirs = (torch.autograd.grad((one * weight_N).sum(), learned) for one in (logp_N, plain_N))
    for one, other in zip(ours, theirs, strict=True):
        assert bool(other.any())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    with torch.no_grad():
        assert not found.log_probs(head.states(inner, inputs)[row_N, column_N], labels_N).requires_grad
