"""A configuration as it is read and written: from flags and a saved file, as YAML, and as others may read it.

A configuration file is saved flags: `--config run.yaml` is turned into flags that come before those
typed, so later ones win and there is one set of types, checks and messages. Never imports torch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from lora_ft.commands import flags
from lora_ft.config import FROM_HUB, OF_ONE_TASK, REWARDS, RunConfig
from lora_ft.errors import ConfigError
from lora_ft.system import redaction
from lora_ft.system.redaction import holds_secret, redacted

# The settings that name a place.
PLACES = (("out",), ("base",), ("init_from",), ("data", "train"), ("data", "eval"), ("reason", "reward"))

T = TypeVar("T")


def cli(cls: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """Returns a `cls` read from `argv`, after the flags that any `--config FILE` in it stands for.

    Raises:
        ConfigError: a configuration file is missing, is not a mapping, or holds an unknown key.
        SystemExit: the flags are wrong (status 2) or ask for help (0); the message has been printed.
    """
    saved, typed = _words(cls, list(sys.argv[1:] if argv is None else argv))
    parsed = tyro.cli(cls, args=saved + typed, prog=prog, config=(tyro.conf.AvoidSubcommands,))
    refuse_code(parsed, typed)
    return parsed


def _words(cls: Any, typed: list[str]) -> tuple[list[str], list[str]]:
    """Returns the flags that the configuration files in `typed` stand for, and the words without those files."""
    saved: list[str] = []
    while (at := flags.at(typed)) is not None:
        _, _, joined = typed[at].partition("=")
        if not joined and at + 1 == len(typed):
            raise ConfigError("--config needs a file, such as --config runs/mine/config.yaml.")
        path = Path(joined or typed[at + 1])
        del typed[at : at + (1 if joined else 2)]
        saved += flags.of_file(cls, path)
    _refuse_secrets(saved + typed)
    return saved, typed


def plain(value: Any) -> Any:
    """Returns a configuration as dictionaries, lists and scalars that YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        others = [name for name in OF_ONE_TASK if isinstance(value, RunConfig) and name != value.task]
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in others}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.as_posix() if isinstance(value, Path) else value


def portable(config: RunConfig) -> RunConfig:
    """Returns the run started anew, without any absolute path of the machine.

    Paths under the current folder are kept relative to it; others keep their last name only. Those that were typed as
    relative stay, so that the run can be repeated from the same folder; `without_places` takes them out of what is
    published.
    """
    return dataclasses.replace(
        config,
        out=Path(_portable(str(config.out))),
        base=_portable(config.base),
        init_from=Path(_portable(str(config.init_from))) if config.init_from else None,
        data=dataclasses.replace(
            config.data,
            train=_portable(config.data.train) if config.data.train else None,
            eval=_portable(config.data.eval) if config.data.eval else None,
        ),
        reason=dataclasses.replace(config.reason, reward=_portable(config.reason.reward)),
        resume=False,
        allow_changed=(),
        dry_run=False,
        twin=False,
    )


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run, as `plain` makes them, as others may read them: see `redaction.portable`."""
    made = copy.deepcopy(settings)
    for *groups, name in PLACES:
        held = made
        for group in groups:
            held = held.get(group, {})
        if isinstance(held.get(name), str):
            held[name] = redaction.portable(held[name])
    return made


def to_yaml(config: RunConfig) -> str:
    """Returns the text of `config.yaml`, of the `portable` run: reading it back gives an equal one."""
    return redacted(yaml.safe_dump(plain(portable(config)), sort_keys=False))


def from_yaml(cls: type[T], path: Path) -> T:
    """Returns the `cls` that `path` holds, with nothing typed on top.

    Raises:
        ConfigError: the file is missing, or one of its settings is wrong.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            saved, _ = _words(cls, ["--config", str(path)])
            return tyro.cli(cls, args=saved, prog=path.name, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit:
        # The parser's box, plain where it is not printed: a title, what is wrong, how to type it, each above a rule.
        _, reason, *_ = re.split(r"^ *-+ *$", said.getvalue(), flags=re.MULTILINE)
        raise ConfigError(f"{path}: {' '.join(reason.split())}") from None


def _refuse_secrets(words: Sequence[str]) -> None:
    """Raises ConfigError where a secret is typed: it would stand in the shell's history and in files of the run."""
    for number, word in enumerate(words):
        if holds_secret(word):
            flag = next((w.partition("=")[0] for w in reversed(words[: number + 1]) if w.startswith("--")), "a word")
            raise ConfigError(
                f"{flag} holds a secret. Tokens are never options: set HF_TOKEN, or log in with `hf auth login`, and "
                "take this one out; it may stand in the history of your shell."
            )


def refuse_code(parsed: Any, typed: Sequence[str], named_by: str = "--config", remedy: str | None = None) -> None:
    """Raises ConfigError where a file alone names a metric on the hub or a function: it may be another's code.

    Args:
        typed: the words on the command line that say what to run.
        named_by: the file.
        remedy: what to do instead of typing the name, where it cannot be typed.
    """
    said = {part for word in typed for part in (word, word.partition("=")[2])}
    reward = getattr(getattr(parsed, "reason", None), "reward", REWARDS[0])
    if reward not in REWARDS and reward not in said:
        raise ConfigError(
            f"{named_by} names the reward {reward}, whose code would be run: "
            + (remedy or f"if you want that, type --reason.reward {reward} too.")
        )
    group = "data." if hasattr(getattr(parsed, "data", None), "metrics") else ""
    for name in getattr(parsed.data if group else parsed, "metrics", ()):
        if name.startswith(FROM_HUB) and name not in said:
            raise ConfigError(
                f"{named_by} names the metric {name}, whose code would be fetched and run: "
                + (remedy or f"if you want that, type --{group}metrics {name} too.")
            )


def without_code(config: RunConfig) -> RunConfig:
    """Returns a run in which nothing that was learned is judged: no metric, and a reward that runs no code."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, metrics=()),
        reason=dataclasses.replace(config.reason, reward=REWARDS[0]),
    )


def _portable(name: str) -> str:
    path = Path(name)
    if not path.is_absolute():
        return name
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name
