"""Classification with each kind of model: batches change nothing that is learned or measured, and no head is lost."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn import metrics as sklearn

from lora_ft import base, evaluate, merge, saved, seal, tasks
from lora_ft.cli import main
from lora_ft.data import labels as known
from lora_ft.data.examples import Labelled
from lora_ft.errors import DataError
from lora_ft.model import modes
from lora_ft.proof import replies
from lora_ft.scoring import class_metrics, losses
from lora_ft.tasks.classify import Classify
from lora_ft.training import replicas
from tests import tiny

KINDS = ["bert", "gpt2", "llama", "openai-gpt"]
HEADS = {"bert": "classifier"}
PROBLEMS = ["multi_label_classification", "regression", "single_label_classification"]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def without_padding(folder: Path) -> Path:
    """Takes the padding token out of a base, as GPT-2 and OpenAI GPT come, and of the latter the end of text too."""
    settings = json.loads((folder / "config.json").read_text())
    del settings["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(settings))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad_token", *(("eos_token",) if settings["model_type"] == "openai-gpt" else ())):
        del told[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tiny.model_folder(tmp_path_factory.mktemp("bases") / name, name) for name in KINDS}
    for name in ("gpt2", "openai-gpt"):
        without_padding(made[name])
    return made


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tiny.Run]:
    made: dict[Any, tiny.Run] = {}

    def run(kind: str, problem: str = "single_label_classification") -> tiny.Run:
        if (kind, problem) not in made:
            out = tmp_path_factory.mktemp("runs") / "adapter"
            rows, facts = features(problem), facts_of(problem)
            made[kind, problem] = tiny.run(out, bases[kind], task="classify", quant="none", features=rows, facts=facts)
        return made[kind, problem]

    return run


def facts_of(problem: str) -> dict[str, Any]:
    return {"labels": [] if problem == "regression" else list(tiny.LABELS), "problem_type": problem}


def features(problem: str, count: int = 13) -> list[tasks.Features]:
    """Returns rows of many lengths, of a number that no batch size here divides, of which the last class has one."""
    made = tiny.rows("classify", count)
    for row in made:
        kind = row["labels"]
        if problem == "multi_label_classification":
            row["labels"] = [int(kind >= place) for place in range(len(tiny.LABELS))]
        elif problem == "regression":
            row["labels"] = kind - 0.5
    return made


def logits_of(run: tiny.Run, model: Any, rows: list[tasks.Features]) -> torch.Tensor:
    """Returns what a model says to rows in one batch, by nothing but its own forward pass."""
    batch = run.task.collate(rows)
    del batch["labels"]
    model.requires_grad_(False)
    with modes.evaluating(model):
        return model(**batch).logits


# The head: saved, reloaded, merged, missed


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_and_plain_transformers_say_what_was_trained(
    runs: Callable[..., tiny.Run], tmp_path: Path, kind: str, problem: str
) -> None:
    run = runs(kind, problem)
    live = logits_of(run, run.model, run.rows)
    made = transformers.AutoModelForSequenceClassification
    stock = made.from_pretrained(run.base_folder, **run.task.config_changes())
    stock.config.pad_token_id = transformers.AutoTokenizer.from_pretrained(run.folder).pad_token_id
    plain = peft.PeftModel.from_pretrained(stock, run.folder).eval()
    torch.testing.assert_close(logits_of(run, plain, run.rows), live, atol=1e-5, rtol=1e-5)

    merge.merge(run.folder, tmp_path / "merged")
    merged = made.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(run, merged, run.rows), live, atol=1e-4, rtol=1e-4)
    assert merged.config.problem_type == problem
    if problem != "regression":
        assert list(merged.config.id2label.values()) == list(tiny.LABELS)
    # All that its user has is the folder: with its own tokenizer it pads as the model expects.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = ["w40 w41", "w42 w43 w44 w45 w46"]
    with torch.no_grad():
        together = merged(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([merged(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for model in (None, tmp_path / "merged"):
        verdict = seal.verify(run.folder, model_folder=model)
        assert verdict.passed, verdict.checks


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_head_is_noticed(runs: Callable[..., tiny.Run], tmp_path: Path, kind: str) -> None:
    run, head = runs(kind), HEADS.get(kind, "score")
    folder = Path(shutil.copytree(run.folder, tmp_path / "adapter"))
    kept = {name: t for name, t in load_file(folder / saved.WEIGHTS).items() if f".{head}." not in name}
    save_file(kept, folder / saved.WEIGHTS)
    assert {"tensors", "heads", "load"} <= {check.name for check in seal.verify(folder).checks if not check.passed}

    merge.merge(run.folder, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.startswith(f"{head}.")}, file, {"format": "pt"})
    verdict = seal.verify(run.folder, model_folder=tmp_path / "merged")
    assert {"tensors", "heads", "replay"} <= {check.name for check in verdict.checks if not check.passed}


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_head_that_tells_other_classes_fails(runs: Callable[..., tiny.Run], tmp_path: Path, problem: str) -> None:
    run = runs("bert", problem)
    merge.merge(run.folder, tmp_path / "merged")
    file, weights = tmp_path / "merged" / "config.json", tmp_path / "merged" / "model.safetensors"
    settings = json.loads(file.read_text())
    settings |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    file.write_text(json.dumps(settings))
    held = load_file(weights)
    held |= {name: held[name][[0, -1]].contiguous() for name in ("classifier.weight", "classifier.bias")}
    save_file(held, weights, {"format": "pt"})
    verdict = seal.verify(run.folder, model_folder=tmp_path / "merged")
    assert "classes" in {check.name for check in verdict.checks if not check.passed}


def test_the_seal_of_a_number_is_half_the_squared_difference(runs: Callable[..., tiny.Run]) -> None:
    run = runs("bert", "regression")
    assert run.seal is not None
    adapter, plain = replies.ask(run.task, run.model, run.seal.batches), run.seal.base_logp
    wanted = float((torch.cat(adapter) - plain).square().mean() / 2)
    assert run.seal.effect == pytest.approx(wanted, rel=1e-4)
    assert run.seal.effect > seal.LEAST_EFFECT
    moved = [logits + 0.1 for logits in adapter]
    assert replies.distance(run.seal.adapter_ids, run.seal.adapter_logp, moved) == pytest.approx(0.005, rel=1e-3)


# The token that a decoder is read at


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(bases: dict[str, Path], kind: str) -> None:
    task = Classify(tiny.LABELS)
    loaded = base.load(
        str(bases[kind]),
        quant="none",
        model_class=task.model_class,
        dtype="float32",
        config_changes=task.config_changes(),
    )
    task.prepare(loaded.tokenizer, 64)
    pad = loaded.tokenizer.decode([loaded.tokenizer.pad_token_id])
    # One row ends in the very token that fills the others.
    texts = ["w40", "w41 w42 w43 w44 w45 w46 w47", f"w48 w49 {pad}", "w50 w51 w52"]
    rows = [task.features(Labelled(f"a:{i}", text, "good")) for i, text in enumerate(texts)]
    with torch.no_grad():
        together = task.score(loaded.model, task.collate(rows)).logits_NV
        alone = torch.cat([task.score(loaded.model, task.collate([row])).logits_NV for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    if kind == "bert":
        return
    # By hand: the head at the last token of the row that is not padding, wherever the batch ends.
    body = getattr(loaded.model, loaded.model.base_model_prefix)
    for row, logits in zip(rows, together, strict=True):
        ids = row["input_ids"]
        while ids[-1] == loaded.tokenizer.pad_token_id:
            ids = ids[:-1]
        with torch.no_grad():
            state = body(torch.tensor([ids]))[0][0, -1]
            torch.testing.assert_close(loaded.model.score(state), logits, atol=1e-5, rtol=1e-5)


def test_a_text_that_the_tokenizer_knows_nothing_of_is_refused(bases: dict[str, Path]) -> None:
    tokenizer = base.load_tokenizer(bases["openai-gpt"])
    assert tokenizer.pad_token == tokenizer.unk_token == "<unk>"
    task = Classify(tiny.LABELS)
    task.prepare(tokenizer, 64)
    with pytest.raises(DataError, match=r"^a:3: the base's tokenizer knows nothing of the text; leave the row out"):
        task.features(Labelled("a:3", "quite unknown", "good"))


# Losses and weights


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_is_that_of_transformers(runs: Callable[..., tiny.Run], problem: str) -> None:
    run = runs("gpt2", problem)
    batch = run.task.collate(run.rows)
    labels = batch["labels"].float() if problem == "multi_label_classification" else batch["labels"]
    inner = modes.unwrapped(run.model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with modes.evaluating(run.model):
        wanted = inner(**inputs, labels=labels).loss
        found = run.task.loss(run.model, batch) / batch["labels"].numel()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    for size in (1, 4, 13):
        assert losses.of_rows(run.task, run.model, run.rows, size).mean == pytest.approx(float(wanted), rel=1e-5)


def test_weights_give_each_class_the_same_sum_however_rows_are_batched(runs: Callable[..., tiny.Run]) -> None:
    run = runs("bert")
    rows = [Labelled("a:1", "x", tiny.LABELS[row["labels"]]) for row in run.rows]
    task = Classify(tiny.LABELS)
    task.tokenizer = run.task.tokenizer
    task.weigh(rows)
    assert task.weights is not None
    counts = Counter(row.label for row in rows)
    sums = [weight * counts[label] for weight, label in zip(task.weights, tiny.LABELS, strict=True)]
    assert sums == pytest.approx([len(rows) / 3] * 3)
    assert len(set(counts.values())) > 1
    right = sorted({row.label for row in rows})
    wanted = sum(
        len(rows) / (len(right) * counts[row.label]) * float(task.loss(run.model.eval(), task.collate([one])))
        / task.weights[one["labels"]]
        for row, one in zip(rows, run.rows, strict=True)
    )  # fmt: skip
    with modes.evaluating(run.model):
        whole = float(task.loss(run.model, task.collate(run.rows)))
        parts = sum(float(task.loss(run.model, task.collate(run.rows[at : at + 5]))) for at in range(0, 13, 5))
        plain = float(run.task.loss(run.model, task.collate(run.rows)))
        unweighted = losses.of_rows(task, run.model, run.rows, 4).nll.sum()
    assert whole == pytest.approx(parts, rel=1e-5)
    assert whole == pytest.approx(wanted, rel=1e-5)
    assert whole != pytest.approx(plain, rel=1e-3)
    # What is measured is what it always was.
    assert unweighted == pytest.approx(plain, rel=1e-5)


def test_a_number_that_the_trainer_would_leave_out_is_learned() -> None:
    task = Classify((), "regression")
    task.prepare(tiny.tokenizer(), 16)
    made = [task.features(Labelled("rows.jsonl:1", "w1 w2", value)) for value in (-100.0, 3.0)]
    labels = task.collate(made)["labels"]
    assert (labels != -100).all()
    assert labels.tolist() == pytest.approx([-100, 3])
    # A row that only fills the place of another in one of several processes has none.
    assert task.collate([replicas.without_labels(made[1])])["labels"].tolist() == [-100]


# Metrics, against scikit-learn on the decoded predictions


@pytest.mark.parametrize("batch_size", [1, 4, 13])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_metrics_are_those_of_scikit_learn_however_rows_are_batched(
    runs: Callable[..., tiny.Run], problem: str, batch_size: int
) -> None:
    run = runs("llama", problem)
    # A class that the adapter gets wrong, so that no value is 1.
    rows = [{**row} for row in run.rows]
    rows[0]["labels"] = rows[1]["labels"] if rows[0]["labels"] != rows[1]["labels"] else rows[2]["labels"]
    found = evaluate.compare(run.task, run.model, [], rows, batch_size=batch_size).adapter
    alone = torch.cat([logits_of(run, run.model, [row]) for row in rows])
    right = [row["labels"] for row in rows]
    if problem == "regression":
        said = alone[:, 0].double().numpy()
        wanted = {
            "mse": sklearn.mean_squared_error(right, said),
            "mae": sklearn.mean_absolute_error(right, said),
            "pearson": stats.pearsonr(right, said).statistic,
            "spearman": stats.spearmanr(right, said).statistic,
            "loss": sklearn.mean_squared_error(right, said),
        }
    elif problem == "multi_label_classification":
        said, truth = (alone > 0).int().numpy(), np.array(right)
        wanted = {
            "f1_micro": sklearn.f1_score(truth, said, average="micro"),
            "f1_macro": sklearn.f1_score(truth, said, average="macro"),
            "subset_accuracy": sklearn.accuracy_score(truth, said),
            "loss": sklearn.log_loss(truth.ravel(), torch.sigmoid(alone.double()).numpy().ravel()),
        }
        report = sklearn.classification_report(truth, said, target_names=tiny.LABELS, output_dict=True, zero_division=0)
        assert_tables(found["per_class"], report)
    else:
        names = np.array(tiny.LABELS)
        p = torch.softmax(alone.double(), 1).numpy()
        # Decoded: the words, and no numbers for them.
        said, truth = names[p.argmax(1)], names[right]
        wanted = {
            "accuracy": sklearn.accuracy_score(truth, said),
            "f1_macro": sklearn.f1_score(truth, said, average="macro"),
            "f1_weighted": sklearn.f1_score(truth, said, average="weighted"),
            "brier": np.square(p - np.eye(3)[right]).sum(1).mean(),
            "loss": sklearn.log_loss(right, p, labels=[0, 1, 2]),
        }
        report = sklearn.classification_report(truth, said, labels=names, output_dict=True, zero_division=0)
        assert_tables(found["per_class"], report)
        assert found["confusion_matrix"] == sklearn.confusion_matrix(truth, said, labels=names).tolist()
        assert wanted["accuracy"] < 1
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert found["rows"] == 13


def assert_tables(found: dict[str, Any], report: dict[str, Any]) -> None:
    assert list(found) == list(tiny.LABELS)
    for label, row in found.items():
        wanted = report[label]
        assert list(row.values()) == pytest.approx([wanted["precision"], wanted["recall"], wanted["f1-score"],
                                                    wanted["support"]])  # fmt: skip


def test_two_classes_have_a_curve_and_one_alone_has_none() -> None:
    logits = np.random.default_rng(0).normal(size=(31, 2)).astype(np.float32)
    right = [i % 2 for i in range(31)]
    p = torch.softmax(torch.tensor(logits).double(), 1).numpy()[:, 1]
    found = class_metrics.measure("single_label_classification", logits, right, ("a", "b"))
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(right, p))
    assert found["auprc"] == pytest.approx(sklearn.average_precision_score(right, p))
    assert found["brier"] == pytest.approx(sklearn.brier_score_loss(right, p))
    assert found["brier"] == pytest.approx(np.square(p - np.array(right)).mean())
    found = class_metrics.measure("single_label_classification", logits, [1] * 31, ("a", "b"))
    assert not found.keys() & {"auroc", "auprc"}
    assert found["brier"] == pytest.approx(np.square(p - 1).mean())
    assert found["per_class"]["a"]["support"] == 0


def test_calibration_is_how_far_claims_are_from_what_comes_true() -> None:
    claimed = np.array([0.9] * 10 + [0.6] * 10 + [1.0])
    right = np.array([True] * 9 + [False] + [True] * 3 + [False] * 7 + [True])
    assert class_metrics.calibration_error(claimed, right) == pytest.approx(10 / 21 * 0.3)
    assert class_metrics.calibration_error(np.array([0.9, 0.9]), np.array([True, True])) == pytest.approx(0.1)


def test_one_class_that_may_be_there_or_not_is_measured_by_itself() -> None:
    logits = np.array([[0, 2.0], [0, -1.0], [0, 3.0], [0, -2.0]])
    found = class_metrics.measure("multi_label_classification", logits, [[1], [1], [0], [0]], ("spam",))
    assert found["f1_micro"] == found["f1_macro"] == found["per_class"]["spam"]["f1"] == pytest.approx(0.5)
    assert found["per_class"]["spam"]["support"] == 2


def test_correlation_with_a_constant_is_left_out() -> None:
    found = class_metrics.measure("regression", np.array([[1.0], [1.0]]), [1.0, 2.0], ())
    assert found == {"mse": 0.5, "mae": 0.5}


# What the labels are


def rows_of(*values: Any) -> list[Labelled]:
    return [Labelled(f"a.jsonl:{i}", "w40", value) for i, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (("a", "b"), "single_label_classification"),
        (("0", "1"), "single_label_classification"),
        (("1.0", "2.0"), "single_label_classification"),  # a table with a gap writes whole numbers so
        (("1.5", "b"), "single_label_classification"),
        (("1.5", "2"), "regression"),
        (("-1e-3", ".5"), "regression"),
        ((1.0, 2.0), "regression"),
        ((1.5, "2"), "regression"),
        ((("a",), ()), "multi_label_classification"),
    ],
)
def test_rows_say_what_is_to_be_learned(values: tuple[Any, ...], problem: str) -> None:
    assert known.problem_of(rows_of(*values)) == problem


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (("a", ("a",), "b", ("b",)), 'a.jsonl:1: label is "a" (as in 1 more rows), but that of a.jsonl:2 is a list'),
        ((("a",), 1.5), "a.jsonl:2: label is 1.5, but that of a.jsonl:1 is a list; give every row one class, or every"),
        (("3", 1.5, "good"), 'a.jsonl:3: label is "good", but that of a.jsonl:2 is a number; give every row one class'),
    ],
)
def test_rows_of_two_kinds_are_one_error(values: tuple[Any, ...], told: str) -> None:
    with pytest.raises(DataError) as caught:
        tasks.get("classify").learn(rows_of(*values))
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(told)


def test_a_class_without_a_training_row_is_named_with_its_place() -> None:
    held_out = [Labelled("b.jsonl:4", "w40", "c"), Labelled("b.jsonl:5", "w40", "a"), Labelled("b.jsonl:6", "w40", "d")]
    with pytest.raises(DataError) as caught:
        tasks.get("classify").learn(rows_of("a", "b"), held_out)
    assert caught.value.problems == (
        'b.jsonl:4: label "c" is that of no training row; those have "a", "b".',
        'b.jsonl:6: label "d" is that of no training row; those have "a", "b".',
    )
    with pytest.raises(DataError, match=r'b.jsonl:4: label "c" is that of no training row'):
        tasks.get("classify").learn(rows_of(("a",), ("b",)), [Labelled("b.jsonl:4", "w40", ("a", "c"))])


@pytest.mark.parametrize(
    ("problem", "label", "told"),
    [
        (
            "single_label_classification",
            "never",
            "a:9: label 'never' is not one the adapter knows: bad, good, plain; correct it.",
        ),
        ("single_label_classification", ("bad",), "a:9: label is ('bad',); the adapter learned one class a row"),
        ("single_label_classification", 1.5, "a:9: label is 1.5; the adapter learned one class a row"),
        ("multi_label_classification", ("bad", "never"), "a:9: label 'never' is not one the adapter knows"),
        ("multi_label_classification", "bad", 'a:9: label is "bad"; the adapter learned a list of classes a row'),
        ("regression", "bad", 'a:9: label is "bad"; the adapter predicts a number, give one'),
        ("regression", ("bad",), "a:9: label is ('bad',); the adapter predicts a number, give one"),
    ],
)
def test_a_label_that_was_not_learned_is_refused(problem: str, label: Any, told: str) -> None:
    task = tasks.get("classify", facts_of(problem))
    task.prepare(tiny.tokenizer(), 64)
    with pytest.raises(DataError) as caught:
        task.features(Labelled("a:9", "w40 w41", label))
    assert str(caught.value).startswith(told)


def test_what_is_learned_is_said_in_words() -> None:
    for problem, label, told in (
        ("single_label_classification", "good", "good"),
        ("multi_label_classification", ("plain", "bad"), "bad, plain"),
        ("multi_label_classification", (), "none"),
        ("regression", "2.50", "2.5"),
    ):
        task = tasks.get("classify", facts_of(problem))
        task.prepare(tiny.tokenizer(), 64)
        assert task.answer(task.features(Labelled("a:1", "w40", label))) == told


def test_facts_of_an_earlier_version_are_of_one_class_a_row() -> None:
    task = tasks.get("classify", {"labels": ["a", "b"]})
    assert task.config_changes()["problem_type"] == "single_label_classification"
    with pytest.raises(TypeError, match="problem_type is none of"):
        tasks.get("classify", {"labels": ["a", "b"], "problem_type": "guess"})


# Rows held out


def test_a_split_holds_out_the_same_share_of_each_class_and_the_last_row_of_none() -> None:
    made = ["often"] * 100 + ["some"] * 30 + ["few"] * 10 + ["twice"] * 2 + ["once"]
    random.Random(1).shuffle(made)
    rows = rows_of(*made)
    chosen = known.held_out(rows, 0.2, seed=42)
    counts = Counter(rows[place].label for place in chosen)
    assert len(chosen) == 29
    assert (counts["often"], counts["some"], counts["few"], counts["once"]) == (20, 6, 2, 0)
    assert known.held_out(rows, 0.2, seed=42) == chosen
    assert known.held_out(rows, 0.2, seed=43) != chosen


def test_a_split_leaves_every_class_of_many_a_row_to_train_on() -> None:
    rng = random.Random(0)
    rows = rows_of(*[tuple(sorted(rng.sample("abcdefgh", rng.randrange(3)))) for _ in range(40)], ("rare", "a"))
    for seed in range(20):
        chosen = known.held_out(rows, 0.5, seed)
        left = {name for place, row in enumerate(rows) if place not in chosen for name in row.label}
        assert left == {name for row in rows for name in row.label}
        assert 40 not in chosen
        assert len(chosen) == 20
    assert len(known.held_out(rows_of(*[value / 7 for value in range(20)]), 0.25, 0)) == 5


def test_a_split_that_leaves_nothing_is_refused() -> None:
    for values in (("a", "b", "c"), (("a",), ("b",)), (1.5,)):
        with pytest.raises(DataError, match=r"data.eval 0.5 of \d rows leaves none to train on or to measure"):
            known.held_out(rows_of(*values), 0.5, 0)


# The whole way, from a file to a page


def written(file: Path, label_of: Callable[[int], Any], count: int = 40) -> Path:
    rng = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            word = rng.randrange(40, 200)
            stream.write(json.dumps({"text": f"w{word} w{rng.randrange(40, 200)}", "label": label_of(word)}) + "\n")
    return file


def trained(base_folder: Path, out: Path, rows: Path, *more: str) -> int:
    words = ["train", "classify", "--base", str(base_folder), "--out", str(out), "--data.train", str(rows)]
    return main([*words, "--data.eval", "0.25", "--train.steps", "20", "--train.lr", "5e-3", *more])


@pytest.mark.parametrize(
    ("kind", "label_of", "names"),
    [
        ("openai-gpt", lambda w: "low" if w < 90 else "high", "accuracy f1_macro f1_weighted brier auroc auprc"),
        ("gpt2", lambda w: ["low"] * (w < 120) + ["odd"] * (w % 2), "f1_micro f1_macro subset_accuracy"),
        ("llama", lambda w: (w - 120) / 50, "mse mae pearson spearman"),
    ],
)
def test_from_rows_to_page(
    bases: dict[str, Path], tmp_path: Path, capsys: Any, kind: str, label_of: Callable[[int], Any], names: str
) -> None:
    rows, out = written(tmp_path / "rows.jsonl", label_of), tmp_path / "run"
    weighed = ["--data.class-weights", "balanced"] if "accuracy f1_macro f1_weighted" in names else []
    assert trained(bases[kind], out, rows, *weighed) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for name in names.split():
        assert f"{name} " in last
        assert f'<th scope="row">{name}</th>' in page
    assert ("What was taken for what" in page) == ("brier" in names)
    assert ("| low |" in card) == ("mse" not in names)
    assert "pad_token_id = tokenizer.pad_token_id" in card
    assert main(["evaluate", str(out), "--data", str(rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= set(names.split()) <= found["base"].keys()
    assert not found["base"].keys() & set(class_metrics.TABLES)
    assert found["loss"] < found["base"]["loss"]
    if "mse" not in names:
        assert sum(row["support"] for row in found["per_class"].values()) >= 20
    assert main(["evaluate", str(out), "--data", str(rows)]) == 0
    assert ("precision" in capsys.readouterr().out) == ("mse" not in names)
    assert main(["data", "check", str(rows), "--base", str(bases[kind]), "--task", "classify", "--show", "1"]) == 0
    assert "40 classify rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "label_of", "told"),
    [
        ("classify", lambda w: w / 7, "data.class-weights needs rows with one class each; leave it out."),
        ("complete", lambda w: "x", "data.class-weights weighs the classes of classify, and complete has none"),
    ],
)
def test_weights_without_classes_are_refused(
    bases: dict[str, Path], tmp_path: Path, capsys: Any, task: str, label_of: Callable[[int], Any], told: str
) -> None:
    rows = written(tmp_path / "rows.jsonl", label_of)
    words = ["train", task, "--base", str(bases["llama"]), "--out", str(tmp_path / "run"), "--data.train", str(rows)]
    assert main([*words, "--data.class-weights", "balanced", "--dry-run"]) == 1
    assert told in capsys.readouterr().err


def test_a_table_of_numbers_is_learned_as_numbers(bases: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"w{i} w{i + 1},{i / 4}\n" for i in range(40, 60)), encoding="utf-8")
    assert main(["data", "check", str(table), "--base", str(bases["bert"]), "--task", "classify", "--show", "2"]) == 0
    assert "-> 10.25" in capsys.readouterr().out
