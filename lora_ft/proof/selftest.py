"""Checks of a run's own configuration, on a few of its rows and in float32, before the run is paid for.

`batch`, `packing` and `padding`: loss and gradient are those of each row alone, however rows are put together.
`layers`: every layer of the adapter gets a gradient. `seed`: the adapter begins as the seed says. `tokens`: an adapter
that is loaded again is evaluated and asked with the tokens that it was trained on.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

from lora_ft import adapters, generate, sources, tasks, train
from lora_ft import base as bases
from lora_ft.base import Base
from lora_ft.config import COMPUTED, RunConfig
from lora_ft.data.examples import Example
from lora_ft.data.mask import IGNORE
from lora_ft.errors import ConfigError, DataError, ProofError
from lora_ft.model import attention, miniature
from lora_ft.model.modes import mixed_precision, unwrapped
from lora_ft.scoring import losses
from lora_ft.sources import Source
from lora_ft.system import atomicio, heap
from lora_ft.tasks import Batch, Features, Task
from lora_ft.training import rows
from lora_ft.training.trainers import TaskLoss, of
from lora_ft.training.watch import peak_bytes

# A prime, so that parts of it are not of one size: what is averaged over parts of one size is right by chance.
ROWS, FEWEST_ROWS = 7, 3
# Of the norm of the gradient, and of the loss. Sums in another order differ by some 1e-6; planted faults by 1e-2.
TOLERANCE = 1e-4
DRAWN = (".lora_A.", ".lora_embedding_B.")
PASS, FAIL, OTHER = "PASS", "FAIL", "not for this task"

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Answer:
    """One check, and what came of it."""

    name: str
    status: str
    found: str
    """What was compared; where the check is none for the task, why."""
    figure: float | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        measured = f"{self.figure:.2g}, at most {self.tolerance:g}: " if self.tolerance else ""
        return f"{self.status}  {self.name}: {measured}{self.found}"


@dataclass(frozen=True)
class Report:
    """All checks of a configuration."""

    answers: tuple[Answer, ...]
    rows: int
    peak_bytes: int
    """Largest memory that it took: of the process on a processor, of the allocator on a GPU."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON."""
        failed = [answer.name for answer in self.answers if answer.status == FAIL]
        return {"passed": not failed, "rows": self.rows, "peak_bytes": self.peak_bytes, "failed": failed,
                "checks": [asdict(answer) for answer in self.answers]}  # fmt: skip

    def require(self, what: Path) -> None:
        """Raises ProofError, naming each check that failed, unless none did."""
        failed = [f"{a.name} ({a.found})" for a in self.answers if a.status == FAIL]
        if failed:
            raise ProofError(f"{what}: a training would not do what it says. Failed: {'; '.join(failed)}.")


def check(config: RunConfig, *, twin: bool = False) -> Report:
    """Returns what came of all checks of a configuration; nothing is kept.

    Args:
        twin: on a small random model of the base's architecture, and made-up rows where none are named.

    Raises:
        ConfigError: no rows are named. DataError: there are too few, or with all their problems.
    """
    if config.data.train is None and not twin:
        raise ConfigError("data.train is missing: name rows in the file, or add --twin for made-up ones.")
    task = tasks.of(config)
    if twin:
        config = task.rehearsed(config)
        task = tasks.of(config)
    examples, _ = rows.few(dataclasses.replace(config, data=dataclasses.replace(config.data, eval=None)), task)
    if len(examples) < FEWEST_ROWS:
        raise DataError([f"{config.data.train}: {len(examples)} rows are too few to check; give {FEWEST_ROWS}."])
    with tempfile.TemporaryDirectory() as scratch:
        settings = _plain(config, Path(scratch))
        if twin:
            miniature.make(Path(scratch) / "base", config, task, examples)
            settings = dataclasses.replace(settings, base=str(Path(scratch) / "base"), revision=None)
        source = sources.resolve(settings.base, settings.revision)
        prepared = rows.prepare(settings, task, source, examples, [])
        return _Checked(settings, task, source, prepared).report()


