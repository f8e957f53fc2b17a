"""One run from configuration to sealed adapter folder: what the command line and every recipe call."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from lora_ft import adapters, checkpoints, evaluate, memory, report, saved, seal, sources, tasks, train
from lora_ft import base as bases
from lora_ft.base import Base
from lora_ft.config import RunConfig
from lora_ft.data import pack
from lora_ft.data.examples import Example
from lora_ft.errors import AdapterError, ConfigError, DataError, Interrupted, OutOfMemoryError
from lora_ft.foreign.strictjson import bare, shown
from lora_ft.model import layers
from lora_ft.pages import samples
from lora_ft.pages.summary import Summary
from lora_ft.proof import environment, recorded, replies
from lora_ft.proof.verdict import Verdict
from lora_ft.scoring import drift
from lora_ft.settings import plain, portable, to_yaml
from lora_ft.system import atomicio, heap, locks, processes
from lora_ft.tasks import Task
from lora_ft.train import Streamed
from lora_ft.training import origin as origins
from lora_ft.training import started
from lora_ft.training.progress import Bar
from lora_ft.training.rows import Rows, check_stream, first_batches, prepare, read

log = logging.getLogger(__name__)

# Rows of an evaluation batch for each of a training batch: without gradients activations are let go at once.
EVALUATION = 4

# What a record says of a training: the fields of `train.Fit`, and of which type each must be.
FIT: dict[str, Any] = {"steps": int, "tokens": int, "seconds": int | float, "peak_bytes": int, "interrupted": bool}


Watch = Callable[[Task, Base, Any, Rows], Iterable[TrainerCallback]]
"""Takes what is about to be trained, the adapter in it, and returns callbacks that watch the training."""


@dataclass
class Run:
    """A finished run: the adapter folder, the live model and what was measured."""

    folder: Path
    base: Base | None
    """None once the run was proven, as is `model`."""
    model: Any
    task: Task
    fit: train.Fit
    metrics: dict[str, dict[str, Any]]
    page: Summary
    """What the card and the report say."""

    def prove(self) -> Verdict:
        """Returns the verdict on the folder loaded anew, having let go of the live model; card and report say it too.

        With that the run is finished, and its checkpoints are deleted.

        Raises:
            ProofError: the folder does not do what the run that wrote it did.
        """
        self.release()
        with _locked(self.folder):
            verdict = seal.verify(self.folder)
            proof = {"kl_live": verdict.kl_live, "passed": verdict.passed}
            report.write(self.folder, dataclasses.replace(self.page, seal=self.page.seal | proof))
            verdict.require(self.folder)
            # What a run needs to go on: until here it could be killed at any point.
            atomicio.remove(self.folder / train.CHECKPOINTS)
        return verdict

    def release(self) -> None:
        """Lets go of the live model and of the memory that it took."""
        self.model = self.base = None
        heap.give_back()

    def summary(self) -> str:
        """Returns the one line that ends every training: speed, memory and the evaluation."""
        parts = [f"{self.fit.tokens_per_s:.0f} tokens/s", f"peak {self.fit.peak_bytes / 2**30:.2f} GiB"]
        if self.metrics:
            base, adapter = self.metrics["base"], self.metrics["adapter"]
            shown = [key for key in adapter if key in base and key != "rows" and "." not in key]
            parts += [f"{key} {base[key]:.4g} -> {adapter[key]:.4g}" for key in shown]
            parts += [f"{drift.KL} {adapter[drift.KL]:.3g}"] if drift.KL in adapter else []
        return ", ".join(parts)


def run(
    config: RunConfig,
    *,
    examples: Sequence[Example] | None = None,
    held_out: Sequence[Example] | None = None,
    console: Console | None = None,
    watch: Watch = lambda *_: (),
) -> Run:
    """Returns the run that `config` describes; its adapter folder is complete and sealed, and `Run.prove` tests it.

    Args:
        examples, held_out: rows already made, instead of those that `config.data` names.
        watch: called before a training begins or goes on.

    Raises:
        ProofError: the run cannot prove what it did; Interrupted: it was stopped and can be resumed.
        BusyError: another process trains into the same folder, or on the same GPU.
        SystemExit: this is one of several processes (`torchrun`, `accelerate launch`) and not the first, which alone
            goes on after the training.
    """
    _refuse_other_sharding(config)
    processes.join()
    shown = console if console and processes.is_first() else Console(stderr=True, quiet=not processes.is_first())
    with _locked(config.out):
        return _run(config, examples, held_out, shown, watch)


def gpu() -> str | None:
    """Returns the uuid of the GPU that a run in this process is on, which `locks.gpu` holds; None on a processor."""
    return (
        str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if torch.cuda.is_available() else None
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the folder of a run in the block, and the GPU that it runs on; tells of an interrupt if it can go on."""
    with locks.run_folder(out) if processes.is_first() else nullcontext(), locks.gpu(gpu(), out):
        try:
            yield
        except KeyboardInterrupt:
            if started.is_trained(out):
                raise Interrupted("Stopped after the training, whose adapter is saved. To go on:") from None
            if not checkpoints.found(out / train.CHECKPOINTS):
                raise
            raise Interrupted("Stopped before the training; its checkpoints are kept. To go on:") from None


