"""Several adapters of one base and task -> one adapter, through PEFT, with the effect that each keeps measured.

Whether two adapters go together is no property of a method: what one learned, the other may undo. So each is measured
on what its own seal keeps, and on rows where there are any, before it is combined and after.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from lora_ft import adapters, evaluate, report, saved, seal, tasks
from lora_ft import base as bases
from lora_ft.commands.options import CombineConfig
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.data import formats
from lora_ft.data.examples import Example
from lora_ft.data.render import IGNORE
from lora_ft.errors import AdapterError
from lora_ft.foreign.adapter import MAX_RANK
from lora_ft.model.modes import evaluating, without
from lora_ft.pages.summary import Summary
from lora_ft.proof import environment, recorded
from lora_ft.proof.verdict import Verdict
from lora_ft.saved import Loaded
from lora_ft.scoring import losses
from lora_ft.seal import Seal
from lora_ft.settings import plain, to_yaml
from lora_ft.system import atomicio, heap
from lora_ft.tasks import Batch, Features, Task

log = logging.getLogger(__name__)

COMBINED = "default"
"""PEFT's name of the combined adapter while the others are beside it."""
# What `ties` and `dare` keep, and draw with, where nothing else is said.
DENSITY, SEED = 0.5, 42
# An adapter that gains less on rows than this, in nats, has no gain to speak of a share of.
LEAST_GAIN = 1e-3


@dataclass
class Part:
    """One of the adapters that are combined."""

    folder: Path
    weight: float
    record: dict[str, Any]
    settings: peft.LoraConfig
    config: RunConfig
    task: Task
    sealed: Seal

    @classmethod
    def of(cls, folder: Path, weight: float) -> Part:
        """Returns an adapter as its folder has it. Raises AdapterError where that is incomplete, or changed since."""
        record, settings = recorded.read(folder), saved.lora_settings(folder)
        config, task = recorded.task(folder, record)
        sealed = seal.read(folder)
        digest, was = environment.file_sha256(folder / saved.WEIGHTS), sealed.record["adapter_sha256"]
        if digest != was:
            raise AdapterError(
                f"{folder / saved.WEIGHTS}: its sha256 is {digest[:16]}, the seal was made of {was[:16]}: the weights "
                "were changed after they were sealed, so what they do is not known. Put back the file of then."
            )
        return cls(folder, weight, record, settings, config, task, sealed)

    @property
    def rank(self) -> int:
        """The largest of any layer."""
        return max((self.settings.r, *self.settings.rank_pattern.values()))


@dataclass
class Kept:
    """What an adapter did alone, and what the combined one does of it."""

    weight: float
    adapter_sha256: str
    kl_effect: float
    """KL(adapter, base) on the rows of its seal, in nats per position, as sealed."""
    kl_combined: float
    """KL(adapter, combined) on the same rows: 0 where nothing was lost, `kl_effect` where all was."""
    loss: dict[str, float | None]
    """Of `base`, `alone` and `combined`, on the same rows, in nats per scored position; None of vectors, whose loss is
    of rows that are contrasted, while a seal keeps single texts."""
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Metrics on the rows that were named for it, of `base`, `alone` and `combined`; empty where none were."""

    @property
    def effect_kept(self) -> float:
        """Share of its effect that the combined adapter has: 1 all, 0 none, less than 0 where it leads elsewhere."""
        return 1 - self.kl_combined / self.kl_effect

    @property
    def gain_kept(self) -> float | None:
        """Share of what it gained in loss on its rows, or those of its seal, that the combined one has too.

        None where it gained nothing there itself, or no loss is known.
        """
        losses_of = {name: found["loss"] for name, found in self.rows.items()} or self.loss
        base, alone, combined = (losses_of[name] for name in ("base", "alone", "combined"))
        if base is None or alone is None or combined is None or base - alone < LEAST_GAIN:
            return None
        return (base - combined) / (base - alone)

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON."""
        return {**dataclasses.asdict(self), "effect_kept": self.effect_kept, "gain_kept": self.gain_kept}


@dataclass
class Combined:
    """A combined adapter folder, and what was measured of it."""

    folder: Path
    rank: int
    parts: list[Kept]
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """Returns what was measured as JSON."""
        return {"rank": self.rank, "parts": [part.as_dict() for part in self.parts], "seal": self.verdict.as_dict()}


