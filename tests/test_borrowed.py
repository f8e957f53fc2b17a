"""A trainer of TRL on an adapter and a quantized base: its constructor leaves both as they were, and is silent."""

from pathlib import Path

import pytest
import torch

from lora_ft import adapters, base, config
from lora_ft.training import borrowed, trainers, watch
from tests import tiny

trl = pytest.importorskip("trl")


class Trainer(trainers.Proven, borrowed.Borrowed, trl.DPOTrainer):
    """The mixins in the order that a task's trainer has them in."""

    stand_in = {"prompt": ["w1"], "chosen": ["w2"], "rejected": ["w3"]}  # noqa: RUF012


@pytest.fixture
def loaded(tmp_path: Path) -> base.Base:
    return base.load(str(tiny.model_folder(tmp_path / "base")), quant="nf4", dtype="float32", device="cpu")


def made(loaded: base.Base, model, out: Path, kind: type = Trainer, **more):
    arguments = trl.DPOConfig(str(out), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    return kind(model=model, args=arguments, processing_class=loaded.tokenizer, **more)


def state(model) -> dict:
    """Returns all that a constructor could change."""
    inner = model.get_base_model()
    return {
        "names": sorted(name for name, _ in model.named_parameters()),
        "learned": sorted(adapters.trained(model)),
        "dtypes": {p.dtype for p in adapters.trained(model).values()},
        "bits": [p.detach().clone() for p in adapters.trained(model).values()],
        "frozen": adapters.frozen_digest(model),
        "dropout": sorted(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)),
        "forward": "forward" in vars(inner),
        "adapters": (sorted(model.peft_config), model.active_adapter),
        "padding": (inner.config.pad_token_id, inner.generation_config.pad_token_id),
        "tags": inner.model_tags,
    }


def assert_same(before: dict, after: dict) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before.pop("bits"), after.pop("bits"), strict=True))
    assert before == after


def test_the_constructor_of_trl_leaves_the_model_as_it_was_and_tells_nobody(tmp_path, loaded, monkeypatch):
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: sent.append(args))
    model = adapters.attach(loaded, config.LoraConfig(rank=4, dropout=0.25), peft_task="CAUSAL_LM")
    model.get_base_model().generation_config.pad_token_id = None
    before, rows = state(model), [{"input_ids": [1, 2]}]
    trainer = made(
        loaded, model, tmp_path / "run", train_dataset=rows, data_collator=list, optimizer_cls_and_kwargs=("mine", {}),
        task=None, eval_rows=rows, plus_ratio=None, interrupt=watch.Interrupt(),
    )  # fmt: skip
    assert_same(before, state(model))
    assert trainer.model is model
    assert (trainer.train_dataset, trainer.data_collator) == (rows, list)
    assert trainer.optimizer_cls_and_kwargs == ("mine", {})
    assert not sent


def test_without_the_mixin_it_would_change_nearly_all_of_it(tmp_path, loaded):
    model = adapters.attach(loaded, config.LoraConfig(rank=4, dropout=0.25), peft_task="CAUSAL_LM")
    model.get_base_model().generation_config.pad_token_id = None
    before = state(model)
    rows = borrowed.datasets.Dataset.from_dict(Trainer.stand_in)
    with borrowed.left_alone(model):
        made(loaded, model, tmp_path / "run", trl.DPOTrainer, train_dataset=rows)
        after = state(model)
        assert torch.bfloat16 in after["dtypes"]
        for name in ("names", "frozen", "dropout", "forward", "adapters", "padding"):
            assert before[name] != after[name], name
    assert_same(before, state(model))