def _run(
    config: RunConfig,
    examples: Sequence[Example] | None,
    held_out: Sequence[Example] | None,
    console: Console,
    watch: Watch,
) -> Run:
    first = processes.is_first()
    with processes.in_turn():
        config, origin = origins.adopted(config)
        if first:
            started.sweep(config.out)
            started.refuse_to_overwrite(config)
            train.require_trackers(config.train)
            started.clear_up(config.out)
        trained = config.resume and started.is_trained(config.out)
        if first and config.resume and not trained:
            checkpoints.newest(config.out / train.CHECKPOINTS)
        task, source, rows = _prepared(config, origin, examples, held_out)
        if first:
            came_from = origin.facts() if origin else {}
            digest = environment.tokenizer_sha256(task.tokenizer)
            started.keep_or_compare(config, rows.facts, digest, source.record(), came_from)
    if not trained:
        base, model, fit = _train(config, task, source, rows, origin, console, watch)
    processes.leave()
    if not first:
        raise SystemExit(0)
    if trained or config.train.shard_base:
        # Of a base that was spread over processes this one holds a part, which goes before the whole one comes.
        if not trained:
            del base, model
        heap.give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        base, model, fit = _recall(config.out)
    sealed = _seal(task, base, model, rows, config.out)
    measured = None
    if rows.held_out:
        with console.status("") as status:
            measured = evaluate.compare(
                task,
                model,
                rows.held_out,
                rows.held_out_features,
                names=config.data.metrics,
                index=[] if isinstance(rows.train_features, Streamed) else rows.train_features,
                batch_size=EVALUATION * config.train.batch_size,
                note=status.update,
            )
    return _finish(config, task, base, model, rows, fit, sealed, measured)


def _prepared(
    config: RunConfig,
    origin: origins.Origin | None,
    examples: Sequence[Example] | None = None,
    held_out: Sequence[Example] | None = None,
) -> tuple[Task, sources.Source, Rows]:
    """Returns task, base and rows of a run, held to the adapter that it goes on from; no weight is loaded."""
    task = origin.task_of(config) if origin else tasks.of(config)
    # Before the base, which may be gigabytes to fetch.
    found = read(config, examples, held_out)
    source = sources.resolve(config.base, config.revision)
    if origin:
        origin.require_base(source)
    rows = prepare(config, task, source, *found)
    if origin:
        origin.require_fit(task)
    return task, source, rows


