"""A training step on a GPU, every line of it, on fake tensors: tests/fake_gpu.py says how."""

from pathlib import Path

import peft
import pytest
import torch

from lora_ft import adapters, config, fused, modes, tasks
from lora_kernels import dispatch, lora
from tests import fake_gpu, tiny
from tests.test_fused import on_base

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels themselves run")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("bases")
    return {name: tiny.model_folder(made / name, name, dtype="bfloat16") for name in ("llama", "gpt2", "bert")}


KERNELS = {
    "dequant": "lora_down_input_kernel",
    "gemm_4bit": "lora_down_input_kernel",
    "triton": "adapted_product_kernel",
    "triton_4bit": "adapted_product_4bit_kernel",
}
"""A kernel that each way of a product must come by."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "quant", "dtype", "way"),
    [
        ("llama", "nf4", "bfloat16", "dequant"),
        ("llama", "nf4", "float16", "gemm_4bit"),
        ("llama", "nf4", "bfloat16", "triton_4bit"),
        ("llama", "nf4", "float32", "triton"),
        ("llama", "int8", "bfloat16", "dequant"),
        ("gpt2", "none", "bfloat16", "dequant"),
        ("gpt2", "none", "float16", "triton"),
        ("bert", "int8", "float16", "dequant"),
        ("bert", "nf4", "bfloat16", "triton"),
    ],
)
def test_a_training_step(folders, architecture, quant, dtype, way):
    task, model = adapted(folders[architecture], quant, dtype)
    batch = task.collate(tiny.rows(task.name))
    del batch["labels"]
    with fake_gpu.fake_gpu() as launched, dispatch.forced(way):
        fake_gpu.move(model)
        learned = adapters.trained(model)
        optimizer = torch.optim.AdamW(learned.values())
        with modes.mixed_precision(model):
            logits = model.train()(**{name: fake_gpu.like(value) for name, value in batch.items()}).logits
        fake_gpu.backward(logits.float().logsumexp(dim=-1).sum())
        for name, parameter in learned.items():
            assert (parameter.grad.dtype, parameter.grad.device.type) == (torch.float32, "cuda"), name
        optimizer.step()
        ((path, layers),) = fused.paths(model).items()
    assert path.startswith("fused")
    assert launched.count("lora_down_kernel") == len(layers)
    assert KERNELS[way] in launched


def test_a_tensor_left_on_the_processor_is_seen(folders, monkeypatch):
    _, model = adapted(folders["llama"], "nf4", "bfloat16")
    monkeypatch.setattr(lora, "down", lambda x_MK, a_RK, *_: torch.empty(len(x_MK), len(a_RK), dtype=x_MK.dtype))
    with fake_gpu.fake_gpu():
        fake_gpu.move(model)
        batch = torch.ones(2, 5, dtype=torch.long, device="cuda")
        with modes.mixed_precision(model), pytest.raises(Exception, match="device"):
            model(input_ids=batch)


def adapted(folder: Path, quant: str, dtype: str) -> tuple[tasks.Task, peft.PeftModel]:
    """Returns a tiny model with an adapter; torch cannot draw one on a GPU that is not there."""
    task, loaded = on_base(folder, quant, dtype)
    return task, adapters.attach(loaded, config.LoraConfig(rank=4, dropout=0.1), peft_task=task.peft_task)
