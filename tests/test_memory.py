"""The plan: what it says a step holds is what the allocator sees, and what it proposes fits."""

import dataclasses
import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_ft import adapters, base, cli, memory, tasks, train
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.data import formats
from lora_ft.errors import ConfigError, UnsupportedModelError
from lora_ft.memory import ledger
from lora_ft.system import devices
from lora_kernels import operators, slabs
from tests import tiny
from tests.allocations import PeakOfStep, held

CLOSE = 0.1
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def settings(
    task: str, base_name: str, *, rank: int = 8, length: int = 256, quant: str = "nf4", **of_train
) -> RunConfig:
    return RunConfig(
        task=task,
        base=base_name,
        out=Path("unused"),
        quant=quant,
        lora=LoraConfig(rank=rank),
        data=DataConfig(max_length=length),
        train=TrainConfig(**{"dtype": "float32", "batch_size": 4, "steps": 2, **of_train}),
    )


def measured(config: RunConfig, folder: Path) -> int:
    """Returns what the second step of a real training holds, its rows as long as they may be."""
    before = held()
    task = tasks.get(config.task, {"labels": list(tiny.LABELS)} if config.task == "classify" else None)
    loaded = base.load(
        config.base,
        quant=config.quant,
        model_class=task.model_class,
        dtype=config.train.dtype,
        device="cpu",
        config_changes=task.config_changes(),
    )
    task.tokenizer, task.max_length = loaded.tokenizer, config.data.max_length
    model = adapters.attach(loaded, config.lora, peft_task=task.peft_task)
    rows = [filled(task.longest(), seed) for seed in range(2 * config.train.batch_size * config.train.accumulate)]
    peak = PeakOfStep(before)
    train.fit(task, loaded, model, rows, [], dataclasses.replace(config, out=folder), [peak])
    return peak.peak


def filled(row: tasks.Features, seed: int) -> tasks.Features:
    """Returns a row with words in it, of which there are gradients."""
    draw = random.Random(seed)
    words = [draw.randrange(10, tiny.VOCAB) for _ in row["input_ids"]]
    return {**row, "input_ids": words, "labels": words if isinstance(row["labels"], list) else seed % 2}


def planned(config: RunConfig) -> int:
    plan = memory.plan(config, "cpu")
    assert plan.asked.peak_bytes == sum(plan.asked.bytes.values())
    return plan.asked.peak_bytes


SMALL = {
    "nf4": ("chat", "llama", {}),
    "dense": ("chat", "llama", {"quant": "none", "rank": 32}),
    "checkpointing": ("chat", "llama", {"checkpoint_activations": True, "length": 512}),
    "accumulation": ("complete", "gpt2", {"quant": "none", "accumulate": 3, "batch_size": 2}),
    "padded": ("complete", "gpt-neox", {"length": 128}),
    "int8": ("chat", "qwen3", {"quant": "int8"}),
    "8 bits": ("complete", "llama", {"rank": 64, "length": 32, "batch_size": 1, "optimizer": "adamw-8bit"}),
    "paged, where nothing pages": ("complete", "gpt2", {"rank": 96, "length": 32, "optimizer": "adamw-paged-8bit"}),
    "encoder": ("classify", "bert", {"batch_size": 8}),
    "two texts": ("seq2seq", "t5", {"length": 128}),
}


@pytest.mark.parametrize("case", SMALL)
def test_a_step_holds_what_the_plan_says(case, tmp_path, caplog):
    task, architecture, options = SMALL[case]
    folder = str(tiny.model_folder(tmp_path / "base", architecture))
    config = settings(task, folder, **options)
    found, said = measured(config, tmp_path / "run"), planned(config)
    print(case, found, said, said / found)
    assert said == pytest.approx(found, rel=CLOSE)


