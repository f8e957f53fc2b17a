"""The seal: what it keeps, and that `verify` notices each way an adapter or a merged model can be broken."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_ft import adapters, base, merge, saved, seal, tasks
from lora_ft.errors import AdapterError, ProofError
from lora_ft.model import modes
from lora_ft.proof import environment, recorded, replies
from lora_ft.proof.verdict import Verdict
from tests import tiny

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    there = tmp_path_factory.mktemp("causal")
    return tiny.run(there / "adapter", tiny.model_folder(there / "base"), quant="nf4")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    there = tmp_path_factory.mktemp("classifier")
    return tiny.run(there / "adapter", tiny.model_folder(there / "base", "bert"), task="classify", quant="none")


@pytest.fixture(scope="module")
def merged(causal: tiny.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    merge.merge(causal.folder, out)
    return out


@pytest.fixture(scope="module")
def merged_classifier(classifier: tiny.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    merge.merge(classifier.folder, out)
    return out


def test_a_sound_adapter_passes(causal: tiny.Run) -> None:
    verdict = seal.verify(causal.folder)
    assert verdict.passed, failed(verdict)
    assert verdict.kl_live <= 1e-9
    assert verdict.kl_effect > 0.1
    assert json.loads(json.dumps(verdict.as_dict()))["passed"] is True
    assert {c.name for c in verdict.checks} >= {
        "seal",
        "file",
        "tensors",
        "heads",
        "finite",
        "lora_B",
        "base",
        "load",
        "tied",
    }


def test_zeroed_lora_b_fails(causal: tiny.Run, tmp_path: Path) -> None:
    def zero(tensors: Tensors) -> Tensors:
        return {k: torch.zeros_like(t) if ".lora_B" in k else t for k, t in tensors.items()}

    found = failed(seal.verify(changed(causal, tmp_path, zero)))
    assert {"lora_B", "replay", "effect"} <= found
    assert not found & {"tensors", "base", "base replay", "tied", "load"}


def test_a_renamed_prefix_fails(causal: tiny.Run, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        return {k.replace("base_model.model.model.", "base_model.model."): t for k, t in tensors.items()}

    assert failed(seal.verify(changed(causal, tmp_path, rename))) == {"file", "tensors", "load"}


def test_a_dropped_head_fails(classifier: tiny.Run, tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> Tensors:
        return {k: t for k, t in tensors.items() if ".classifier." not in k}

    assert failed(seal.verify(changed(classifier, tmp_path, drop))) == {"file", "tensors", "heads", "load"}


def test_a_number_that_is_none_fails(causal: tiny.Run, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        name = next(iter(tensors))
        tensors[name][0, 0] = float("nan")
        return tensors

    assert {"finite", "load"} <= failed(seal.verify(changed(causal, tmp_path, spoil)))


def test_a_file_that_is_no_safetensors_fails(causal: tiny.Run, tmp_path: Path) -> None:
    folder = copied(causal, tmp_path)
    (folder / saved.WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert failed(seal.verify(folder)) == {"file", "tensors", "load"}


def test_another_base_fails(causal: tiny.Run, tmp_path: Path) -> None:
    other = tiny.model_folder(tmp_path / "other", seed=1)
    verdict = seal.verify(causal.folder, base_name=str(other))
    assert failed(verdict) == {"base", "load"}
    assert verdict.as_dict()["kl_live"] is None


def test_other_base_weights_fail_by_their_replies_too(
    causal: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a digest lied, what the base says would still give it away."""
    other = saved.sources.resolve(str(tiny.model_folder(tmp_path / "other", seed=1)))
    monkeypatch.setattr(saved, "find_base", lambda folder, record, base_name=None: other)
    found = failed(seal.verify(causal.folder))
    assert {"base replay", "replay"} <= found
    assert "base" not in found


