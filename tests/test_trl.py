"""The mixins on TRL's SFTTrainer: stopped in a step and gone on with, it is the run in one piece, without a pickle."""

import random
from pathlib import Path

import datasets
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lora_ft import adapters, checkpoints
from lora_ft.training import guard
from tests import tiny

trl = pytest.importorskip("trl")


class Trainer(checkpoints.Checkpoints, guard.GuardedSteps, trl.SFTTrainer):
    """TRL's, with nothing of this library but its mixins."""


class Die(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise InterruptedError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def made(base: Path, out: Path, **settings) -> Trainer:
    rng = random.Random(0)
    rows = [
        {"messages": [{"role": "user", "content": " ".join(f"w{rng.randrange(40, 200)}" for _ in range(1 + i % 5))},
                      {"role": "assistant", "content": f"w{i % 5} w7 w8"}]}
        for i in range(14)
    ]  # fmt: skip
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **settings}
    arguments = trl.SFTConfig(
        str(out), num_train_epochs=3, save_steps=1, save_total_limit=3, logging_steps=1, learning_rate=1e-2,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, max_length=64,
        **settings,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=arguments, peft_config=lora,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip


DROP = {"dataloader_drop_last": True, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 3}


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        pytest.param(2, {}, id="mid-epoch"),
        pytest.param(4, {}, id="epoch-end"),
        pytest.param(5, DROP, id="drop-last"),
        pytest.param(6, {"train_sampling_strategy": "group_by_length"}, id="by-length"),
    ],
)
def test_trl_goes_on_bit_for_bit(tmp_path, base, at, settings):
    whole = made(base, tmp_path / "whole", **settings)
    whole.train()
    cut = made(base, tmp_path / "cut", **settings)
    cut.add_callback(Die(at))
    with pytest.raises(InterruptedError):
        cut.train()
    torch.manual_seed(999)
    again = made(base, tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 12
    assert again.fingerprint == whole.fingerprint != ""
    ours, theirs = adapters.trained(again.model), adapters.trained(whole.model)
    assert all(torch.equal(theirs[name], p) for name, p in ours.items())
    counted = [[(line["step"], line["num_tokens"]) for line in run.state.log_history if "loss" in line]
               for run in (whole, again)]  # fmt: skip
    assert counted[0] == counted[1]
    assert len({tokens for _, tokens in counted[0]}) == 12
    kinds = {path.suffix for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_trl_saves_its_tokenizer_and_no_pickle(tmp_path, base):
    made(base, tmp_path / "out").save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_trl_tells_nobody_of_the_run(tmp_path, base, monkeypatch):
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: sent.append(args))
    made(base, tmp_path)
    assert not sent
    # Without the mixin it would.
    trl.SFTTrainer._send_telemetry(made(base, tmp_path))
    assert sent
