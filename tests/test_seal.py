"""The seal: what it keeps, and that `verify` notices each way an adapter or a merged model can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft import adapters, merge, replies, seal
from lora_ft.errors import AdapterError, ProofError
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
    assert {c.name for c in verdict.checks} >= {"seal", "tensors", "heads", "finite", "lora_B", "base", "load", "tied"}


def test_zeroed_lora_b_fails(causal: tiny.Run, tmp_path: Path) -> None:
    def zero(tensors: Tensors) -> Tensors:
        return {k: torch.zeros_like(t) if ".lora_B" in k else t for k, t in tensors.items()}

    found = failed(seal.verify(changed(causal, tmp_path, zero)))
    assert {"lora_B", "replay", "effect"} <= found
    assert not found & {"tensors", "base", "base replay", "tied", "load"}


def test_a_renamed_prefix_fails(causal: tiny.Run, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        return {k.replace("base_model.model.model.", "base_model.model."): t for k, t in tensors.items()}

    assert failed(seal.verify(changed(causal, tmp_path, rename))) == {"tensors", "load"}


def test_a_dropped_head_fails(classifier: tiny.Run, tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> Tensors:
        return {k: t for k, t in tensors.items() if ".classifier." not in k}

    assert failed(seal.verify(changed(classifier, tmp_path, drop))) == {"tensors", "heads", "load"}


def test_a_number_that_is_none_fails(causal: tiny.Run, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        name = next(iter(tensors))
        tensors[name][0, 0] = float("nan")
        return tensors

    assert {"finite", "replay"} <= failed(seal.verify(changed(causal, tmp_path, spoil)))


def test_a_file_that_is_no_safetensors_fails(causal: tiny.Run, tmp_path: Path) -> None:
    folder = copied(causal, tmp_path)
    (folder / adapters.WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert failed(seal.verify(folder)) == {"tensors", "load"}


def test_another_base_fails(causal: tiny.Run, tmp_path: Path) -> None:
    other = tiny.model_folder(tmp_path / "other", seed=1)
    verdict = seal.verify(causal.folder, base_name=str(other))
    assert failed(verdict) == {"base", "load"}
    assert verdict.as_dict()["kl_live"] is None


def test_other_base_weights_fail_by_their_replies_too(
    causal: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a digest lied, what the base says would still give it away."""
    other = adapters.sources.resolve(str(tiny.model_folder(tmp_path / "other", seed=1)))
    monkeypatch.setattr(adapters, "find_base", lambda record, base_name=None: other)
    found = failed(seal.verify(causal.folder))
    assert {"base replay", "replay"} <= found
    assert "base" not in found


def test_embeddings_that_came_untied_fail(causal: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = adapters.load

    def untied(*args: Any) -> adapters.Loaded:
        loaded = load(*args)
        head = loaded.base.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        return loaded

    monkeypatch.setattr(adapters, "load", untied)
    assert failed(seal.verify(causal.folder)) == {"tied"}


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
    adapters.save(run.model, run.folder)
    verdict = seal.verify(run.folder)
    assert verdict.passed, failed(verdict)
    assert verdict.kl_live > 0


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


def test_a_merge_of_another_kind_or_none_fails(causal: tiny.Run, merged_classifier: Path, tmp_path: Path) -> None:
    assert "load" in failed(seal.verify(causal.folder, model_folder=tmp_path))
    assert "load" in failed(seal.verify(causal.folder, model_folder=tmp_path / "absent"))
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
    assert seal.kl(ids, logp, second) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert seal.kl(ids, logp, first) == pytest.approx(0, abs=1e-7)
    full = torch.nn.functional.kl_div(
        second.log_softmax(1), first.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert seal.kl(ids, logp, second) <= float(full)


def test_kl_of_few_classes_has_no_rest() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(7, 3), torch.randn(7, 3)
    ids, logp = replies.likeliest([first])
    full = torch.nn.functional.kl_div(
        second.log_softmax(1), first.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert seal.kl(ids, logp, second) == pytest.approx(float(full), rel=1e-5)


def failed(verdict: seal.Verdict) -> set[str]:
    """Returns the names of the checks that failed, having checked that the verdict says so."""
    names = {check.name for check in verdict.checks if not check.passed}
    assert verdict.passed is (not names)
    return names


def copied(run: tiny.Run, there: Path) -> Path:
    """Returns a copy of the run's folder."""
    return Path(shutil.copytree(run.folder, there / "copy"))


def changed(run: tiny.Run, there: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Returns a copy of the run's folder whose adapter went through `change`."""
    folder = copied(run, there)
    tensors = {name: t.clone() for name, t in load_file(folder / adapters.WEIGHTS).items()}
    save_file(
        {k: t.contiguous() for k, t in change(tensors).items()}, folder / adapters.WEIGHTS, metadata={"format": "pt"}
    )
    return folder