def combine(config: CombineConfig) -> Combined:
    """Returns the combined adapter that `config` describes; its folder is whole, sealed and verified as any other.

    Raises:
        AdapterError: adapters that do not go together, naming every reason; or a folder of one is incomplete.
        ProofError: the combined adapter changes nothing, or its folder does not do what the live one did.
    """
    out = config.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} exists and is not an empty folder; combine into a new one.")
    weights = config.weights or (1.0,) * len(config.adapters)
    parts = [Part.of(folder, weight) for folder, weight in zip(config.adapters, weights, strict=True)]
    _refuse_what_does_not_fit(parts, config)
    examples = [formats.read(name, {}) for name in config.data]
    loaded = _loaded_beside_each_other(parts, config.base)
    loaded.task = task = tasks.of(parts[0].config, _facts(parts))
    loaded.prepare_task()
    measured = _Measured(loaded, parts, examples, config.metrics)
    measured.take("alone")
    _combine(loaded.model, parts, config)
    rank = loaded.model.peft_config[COMBINED].r
    measured.take("combined")
    kept = measured.kept()
    with atomicio.draft(out) as draft:
        for number in range(len(parts)):
            loaded.model.delete_adapter(_name(number))
        loaded.model.set_adapter(COMBINED)
        _write(draft, loaded, parts, config, rank)
        rows = [row for part in parts for row in rows_of(task, part.sealed.batches)]
        sealed = seal.make(task, loaded.base, loaded.model, rows, draft.path)
        page = _page(draft.path, loaded, parts, kept, config, sealed, rank)
        del loaded, measured
        heap.give_back()
        verdict = seal.verify(draft.path, base_name=config.base)
        proof = {"kl_live": verdict.kl_live, "passed": verdict.passed}
        report.write(draft.path, dataclasses.replace(page, title=out.name, seal=page.seal | proof))
        verdict.require(out)
        draft.commit(out)
    return Combined(out, rank, kept, verdict)


def rows_of(task: Task, batches: Sequence[Batch]) -> list[Features]:
    """Returns the rows of batches as they were before they were padded."""
    # Where the labels are a text of their own, padding is what is not scored.
    paired = task.peft_task == "SEQ_2_SEQ_LM"
    rows = []
    for batch in batches:
        for index, mask_T in enumerate(batch["attention_mask"].bool()):
            row = {key: values[index] for key, values in batch.items()}
            kept = {key: values != IGNORE if paired and key == "labels" else mask_T for key, values in row.items()}
            # A number is of the row as a whole.
            rows.append({key: (values[kept[key]] if values.ndim else values).tolist() for key, values in row.items()})
    return rows


def _refuse_what_does_not_fit(parts: Sequence[Part], config: CombineConfig) -> None:
    """Raises AdapterError with every reason why the adapters cannot be combined this way."""
    first, problems = parts[0], []
    for part in parts[1:]:
        pairs = {
            "the base": [p.record["base"]["weights_sha256"] for p in (first, part)],
            "the task": [p.config.task for p in (first, part)],
            "how vectors are pooled": [p.task.facts().get("pooling") for p in (first, part)],
            "the tokenizer or chat template": [p.sealed.record["tokenizer_sha256"] for p in (first, part)],
            "how the base is quantized": [p.record["quant"] for p in (first, part)],
        }
        problems += [
            f"{part.folder}: {what} is another than that of {first.folder} ({second[:16]}, not {was[:16]})"
            for what, (was, second) in pairs.items()
            if was != second
        ]
    for part in parts:
        of = part.settings
        kinds = {
            "it is a DoRA, whose magnitudes belong to its own update": of.use_dora,
            f"it holds {', '.join(of.modules_to_save or ())} whole, and there is one of each": of.modules_to_save,
            "it trains rows of single tokens": of.trainable_token_indices,
            "its B have biases": of.lora_bias,
            "it adapts parameters that are no modules": of.target_parameters,
        }
        problems += [f"{part.folder}: {why}" for why, holds in kinds.items() if holds]
    if len({isinstance(part.settings.target_modules, str) for part in parts}) > 1:
        problems.append("one names its modules, another has an expression for them, which PEFT does not join")
    if _works_on_factors(config.method):
        ranks = [part.rank for part in parts]
        if len(set(ranks)) > 1 or any(part.settings.rank_pattern for part in parts):
            told = ", ".join(map(str, ranks))
            problems.append(
                f"{config.method} needs one rank for all layers of all of them, and theirs are {told}: "
                f"use cat, svd{'' if config.method == 'linear' else f' or {config.method}_svd'}"
            )
    total = sum(part.rank for part in parts)
    if config.method == "cat" and total > MAX_RANK:
        problems.append(f"cat would give rank {total:,}, above {MAX_RANK:,}: use svd")
    if config.rank is not None and config.rank > MAX_RANK:
        problems.append(f"rank {config.rank:,} is above {MAX_RANK:,}")
    if problems:
        raise AdapterError("\n".join(["These adapters cannot be combined:", *(f"  {why}" for why in problems)]))