def _plain(config: RunConfig, out: Path) -> RunConfig:
    """Returns the configuration without what draws anew in each pass, and a step that changes nothing but the adapter.

    The products of an int8 base depend on what else is in a batch, so it is left whole.
    """
    return dataclasses.replace(
        config,
        out=out,
        init_from=None,
        quant="none" if config.quant == "int8" else config.quant,
        lora=dataclasses.replace(config.lora, dropout=0.0),
        data=dataclasses.replace(config.data, eval=None, metrics=(), packing=False, streaming=False),
        train=dataclasses.replace(
            config.train,
            dtype="float32",
            steps=1,
            schedule="constant",
            warmup=0.0,
            clip=0.0,
            eval_steps=None,
            save_steps=None,
            patience=None,
            report_to=(),
            shard_base=False,
        ),
        resume=False,
        allow_changed=(),
        dry_run=False,
        twin=False,
    )


class _Caught(TrainerCallback):
    """The gradient of a step before it is made, and its loss."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}
        self.loss = float("nan")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = _gradients(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = logs.get("loss", self.loss)


class _Checked:
    """A configuration that is being checked: its model, and the loss and gradient of its rows one by one."""

    def __init__(self, config: RunConfig, task: Task, source: Source, prepared: rows.Rows) -> None:
        self.config, self.task, self.source, self.prepared = config, task, source, prepared
        features: Any = prepared.train_features
        self.rows = _chosen(task, features)
        self.base, self.model = self._made(config.train.seed)
        self.start = _learned(self.model)
        self.trainings = 0

    def report(self) -> Report:
        self.model.train()
        self.alone = self._of_batches([self.task.collate([row]) for row in self.rows])
        layers = self._layers()
        answers = [*self._together(trains=layers.status == PASS), self._padding(), layers, self._tokens()]
        peak, seed = peak_bytes(self.base.device), self.config.train.seed
        del self.base, self.model
        heap.give_back()
        answers.append(self._seed(seed))
        return Report(tuple(answers), len(self.rows), peak)

    def _made(self, seed: int) -> tuple[Base, Any]:
        """Returns base and model as a training makes them, but that nothing in them is dropped."""
        config, task = self.config, self.task
        told = bases.text_config(self.source, task.model_class).to_dict()
        undropped = {name: 0.0 for name, value in told.items() if "drop" in name and isinstance(value, float)}
        base = bases.load(
            self.source,
            quant=config.quant,
            model_class=task.model_class,
            dtype=config.train.dtype,
            seed=seed,
            config_changes=undropped | task.config_changes(),
        )
        model = adapters.attach(
            base,
            config.lora,
            peft_task=task.peft_task,
            seed=seed,
            special_tokens=config.data.special_tokens,
            batches=rows.first_batches(task, self.prepared, config) if config.lora.init == "eva" else (),
        )
        return base, model

    # Rows together

    def _together(self, *, trains: bool) -> Iterator[Answer]:
        kind = of(self.task)
        if not issubclass(kind, TaskLoss):
            for name in ("batch", "packing"):
                yield Answer(name, OTHER, f"{self.task.name} is trained by {kind.__name__}, whose loss is its own")
            return
        if not trains:
            for name in ("batch", "packing"):
                yield Answer(name, OTHER, "a training refuses to start where part of the adapter has no gradient")
            return
        count = len(self.rows)
        sizes = sorted({count, count // 2, 2, 1}, reverse=True)
        found = max(self._off(*self._step(size, packing=False)) for size in sizes)
        listed = ", ".join(map(str, sizes))
        told = f"loss and gradient of a step of {count} rows, {listed} in a pass, beside those of each row alone"
        yield _measured("batch", found, told)
        against = (
            attention.refusal(self.model) if self.task.shares_rows else f"rows of the task {self.task.name} cannot"
        )
        if against is not None:
            yield Answer("packing", OTHER, f"several rows cannot share one: {against}")
            return
        found = self._off(*self._step(count, packing=True))
        yield _measured("packing", found, f"loss and gradient of a step of {count} rows packed, beside the same")

    def _step(self, size: int, *, packing: bool) -> tuple[float, Gradients]:
        """Returns loss and gradient of one step on all rows, so many in a pass, as a training makes it."""
        config, caught = self.config, _Caught()
        self.trainings += 1
        settings = dataclasses.replace(
            config,
            out=config.out / str(self.trainings),
            data=dataclasses.replace(config.data, packing=packing),
            train=dataclasses.replace(config.train, batch_size=size, accumulate=-(-len(self.rows) // size)),
        )
        train.fit(self.task, self.base, self.model, self.rows, [], settings, [caught])
        for name, parameter in adapters.trained(self.model).items():
            parameter.data.copy_(self.start[name])
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        return caught.loss, caught.gradients

    def _padding(self) -> Answer:
        tokenizer, found = self.task.tokenizer, []
        before = tokenizer.padding_side
        try:
            for side in ("right", "left"):
                tokenizer.padding_side = side
                found.append(self._off(*self._of_batches([self.task.collate(self.rows)])))
        finally:
            tokenizer.padding_side = before
        sides = "whichever side the tokenizer pads"
        if self.task.shares_rows and "position_ids" in generate.parameters(unwrapped(self.model)):
            found.append(self._off(*self._of_batches([_on_the_left(self.task.collate(self.rows))])))
            sides = "on the right and on the left"
        told = f"loss and gradient of {len(self.rows)} rows padded to one length, {sides}, beside the same"
        return _measured("padding", max(found), told)

    def _of_batches(self, batches: Sequence[Batch]) -> tuple[float, Gradients]:
        """Returns loss and gradient of all scored positions of the batches, without any Trainer."""
        count = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
        loss = 0.0
        self.model.zero_grad(set_to_none=True)
        for nll in self._losses([losses.to(batch, self.base.device) for batch in batches]):
            part = nll / max(count, 1)
            part.backward()
            loss += part.item()
        found = _gradients(self.model)
        self.model.zero_grad(set_to_none=True)
        return loss, found

    def _losses(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """Yields losses that add up to that of all batches, each row of which knows the others where it must."""
        task, model = self.task, self.model
        with mixed_precision(model):
            if task.contrasts:
                vectors_RD = torch.cat([task.vectors(model, batch) for batch in batches])
                told = {key: torch.cat([b[key] for b in batches]) for key in batches[0] if batches[0][key].ndim == 1}
                yield task.contrast(vectors_RD, told, (told["labels"] != IGNORE).nonzero()[:, 0]).sum()
                return
            if task.together(batches[0]):
                vectors = [task.vectors(model, batch) for batch in batches]
                sizes = [len(part) for part in vectors]
                for name, value in task.shared(torch.cat(vectors)).items():
                    parts = zip(batches, value.split(sizes), strict=True)
                    batches = [{**batch, name: part} for batch, part in parts]
        for batch in batches:
            with mixed_precision(model):
                nll = task.loss(model, batch)
            yield nll

    def _off(self, loss: float, gradients: Gradients) -> float:
        """Returns how far a loss or a gradient is from that of the rows alone, relative; the larger of the two."""
        alone, wanted = self.alone
        norm = sum(float(g.double().square().sum()) for g in wanted.values()) ** 0.5
        names = wanted.keys() | gradients.keys()
        apart = sum(float((_of(gradients, n, wanted) - _of(wanted, n, gradients)).square().sum()) for n in names) ** 0.5
        worst = max(abs(loss - alone) / max(abs(alone), 1e-12), apart / max(norm, 1e-12))
        return worst if worst == worst else float("inf")

    # The adapter

    def _layers(self) -> Answer:
        gradients = self.alone[1]
        moved = {name for name, gradient in gradients.items() if bool(gradient.any()) and gradient.isfinite().all()}
        layers = {
            name: [n for n, _ in module.named_parameters(prefix=name) if "lora_" in n]
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        heads = self.base.task_heads
        layers |= {name: [n for n in self.start if f".{name}." in n and "lora_" not in n] for name in heads}
        still = [name.removeprefix("base_model.model.") for name, own in layers.items() if not moved & {*own}]
        some = f" (none in {', '.join(still[:3])}{' ...' if len(still) > 3 else ''})" if still else ""
        told = f"{len(still)} of {len(layers)} layers get no gradient{some}"
        return Answer("layers", FAIL if still else PASS, told, float(len(still)), 0.0)

    def _seed(self, seed: int) -> Answer:
        again, other = (_learned(self._made(number)[1]) for number in (seed, seed + 1))
        drawn = [name for name in self.start if any(part in name for part in DRAWN)]
        if self.config.lora.init in COMPUTED:
            drawn = []
        unlike = [name for name in self.start if not torch.equal(self.start[name], again[name])]
        alike = [name for name in drawn if torch.equal(self.start[name], other[name])]
        wrong = [*unlike, *alike]
        told = f"{len(unlike)} of {len(self.start)} tensors begin otherwise with seed {seed} again, "
        told += f"{len(alike)} of {len(drawn)} drawn ones the same with {seed + 1}" if drawn else (
            f"and none is drawn: lora.init {self.config.lora.init} computes them"
        )  # fmt: skip
        told += f" ({wrong[0]})" if wrong else ""
        return Answer("seed", FAIL if wrong else PASS, told, float(len(wrong)), 0.0)

    # The tokens

    def _tokens(self) -> Answer:
        place = self.config.out / "tokenizer"
        with atomicio.folder(place) as draft:
            draft.library(self.task.tokenizer.save_pretrained)
        tokenizer = bases.load_tokenizer(place)
        again = tasks.of(self.config, json.loads(json.dumps(self.task.facts())))
        again.prepare(tokenizer, self.task.max_length)
        again.see(self.prepared.train)
        ends = {*again.end_ids(), *generate.end_ids(unwrapped(self.model), tokenizer)} if _replies(again) else set()
        features: Any = self.prepared.train_features
        wrong = [
            why
            for example, row in zip(self.prepared.train, features, strict=True)
            if (why := _unlike(again, example, row, ends))
        ]
        told = f"{len(wrong)} of {len(features)} rows are evaluated or asked with other tokens than trained"
        told += f" ({wrong[0]})" if wrong else ""
        return Answer("tokens", FAIL if wrong else PASS, told, float(len(wrong)), 0.0)


def _chosen(task: Task, features: Sequence[Features]) -> list[Features]:
    """Returns a few rows, short ones of several lengths; where they must be ordered, the first of such an order."""
    draw = task.order(features)
    if draw is not None:
        return [features[i] for i in list(draw(torch.Generator().manual_seed(0)))[:ROWS]]
    order = sorted(range(len(features)), key=lambda i: sum(task.lengths(features[i])))
    return [features[i] for i in (order[: 2 * ROWS : 2] if len(order) >= 2 * ROWS else order[:ROWS])]


def _otherwise_predicted(again: Task, example: Example, row: Features) -> str:
    """Returns in what a row differs where `predict` asks for it, of a task that makes no text."""
    try:
        asked = again.asked(example)
    except DataError:
        return ""  # of texts that are compared it asks for one
    same = "input_ids" not in row or asked["input_ids"] == row["input_ids"]
    return "" if same else f"{example.where}: predicted with other tokens"


def _unlike(again: Task, example: Example, row: Features, ends: set[int]) -> str:
    """Returns in what a row differs where the adapter is loaded again; empty where it does not.

    Args:
        again: the task as it is loaded with the adapter.
        ends: tokens that end a reply when one is generated.
    """
    if again.features(example) != row:
        return f"{example.where}: evaluated with other tokens"
    if not _replies(again):
        return _otherwise_predicted(again, example, row)
    try:
        prompt, _ = again.question(example)
    except DataError:
        return ""  # of plain text all is learned
    text = again.texts(row)[0]
    ids, labels = text["input_ids"], text["labels"]
    if max(again.lengths(row)) >= again.max_length:
        return ""  # cut, so that its end is not there
    if again.peft_task == "SEQ_2_SEQ_LM":
        if prompt != ids:
            return f"{example.where}: asked with another source"
    elif ids[: len(prompt)] != prompt:
        return f"{example.where}: asked with another prompt"
    elif labels[len(prompt) : len(prompt) + 1] == [IGNORE] and any(k != IGNORE for k in labels[len(prompt) :]):
        return f"{example.where}: what follows its prompt is not trained"
    if again.reward is not None:
        return ""  # an answer that replies are checked against is none itself
    last = next(label for label in reversed(labels) if label != IGNORE)
    return "" if last in ends else f"{example.where}: the token {last} that ends it in training ends no reply"


def _replies(task: Task) -> bool:
    return task.peft_task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _measured(name: str, figure: float, told: str) -> Answer:
    return Answer(name, PASS if figure <= TOLERANCE else FAIL, told, figure, TOLERANCE)


def _gradients(model: Any) -> Gradients:
    return {n: p.grad.detach().cpu().clone() for n, p in adapters.trained(model).items() if p.grad is not None}


def _learned(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapters.trained(model).items()}


def _of(held: Gradients, name: str, other: Gradients) -> torch.Tensor:
    return (held[name] if name in held else torch.zeros_like(other[name])).double()


def _on_the_left(batch: Batch) -> Batch:
    """Returns rows padded on the right with the padding on their left, and the places of their tokens."""
    mask = batch["attention_mask"]
    shifts = (mask.shape[1] - mask.sum(1)).tolist()
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORE  # no token of the row says it
    moved = {
        key: torch.stack([row.roll(shift) for row, shift in zip(values, shifts, strict=True)])
        for key, values in {**batch, "labels": labels}.items()
    }
    moved["position_ids"] = (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return moved