REAL = {
    "nf4": ("smollm2-135m", {"dtype": "bfloat16", "length": 512}),
    "dense, of rank 64": ("smollm2-135m", {"dtype": "bfloat16", "quant": "none", "rank": 64, "length": 256}),
    "checkpointing": ("smollm2-135m", {"dtype": "bfloat16", "checkpoint_activations": True, "length": 1024}),
    "one long row": ("smollm2-135m", {"dtype": "bfloat16", "batch_size": 1, "length": 1024}),
    "int8": ("smollm2-135m", {"dtype": "bfloat16", "quant": "int8", "batch_size": 2, "length": 256}),
    "encoder": ("minilm", {"dtype": "float32", "batch_size": 16, "length": 256, "rank": 16}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL)
def test_a_step_of_a_real_model_holds_what_the_plan_says(case, tmp_path):
    name, options = REAL[case]
    config = settings("classify" if name == "minilm" else "chat", name, **options)
    found, said = measured(config, tmp_path / "run"), planned(config)
    print(f"{case}: {found / 2**20:.1f} MiB, planned {said / 2**20:.1f}, {said / found - 1:+.1%}")
    assert said == pytest.approx(found, rel=CLOSE)


def llama_8b(folder: Path, **changes) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    return str(folder)


def test_llama_8b_is_planned_of_its_configuration_alone(tmp_path):
    config = settings("chat", llama_8b(tmp_path / "llama"), rank=16, length=2048, dtype="auto", batch_size=1)
    began = time.process_time()
    plan = memory.plan(config, "RTX 3060")
    assert time.process_time() - began < 60
    layers = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    packed = layers // 2 + layers // 64 + 4 * (layers // 64 // 256)
    whole = 2 * (2 * 128256 * 4096 + 65 * 4096)
    # Beside them a few small tables: codes of scales, frequencies of rotations.
    assert plan.asked.bytes[memory.WEIGHTS] == pytest.approx(packed + whole, rel=1e-3)
    adapter = 4 * 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert plan.asked.bytes[memory.ADAPTERS] == adapter
    assert plan.asked.bytes[memory.OPTIMIZER] == pytest.approx(2 * adapter, rel=1e-3)
    # Twice the products with all weights, once forwards and once backwards; attention and adapters come on top.
    assert 1 < plan.asked.flops / (2 * 2 * 2048 * (layers + 128256 * 4096)) < 1.15
    # A card of 12 GiB takes a row only where activations are computed again.
    assert not plan.fits
    assert plan.fitting is not None
    assert plan.fitting.checkpointing == "on"
    assert plan.fitting.peak_bytes < plan.device.usable_bytes < plan.asked.peak_bytes
    assert plan.fitting.flops > 1.3 * plan.asked.flops


@pytest.mark.parametrize("device", ["RTX 3060", "cpu"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adamw-paged-8bit"])
def test_the_moments_of_each_optimizer_are_counted(tmp_path, optimizer, device):
    two_layers = llama_8b(tmp_path / "llama", num_hidden_layers=2)
    config = settings("chat", two_layers, length=64, dtype="auto", batch_size=1, optimizer=optimizer)
    # By projection and layer: A of 8 x inputs and B of outputs x 8. B of keys and values is the smallest, 8192.
    sizes = [8 * width for width in (*[4096] * 4, *[4096, 1024, 1024, 4096], *[4096] * 2, 14336, *[14336] * 2, 4096)]
    if optimizer == "adamw":
        wanted = sum(2 * 4 * size for size in sizes)
    elif optimizer == "adamw-8bit" or device == "cpu":
        wanted = sum(2 * (size + 4 * size // 256) for size in sizes)
    else:  # of what is paged the scales stay
        wanted = sum(2 * (4 * size // 256 + (size if size < 100_000 else 0)) for size in sizes)
        assert max(sizes) > 100_000
    planned = memory.plan(config, device).asked
    assert planned.bytes[memory.OPTIMIZER] == pytest.approx(2 * wanted, rel=1e-3)
    assert planned.peak_bytes == sum(planned.bytes.values())


# What is proposed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.model_folder(tmp_path_factory.mktemp("small") / "base"))


def on(plan: memory.Plan, usable: int, monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> memory.Plan:
    """Returns the plan for a device with so much memory."""
    monkeypatch.setattr(devices, "find", lambda asked: dataclasses.replace(plan.device, usable_bytes=usable))
    return memory.plan(config)


def test_what_does_not_fit_is_split_with_the_same_global_batch(small, monkeypatch):
    config = settings("chat", small, batch_size=6, accumulate=2)
    whole = memory.plan(config, "cpu")
    assert whole.fits
    assert whole.fitting is not None
    assert (whole.fitting.rows, whole.options()) == (12, "--train.batch-size 12 --train.accumulate 1")
    half = on(whole, whole.asked.peak_bytes * 6 // 10, monkeypatch, config)
    assert not half.fits
    assert half.fitting is not None
    assert (half.fitting.rows, half.accumulate, half.fitting.checkpointing) == (3, 4, "off")
    assert half.options() == "--train.batch-size 3 --train.accumulate 4"
    changed = settings("chat", small, batch_size=3, accumulate=4)
    assert memory.plan(changed).asked.peak_bytes == half.fitting.peak_bytes <= half.device.usable_bytes


def test_the_dense_copy_of_4_bit_weights_goes_first(small, monkeypatch):
    config = settings("chat", small, batch_size=1, length=64)
    whole = memory.plan(config, "cpu")
    assert whole.fits
    assert whole.asked.bytes[memory.DENSE]
    tight = on(whole, whole.asked.peak_bytes - 1, monkeypatch, config)
    assert tight.fitting is not None
    assert tight.options() == "--train.batch-size 1 --train.accumulate 1 --train.base-cache off"
    assert tight.fitting.bytes[memory.DENSE] == 0
    off = dataclasses.replace(config, train=dataclasses.replace(config.train, base_cache="off"))
    assert memory.plan(off).asked.peak_bytes == tight.fitting.peak_bytes <= tight.device.usable_bytes


def test_activations_are_computed_again_where_one_row_does_not_fit(small, monkeypatch):
    config = settings("chat", small, batch_size=2, length=512, base_cache="off")
    whole = memory.plan(settings("chat", small, batch_size=1, length=512, accumulate=2, base_cache="off"), "cpu")
    tight = on(whole, whole.asked.peak_bytes - 1, monkeypatch, config)
    assert tight.fitting is not None
    assert tight.fitting.checkpointing == "on"
    assert "--train.checkpoint-activations" in tight.options()
    assert tight.fitting.peak_bytes <= tight.device.usable_bytes
    none = on(whole, whole.asked.bytes[memory.WEIGHTS], monkeypatch, config)
    assert none.fitting is None


def test_the_longest_rows_of_a_file_are_planned_for(small, tmp_path):
    file = tmp_path / "rows.jsonl"
    words = [3, 40, 9, 61]
    rows = [{"prompt": "w1", "completion": " ".join(["w2"] * count)} for count in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings("complete", small, batch_size=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(file)))
    plan = memory.plan(config, "cpu")
    task = tasks.get("complete")
    task.prepare(tiny.tokenizer(), 256)
    lengths = sorted(len(row["input_ids"]) for row in tasks.featurize(task, formats.read(str(file))))
    assert plan.asked.tokens == sum(lengths[-2:])
    assert plan.tokens_per_epoch == sum(lengths)
    assert plan.seconds_per_epoch is not None
    assert plan.seconds_per_epoch > 0


def test_planning_leaves_nothing_changed(small):
    before = held()
    memory.plan(settings("chat", small), "RTX 3060")
    assert held() - before < 2**20
    assert torch.zeros(1).untyped_storage().nbytes() == 4


@pytest.mark.parametrize("device", ["cpu", "RTX 3060", "T4"])
@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize(
    ("task", "architecture"),
    [("chat", "qwen3"), ("classify", "bert"), ("seq2seq", "t5"), ("tag", "llama"), ("embed", "bert")],
)
def test_every_kind_is_planned_for_every_device(tmp_path, task, architecture, quant, device):
    folder = str(tiny.model_folder(tmp_path / "base", architecture))
    dtype = "float32" if device == "cpu" else "auto"
    config = settings(task, folder, quant=quant, dtype=dtype, length=32, batch_size=2)
    plan = memory.plan(config, device)
    if quant == "int8":  # whose layers change as they are used
        assert plan.asked.bytes == memory.plan(config, device).asked.bytes
    stored = sum(tensor.nbytes for tensor in load_file(Path(folder) / "model.safetensors").values())
    of_float32 = {"nf4": 0.9, "int8": 0.9, "none": 1.01}[quant] * (1 if device == "cpu" else 0.55)
    assert plan.asked.bytes[memory.WEIGHTS] < of_float32 * stored + 2**16
    assert slabs.SLAB == 2**23


def test_the_longest_sources_and_targets_are_planned_for(tmp_path):
    folder = str(tiny.model_folder(tmp_path / "base", "t5"))
    file = tmp_path / "rows.jsonl"
    rows = [("w1 " * 40, "w2 w3"), ("w1 w2", "w3 " * 60)] * 2
    file.write_text("".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in rows))
    config = settings("seq2seq", folder, batch_size=2, quant="none")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(file)))
    long_targets = memory.plan(config, "cpu").asked
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(tmp_path / "short.jsonl")))
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in rows[::2]))
    assert long_targets.peak_bytes > memory.plan(short, "cpu").asked.peak_bytes


def test_what_starts_from_numbers_is_refused(small):
    config = settings("chat", small)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dora=True))
    with pytest.raises(ConfigError, match=r"lora.dora cannot be planned"):
        memory.plan(config, "cpu")


