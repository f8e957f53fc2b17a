"""Vectors of texts: what is contrasted, in however many passes; what is measured; that every library makes the same."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_ft import adapters, base, combine, config, merge, saved, seal, tasks, train
from lora_ft.cli import main
from lora_ft.commands.options import CombineConfig
from lora_ft.data import formats, vectors
from lora_ft.data.examples import Labelled, Match, Pair, Scored, Text
from lora_ft.errors import AdapterError, DataError, SourceError, UnsupportedModelError
from lora_ft.model import modes
from lora_ft.scoring import losses, retrieval
from lora_ft.tasks.embed import Embed
from lora_ft.training import gradcache, guard, trainers
from tests import tiny
from tests.test_replicas import done, launched, lines

KINDS = ["bert", "gpt2", "llama"]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tiny.model_folder(tmp_path_factory.mktemp("bases") / name, name) for name in KINDS}
    return made | {"still": tiny.model_folder(tmp_path_factory.mktemp("bases") / "still", "bert", **STILL)}


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(40, 280)}" for _ in range(count))


def examples(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns rows of many lengths, some of which share a text or a label."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    for number in range(count):
        topic = f"w{number % 5} w{number % 5 + 7}"
        text, other = f"{topic} {words(rng, rng.randrange(1, 7))}", f"{topic} {words(rng, rng.randrange(1, 4))}"
        if kind == "labels":
            made.append({"text": text, "label": f"c{number % 5}"})
        elif kind == "scores":
            made.append({"sentence1": text, "sentence2": other, "score": rng.randrange(-4, 5) / 4})
        else:
            # Every third row has the anchor of the one before, every fourth its positive.
            anchor = made[-1]["anchor"] if number % 3 == 2 else text
            made.append({"anchor": anchor, "positive": made[-1]["positive"] if number % 4 == 3 else other})
            if kind == "triplets":
                made[-1]["negative"] = made[-2]["positive"] if number % 5 == 4 else words(rng, 3)
    return made


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def options(base_folder: Path, rows: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "embed", "--base", str(base_folder), "--out", str(out), "--quant", "none", "--data.train", str(rows),
        "--train.dtype", "float32", "--lora.rank", "4", "--train.lr", "5e-3", *more,
    ]  # fmt: skip


def prepared(pooling: str = "mean") -> Embed:
    task = Embed(pooling)
    task.prepare(tiny.tokenizer(), 64)
    return task


def batch_of(kind: str, count: int = 12) -> tuple[tasks.Batch, list[Any]]:
    """Returns a batch and the examples in it."""
    task = prepared()
    fields = {"labels": Labelled, "scores": Scored}.get(kind, Match)
    made = [fields(f"a:{i}", *row.values()) for i, row in enumerate(examples(kind, count), start=1)]
    if kind == "labels":
        made.append(Labelled("a:99", made[0].text, "c3"))  # the text of another label
    return task.collate([task.features(example) for example in made]), made


# What is contrasted


def naive(kind: str, rows: list[Any], vector: torch.Tensor) -> list[float]:
    """Returns the loss of each row by loops over texts, as the docstrings put it."""
    if kind == "labels":
        texts = [(row.text, row.label, i, True) for i, row in enumerate(rows)]
    else:
        texts = []
        for row in rows:
            parts = [row.anchor, row.positive] + ([row.negative] if row.negative is not None else [])
            texts += [(text, row.anchor if i < 2 else None, len(texts) + i, i > 0) for i, text in enumerate(parts)]
    anchors = [t for i, t in enumerate(texts) if kind == "labels" or (t[1] is not None and not t[3])]
    found = []
    for text, group, place, _ in anchors:
        others = [t for t in texts if t[3] and t[2] != place]
        positives = [t for t in others if t[1] == group]
        same = {t[0] for t in positives} | {text}
        negatives = [t for t in others if t[1] != group and t[0] not in same]
        z = {t[2]: float(vector[place] @ vector[t[2]]) / 0.05 for t in others}
        below = sum(math.exp(z[t[2]]) for t in negatives)
        each = [-math.log(math.exp(z[t[2]]) / (math.exp(z[t[2]]) + below)) for t in positives]
        found.append(sum(each) / len(each) if each else 0.0)
    return found


@pytest.mark.parametrize("kind", ["labels", "pairs", "triplets"])
def test_each_anchor_tells_its_positives_from_the_negatives(kind: str) -> None:
    batch, rows = batch_of(kind)
    torch.manual_seed(0)
    vector = torch.nn.functional.normalize(torch.randn(len(batch["labels"]), 16, dtype=torch.float64), dim=1)
    anchors = (batch["labels"] != -100).nonzero()[:, 0]
    found = Embed().contrast(vector, batch, anchors)
    assert found.tolist() == pytest.approx(naive(kind, rows, vector), rel=1e-9, abs=1e-12)
    # Each mask matters: without what it hides, the loss is another.
    for key in ("text", "group"):
        spoiled = batch | {key: torch.where(batch[key] < 0, batch[key], torch.arange(len(batch[key])))}
        assert not torch.allclose(Embed().contrast(vector, spoiled, anchors), found)
    # A row that only fills a place is nothing to the others.
    task = prepared()
    features = [task.features(row) for row in rows]
    filled = task.collate([*features, features[3] | {"labels": -100}])
    more = torch.cat([vector, vector[: len(filled["labels"]) - len(vector)]])
    torch.testing.assert_close(Embed().contrast(more, filled, anchors), found)


def test_texts_with_a_score_learn_a_cosine() -> None:
    batch, rows = batch_of("scores")
    vector = torch.nn.functional.normalize(torch.randn(len(batch["labels"]), 16), dim=1)
    anchors = (batch["labels"] != -100).nonzero()[:, 0]
    wanted = [(float(vector[2 * i] @ vector[2 * i + 1]) - row.score) ** 2 for i, row in enumerate(rows)]
    assert Embed().contrast(vector, batch, anchors).tolist() == pytest.approx(wanted, abs=1e-6)


def test_rows_of_a_label_come_two_by_two_and_each_once() -> None:
    task = prepared()
    rows = [task.features(Labelled(f"a:{i}", f"w{i}", f"c{i % 7}")) for i in range(40)]
    draw = task.order(rows)
    assert draw is not None
    order, again, other = (list(draw(torch.Generator().manual_seed(seed))) for seed in (1, 1, 2))
    assert sorted(order) == list(range(40))
    assert order == again != other
    alone = sum(rows[a]["group"] != rows[b]["group"] for a, b in zip(order[::2], order[1::2], strict=True))
    assert alone <= 7 // 2 + 1
    assert task.order([task.features(Match("a:1", "w1", "w2"))]) is None


def test_rows_that_labels_leave_over_come_among_the_pairs() -> None:
    task = prepared()
    # Of each label three, so that a third of all rows is left over.
    rows = [task.features(Labelled(f"a:{i}", f"w{i}", f"c{i % 21}")) for i in range(63)]
    draw = task.order(rows)
    assert draw is not None
    for seed in range(5):
        order = list(draw(torch.Generator().manual_seed(seed)))
        assert sorted(order) == list(range(63))
        steps = [[rows[place]["group"] for place in order[at : at + 16]] for at in range(0, 63, 16)]
        assert all(len(set(groups)) < len(groups) for groups in steps)


def test_a_step_that_tells_no_text_from_another_is_skipped(bases: dict[str, Path], tmp_path: Path) -> None:
    task = prepared()
    given = [f"{label} w{place}" for place, label in enumerate("aabb" + "abcd" + "aaaa")]
    rows = [task.features(Labelled("a:1", text.partition(" ")[2], text[0])) for text in given]
    logged, after = trained(bases["still"], tmp_path / "out", rows, 2, 2, steps=3, streamed=True)
    skipped = [line for line in logged if line.get("event") == "step skipped"]
    assert [(line["reason"], line["rows"]) for line in skipped] == [
        (guard.UNTAUGHT, [4, 5, 6, 7]), (guard.UNTAUGHT, [8, 9, 10, 11]),
    ]  # fmt: skip
    # The momentum of the first step moves nothing in the others.
    _, once = trained(bases["still"], tmp_path / "once", rows[:4], 2, 2, steps=1, streamed=True)
    assert all(torch.equal(after[name], once[name]) for name in once)


# In however many passes


def trained(
    base_folder: Path,
    out: Path,
    rows: list[tasks.Features],
    size: int,
    accumulate: int = 1,
    steps: int = 6,
    **more: Any,
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Returns what a training logged of its steps, and its adapter."""
    task = prepared()
    loaded = base.load(str(base_folder), quant="none", model_class=task.model_class, dtype="float32")
    lora = config.LoraConfig(rank=4, dropout=more.pop("dropout", 0.0))
    sizes = config.TrainConfig(batch_size=size, accumulate=accumulate, steps=steps, lr=5e-3, dtype="float32")
    settings = config.RunConfig(task="embed", base="x", out=out, quant="none", lora=lora, train=sizes)
    model = adapters.attach(loaded, lora, peft_task=task.peft_task)
    given = train.Streamed(lambda: iter(rows)) if more.pop("streamed", False) else rows
    train.fit(task, loaded, model, given, [], settings)
    return lines(out), {name: p.detach() for name, p in adapters.trained(model).items()}


