"""What a run was started with, kept in its folder: whether the run that is asked for now is the same one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lora_ft import checkpoints, saved
from lora_ft.config import RunConfig
from lora_ft.errors import ConfigError, Interrupted, LoraFtError, StorageError
from lora_ft.proof import environment
from lora_ft.settings import plain
from lora_ft.system import atomicio, manifest, processes
from lora_ft.train import CHECKPOINTS

log = logging.getLogger(__name__)

FILE = "run.json"
# Versions and device: whoever has no other must be able to go on, so a change of them is told and not refused.
MADE_WITH = "made_with"
LOST = (
    "nothing says how the run was started, or another version of lora-ft began it: put the file back, or start anew "
    "in another folder."
)
# What may change when a run is resumed: none of it changes the adapter, as the digests of rows and base may not.
FREE_ON_RESUME = {
    "out", "resume", "allow_changed", "dry_run", "twin", "base", "init_from", "data.train", "data.eval",
    "train.log_steps", "train.report_to",
}  # fmt: skip


def refuse_to_overwrite(config: RunConfig) -> None:
    """Raises ConfigError where the folder of the run holds anything but the run that is to be resumed."""
    out = config.out
    begun = (out / CHECKPOINTS / FILE).exists()
    if begun and (checkpoints.found(out / CHECKPOINTS) or is_trained(out)):
        if not config.resume:
            raise ConfigError(f"{out} holds an unfinished run: go on with --resume, or choose another --out.")
        return
    if (out / saved.WEIGHTS).exists():
        raise ConfigError(f"{out} already holds an adapter: choose another --out, or move that one away.")
    if out.exists() and not begun and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder; choose another --out, so that nothing is overwritten.")


def is_trained(out: Path) -> bool:
    """Returns whether the adapter of a run is saved, all of it but its seal, evaluation and report."""
    return (out / environment.FILE).is_file() or (out / CHECKPOINTS / saved.STAGED).is_dir()


def sweep(out: Path) -> None:
    """Removes what a run that was killed left half written in its folder; nothing that has a name of its own.

    Raises:
        StorageError: a folder in it is a link, so what is swept could be somebody's.
    """
    for place in (out / CHECKPOINTS, out / CHECKPOINTS / saved.STAGED):
        if place.is_symlink():
            raise StorageError(f"{place}: it is a link, and what is behind it may be somebody's: put the folder there.")
    begun = (out / CHECKPOINTS / FILE).is_file()
    if not begun and (out / CHECKPOINTS).is_dir():
        # Killed in its very first write: nothing is there but a draft of that file.
        if all(path.name.startswith(f"{atomicio.DRAFT}{FILE}") for path in (out / CHECKPOINTS).iterdir()):
            atomicio.remove(out / CHECKPOINTS)
    # Only in a folder of ours: in another, such a file is somebody's.
    elif begun or (out / environment.FILE).is_file():
        for place in (out, out / CHECKPOINTS):
            atomicio.sweep(place)


def clear_up(out: Path) -> None:
    """Sweeps the folder of a run that was killed, and finishes what it had begun to move.

    Moving writes over files, so it comes after `refuse_to_overwrite`.
    """
    sweep(out)
    if (out / CHECKPOINTS / FILE).is_file() and (out / CHECKPOINTS / saved.STAGED).is_dir():
        try:
            move_in_adapter(out)
        except StorageError as error:
            if error.full:
                raise
            aside = atomicio.set_aside(out / CHECKPOINTS / saved.STAGED)
            log.warning("the adapter of the finished training is left aside as %s: %s", aside.name, error)


def move_in_adapter(out: Path) -> None:
    """Moves the adapter that was committed beside the checkpoints into the folder of the run, its record last."""
    atomicio.move_in(out / CHECKPOINTS / saved.STAGED, out, last=environment.FILE)


def keep_or_compare(
    config: RunConfig,
    facts: dict[str, Any],
    tokenizer_sha256: str,
    base: dict[str, Any],
    origin: dict[str, Any] | None = None,
) -> None:
    """Writes down what a run is started with; on resuming, raises ConfigError unless it is the same but where allowed.

    Args:
        facts: of the rows; `base`: `Source.record` of the base; `origin`: of the adapter that the run goes on from, if
            it does.
    """
    path = config.out / CHECKPOINTS / FILE
    # Of a data set that is streamed from the hub there is no digest, only the name.
    free = FREE_ON_RESUME if digest_of(facts["train"]) else FREE_ON_RESUME - {"data.train"}
    now = {key: value for key, value in _flat(plain(config)).items() if key not in free}
    # Of all processes: as many passes make a step, whoever makes them.
    now["train.accumulate"] = config.train.accumulate * processes.count()
    now |= _flat({"rows": facts, "tokenizer": {"sha256": tokenizer_sha256}, "weights": base})
    now |= _flat({"init_from": origin or {}})
    now |= _flat({MADE_WITH: environment.made_with()})
    now = json.loads(json.dumps(now))
    if config.resume:
        # What an earlier version had no option for was as it is now where nothing is said.
        defaults = _flat(plain(RunConfig(task=config.task, base=config.base, out=config.out)))
        before = {key: defaults[key] for key in now if key in defaults} | manifest.read_sealed(path, LOST)
        unknown = [key for key in config.allow_changed if key not in now.keys() | before.keys()]
        if unknown:
            raise ConfigError(f"allow-changed: a run has no key {unknown[0]}; its keys are {', '.join(sorted(now))}.")
        changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
        told = {key: f"  {key} was {before.get(key)}, is {now.get(key)}" for key in changed}
        other = [key for key in changed if key.startswith(f"{MADE_WITH}.")]
        changed = [key for key in changed if key not in other]
        refused = [key for key in changed if key not in config.allow_changed]
        if refused:
            raise ConfigError(
                f"{config.out} was started as another run; resume it as it was, start anew, or add --allow-changed "
                f"{' '.join(refused)} if that is meant:\n" + "\n".join(told[key] for key in refused)
            )
        if not changed and not other:
            return
        if changed:
            log.warning("the run goes on, but not as it was started:\n%s", "\n".join(told[key] for key in changed))
        if other:
            log.warning(
                "the run goes on, but what it is made with has changed, so that it is no longer the run in one piece "
                "bit for bit:\n%s", "\n".join(told[key].replace(f"{MADE_WITH}.", "") for key in other)
            )  # fmt: skip
    atomicio.write_sealed(path, now)


def interrupted(out: Path, steps: int) -> LoraFtError:
    """Returns what to say of an interrupted training: the step to go on from need not be the last, on a full disk."""
    saved_steps = [checkpoints.step_of(place) for place in checkpoints.found(out / CHECKPOINTS)]
    if not saved_steps:
        return LoraFtError(f"Stopped at step {steps}, and no checkpoint could be saved: start anew.")
    saved_at = (
        "a checkpoint is saved" if saved_steps[-1] == steps else f"the last checkpoint is of step {saved_steps[-1]}"
    )
    return Interrupted(f"Stopped at step {steps}; {saved_at}. To go on:")


def after_bad_row(out: Path, facts: dict[str, Any]) -> str:
    """Returns what to do where a row that was streamed ended the training."""
    saved_steps = [checkpoints.step_of(place) for place in checkpoints.found(out / CHECKPOINTS)]
    if not saved_steps:
        return (
            "No checkpoint was saved before it: mend the row and start anew. --dry-run reads all rows and names each "
            "problem."
        )
    # The digest of the file is then another, which a resumed run asks about.
    digest = digest_of(facts)
    allowed = f" --allow-changed rows.train.{digest}" if digest else ""
    return (
        f"A checkpoint of step {saved_steps[-1]} is saved: mend the row in its place, leaving those before it as they "
        f"are, and go on with --resume{allowed}."
    )


def digest_of(facts: dict[str, Any]) -> str | None:
    """Returns the name of the digest among the facts of some rows; None where they have none."""
    return next((name for name in ("sha256", "sampled_sha256") if facts.get(name)), None)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