def test_embeddings_that_came_untied_fail(causal: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = saved.load

    def untied(*args: Any) -> saved.Loaded:
        loaded = load(*args)
        head = loaded.base.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        return loaded

    monkeypatch.setattr(saved, "load", untied)
    assert failed(seal.verify(causal.folder)) == {"tied"}


def swap_words(folder: Path) -> None:
    """Gives two words of a vocabulary each other's ids."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    words = tree["model"]["vocab"]
    words["w3"], words["w4"] = words["w4"], words["w3"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def replace_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


@pytest.mark.parametrize("change", [swap_words, replace_template])
def test_another_tokenizer_or_template_fails(
    causal: tiny.Run, merged: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """The replay holds ids, so only a digest can tell."""
    folder, model = copied(causal, tmp_path), Path(shutil.copytree(merged, tmp_path / "model"))
    change(folder)
    change(model)
    assert failed(seal.verify(folder)) == {"tokenizer"}
    assert failed(seal.verify(causal.folder, model_folder=model)) == {"tokenizer"}


def test_a_tokenizer_written_anew_is_the_same(causal: tiny.Run, tmp_path: Path) -> None:
    folder = copied(causal, tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text())))
    base.load_tokenizer(folder).save_pretrained(folder)
    assert not failed(seal.verify(folder))


def test_an_altered_or_missing_seal_fails(causal: tiny.Run, tmp_path: Path) -> None:
    folder = copied(causal, tmp_path)
    stored = load_file(folder / seal.FILES[0])
    stored["adapter_logp"] -= 0.1
    save_file(stored, folder / seal.FILES[0])
    assert failed(seal.verify(folder)) == {"seal"}
    (folder / seal.FILES[1]).unlink()
    assert failed(seal.verify(folder)) == {"seal"}


def test_int8_noise_is_fine(tmp_path: Path) -> None:
    run = tiny.run(tmp_path / "adapter", tiny.model_folder(tmp_path / "base"), quant="int8")
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    saved.save(run.model, run.folder)
    verdict = seal.verify(run.folder)
    # It replays, although the file is not the one that was sealed.
    assert failed(verdict) == {"file"}
    assert verdict.kl_live > 0


def test_a_file_that_only_its_digest_tells_apart_fails(causal: tiny.Run, tmp_path: Path) -> None:
    def touch(tensors: Tensors) -> Tensors:
        name = next(name for name in tensors if ".lora_B" in name)
        tensors[name][0, 0] += 1e-6
        return tensors

    assert failed(seal.verify(changed(causal, tmp_path, touch))) == {"file"}


@pytest.mark.parametrize("factor", [0.0, 0.5, 100.0, float("nan")])
def test_an_effect_that_the_replies_do_not_have_fails(causal: tiny.Run, tmp_path: Path, factor: float) -> None:
    """It sets how far a replay may be off."""
    folder = copied(causal, tmp_path)
    change_json(folder / seal.FILES[1], kl_effect=factor * seal.read(folder).effect)
    verdict = seal.verify(folder)
    assert failed(verdict) == {"seal"}
    assert ("NaN" if math.isnan(factor) else "kl_effect") in verdict.checks[0].found


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kl_effect": "much"}, 'kl_effect is "much", not a number'),
        ({"heads": None, "classes": 1.5}, "classes is 1.5, not a whole number; heads is None, not a list"),
    ],
)
def test_a_damaged_seal_says_where(causal: tiny.Run, tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    folder = copied(causal, tmp_path)
    change_json(folder / seal.FILES[1], **fields)
    with pytest.raises(AdapterError, match=rf"seal\.json: {told}"):
        seal.read(folder)


def test_nothing_is_sealed_that_nothing_reads(causal: tiny.Run) -> None:
    """Every entry is compared with something, or tells people what made the seal."""
    assert set(causal.seal.record) == {*seal.RECORD, "format", "lora_ft", "positions"}  # type: ignore[union-attr]
    kept = causal.seal
    assert kept is not None
    assert kept.effect == pytest.approx(
        replies.distance(kept.adapter_ids, kept.adapter_logp, _base_replies(causal)), rel=1e-4
    )


def test_a_folder_that_does_not_exist_is_no_failed_check(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere: there is no such folder"):
        seal.verify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("environment.json", [], "environment.json: it holds a list, not an object"),
        ("environment.json", {"base": None}, "environment.json: base is None, not an object"),
        ("environment.json", {"dtype": 16}, "environment.json: dtype is 16, not a string"),
        ("environment.json", {"dtype": "load"}, 'environment.json: dtype is "load", not one of float32'),
        ("environment.json", {"base": {"name": "x"}}, "base.source is missing; .*base.weights_sha256 is missing"),
        ("environment.json", {"task": {"colour": 1}}, "environment.json: task is {'colour': 1}, which does not fit"),
        ("environment.json", {"task": 3}, "environment.json: task is 3, which does not fit"),
        ("adapter_config.json", [], "adapter_config.json: it holds a list, not an object"),
        ("adapter_config.json", {"r": "8"}, 'adapter_config.json: r is "8", not a whole number'),
        ("adapter_config.json", {"r": True}, "adapter_config.json: r is True, not a whole number"),
        ("adapter_config.json", {"r": -1}, "adapter_config.json: r is -1, not a whole number from 1 to 4096"),
        ("adapter_config.json", {"peft_type": "IA3"}, 'adapter_config.json: peft_type is "IA3", not LORA'),
        ("adapter_config.json", {"bias": 7}, "adapter_config.json: bias is 7, not none"),
        ("adapter_config.json", {"target_modules": ["nowhere"]}, "adapter_config.json: PEFT cannot use it"),
    ],
)
def test_a_damaged_folder_says_where(
    causal: tiny.Run, tmp_path: Path, file: str, change: dict[str, Any] | list[Any], told: str
) -> None:
    folder = copied(causal, tmp_path)
    if isinstance(change, list):
        (folder / file).write_text("[]")
    else:
        change_json(folder / file, **change)
    with pytest.raises(AdapterError, match=told):
        saved.load(folder, device="cpu")
    assert failed(seal.verify(folder, device="cpu")) >= {"load"}


@pytest.mark.parametrize("file", ["environment.json", "adapter_config.json"])
def test_a_lost_key_is_named(causal: tiny.Run, tmp_path: Path, file: str) -> None:
    """Each key by itself: what is read without having been looked for would be a traceback."""
    folder = copied(causal, tmp_path)
    whole = json.loads((folder / file).read_text())
    wanted = recorded.RECORD if file == environment.FILE else saved.SETTINGS
    assert wanted.keys() <= whole.keys()
    for key in wanted:
        (folder / file).write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(AdapterError, match=rf"{file}: {key} is missing"):
            saved.load(folder, device="cpu")


def test_a_configuration_cannot_name_modules_to_import(causal: tiny.Run, tmp_path: Path) -> None:
    folder = copied(causal, tmp_path)
    change_json(folder / saved.CONFIG, megatron_config={"a": 1}, megatron_core="antigravity")
    with pytest.raises(AdapterError, match="megatron_config has PEFT import the module"):
        saved.load(folder, device="cpu")
    # PEFT writes the name of the module into every file.
    change_json(folder / saved.CONFIG, megatron_config=None)
    assert saved.load(folder, device="cpu").model.peft_config["default"].megatron_core != "antigravity"


def test_another_base_is_refused_with_the_list_of_what_differs(causal: tiny.Run, tmp_path: Path) -> None:
    narrow = tiny.model_folder(tmp_path / "narrow", intermediate_size=48, num_hidden_layers=1)
    with pytest.raises(AdapterError, match="an adapter works on its own base only") as told:
        saved.load(causal.folder, str(narrow), "cpu")
    message = str(told.value)
    assert "model.layers.0.mlp.down_proj: the adapter is made for 128 inputs, this base's weight is [64, 48]" in message
    assert "model.layers.1.mlp.down_proj: the adapter changes it, and this base has none" in message
    same = tiny.model_folder(tmp_path / "same", seed=1)
    with pytest.raises(AdapterError, match="the numbers in the weights; the layers that the adapter changes have"):
        saved.load(causal.folder, str(same), "cpu")


# The dtype


@pytest.mark.parametrize(
    ("architecture", "task", "lora"),
    [
        ("bert", "classify", {}),
        ("llama", "complete", {"save_modules": ("embed_tokens",)}),
        ("llama", "complete", {"init": "eva"}),
    ],
    ids=lambda value: str(value),
)
def test_what_is_trained_is_float32_on_a_base_of_16_bits(
    tmp_path: Path, architecture: str, task: str, lora: dict[str, Any]
) -> None:
    folder = tiny.model_folder(tmp_path / "base", architecture)
    run = tiny.run(tmp_path / "adapter", folder, task=task, quant="none", dtype="bfloat16", steps=10, **lora)
    batch = run.task.collate(run.rows)
    loaded = saved.load(run.folder, device="cpu")
    said = []
    for model in (run.model, loaded.model):
        assert adapters.trained(model).keys() == adapters.trained(run.model).keys()
        assert {p.dtype for p in adapters.trained(model).values()} == {torch.float32}
        assert next(p for p in model.parameters() if not p.requires_grad).dtype == torch.bfloat16
        with modes.evaluating(model):
            said.append(run.task.score(model, batch).logits_NV)
    assert torch.equal(*said)
    assert seal.verify(run.folder, device="cpu").passed
    stored = load_file(run.folder / saved.WEIGHTS)
    assert {t.dtype for t in stored.values()} == {torch.float32}
    # Plain PEFT, as anyone would.
    plain = base.load(str(folder), quant="none", model_class=run.task.model_class, dtype="float32", device="cpu",
                      config_changes=run.task.config_changes())  # fmt: skip
    model = peft.PeftModel.from_pretrained(plain.model, str(run.folder))
    found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert stored.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_small_step_of_a_head_is_not_rounded_away(tmp_path: Path, dtype: str) -> None:
    task = tasks.get("classify", {"labels": list(tiny.LABELS)})
    loaded = base.load(
        str(tiny.model_folder(tmp_path / "base", "bert")), quant="none", dtype=dtype, device="cpu",
        model_class=task.model_class, config_changes=task.config_changes(),
    )  # fmt: skip
    task.tokenizer = loaded.tokenizer
    model = adapters.attach(loaded, adapters.LoraConfig(rank=4), peft_task="SEQ_CLS")
    with modes.evaluating(model):
        assert task.score(model, task.collate(tiny.rows("classify"))).logits_NV.isfinite().all()
    head = next(p for name, p in adapters.trained(model).items() if "classifier" in name and p.ndim == 2)
    torch.nn.init.ones_(head)
    optimizer = torch.optim.AdamW([head], lr=1e-4, weight_decay=0.0)
    head.grad = torch.ones_like(head)
    optimizer.step()
    assert float((1 - head.detach()).mean()) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize(
    ("recorded", "device", "native", "used"),
    [
        ("float32", "cuda", True, "float32"),
        ("float16", "cuda:1", True, "float16"),
        ("bfloat16", "cuda", True, "bfloat16"),
        ("bfloat16", "cuda", False, "float16"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("float16", "cpu", False, "float16"),
    ],
)
def test_an_adapter_is_used_in_the_dtype_of_its_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recorded: str, device: str, native: bool,
    used: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    with caplog.at_level(logging.INFO, "lora_ft"):
        assert saved._dtype(recorded, device) == used
    assert ("no native bfloat16" in caplog.text) is (used != recorded)


def test_a_gpu_does_not_choose_another_dtype(causal: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run computed in float32; on a machine with a GPU that was forgotten."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> base.Base:
        asked.append((options["dtype"], options["device"]))
        raise AdapterError("enough")

    monkeypatch.setattr(base, "load", load)
    for device in (None, "cpu", "cuda"):
        with pytest.raises(AdapterError, match="enough"):
            saved.load(causal.folder, device=device)
    assert asked == [("float32", "cuda"), ("float32", "cpu"), ("float32", "cuda")]


def test_a_sound_merge_passes(causal: tiny.Run, merged: Path, classifier: tiny.Run, merged_classifier: Path) -> None:
    assert not failed(seal.verify(causal.folder, model_folder=merged))
    assert not failed(seal.verify(classifier.folder, model_folder=merged_classifier))


def test_a_merge_that_came_untied_fails(causal: tiny.Run, merged: Path, tmp_path: Path) -> None:
    model = shutil.copytree(merged, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1e-6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert failed(seal.verify(causal.folder, model_folder=model)) == {"tied"}
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    assert failed(seal.verify(causal.folder, model_folder=model)) == {"tied"}


def test_a_merge_without_its_head_fails(classifier: tiny.Run, merged_classifier: Path, tmp_path: Path) -> None:
    model = shutil.copytree(merged_classifier, tmp_path / "model")
    tensors = {k: t for k, t in load_file(model / "model.safetensors").items() if not k.startswith("classifier.")}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert {"tensors", "heads", "replay"} <= failed(seal.verify(classifier.folder, model_folder=model))


def test_a_merge_that_lost_the_adapter_fails(causal: tiny.Run) -> None:
    assert failed(seal.verify(causal.folder, model_folder=causal.base_folder)) == {"replay"}


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation_internal", "experts_implementation"])
def test_a_merged_model_cannot_name_kernels_to_fetch(
    causal: tiny.Run, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    fetch = lambda *_, **__: pytest.fail("a kernel was asked for")  # noqa: E731
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", fetch)
    model = Path(shutil.copytree(merged, tmp_path / "model"))
    change_json(model / "config.json", **{field: "evil/kernel"})
    verdict = seal.verify(causal.folder, model_folder=model)
    # A tokenizer is not read either beside such a configuration.
    assert failed(verdict) == {"tokenizer", "load"}
    assert all('names code to fetch, "evil/kernel"' in c.found for c in verdict.checks if not c.passed)
    change_json(model / "config.json", **{field: "flash_attention_2"})
    loaded = seal.load_merged(causal.task, model, "cpu")[0]
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config._experts_implementation != "flash_attention_2"


def test_a_merge_of_another_kind_or_none_fails(causal: tiny.Run, merged_classifier: Path, tmp_path: Path) -> None:
    assert "load" in failed(seal.verify(causal.folder, model_folder=tmp_path))
    with pytest.raises(AdapterError, match="absent: there is no such folder"):
        seal.verify(causal.folder, model_folder=tmp_path / "absent")
    wrong = seal.verify(causal.folder, model_folder=merged_classifier)
    assert failed(wrong) & {"architecture", "load"}


def test_an_adapter_without_effect_is_not_sealed(tmp_path: Path) -> None:
    run = tiny.run(tmp_path / "adapter", tiny.model_folder(tmp_path / "base"), sealed=False, steps=1)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    with pytest.raises(ProofError, match="no effect"):
        seal.make(run.task, run.base, run.model, run.rows, run.folder)


def test_the_same_run_gives_the_same_bytes(causal: tiny.Run, tmp_path: Path) -> None:
    folder = copied(causal, tmp_path)
    before = [(folder / name).read_bytes() for name in seal.FILES]
    seal.make(causal.task, causal.base, causal.model, causal.rows, folder)
    assert [(folder / name).read_bytes() for name in seal.FILES] == before


def test_the_seal_keeps_little_and_reads_back(causal: tiny.Run, tmp_path: Path) -> None:
    folder = copied(causal, tmp_path)
    long = {"input_ids": [5] * 900, "labels": [-100] * 300 + [7] * 600}
    made = seal.make(causal.task, causal.base, causal.model, [long, *tiny.rows("complete", 80)], folder)
    assert sum(len(batch["input_ids"]) for batch in made.batches) <= replies.ROWS
    assert max(batch["input_ids"].shape[1] for batch in made.batches) == replies.ROW_TOKENS
    assert max(int((batch["labels"] != -100).sum(dim=1).max()) for batch in made.batches) == replies.POSITIONS_PER_ROW
    assert made.adapter_ids.shape == (made.record["positions"], 20)
    again = seal.read(folder)
    assert torch.equal(again.adapter_logp, made.adapter_logp)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(again.batches, made.batches, strict=True) for k in a)
    assert (folder / seal.FILES[0]).stat().st_size < 1 << 20


def test_rows_without_a_label_cannot_be_sealed(causal: tiny.Run, tmp_path: Path) -> None:
    with pytest.raises(ProofError, match="position"):
        seal.make(causal.task, causal.base, causal.model, [{"input_ids": [5, 6], "labels": [-100, -100]}], tmp_path)


def test_read_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"seal\.safetensors and no seal\.json"):
        seal.read(tmp_path)


def test_kl_is_that_of_the_classes_kept_and_the_rest() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5, 50), torch.randn(5, 50)
    ids, logp = replies.likeliest([first])
    p, q = first.double().softmax(1).gather(1, ids), second.double().softmax(1).gather(1, ids)
    p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], dim=1) for x in (p, q))
    assert replies.kl(ids, logp, second) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert replies.kl(ids, logp, first) == pytest.approx(0, abs=1e-7)
    full = torch.nn.functional.kl_div(
        second.log_softmax(1), first.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert replies.kl(ids, logp, second) <= float(full)


def test_kl_of_few_classes_has_no_rest() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(7, 3), torch.randn(7, 3)
    ids, logp = replies.likeliest([first])
    full = torch.nn.functional.kl_div(
        second.log_softmax(1), first.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert replies.kl(ids, logp, second) == pytest.approx(float(full), rel=1e-5)


def failed(verdict: Verdict) -> set[str]:
    """Returns the names of the checks that failed, having checked that the verdict says so."""
    names = {check.name for check in verdict.checks if not check.passed}
    assert verdict.passed is (not names)
    return names


def change_json(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _base_replies(run: tiny.Run) -> list[torch.Tensor]:
    with modes.without(run.model):
        return replies.ask(run.task, run.model, run.seal.batches)  # type: ignore[union-attr]


def copied(run: tiny.Run, there: Path) -> Path:
    """Returns a copy of the run's folder."""
    return Path(shutil.copytree(run.folder, there / "copy"))


def changed(run: tiny.Run, there: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Returns a copy of the run's folder whose adapter went through `change`."""
    folder = copied(run, there)
    tensors = {name: t.clone() for name, t in load_file(folder / saved.WEIGHTS).items()}
    save_file(
        {k: t.contiguous() for k, t in change(tensors).items()}, folder / saved.WEIGHTS, metadata={"format": "pt"}
    )
    return folder