def features_of(kind: str, count: int) -> list[tasks.Features]:
    task, fields = prepared(), {"labels": Labelled, "scores": Scored}.get(kind, Match)
    return [task.features(fields(f"a:{i}", *row.values())) for i, row in enumerate(examples(kind, count))]


def require_same_steps(one: Path, other: Path) -> None:
    assert len(lines(one)) == len(lines(other))
    for before, after in zip(lines(one), lines(other), strict=True):
        for key in {"loss", "grad_norm", "tokens", "eval_loss"} & before.keys():
            assert after[key] == pytest.approx(before[key], rel=1e-3), (before, after)


@pytest.mark.parametrize("kind", ["labels", "scores", "triplets"])
def test_a_step_in_four_passes_is_that_in_one(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    rows = features_of(kind, 22)  # the last step of an epoch is a ragged one
    _, adapter = trained(bases["still"], tmp_path / "one", rows, 8)
    _, again = trained(bases["still"], tmp_path / "four", rows, 2, 4)
    require_same_steps(tmp_path / "one", tmp_path / "four")
    for name, tensor in adapter.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-2, atol=1e-4)


def test_the_gradient_of_four_passes_is_that_of_one(bases: dict[str, Path]) -> None:
    task = prepared()
    loaded = base.load(str(bases["still"]), quant="none", model_class=task.model_class, dtype="float32")
    model = adapters.attach(loaded, config.LoraConfig(rank=4), peft_task=task.peft_task)
    for parameter in adapters.trained(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = features_of("triplets", 12)
    task.loss(model, task.collate(rows)).backward()
    wanted = {name: p.grad.clone() for name, p in adapters.trained(model).items() if p.grad is not None}
    model.zero_grad()
    batches = [task.collate(rows[at : at + 3]) for at in range(0, 12, 3)]
    with torch.no_grad():
        found = [task.vectors(model, batch) for batch in batches]
    told = {key: torch.cat([batch[key] for batch in batches]) for key in ("labels", "text", "group", "candidate")}
    errors, gradient = gradcache.contrasted(task, torch.cat(found), told)
    sizes = [len(part) for part in found]
    for batch, error, part in zip(batches, errors.split(sizes), gradient.split(sizes), strict=True):
        loss = task.loss(model, {**batch, "gradient": part, "error": error})
        assert float(loss) == pytest.approx(float(error.sum()), rel=1e-5)
        loss.backward()
    assert len(wanted) == len(adapters.trained(model))
    for name, p in adapters.trained(model).items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5 * float(wanted[name].abs().max()))