def _train(
    config: RunConfig,
    task: Task,
    source: sources.Source,
    rows: Rows,
    origin: origins.Origin | None,
    console: Console,
    watch: Watch,
) -> tuple[Base, Any, train.Fit]:
    """Returns base, model and what training did, the adapter saved by the first process."""
    planned = memory.of_training(config, task, source, rows)
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
        batches=first_batches(task, rows, config) if config.lora.init == "eva" else (),
    )
    if origin:
        saved.fill(model, origin.folder)
        adapters.keep_as_reference(model, task)
    learned = sum(p.numel() for p in adapters.trained(model).values())
    log.info("training %s parameters of %s", f"{learned:,}", f"{base.model.num_parameters():,}")
    names = [example.where for example in rows.train]
    try:
        with Bar(console) as bar:
            watching = [bar, *watch(task, base, model, rows)]
            passes = planned.passes(config.train.batch_size) if planned else None
            fit = train.fit(
                task, base, model, rows.train_features, rows.held_out_features, config, watching, names, passes
            )
    except DataError as error:
        raise DataError([*error.problems, started.after_bad_row(config.out, rows.facts["train"])]) from None
    except OutOfMemoryError as error:
        steps = [checkpoints.step_of(place) for place in checkpoints.found(config.out / train.CHECKPOINTS)]
        if not steps:
            raise
        way = f"A checkpoint of step {steps[-1]} is saved: go on with --resume --allow-changed, naming what changes."
        raise OutOfMemoryError(f"{error} {way}") from None
    # Whoever measures the adapter later has its base alone to compare it with.
    model.reference = None
    if rows.facts["train"].get("cut_rows"):
        facts = rows.facts["train"]
        log.warning("%d of the %d rows read have more than %d tokens, and were cut", facts["cut_rows"],
                    facts["rows_read"], task.max_length)  # fmt: skip
    if fit.interrupted:
        raise started.interrupted(config.out, fit.steps)
    if processes.is_first():
        _save(config, task, base, model, rows, fit, planned, origin)
    return base, model, fit


def dry_run(
    config: RunConfig, examples: Sequence[Example] | None = None, held_out: Sequence[Example] | None = None
) -> dict[str, Any]:
    """Returns what a run would do, having checked its rows and loss mask; loads no weights."""
    started.refuse_to_overwrite(config)
    train.require_trackers(config.train)
    config, origin = origins.adopted(config)
    task, source, rows = _prepared(config, origin, examples, held_out)
    plan: dict[str, Any] = {"base": source.record(), "data": rows.facts, "config": plain(config)}
    if isinstance(rows.train_features, Streamed):
        plan |= check_stream(config, task)
        tasks.tell_of_cut_rows(task)
    else:
        counts = [len(row["input_ids"]) for row in rows.train_features]
        lengths = [length for row in rows.train_features for length in task.lengths(row)]
        items = len(pack.fill(counts, config.data.max_length)) if config.data.packing else len(counts)
        batches = math.ceil(items / config.train.batch_size)
        steps = config.train.steps or math.ceil(config.train.epochs * math.ceil(batches / config.train.accumulate))
        plan |= {"tokens": sum(lengths), "longest_row": max(lengths), "cut_rows": task.cut_rows, "steps": steps}
    return plan


def _save(
    config: RunConfig,
    task: Task,
    base: Base,
    model: Any,
    rows: Rows,
    fit: train.Fit,
    planned: memory.Step | None = None,
    origin: origins.Origin | None = None,
) -> None:
    """Writes the adapter and what it takes to load it: from here on nothing of the training can be lost.

    All of it is committed beside the checkpoints first. Wherever the moving into the run's folder is cut short, a
    resumed run finishes it; `environment.json`, the last file, says that the training is done.
    """
    out = config.out
    with atomicio.folder(out / train.CHECKPOINTS / saved.STAGED, {}) as draft:
        saved.write(model, draft)
        draft.library(task.tokenizer.save_pretrained)
        draft.write("config.yaml", to_yaml(config))
        draft.write_files(task.files(base.model.config, task.max_length))
        record = environment.describe(
            base,
            task=task.facts(),
            data=rows.facts,
            fit=dataclasses.asdict(fit),
            plan=planned and dataclasses.asdict(planned) | {"peak_bytes": planned.peak_bytes},
            adapter_sha256=environment.file_sha256(draft.path / saved.WEIGHTS),
            tokenizer_sha256=environment.tokenizer_sha256(bases.load_tokenizer(draft.path)),
            **({"init_from": origin.facts()} if origin else {}),
        )
        draft.write_json(environment.FILE, record)
    started.move_in_adapter(out)


