"""SmolLM2-135M with an adapter, exported: a real llama.cpp gives the greedy answers of the merged model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from lora_ft import export, merge, runs, seal, sources
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.data import meetings
from tests import llama_cpp

PROMPTS, TOKENS = 20, 16


@pytest.mark.slow
def test_answers_of_llama_cpp_and_transformers_are_those_of_the_merged_model(tmp_path: Path) -> None:
    config = RunConfig(
        task="chat",
        base="smollm2-135m",
        out=tmp_path / "run",
        quant="none",
        lora=LoraConfig(rank=8, alpha=16),
        data=DataConfig(max_length=256),
        train=TrainConfig(steps=8, batch_size=2, lr=1e-3),
    )
    done = runs.run(config, examples=meetings.rows(16, "train"))
    task, folder = done.task, done.folder
    done.release()
    merge.merge(folder, tmp_path / "merged", dtype="float16")
    export.export(tmp_path / "merged", tmp_path / "merged.gguf")
    asked = [[*row.messages[:-1]] for row in meetings.rows(PROMPTS, "held_out")]
    prompts = [task.renderer.prompt(turns) for turns in asked]  # type: ignore[attr-defined]
    merged = seal.load_merged(task, tmp_path / "merged", "cpu")[0]
    with llama_cpp.running(tmp_path / "merged.gguf") as running:
        assert [running.prompt(turns) for turns in asked] == prompts
        answers = [running.greedy(prompt, TOKENS) for prompt in prompts]
    same = sum(llama_cpp.agreed(merged, p, *answer) for p, answer in zip(prompts, answers, strict=True))
    print(f"{same} of {PROMPTS * TOKENS} tokens are the merged model's, before two were as likely")
    assert same > 0.8 * PROMPTS * TOKENS
    del merged
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="merged.gguf",
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    same = sum(llama_cpp.agreed(read, p, *answer) for p, answer in zip(prompts, answers, strict=True))
    print(f"{same} of {PROMPTS * TOKENS} tokens are those of the file as transformers reads it")
    assert same > 0.8 * PROMPTS * TOKENS
    del read
    export.export(sources.resolve("smollm2-135m").folder, tmp_path / "base.gguf")
    export.export(folder, tmp_path / "lora.gguf", form="gguf-lora")
    merged = seal.load_merged(task, tmp_path / "merged", "cpu")[0]
    with llama_cpp.running(tmp_path / "base.gguf", tmp_path / "lora.gguf") as running:
        answers = [running.greedy(prompt, TOKENS) for prompt in prompts]
    same = sum(llama_cpp.agreed(merged, p, *answer) for p, answer in zip(prompts, answers, strict=True))
    print(f"{same} of {PROMPTS * TOKENS} tokens of the adapter beside its base are")
    assert same > 0.8 * PROMPTS * TOKENS