def test_without_the_cache_a_pass_would_not_know_the_others(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = features_of("pairs", 8)
    whole, _ = trained(bases["still"], tmp_path / "all", rows, 2, 4, steps=1)
    monkeypatch.setattr(gradcache.GradientCache, "_fill", lambda self: None)
    few, _ = trained(bases["still"], tmp_path / "few", rows, 2, 4, steps=1)
    assert few[0]["loss"] < 0.9 * whole[0]["loss"]


def test_what_dropout_draws_is_the_same_both_times(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    real = Embed.vectors

    def watched(task: Embed, model: Any, batch: tasks.Batch) -> torch.Tensor:
        found = real(task, model, batch)
        made[found.requires_grad].append(found.detach())
        return found

    monkeypatch.setattr(Embed, "vectors", watched)
    trained(bases["bert"], tmp_path / "out", features_of("pairs", 10), 2, 3, steps=2, dropout=0.2)
    learned = made[True][1:]  # the first tries the longest batch
    assert len(learned) == len(made[False]) == 5
    for first, again in zip(made[False], learned, strict=True):
        assert torch.equal(first, again)
    assert len({float(part.sum()) for part in learned}) == 5


@pytest.mark.parametrize("short", ["looking", "learning"])
def test_what_dropout_draws_is_the_same_after_a_lack_of_memory(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    made: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    real, left = Embed.vectors, [True]

    def watched(task: Embed, model: Any, batch: tasks.Batch) -> torch.Tensor:
        found = real(task, model, batch)
        # In the second pass of the step.
        if left[0] and found.requires_grad == (short == "learning") and len(made[found.requires_grad]) == 1:
            left.clear()
            left.append(False)
            raise torch.OutOfMemoryError("out of memory")
        made[found.requires_grad].append(found.detach())
        return found

    monkeypatch.setattr(Embed, "vectors", watched)
    rows = features_of("pairs", 12)
    trained(bases["bert"], tmp_path / "out", rows, 4, 3, steps=1, streamed=True, dropout=0.2)
    assert not left[0]
    looked, learned = made[False][-6:], made[True][-6:]
    for first, again in zip(looked, learned, strict=True):
        assert torch.equal(first, again)


def test_texts_with_a_score_are_read_once_and_alone(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradcache.GradientCache, "_fill", lambda self: pytest.fail("of no use"))
    trained(bases["still"], tmp_path / "out", features_of("scores", 4), 2, 2, steps=1)
    rows = written(tmp_path / "rows.jsonl", examples("scores", 8))
    more = ["--train.batch-size", "1", "--train.steps", "2"]
    assert main(options(bases["bert"], rows, tmp_path / "one", *more, "--dry-run")) == 0
    assert main(options(bases["bert"], rows, tmp_path / "two", *more, "--dry-run", "--data.streaming")) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_does_not_fit_is_contrasted_whole_in_halves(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    # Streamed rows are not tried before the first step, in which the memory then gives out.
    rows = features_of("pairs", 12)
    trained(bases["still"], tmp_path / "whole", rows, 4, accumulate, steps=3, streamed=True)
    real = Embed.vectors

    def small(task: Embed, model: Any, batch: tasks.Batch) -> torch.Tensor:
        if len(batch["labels"]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(task, model, batch)

    monkeypatch.setattr(Embed, "vectors", small)
    trained(bases["still"], tmp_path / "halves", rows, 4, accumulate, steps=3, streamed=True)
    require_same_steps(tmp_path / "whole", tmp_path / "halves")


def test_two_processes_contrast_what_one_does_with_twice_the_passes(bases: dict[str, Path], tmp_path: Path) -> None:
    # Ragged: the last batch of an epoch goes to one of them alone. Dropout is that of the base.
    rows = written(tmp_path / "rows.jsonl", examples("triplets", 11))
    held_out = written(tmp_path / "held_out.jsonl", examples("triplets", 5, seed=1))
    more = ["--data.eval", str(held_out), "--train.eval-steps", "3", "--train.epochs", "2", "--train.batch-size", "2"]
    assert main(options(bases["bert"], rows, tmp_path / "one", *more, "--train.accumulate", "2")) == 0
    done(launched(options(bases["bert"], rows, tmp_path / "two", *more)))
    require_same_steps(tmp_path / "one", tmp_path / "two")


def test_a_run_that_was_stopped_is_the_run_in_one_piece(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = written(tmp_path / "rows.jsonl", examples("labels", 21))
    more = ["--train.batch-size", "2", "--train.accumulate", "2", "--train.save-steps", "4", "--train.epochs", "2"]
    assert main(options(bases["bert"], rows, tmp_path / "whole", *more)) == 0
    save = trainers.AdapterTrainer._save_checkpoint

    def stopping(trainer: Any, *args: Any, **kwargs: Any) -> None:
        save(trainer, *args, **kwargs)
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainers.AdapterTrainer, "_save_checkpoint", stopping)
    assert main(options(bases["bert"], rows, tmp_path / "parts", *more)) == 130
    monkeypatch.undo()
    assert main(options(bases["bert"], rows, tmp_path / "parts", *more, "--resume")) == 0
    adapter, again = (load_file(tmp_path / name / saved.WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.equal(again[name], tensor) for name, tensor in adapter.items())


# The vectors


@pytest.mark.parametrize("pooling", sorted(vectors.POOLINGS))
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_company_change_no_vector(bases: dict[str, Path], kind: str, pooling: str) -> None:
    task = Embed(pooling)
    loaded = base.load(str(bases[kind]), quant="none", model_class=task.model_class, dtype="float32")
    task.prepare(loaded.tokenizer, 32)
    rng = random.Random(0)
    rows = [task.features(Pair(f"a:{i}", words(rng, 1 + i % 9), words(rng, 12 - i % 5))) for i in range(40)]
    found = losses.vectors(task, loaded.model, rows, 40)["vector"]
    torch.testing.assert_close(losses.vectors(task, loaded.model, rows, 3)["vector"], found, atol=1e-5, rtol=1e-4)
    texts = [ids for row in rows for ids in (row["input_ids"], *row["others"])]
    for ids, vector in list(zip(texts, found, strict=True))[::7]:
        with modes.evaluating(loaded.model):
            state = loaded.model(torch.tensor([ids]))[0][0]
        places = torch.arange(1.0, len(ids) + 1)[:, None]
        pooled = {
            "mean": state.mean(dim=0), "cls": state[0], "lasttoken": state[-1],
            "weightedmean": (state * places).sum(dim=0) / places.sum(),
        }[pooling]  # fmt: skip
        torch.testing.assert_close(vector, pooled / pooled.norm(), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny.Run]:
    made = {}
    for kind, pooling in (("bert", "mean"), ("llama", "weightedmean")):
        task = prepared(pooling)
        features = [task.features(Match(f"a:{i}", *row.values())) for i, row in enumerate(examples("triplets", 18))]
        out = tmp_path_factory.mktemp("runs") / kind
        facts = {"pooling": pooling}
        made[kind] = tiny.run(out, bases[kind], task="embed", quant="none", features=features, facts=facts)
    return made


def of_run(run: tiny.Run, model: Any) -> torch.Tensor:
    return losses.vectors(run.task, model, run.rows, 8)["vector"]


def test_adapters_that_make_vectors_are_combined(runs: dict[str, tiny.Run], tmp_path: Path, capsys: Any) -> None:
    run = runs["llama"]
    rows, out = written(tmp_path / "rows.jsonl", examples("triplets", 8)), tmp_path / "both"
    words = ["combine", *[str(run.folder)] * 2, "--weights", "0.75", "0.25", "--data", *[str(rows)] * 2]
    assert main([*words, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for part in found["parts"]:
        # They are one and the same, so nothing of either is lost.
        assert part["loss"] == dict.fromkeys(("base", "alone", "combined"))
        assert part["effect_kept"] == pytest.approx(1, abs=1e-4)
        assert part["rows"]["combined"]["loss"] == pytest.approx(part["rows"]["alone"]["loss"], rel=1e-4)
    torch.testing.assert_close(of_run(run, saved.load(out).model), of_run(run, run.model), atol=1e-5, rtol=1e-4)
    assert vectors.pooling_of(out, False) == "weightedmean"
    assert "own seal keeps. Kept is" in (out / "README.md").read_text()


def test_vectors_that_are_pooled_otherwise_are_not_combined(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    parts = [combine.Part.of(runs["llama"].folder, 1.0) for _ in range(2)]
    parts[1].task = prepared("lasttoken")
    with pytest.raises(AdapterError, match="how vectors are pooled is another"):
        combine._refuse_what_does_not_fit(parts, CombineConfig(adapters=(tmp_path,) * 2, out=tmp_path))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_plain_peft_and_plain_transformers_make_the_vectors_that_were_trained(
    runs: dict[str, tiny.Run], tmp_path: Path, kind: str
) -> None:
    run = runs[kind]
    live = of_run(run, run.model)
    stock = transformers.AutoModel.from_pretrained(run.base_folder)
    before = of_run(run, stock)
    plain = peft.PeftModel.from_pretrained(stock, run.folder).eval()
    torch.testing.assert_close(of_run(run, plain), live, atol=1e-5, rtol=1e-4)
    assert float((1 - (before * live).sum(dim=1)).mean()) > 1e-3
    merge.merge(run.folder, tmp_path / "merged")
    merged = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(of_run(run, merged), live, atol=1e-5, rtol=1e-4)
    assert run.seal is not None
    effect = float((1 - (run.seal.base_logp * run.seal.adapter_logp)).mean())
    assert run.seal.effect == pytest.approx(effect, rel=1e-3)
    for model in (None, tmp_path / "merged"):
        verdict = seal.verify(run.folder, model_folder=model)
        assert verdict.passed, verdict.checks
    # As sentence-transformers reads it: the first module, its pooling, its length.
    for folder in (tmp_path / "merged",):
        told = json.loads((folder / vectors.POOLING).read_text())
        assert [flag for flag, on in told.items() if on is True] == [
            f"pooling_mode_{run.task.facts()['pooling']}_tokens"
        ]
        assert told["word_embedding_dimension"] == live.shape[1]
        assert vectors.pooling_of(folder, kind == "bert") == run.task.facts()["pooling"]


@pytest.mark.parametrize("spoiled", ["halved", "pooling", "merged"])
def test_a_seal_notices_other_vectors(runs: dict[str, tiny.Run], tmp_path: Path, spoiled: str) -> None:
    run, folder = runs["bert"], tmp_path / "adapter"
    shutil.copytree(run.folder, folder)
    merged = None
    if spoiled == "pooling":
        record = json.loads((folder / "environment.json").read_text())
        record["task"]["pooling"] = "cls"
        (folder / "environment.json").write_text(json.dumps(record))
    else:
        if spoiled == "merged":
            merged = tmp_path / "merged"
            merge.merge(folder, merged)
        file, part = (
            (merged / "model.safetensors", "output.dense.weight") if merged else (folder / saved.WEIGHTS, "lora_B")
        )
        held = load_file(file)
        save_file({name: t * 0.5 if part in name else t for name, t in held.items()}, file, {"format": "pt"})
    failed = {check.name for check in seal.verify(folder, model_folder=merged).checks if not check.passed}
    assert failed & {"replay", "base replay"}


def test_sentence_transformers_makes_the_same_vectors(bases: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    monkeypatch.chdir(bases["bert"].parent)  # where the adapter's name of its base is a folder
    rows = written(tmp_path / "rows.jsonl", examples("labels", 20))
    assert main(options(bases["bert"], rows, tmp_path / "out", "--train.epochs", "2")) == 0
    assert main(["merge", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0
    loaded = saved.load(tmp_path / "out")
    loaded.prepare_task()
    features = tasks.featurize(loaded.task, formats.read(str(rows)))
    live = losses.vectors(loaded.task, loaded.model, features, 8)["vector"]
    texts = [row["text"] for row in examples("labels", 20)]
    for name in ("out", "merged"):
        found = package.SentenceTransformer(str(tmp_path / name), device="cpu").encode(texts, convert_to_tensor=True)
        torch.testing.assert_close(found, live, atol=1e-5, rtol=1e-4)


def test_an_encoder_without_a_pooler_is_as_good_and_none_is_trained(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "base", "bert")
    file = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.startswith("pooler.")}, file, {"format": "pt"})
    rows = written(tmp_path / "rows.jsonl", examples("pairs", 8))
    assert main(options(folder, rows, tmp_path / "out", "--lora.targets", "dense", "--train.steps", "4")) == 0
    assert not [name for name in load_file(tmp_path / "out" / saved.WEIGHTS) if "pooler" in name]
    assert json.loads((tmp_path / "out" / saved.CONFIG).read_text())["exclude_modules"]
    assert main(["merge", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--model", str(tmp_path / "merged")]) == 0


def test_a_base_says_how_it_pools(tmp_path: Path) -> None:
    assert [vectors.pooling_of(tmp_path, both_ways) for both_ways in (True, False)] == ["mean", "weightedmean"]
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / vectors.POOLING
    for told, pooling in (
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": "lasttoken"}, "lasttoken"),
        ({"embedding_dimension": 8, "pooling_mode": ["mean"]}, "mean"),
    ):
        file.write_text(json.dumps(told))
        assert vectors.pooling_of(tmp_path, True) == pooling
    file.write_text(json.dumps({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}))
    with pytest.raises(UnsupportedModelError, match=r"1_Pooling/config\.json pools by max, mean; mean, cls"):
        vectors.pooling_of(tmp_path, True)
    file.write_text(json.dumps({"pooling_mode": "mean"}))
    modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match=r'modules\.json names "Dense"'):
        vectors.pooling_of(tmp_path, True)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(SourceError, match="is no list of modules"):
        vectors.pooling_of(tmp_path, True)


# What is measured


@pytest.mark.parametrize("kind", ["labels", "pairs"])
@pytest.mark.parametrize("indexed", [False, True])
def test_recall_is_of_the_nearest_texts(kind: str, indexed: bool) -> None:
    batch, _ = batch_of(kind, 14)
    torch.manual_seed(1)

    def told(of: tasks.Batch) -> tasks.Batch:
        return of | {"vector": torch.nn.functional.normalize(torch.randn(len(of["labels"]), 6), dim=1)}

    found, known = told(batch), told(batch_of(kind, 9)[0]) if indexed else None
    # Of one row nothing is to be found.
    lonely = found["group"].clone()
    lonely[:2] = torch.tensor([7, 8])
    found = found | {"group": lonely, "text": found["text"].clone().index_fill(0, torch.tensor([0, 1]), 5)}
    counted, hit = 0, dict.fromkeys(retrieval.NEAREST, 0)
    for a in (found["labels"] != -100).nonzero()[:, 0].tolist():
        sides = [
            (found, i)
            for i in found["candidate"].nonzero()[:, 0].tolist()
            if i != a and not (indexed and kind == "labels")
        ]
        sides += [(known, i) for i in known["candidate"].nonzero()[:, 0].tolist()] if known else []
        right = {int(side["text"][i]) for side, i in sides if side["group"][i] == found["group"][a]}
        ranked = sorted(sides, key=lambda one: -float(found["vector"][a] @ one[0]["vector"][one[1]]))
        if right:
            counted += 1
            for k in hit:
                hit[k] += any(int(side["text"][i]) in right for side, i in ranked[:k])
    assert counted < int((found["labels"] != -100).sum())
    assert retrieval.recall(found, known) == pytest.approx({f"recall@{k}": n / counted for k, n in hit.items()})


def test_a_large_index_is_looked_through_in_small_parts_and_no_anchor_of_it_is_read(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepared()
    loaded = base.load(str(bases["still"]), quant="none", model_class=task.model_class, dtype="float32")
    rows, index = features_of("triplets", 9), features_of("triplets", 14)
    found, known = (losses.vectors(task, loaded.model, some, 4) for some in (rows, index))
    wanted = retrieval.recall(found, known)
    read = []
    real = losses.vectors
    monkeypatch.setattr(losses, "vectors", lambda *args: read.append(real(*args)) or read[-1])
    monkeypatch.setattr(losses, "CELLS", 100)
    of_each, values = retrieval.measured(task, loaded.model, rows, index, 4)
    assert values == pytest.approx(wanted)
    assert [len(part["vector"]) for part in read] == [27, 28]
    assert of_each.nll == pytest.approx(losses.contrasted(task, found, 9).nll)
    sizes = [len(part) for part in losses.blocks(found["labels"], 46)]
    assert sizes == [2, 2, 2, 2, 1]


def test_scores_are_measured_by_their_order(bases: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    rows = written(tmp_path / "rows.jsonl", examples("scores", 24))
    held_out = written(tmp_path / "held_out.jsonl", examples("scores", 12, seed=3))
    out = tmp_path / "out"
    assert main(options(bases["bert"], rows, out, "--data.eval", str(held_out), "--train.epochs", "2")) == 0
    assert "spearman " in capsys.readouterr().out.splitlines()[-1]
    assert "squared differences of cosine and score" in (out / "README.md").read_text()
    assert main(["evaluate", str(out), "--data", str(held_out), "--json", "--batch-size", "5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loss"] == pytest.approx(told["mse"])
    assert told["base"].keys() >= {"spearman", "pearson", "mae"}


@pytest.mark.parametrize("kind", ["labels", "pairs"])
def test_held_out_rows_are_looked_up_among_those_trained_on(
    bases: dict[str, Path], tmp_path: Path, capsys: Any, kind: str
) -> None:
    rows = written(tmp_path / "rows.jsonl", examples(kind, 40))
    out = tmp_path / "out"
    assert main(options(bases["bert"], rows, out, "--data.eval", "0.25", "--train.steps", "20")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(f"recall@{k} " in last for k in (1, 5, 10))
    assert "from sentence" not in (out / "README.md").read_text()
    assert "vectors @ vectors.T" in (out / "README.md").read_text()
    assert (out / "report.html").read_text().count("recall@1</th>") == 1
    record = json.loads((out / "environment.json").read_text())
    assert record["task"] == {"pooling": "mean"}
    if kind == "labels":
        assert record["data"]["eval"]["rows"] == 10


def test_vectors_are_predicted(runs: dict[str, tiny.Run], tmp_path: Path) -> None:
    run = runs["bert"]
    rows = examples("triplets", 5)
    asked, out = written(tmp_path / "rows.jsonl", [{"text": row["anchor"]} for row in rows]), tmp_path / "out.jsonl"
    assert main(["predict", str(run.folder), "--input", str(asked), "--out", str(out), "--batch-size", "2"]) == 0
    said = [json.loads(line) for line in out.read_text().splitlines()]
    features = [prepared().features(Match("a:1", *row.values())) for row in rows]
    live = losses.vectors(run.task, run.model, features, 8)
    torch.testing.assert_close(
        torch.tensor([row["prediction"] for row in said]), live["vector"][live["labels"] != -100], atol=1e-5, rtol=1e-4
    )


def test_the_snippet_of_the_card_prints_cosines(bases: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(bases["llama"].parent)
    rows = written(tmp_path / "rows.jsonl", examples("pairs", 8))
    out = tmp_path / "out"
    assert main(options(bases["llama"], rows, out, "--train.steps", "3")) == 0
    program = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    said: list[Any] = []
    program = program.replace('adapter = "."', f"adapter = {str(out)!r}")
    exec(compile(program, "card", "exec"), {"print": said.append})
    loaded = saved.load(out)
    loaded.prepare_task()
    asked = "Where is the nearest post office?"
    row = loaded.task.features(Match("a:1", asked, "How do I get there?"))
    live = losses.vectors(loaded.task, loaded.model, [row], 1)["vector"]
    torch.testing.assert_close(said[0].cpu(), live @ live.T, atol=1e-4, rtol=1e-4)


# Rows and options


BAD_ROWS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "empty": ([{"anchor": "w1", "positive": ""}], [":1: positive is empty; give a string that is not empty."]),
    "no text": ([{"anchor": "w1", "positive": "w2", "negative": 3}], [":1: negative is 3; give a string that is not"]),
    "no negative": (
        [{"anchor": "w1", "positive": "w2", "negative": "w3"}, {"anchor": "w1", "positive": "w2"}],
        [":2: negative is missing; give a string that is not empty."],
    ),
    "no number": (
        [{"sentence1": "w1", "sentence2": "w2", "score": score} for score in ("much", None, True)],
        [
            ':1: score is "much"; give how alike the texts are, as a number from -1 to 1.',
            ":2: score is null; give how alike",
            ":3: score is true; give how alike",
        ],
    ),
    "too alike": (
        [{"sentence1": "w1", "sentence2": "w2", "score": score} for score in (1, 4.5, "-5")],
        [
            ":2: the score is 4.5, and a cosine lies from -1 to 1: divide all scores by the largest there can be.",
            ":3: the score is -5, and a cosine",
        ],
    ),
    "a class of two texts": (
        [{"sentence1": "w1", "sentence2": "w2", "label": "same"}],
        [':1: label is "same"; of two texts embed learns how alike they are, so give a number from -1 to 1.'],
    ),
    "several classes": (
        [{"text": "w1", "label": label} for label in (["a", "b"], ["a"], ["a"])],
        [
            ":1: label is ",
            ", several classes; embed takes one class a row, as a string or a whole number, or two texts",
        ],
    ),
    "one class": (
        [{"text": "w1", "label": "a"}, {"text": "w2", "label": "a"}],
        [':1: all rows have the label "a"; embed learns which texts belong together from rows of two labels or more'],
    ),
    "all classes differ": (
        [{"text": "w1", "label": "a"}, {"text": "w2", "label": "b"}],
        [":1: no two share a label; embed learns"],
    ),
    "text": ([{"text": "w1"}], [":1: a text row does not say which texts belong together; embed takes text/label"]),
}


@pytest.mark.parametrize("name", sorted(BAD_ROWS))
def test_rows_that_do_not_suit_are_named(tmp_path: Path, name: str) -> None:
    rows, told = BAD_ROWS[name]
    file = written(tmp_path / "rows.jsonl", rows)

    def taken() -> None:
        task, found = prepared(), formats.read(str(file))
        task.learn(found)
        tasks.featurize(task, found)

    with pytest.raises(DataError) as caught:
        taken()
    assert all(problem.startswith("rows.jsonl:") for problem in caught.value.problems)
    assert all(phrase in str(caught.value) for phrase in told), str(caught.value)


def test_rows_of_two_kinds_are_refused() -> None:
    made = [Match("a:1", "w1", "w2"), Text("a:2", "w3")]
    with pytest.raises(DataError, match=r"^a:2: is a row of no use, but a:1 is one of anchor and positive"):
        Embed().learn(made)
    with pytest.raises(DataError, match=r"^a:2: is a row of texts and score"):
        Embed().learn([made[0], Scored("a:2", "w1", "w2", 0.5)])
    with pytest.raises(TypeError, match="pooling is none of"):
        tasks.get("embed", {"pooling": "max"})


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["--train.batch-size", "1"], 2, "a step would have a single row"),
        (["--data.packing"], 1, "rows of the task embed cannot"),
        (["--data.class-weights", "balanced"], 1, "and embed has none"),
        (["--data.eval", "0.5", "--data.metrics", "bleu"], 1, "embed rows have no reply to generate"),
    ],
)  # fmt: skip
def test_options_that_do_not_suit_are_refused(
    bases: dict[str, Path], tmp_path: Path, capsys: Any, more: list[str], status: int, told: str
) -> None:
    rows = written(tmp_path / "rows.jsonl", examples("pairs", 8))
    assert main(options(bases["bert"], rows, tmp_path / "out", *more)) == status
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_rows_with_labels_are_not_streamed(bases: dict[str, Path], tmp_path: Path, capsys: Any, dry: list[str]) -> None:
    rows = written(tmp_path / "rows.jsonl", examples("labels", 8))
    assert main(options(bases["bert"], rows, tmp_path / "out", "--data.streaming", "--train.steps", "2", *dry)) == 1
    assert "rows.jsonl:1: a row with a label is contrasted with another of the label" in capsys.readouterr().err


def test_a_model_that_reads_one_text_to_write_another_is_refused(tmp_path: Path, capsys: Any) -> None:
    folder = tiny.model_folder(tmp_path / "t5", "t5")
    rows = written(tmp_path / "rows.jsonl", examples("pairs", 8))
    assert main(options(folder, rows, tmp_path / "out")) == 1
    assert "t5 model, which reads one text to write another" in capsys.readouterr().err


def test_the_last_row_of_an_epoch_alone_makes_no_step(bases: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    rows = written(tmp_path / "rows.jsonl", examples("pairs", 5))
    more = ["--train.batch-size", "4", "--train.epochs", "3"]
    assert main(options(bases["bert"], rows, tmp_path / "out", *more)) == 0
    assert "no position is scored" in caplog.text + (tmp_path / "out" / "metrics.jsonl").read_text()


def test_eva_starts_from_texts(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", examples("triplets", 16))
    targets = ["--lora.init", "eva", "--lora.targets", "query", "value"]
    assert main(options(bases["bert"], rows, tmp_path / "out", *targets, "--train.steps", "3")) == 0


@pytest.mark.parametrize("named", [False, True])
def test_the_memory_of_a_step_is_planned(bases: dict[str, Path], tmp_path: Path, capsys: Any, named: bool) -> None:
    rows = written(tmp_path / "rows.jsonl", examples("triplets", 16))
    command = ["plan", "embed", "--base", str(bases["bert"]), "--train.batch-size", "4", "--device", "cpu", "--json"]
    assert main([*command, "--data.max-length", "32", *(["--data.train", str(rows)] if named else [])]) == 0
    step = json.loads(capsys.readouterr().out)["asked"]
    assert step["rows"] == 4
    assert step["bytes"]["activations"] > 0
    task = prepared()
    lengths = sorted(sum(task.lengths(task.features(Match("a:1", *row.values())))) for row in examples("triplets", 16))
    assert step["tokens"] == (sum(lengths[-4:]) if named else 4 * 2 * 32)