def _recall(out: Path) -> tuple[Base, Any, train.Fit]:
    """Returns what `_train` did, of a run that was stopped after it."""
    loaded = saved.load(out)
    return loaded.base, loaded.model, _fit(out, loaded.record)


def _fit(out: Path, record: dict[str, Any]) -> train.Fit:
    """Returns what the record of a run says of its training. Raises AdapterError where it says something else."""
    found = record.get("fit")
    if not isinstance(found, dict):
        raise AdapterError(f"{out / environment.FILE}: fit is {shown(found)}, not an object: the file was damaged.")
    problems = recorded.unlike(found, FIT, "fit.")
    problems += [f"fit.{bare(key)} is none of a training" for key in found.keys() - FIT.keys()]
    if not problems and not found["seconds"] > 0:
        problems.append(f"fit.seconds is {found['seconds']}, not a time")
    if problems:
        raise AdapterError(f"{out / environment.FILE}: {'; '.join(problems[:8])}: the file was damaged.")
    return train.Fit(**found)


def _seal(task: Task, base: Base, model: Any, rows: Rows, out: Path) -> seal.Seal:
    """Returns the seal of the saved adapter: the one it has, or one made of held-out rows, else of training rows."""
    if all((out / name).is_file() for name in seal.FILES):
        return seal.read(out)
    sealed_rows = rows.held_out_features or rows.train_features
    if isinstance(sealed_rows, Streamed):
        sealed_rows = list(itertools.islice(sealed_rows, replies.ROWS))
    return seal.make(task, base, model, sealed_rows, out)


def _finish(
    config: RunConfig,
    task: Task,
    base: Base,
    model: Any,
    rows: Rows,
    fit: train.Fit,
    sealed: seal.Seal,
    measured: evaluate.Comparison | None,
) -> Run:
    """Writes card and report."""
    out, record = config.out, environment.read(config.out)
    settings = plain(portable(config))
    # Rows end where the base has no more positions, whatever was asked for.
    settings["data"]["max_length"] = task.max_length
    metrics = {"base": measured.base, "adapter": measured.adapter} if measured else {}
    page = Summary(
        title=out.name,
        task=config.task,
        base=record["base"],
        config=settings,
        environment=record,
        # Not those of `rows`: of streamed ones it was counted in training, which a resumed run may have behind it.
        data=record["data"],
        metrics=metrics,
        fit=dataclasses.asdict(fit) | {"tokens_per_s": fit.tokens_per_s},
        seal={"kl_effect": sealed.effect, "rows": sum(len(batch["labels"]) for batch in sealed.batches)},
        samples=samples.taken(task, base, model, rows.held_out, measured),
        layers=layers.measured(model),
        plan=record["plan"] | {"measured_rows": not config.data.streaming} if record.get("plan") else {},
        adapter_bytes=(out / saved.WEIGHTS).stat().st_size,
        files={name: environment.file_sha256(out / name) for name in (saved.WEIGHTS, saved.CONFIG)},
    )
    report.write(out, page)
    return Run(out, base, model, task, fit, metrics, page)


def _refuse_other_sharding(config: RunConfig) -> None:
    """Raises ConfigError where somebody else would spread the model, or there is nothing to spread it over."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ConfigError(
                f"accelerate is told to spread the model ({name}), adapter and all: launch with --multi_gpu or "
                "torchrun instead, and spread the base alone with --train.shard-base."
            )
    if config.train.shard_base and processes.asked() == 1:
        raise ConfigError("train.shard-base needs several processes: start with torchrun, or leave it out.")
