"""A hundred steps with fused layers, whole decoder layers where there are some, end where PEFT's own layers do."""

import functools
from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners import lora

from lora_ft import adapters, config, fused, tasks
from lora_ft.model import blocks, modes
from lora_ft.scoring import losses
from tests import tiny
from tests.kernel_ops.accuracy import error
from tests.test_fused import on_base, plainly

STEPS, BATCH = 100, 6
MODELS = {
    "llama": ("nf4", {}),
    "qwen3": ("none", {}),
    # Without the dropout that these draw: in another dtype it would draw another mask.
    "gpt2": ("none", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "bert": ("none", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
}
"""Architecture -> how its base is quantized, and settings of the model."""

Training = tuple[torch.Tensor, torch.Tensor]
"""The loss of every step, and all adapter weights after the last in one row."""


@pytest.fixture(scope="module", params=MODELS)
def train(request, tmp_path_factory) -> Callable[[bool, str], Training]:
    """Returns a function that trains one of the models, fused or plain, in a dtype; each once."""
    name = request.param
    quant, settings = MODELS[name]
    # Weights that bfloat16 holds exactly, so that the model is the same in every dtype.
    folder = tiny.model_folder(tmp_path_factory.mktemp("bases") / name, name, dtype="bfloat16", **settings)

    @functools.cache
    def run(ours: bool, dtype: str) -> Training:
        with pytest.MonkeyPatch.context() as patch:
            if not ours:
                plainly(patch)
            task, loaded = on_base(folder, quant, dtype)
            model = adapters.attach(loaded, config.LoraConfig(rank=4), peft_task=task.peft_task).train()
        layers = [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
        assert layers
        assert all(isinstance(layer, fused._Fused) == ours for layer in layers)
        whole = ours and name in blocks.FAMILIES
        assert (set(blocks.paths(model)) == {"whole"}) == whole
        return fit(task, model)

    return run


def fit(task: tasks.Task, model: peft.PeftModel) -> Training:
    learned = adapters.trained(model).values()
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    rows = tiny.rows(task.name, 2 * BATCH)
    curve = []
    for step in range(STEPS):
        start = step * BATCH % len(rows)
        with modes.mixed_precision(model):
            found = losses.row_losses(task, model, task.collate(rows[start : start + BATCH]))
            nll_B, count_B = found["nll"], found["count"]
        loss = nll_B.sum() / count_B.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve), torch.cat([parameter.detach().flatten() for parameter in learned])


@pytest.mark.filterwarnings("ignore")
def test_in_float32_curves_and_weights_agree_to_a_hundred_thousandth(train):
    ours, plain = train(True, "float32"), train(False, "float32")
    assert plain[0][-10:].mean() < 0.1 * plain[0][:10].mean()  # or there was nothing to agree on
    for found, wanted in zip(ours, plain, strict=True):
        assert error(found, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_in_bfloat16_rounding_costs_what_it_costs_peft(train):
    """The budget is what bfloat16 does to PEFT's own layers: their distance from their run in float32.

    Where a hundred steps of rounding lead is chance, so two runs that round alike are at like distances from the run
    that does not, not at equal ones; half as much again is allowed.
    """
    ours, plain, exact = train(True, "bfloat16"), train(False, "bfloat16"), train(False, "float32")
    for found, wanted, truth in zip(ours, plain, exact, strict=True):
        budget = error(wanted, truth)
        assert 1e-4 < budget < 0.1
        assert error(found, truth) < 1.5 * budget
