"""One run from configuration to sealed adapter folder: what the command line and every recipe call."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_ft import adapters, environment, evaluate, report, seal, sources, tasks, train
from lora_ft import base as bases
from lora_ft.base import Base
from lora_ft.config import RunConfig, plain, to_yaml
from lora_ft.data import formats
from lora_ft.data.formats import Example
from lora_ft.errors import ConfigError, DataError, Interrupted, LoraFtError
from lora_ft.progress import Bar
from lora_ft.tasks import Features, Task
from lora_ft.train import Streamed

log = logging.getLogger(__name__)

SAMPLES = 3
EVA_BATCHES = 8


@dataclass
class Rows:
    """The rows of a run: examples as read and features as the model takes them."""

    train: Sequence[Example]
    train_features: Sequence[Features] | Streamed
    held_out: Sequence[Example]
    held_out_features: Sequence[Features]
    facts: dict[str, Any]
    """Name, number and digest of each part."""


@dataclass
class Run:
    """A finished run: the adapter folder, the live model and what was measured."""

    folder: Path
    base: Base
    model: Any
    task: Task
    fit: train.Fit
    metrics: dict[str, dict[str, Any]]
    page: report.Summary
    """What the card and the report say."""

    def prove(self) -> None:
        """Lets go of the live model, loads the folder anew, and writes what its seal says into card and report.

        Raises:
            ProofError: the folder does not do what the run that wrote it did.
        """
        del self.model, self.base
        gc.collect()
        verdict = seal.verify(self.folder)
        proof = {"kl_live": verdict.kl_live, "passed": verdict.passed}
        report.write(self.folder, dataclasses.replace(self.page, seal=self.page.seal | proof))
        verdict.require(self.folder)

    def summary(self) -> str:
        """Returns the one line that ends every training: speed, memory and the evaluation."""
        parts = [f"{self.fit.tokens_per_s:.0f} tokens/s", f"peak {self.fit.peak_bytes / 2**30:.2f} GiB"]
        if self.metrics:
            base, adapter = self.metrics["base"], self.metrics["adapter"]
            shown = [key for key in adapter if key in base and key != "rows" and "." not in key]
            parts += [f"{key} {base[key]:.4g} -> {adapter[key]:.4g}" for key in shown]
        return ", ".join(parts)


def run(
    config: RunConfig,
    *,
    examples: Sequence[Example] | None = None,
    held_out: Sequence[Example] | None = None,
    console: Console | None = None,
) -> Run:
    """Returns the run that `config` describes; its adapter folder is complete and sealed, and `Run.prove` tests it.

    Args:
        examples, held_out: rows already made, instead of those that `config.data` names.

    Raises:
        ProofError: the run cannot prove what it did; Interrupted: it was stopped and can be resumed.
    """
    console = console or Console(stderr=True)
    _refuse_to_overwrite(config)
    task = tasks.get(config.task)
    source = sources.resolve(config.base, config.revision)
    rows = read_rows(config, task, source, examples, held_out)
    base = bases.load(
        source,
        quant=config.quant,
        model_class=task.model_class,
        dtype=config.train.dtype,
        seed=config.train.seed,
        config_changes=task.config_changes(),
    )
    model = adapters.attach(
        base,
        config.lora,
        peft_task=task.peft_task,
        seed=config.train.seed,
        special_tokens=config.data.special_tokens,
        batches=_first_batches(task, rows, config) if config.lora.init == "eva" else (),
    )
    learned = sum(p.numel() for p in adapters.trained(model).values())
    log.info("training %s parameters of %s", f"{learned:,}", f"{base.model.num_parameters():,}")
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    fit = train.fit(task, base, model, rows.train_features, rows.held_out_features, config, [Bar(console)])
    if fit.interrupted:
        raise Interrupted(
            f"Stopped at step {fit.steps}; a checkpoint is saved. To go on: the same command with --resume"
        )
    metrics: dict[str, dict[str, Any]] = {}
    if rows.held_out:
        with console.status("") as status:
            metrics = evaluate.compare(
                task,
                model,
                rows.held_out,
                rows.held_out_features,
                names=config.data.metrics,
                batch_size=config.train.batch_size,
                note=status.update,
            )
    return _finish(config, task, base, model, rows, fit, metrics)


def read_rows(
    config: RunConfig,
    task: Task,
    source: sources.Source,
    examples: Sequence[Example] | None = None,
    held_out: Sequence[Example] | None = None,
) -> Rows:
    """Returns the rows of a run, every one checked; no weight is loaded for it. Raises DataError with all problems."""
    data, facts = config.data, {}
    if examples is None and data.train is None:
        raise ConfigError("--data.train is needed: a file of rows, or the name of a hub data set.")
    streamed = data.streaming and examples is None
    if examples is None:
        examples = [] if streamed else formats.read(str(data.train), data.columns)
    if held_out is None and data.eval is not None and data.eval_fraction is None:
        held_out = formats.read(data.eval, data.columns)
    elif held_out is None and data.eval_fraction is not None:
        examples, held_out = _split(examples, data.eval_fraction, config.train.seed)
    held_out = held_out or []
    task.learn([*examples, *held_out])
    tokenizer = bases.load_tokenizer(source.folder)
    if data.special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(data.special_tokens)})
    task.prepare(tokenizer, data.max_length)
    facts["train"] = {"name": _name(data.train), "rows": len(examples), "sha256": _digest(examples)}
    if held_out:
        facts["eval"] = {"name": _name(data.eval), "rows": len(held_out), "sha256": _digest(held_out)}
    features: Sequence[Features] | Streamed
    if streamed:
        facts["train"] = {"name": _name(data.train), "rows": None, "sha256": None}
        features = Streamed(lambda: _stream(config, task))
    else:
        features = tasks.featurize(task, examples)
    return Rows(examples, features, held_out, tasks.featurize(task, held_out), facts)


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Returns what a run would do, having checked its rows and loss mask; loads no weights."""
    task = tasks.get(config.task)
    source = sources.resolve(config.base, config.revision)
    rows = read_rows(config, task, source)
    plan: dict[str, Any] = {"base": source.record(), "data": rows.facts, "config": plain(config)}
    if not isinstance(rows.train_features, Streamed):
        lengths = [len(row["input_ids"]) for row in rows.train_features]
        per_step = config.train.batch_size * config.train.accumulate
        steps = config.train.steps or int(config.train.epochs * -(-len(lengths) // per_step))
        plan |= {"tokens": sum(lengths), "longest_row": max(lengths), "steps": steps}
    return plan


def _finish(
    config: RunConfig,
    task: Task,
    base: Base,
    model: Any,
    rows: Rows,
    fit: train.Fit,
    metrics: dict[str, dict[str, Any]],
) -> Run:
    """Writes everything of the adapter folder that training did not, and proves the adapter's effect."""
    out = config.out
    adapters.save(model, out)
    base.tokenizer.save_pretrained(out)
    record = environment.describe(
        base,
        task=task.facts(),
        data=rows.facts,
        fit=dataclasses.asdict(fit),
        adapter_sha256=environment.file_sha256(out / adapters.WEIGHTS),
    )
    environment.write(out, record)
    sealed_rows = rows.held_out_features or rows.train_features
    if isinstance(sealed_rows, Streamed):
        sealed_rows = [row for row, _ in zip(sealed_rows, range(32), strict=False)]
    sealed = seal.make(task, base, model, sealed_rows, out)
    page = report.Summary(
        title=out.name,
        task=config.task,
        base=record["base"],
        config=plain(config),
        environment=record,
        data=rows.facts,
        metrics=metrics,
        fit=dataclasses.asdict(fit) | {"tokens_per_s": fit.tokens_per_s},
        seal={"kl_effect": sealed.effect, "rows": sum(len(batch["labels"]) for batch in sealed.batches)},
        samples=_samples(task, model, rows.held_out[:SAMPLES]) if config.data.metrics else [],
        adapter_bytes=(out / adapters.WEIGHTS).stat().st_size,
        files={name: environment.file_sha256(out / name) for name in (adapters.WEIGHTS, adapters.CONFIG)},
    )
    report.write(out, page)
    shutil.rmtree(out / train.CHECKPOINTS, ignore_errors=True)
    return Run(out, base, model, task, fit, metrics, page)


def _samples(task: Task, model: Any, examples: Sequence[Example]) -> list[dict[str, str]]:
    with adapters.without(model):
        before = evaluate.replies(task, model, examples)
    after = evaluate.replies(task, model, examples)
    return [
        {"prompt": _asked(example), "expected": task.question(example)[1], "before": old, "after": new}
        for example, old, new in zip(examples, before, after, strict=True)
    ]


def _asked(example: Example) -> str:
    """Returns what the user said last, for people to read."""
    if isinstance(example, formats.Chat):
        said = [message["content"] for message in example.messages[:-1] if message["role"] == "user"]
        return str(said[-1]) if said else ""
    return example.prompt if isinstance(example, formats.Pair) else ""


def _refuse_to_overwrite(config: RunConfig) -> None:
    if (config.out / adapters.WEIGHTS).exists():
        raise ConfigError(f"{config.out} already holds an adapter: choose another --out, or move that one away.")
    if not config.resume and (config.out / train.CHECKPOINTS).exists():
        raise ConfigError(
            f"{config.out} holds checkpoints of an unfinished run: go on with --resume, or choose another --out."
        )


def _split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    count = max(1, round(fraction * len(order)))
    if count >= len(order):
        raise DataError([f"data.eval {fraction} of {len(order)} rows leaves none to train on; give more rows."])
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


def _stream(config: RunConfig, task: Task) -> Iterator[Features]:
    for example in formats.stream(str(config.data.train), config.data.columns):
        yield task.features(example)


def _first_batches(task: Task, rows: Rows, config: RunConfig) -> list[dict[str, Any]]:
    if isinstance(rows.train_features, Streamed):
        raise LoraFtError("lora.init=eva reads rows before training starts, which data.streaming does not allow.")
    size = config.train.batch_size
    starts = range(0, min(len(rows.train_features), EVA_BATCHES * size), size)
    batches = [task.collate(rows.train_features[start : start + size]) for start in starts]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(dataclasses.astuple(example)[1:]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _name(source: str | None) -> str:
    return Path(source).name if source else "rows made by the program"
