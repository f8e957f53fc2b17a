"""The adapter that a training goes on from (`--init-from`): read, held to the run that is asked for, and put into it.

What shapes an adapter is that adapter's own; what is learned of it, and how, is the run's.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft

from lora_ft import saved, tasks
from lora_ft.config import DataConfig, LoraConfig, RunConfig
from lora_ft.errors import AdapterError, ConfigError
from lora_ft.foreign import adapter as foreign
from lora_ft.foreign import tensors
from lora_ft.foreign.strictjson import shown
from lora_ft.proof import environment, recorded
from lora_ft.sources import Source
from lora_ft.tasks import Task

log = logging.getLogger(__name__)

ADAPTED = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?A(?:\.weight)?")
# What a plain adapter may have and a training here does not give it.
UNTRAINED = ("lora_bias", "target_parameters")
# Starts that moved the base: as PEFT saves them, what they learned is on weights that nobody has.
MOVED = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class Origin:
    """An adapter folder, of lora-ft or of plain PEFT, whose weights a training begins with."""

    folder: Path
    settings: peft.LoraConfig
    sha256: str
    """Of its file of weights."""
    record: dict[str, Any] | None
    """What it records of the run that made it; None of plain PEFT, as `config` and `task` are."""
    config: RunConfig | None
    task: Task | None

    def adopted(self, config: RunConfig) -> RunConfig:
        """Returns the configuration with the shape of this adapter.

        Raises:
            ConfigError: an option asks for another shape.
        """
        lora, data = _shape(self)
        problems = [
            f"  {name}.{key.replace('_', '-')} is {_said(asked)}, the adapter's is {_said(value)}"
            for name, given, default, shape in (
                ("lora", config.lora, LoraConfig(), lora),
                ("data", config.data, DataConfig(), data),
            )
            for key, value in shape.items()
            if (asked := getattr(given, key)) != getattr(default, key) and _sorted(asked) != _sorted(value)
        ]
        if problems:
            raise ConfigError(
                f"init-from: an adapter keeps the shape that it has, so leave out what asks for another than that of "
                f"{self.folder}:\n" + "\n".join(problems)
            )
        log.info(
            "going on from %s: rank %d, alpha %g, %s", self.folder, lora["rank"], lora["alpha"], _said(lora["targets"])
        )
        return dataclasses.replace(
            config, lora=dataclasses.replace(config.lora, **lora), data=dataclasses.replace(config.data, **data)
        )

    def task_of(self, config: RunConfig) -> Task:
        """Returns the task of a run, which knows what this adapter learned of its rows where it is of the same task.

        Raises:
            AdapterError: the adapter is for models of another kind, or nothing says what its classes are.
        """
        task = tasks.of(config)
        if self.settings.task_type != task.peft_task:
            raise AdapterError(
                f"{self.folder}: the adapter's task_type is {shown(str(self.settings.task_type))}, and the task "
                f"{config.task} needs {task.peft_task}: go on with a task of that type."
            )
        if self.task is not None and self.task.name == task.name:
            return tasks.of(config, self.task.facts())
        if self.settings.modules_to_save and task.peft_task in ("SEQ_CLS", "TOKEN_CLS"):
            raise AdapterError(
                f"{self.folder}: nothing says which class each output of its head stands for, so {config.task} cannot "
                "go on with it: only an adapter that lora-ft trained for the task says so."
            )
        return task

    def require_fit(self, task: Task) -> None:
        """Raises AdapterError where the rows of the run call for another head than this adapter has."""
        same = self.task if self.task is not None and self.task.name == task.name else task
        has, needs = same.config_changes(), task.config_changes()
        for key in sorted(key for key in has.keys() | needs.keys() if has.get(key) != needs.get(key)):
            raise AdapterError(
                f"{self.folder}: {key} is {shown(has.get(key))} in the adapter, but the rows call for "
                f"{shown(needs.get(key))}: give rows of the kind that it was trained on, or start anew."
            )
        was = (self.record or {}).get("tokenizer_sha256")
        if was and environment.tokenizer_sha256(task.tokenizer) != was:
            log.warning("init-from: tokenizer or chat template are not those that %s was trained with", self.folder)

    def require_base(self, source: Source) -> None:
        """Raises AdapterError where the base of the run is not the one that this adapter was made on."""
        if self.record is not None:
            saved.require_base(self.folder, self.record["base"], source)
            return
        named, known = self.settings.base_model_name_or_path or "", {source.name, source.repo or source.name}
        if Path(named).name.lower() not in {Path(name).name.lower() for name in known}:
            raise AdapterError(
                f"{self.folder}: the adapter was made on {shown(named)}, and the base of this run is {source.name}: an "
                "adapter works on its own base only. If they are the same, correct base_model_name_or_path in its "
                f"{saved.CONFIG}."
            )
        log.warning(
            "%s records no digest of its base, so by name alone %s is the %s that it was made on",
            self.folder, source.name, named,
        )  # fmt: skip

    def facts(self) -> dict[str, str]:
        """Returns what a run records of it."""
        return {"sha256": self.sha256}


def adopted(config: RunConfig) -> tuple[RunConfig, Origin | None]:
    """Returns the configuration with the shape of the adapter that it goes on from, and that adapter, if there is one.

    Raises:
        AdapterError: that is no adapter, or one that no training here could have made.
        ConfigError: an option asks for another shape.
    """
    if config.init_from is None:
        return config, None
    origin = read(config.init_from)
    return origin.adopted(config), origin


def read(folder: Path) -> Origin:
    """Returns the adapter in `folder`.

    Raises:
        AdapterError: it is none, or one that no training here could have made.
    """
    settings = saved.lora_settings(folder)
    header = tensors.header(folder / saved.WEIGHTS, AdapterError)[1]
    foreign.refuse_names(header, folder / saved.WEIGHTS)
    strange = [name for name in UNTRAINED if getattr(settings, name)]
    if strange:
        raise AdapterError(f"{folder / saved.CONFIG}: {', '.join(strange)} cannot be trained on here: start anew.")
    start = saved.read_settings(folder).get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVED):
        raise AdapterError(
            f"{folder / saved.CONFIG}: init_lora_weights is {shown(start)}, which moved the weights of its base, so on "
            "the base alone it is another adapter: have PEFT convert it to plain LoRA when it is saved."
        )
    record = config = task = None
    if (folder / environment.FILE).is_file():
        record = recorded.read(folder)
        config, task = recorded.task(folder, record)
    return Origin(folder, settings, environment.file_sha256(folder / saved.WEIGHTS), record, config, task)


def _shape(origin: Origin) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of an adapter's shape: those of `lora` and of `data`."""
    settings = origin.settings
    lora = {
        "rank": settings.r,
        "alpha": float(settings.lora_alpha),
        "rslora": settings.use_rslora,
        "dora": settings.use_dora,
        "rank_pattern": dict(settings.rank_pattern or {}),
        "alpha_pattern": {key: float(value) for key, value in (settings.alpha_pattern or {}).items()},
    }
    if origin.config is not None:
        # In the words of the options: PEFT's file has every layer by name, the task's head, and tokens by number.
        lora |= {key: getattr(origin.config.lora, key) for key in ("targets", "save_modules", "train_tokens")}
        return lora, {"special_tokens": origin.config.data.special_tokens}
    if settings.trainable_token_indices:
        raise AdapterError(
            f"{origin.folder}: it trains rows of tokens by their number, and no record says which tokens those are: "
            "only an adapter that lora-ft trained can be gone on from with them."
        )
    targets = settings.target_modules
    if not isinstance(targets, set | list):
        # A pattern: the modules that it fitted are in the file.
        header = tensors.header(origin.folder / saved.WEIGHTS, AdapterError)[1]
        targets = {found[1] for name in header if (found := ADAPTED.fullmatch(name))}
    whole = tuple(sorted(settings.modules_to_save or ()))
    tokens: dict[str, Any] = {"special_tokens": ()}
    return lora | {"targets": tuple(sorted(targets)), "save_modules": whole, "train_tokens": ()}, tokens


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple) else value


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