def _works_on_factors(method: str) -> bool:
    return method != "cat" and not method.endswith("svd")


def _facts(parts: Sequence[Part]) -> dict[str, Any]:
    """Returns what the combined adapter knows of its rows: what all parts do, and nothing where they differ."""
    every = [part.task.facts() for part in parts]
    return {key: value if all(facts[key] == value for facts in every) else None for key, value in every[0].items()}


def _name(number: int) -> str:
    return f"part{number}"


def _loaded_beside_each_other(parts: Sequence[Part], base_name: str | None) -> Loaded:
    """Returns the base with all adapters on it, by `_name`."""
    loaded = saved.load(parts[0].folder, base_name)
    for number, part in enumerate(parts):
        saved.add(loaded, part.folder, part.settings, _name(number))
    loaded.model.set_adapter(_name(0))
    loaded.model.delete_adapter("default")
    loaded.model.eval()
    return loaded


def _combine(model: peft.PeftModel, parts: Sequence[Part], config: CombineConfig) -> None:
    """Puts the combined adapter into the model."""
    names, chosen = [_name(number) for number in range(len(parts))], _chosen(config)
    # PEFT gives the new adapter the first one's settings with alpha = r: with rsLoRA that would multiply it by sqrt(r).
    first = model.peft_config[names[0]]
    first.use_rslora, was = False, first.use_rslora
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(chosen.get("seed", SEED))
        warnings.filterwarnings("ignore", message="The density .* is greater than or equal to 1")
        model.add_weighted_adapter(
            names,
            [part.weight for part in parts],
            COMBINED,
            combination_type=config.method,
            svd_rank=config.rank,
            svd_full_matrices=False,
            density=chosen.get("density"),
        )
    first.use_rslora = was
    model.peft_config[COMBINED].lora_dropout = 0.0
    adapters.in_float32(model)


class _Measured:
    """The losses and replies of each part on its own rows, of the base, the part alone and the combined adapter."""

    def __init__(
        self, loaded: Loaded, parts: Sequence[Part], examples: Sequence[list[Example]], names: Sequence[str]
    ) -> None:
        self.model, self.task, self.parts, self.names = loaded.model, loaded.task, parts, names
        self.examples = examples
        if examples:
            evaluate.require(loaded.task, names)
        self.features = [tasks.featurize(loaded.task, rows) for rows in examples]
        self.loss: list[dict[str, float | None]] = [{} for _ in parts]
        self.rows: list[dict[str, dict[str, Any]]] = [{} for _ in parts]
        self.drift: list[float] = []

    def take(self, what: str) -> None:
        """Measures `alone`, and with it the base, or `combined`."""
        for number, part in enumerate(self.parts):
            self.model.set_adapter(_name(number) if what == "alone" else COMBINED)
            if what == "alone":
                with without(self.model):
                    self._take(number, part, "base")
            else:
                self.drift.append(seal.drift(part.sealed, self.task, self.model))
            self._take(number, part, what)

    def _take(self, number: int, part: Part, what: str) -> None:
        self.loss[number][what] = _loss(self.task, self.model, part.sealed.batches)
        if self.examples:
            self.rows[number][what] = evaluate.measure(
                self.task, self.model, self.examples[number], self.features[number], names=self.names
            )

    def kept(self) -> list[Kept]:
        """Returns what was measured of each part."""
        return [
            Kept(part.weight, part.sealed.record["adapter_sha256"], part.sealed.effect, drift, loss, rows)
            for part, drift, loss, rows in zip(self.parts, self.drift, self.loss, self.rows, strict=True)
        ]


