"""A training step on a GPU, every line of it, on fake tensors: tests/fake_gpu.py says how."""

from pathlib import Path

import peft
import pytest
import torch

from lora_ft import adapters, config, fused, tasks
from lora_ft.model import blocks, head, modes
from lora_kernels import dispatch, group, lora
from tests import fake_gpu, tiny
from tests.test_fused import on_base

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels themselves run")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("bases")
    # Of queries, keys and values so few that the gradient of what they share is one product.
    sizes = {"llama": {"num_key_value_heads": 1}}
    names = ("llama", "qwen3", "gpt2", "bert")
    return {name: tiny.model_folder(made / name, name, dtype="bfloat16", **sizes.get(name, {})) for name in names}


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
def test_a_training_step_a_layer_at_a_time(folders, architecture, quant, dtype, way, monkeypatch):
    monkeypatch.setattr(blocks, "compute_whole", lambda model: None)
    task, model = adapted(folders[architecture], quant, dtype)
    with fake_gpu.fake_gpu() as launched, dispatch.forced(way):
        step(task, model)
        ((path, layers),) = fused.paths(model).items()
    assert path.startswith("fused")
    assert launched.count("lora_down_kernel") == len(layers)
    assert KERNELS[way] in launched


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("architecture", "quant", "dtype", "way"),
    [
        ("llama", "nf4", "bfloat16", "dequant"),
        ("llama", "nf4", "float16", "gemm_4bit"),
        ("llama", "nf4", "float32", "triton_4bit"),
        ("llama", "none", "bfloat16", "dequant"),
        ("llama", "none", "bfloat16", "triton"),
        ("qwen3", "nf4", "bfloat16", "dequant"),
    ],
)
def test_a_training_step_in_whole_decoder_layers(
    folders, architecture, quant, dtype, way, dropout, checkpointing, monkeypatch
):
    task, model = adapted(folders[architecture], quant, dtype, dropout)
    joint, whole = [], group._joint_backward
    monkeypatch.setattr(group, "_joint_backward", lambda *args: joint.append(args) or whole(*args))
    if checkpointing:
        # Of a GPU that is not there, no generator has a state to bring back.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    with fake_gpu.fake_gpu() as launched, dispatch.forced(way):
        step(task, model)
        assert set(blocks.paths(model)) == {"whole"}
    layers = len(blocks.paths(model)["whole"])
    forwards = layers * (2 if checkpointing else 1)
    # Without dropout norm and activation make all low-rank images but that of the output projection, which torch makes
    # in float32.
    assert launched.count("lora_down_kernel") == forwards * (4 if dropout else dtype != "float32")
    assert launched.count("swiglu_lora_kernel") == forwards
    assert launched.count("rms_norm_lora_kernel") == forwards * (4 if architecture == "qwen3" else 2)
    assert launched.count("rope_kernel") == forwards + layers
    is_joint = architecture == "llama" and quant == "nf4" and way == "dequant" and not dropout
    assert len(joint) == (layers if is_joint else 0)


def step(task: tasks.Task, model: peft.PeftModel) -> None:
    """Trains the model for a step on the GPU, and looks at every gradient."""
    fake_gpu.move(model)
    batch = task.collate(tiny.rows(task.name))
    del batch["labels"]
    learned = adapters.trained(model)
    optimizer = torch.optim.AdamW(learned.values())
    with modes.mixed_precision(model):
        logits = model.train()(**{name: fake_gpu.like(value) for name, value in batch.items()}).logits
    fake_gpu.backward(logits.float().logsumexp(dim=-1).sum())
    for name, parameter in learned.items():
        assert (parameter.grad.dtype, parameter.grad.device.type) == (torch.float32, "cuda"), name
    optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_a_training_step_through_the_loss_of_the_head(folders, monkeypatch):
    _, model = adapted(folders["llama"], "nf4", "bfloat16")
    inner = modes.unwrapped(model)
    found = head.Head.of(inner)
    assert found.is_matrix
    # How many tokens are labelled cannot be read from labels without numbers.
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda found: found.new_empty((5, 1), dtype=torch.long))
    with fake_gpu.fake_gpu() as launched:
        fake_gpu.move(model)
        ids = torch.ones(2, 9, dtype=torch.long, device="cuda")
        with modes.mixed_precision(model.train()):
            states = head.states(inner, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            loss = found.loss(states.flatten(0, 1), ids.flatten())
        assert (loss.dtype, loss.shape, loss.device.type) == (torch.float32, (), "cuda")
        fake_gpu.backward(loss)
        assert launched.count("differentiate_logits_kernel") == 1
    for name, parameter in adapters.trained(model).items():
        assert (parameter.grad.dtype, parameter.grad.device.type) == (torch.float32, "cuda"), name


def test_a_tensor_left_on_the_processor_is_seen(folders, monkeypatch):
    _, model = adapted(folders["llama"], "nf4", "bfloat16")
    monkeypatch.setattr(lora, "down", lambda x_MK, a_RK, *_: torch.empty(len(x_MK), len(a_RK), dtype=x_MK.dtype))
    with fake_gpu.fake_gpu():
        fake_gpu.move(model)
        batch = torch.ones(2, 5, dtype=torch.long, device="cuda")
        with modes.mixed_precision(model), pytest.raises(Exception, match="device"):
            model(input_ids=batch)


def adapted(folder: Path, quant: str, dtype: str, dropout: float = 0.1) -> tuple[tasks.Task, peft.PeftModel]:
    """Returns a tiny model with an adapter; torch cannot draw one on a GPU that is not there."""
    task, loaded = on_base(folder, quant, dtype)
    return task, adapters.attach(loaded, config.LoraConfig(rank=4, dropout=dropout), peft_task=task.peft_task)