def test_a_model_that_asks_for_numbers_is_told_with_what_to_do(small, monkeypatch):
    from lora_ft.tasks.causal import Causal

    monkeypatch.setattr(Causal, "loss", lambda self, model, batch: next(model.parameters()).sum().item())
    with pytest.raises(UnsupportedModelError, match=r"cannot be planned: its step depends on numbers.*train it with"):
        memory.plan(settings("chat", small), "cpu")


def test_packing_is_refused_where_rows_cannot_share_one(tmp_path):
    config = settings("complete", str(tiny.model_folder(tmp_path / "base", "openai-gpt")), quant="none")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=True))
    with pytest.raises(UnsupportedModelError, match=r"data.packing: .* its attention is its own"):
        memory.plan(config, "cpu")


def test_what_operators_hold_is_counted_by_the_names_they_have():
    assert set(ledger._HOLD | ledger._HOLD_ON_CPU) <= set(operators.bodies)


# Devices and bases


@pytest.mark.parametrize(
    ("asked", "kind", "gib"),
    [
        ("RTX 3060", "cuda", 11.8),
        ("rtx3060", "cuda", 11.8),
        ("NVIDIA GeForce RTX 4090", "cuda", 23.6),
        ("12GiB", "cuda", 12),
        ("24 GB", "cuda", 24e9 / 2**30),
    ],
)
def test_devices(asked, kind, gib):
    found = devices.find(asked)
    assert found.kind == kind
    assert found.usable_bytes == pytest.approx((gib - 0.5) * 2**30 * 0.95)


def test_a_card_without_bfloat16_computes_in_float16():
    assert devices.find("T4").dtype == "float16"


def test_a_processor_with_so_much_for_the_process():
    whole, less = devices.find("cpu:64GiB"), devices.find("cpu:8GiB")
    assert whole.usable_bytes - less.usable_bytes == pytest.approx(56 * 2**30, rel=0.01)
    assert less.usable_bytes < 8 * 2**30


@pytest.mark.parametrize("asked", ["RTX 9999", "12", "gpu:12GiB", "", "12 apples", "-3GiB"])
def test_what_is_no_device(asked):
    with pytest.raises(ConfigError, match="is no device known here: take a card"):
        devices.find(asked)


def test_the_command(small, capsys):
    words = ["chat", "--base", small, "--data.max-length", "64", "--device", "RTX 3060"]
    assert cli.main(["plan", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["asked"]["peak_bytes"] == sum(told["asked"]["bytes"].values())
    assert cli.main(["plan", *words, "--out", "runs/x"]) == 0
    said = capsys.readouterr().out
    assert "RTX 3060 has 10.73 GiB for tensors." in said
    assert "It fits." in said