def _loss(task: Task, model: torch.nn.Module, batches: Sequence[Batch]) -> float | None:
    """Returns the loss at the scored positions of a seal, in nats a position; None of a task that contrasts."""
    if task.contrasts:
        return None
    with evaluating(model):
        device = next(model.parameters()).device
        scores = [task.score(model, losses.to(batch, device)) for batch in batches]
        errors = [task.errors(one) for one in scores]
    return float(sum(errors_N.sum() for errors_N in errors) / sum(len(errors_N) for errors_N in errors))


def _write(draft: atomicio.Draft, loaded: Loaded, parts: Sequence[Part], config: CombineConfig, rank: int) -> None:
    """Writes all of an adapter folder but what is measured."""
    saved.write(loaded.model, draft)
    draft.library(loaded.base.tokenizer.save_pretrained)
    settings = _settings(loaded, parts, config, rank)
    draft.write("config.yaml", to_yaml(settings))
    longest = bases.longest_row(loaded.base.source, loaded.task.model_class, settings.data.max_length)
    draft.write_files(loaded.task.files(loaded.base.model.config, longest))
    record = environment.describe(
        loaded.base,
        task=loaded.task.facts(),
        data={},
        combined={"method": config.method, "rank": rank, **_chosen(config), "parts": [_origin(part) for part in parts]},
        adapter_sha256=environment.file_sha256(draft.path / saved.WEIGHTS),
        tokenizer_sha256=environment.tokenizer_sha256(bases.load_tokenizer(draft.path)),
    )
    draft.write_json(environment.FILE, record)


def _chosen(config: CombineConfig) -> dict[str, Any]:
    """Returns the options that the method reads."""
    density, seed = config.density or DENSITY, SEED if config.seed is None else config.seed
    chosen: dict[str, Any] = {"density": density} if config.method.startswith(("ties", "dare")) else {}
    return chosen | ({"seed": seed} if config.method.startswith("dare") else {})


def _origin(part: Part) -> dict[str, Any]:
    """Returns where a part came from, by digests alone: its weights, and the rows that it was trained on."""
    return {
        "weight": part.weight,
        "adapter_sha256": environment.file_sha256(part.folder / saved.WEIGHTS),
        "data": part.record.get("data", {}),
        "parts": (part.record.get("combined") or {}).get("parts", []),
    }


def _settings(loaded: Loaded, parts: Sequence[Part], config: CombineConfig, rank: int) -> RunConfig:
    """Returns the configuration that the combined adapter is loaded by; no training of it would make the adapter."""
    first, targets = parts[0].config, loaded.model.peft_config[COMBINED].target_modules
    return RunConfig(
        task=first.task,
        base=loaded.record["base"]["name"],
        out=Path(config.out.name),
        quant=first.quant,
        lora=LoraConfig(
            rank=rank,
            alpha=float(rank),
            rslora=False,
            targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        ),
        data=DataConfig(max_length=max(part.config.data.max_length for part in parts)),
        train=TrainConfig(seed=_chosen(config).get("seed", SEED), dtype=loaded.record["dtype"]),
    )


def _page(
    folder: Path,
    loaded: Loaded,
    parts: Sequence[Part],
    kept: Sequence[Kept],
    config: CombineConfig,
    sealed: Seal,
    rank: int,
) -> Summary:
    """Returns what card and report say."""
    record = environment.read(folder)
    shown = [
        part.as_dict() | {"number": number, "data": [facts["name"] for facts in origin["data"].values() if facts]}
        for number, (part, origin) in enumerate(zip(kept, record["combined"]["parts"], strict=True), start=1)
    ]
    return Summary(
        title=config.out.name,
        task=parts[0].config.task,
        base=record["base"],
        config=plain(_settings(loaded, parts, config, rank)),
        environment=record,
        data={},
        seal={"kl_effect": sealed.effect, "rows": sum(len(batch["labels"]) for batch in sealed.batches)},
        combined={"method": config.method, "rank": rank, **_chosen(config), "parts": shown},
        adapter_bytes=(folder / saved.WEIGHTS).stat().st_size,
        files={name: environment.file_sha256(folder / name) for name in (saved.WEIGHTS, saved.CONFIG)},
    )
