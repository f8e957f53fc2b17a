"""Rewards: what a reply is worth, of the answer that its row gives. Each checks the answers first, then the replies."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import logging
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.foreign.cell import Cell, DiedError, RaisedError, StoppedError
from lora_ft.foreign.strictjson import JsonError, loads
from lora_ft.scoring import sandbox

log = logging.getLogger(__name__)

# After which worked solutions, such as those of GSM8K, write their answer.
FINAL = "####"
# A sign belongs to a number where nothing stands before it: of `8-3` the numbers are 8 and 3.
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?", re.ASCII)
# A block to its closing fence or, as in Markdown, to the end of the text.
FENCED = re.compile(
    r"^[ \t]*+(`{3,}+)[ \t]*+([^\s`]*+)[^\n`]*+\n(.*?)(?:^[ \t]*+\1`*+[ \t]*+$|\Z)", re.DOTALL | re.MULTILINE
)
PYTHON = ("", "py", "python", "python3")
# For one pattern on one reply.
PATTERN_S = 1.0
PATTERN_BYTES = 256 * 2**20


class Reward(ABC):
    """What replies are worth."""

    is_known = True
    """Whether it can be told without running what another file than this program's names."""

    def require(self) -> None:  # noqa: B027 - most need nothing
        """Makes the reward ready for replies, of whoever typed its name. Raises ConfigError where it cannot be had."""

    def admit(self) -> None:
        """Makes the reward ready for replies where an adapter folder names it, if `require` has not.

        Raises:
            LoraFtError: it cannot be had, or would do what is not done because a folder names it.
        """
        self.require()

    def fault(self, answer: str) -> str | None:
        """Returns what is wrong with the answer of a row, and how to mend it; None where replies can be checked."""
        return None

    @abstractmethod
    def of(self, replies: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Returns what each reply is worth; all but the user's own functions say 1 for a right one and 0 for others."""


class Exact(Reward):
    """The reply's answer is the row's: equal as numbers where that is one, else the same text.

    The answer is what stands after the last `####`, of rows and replies alike. Without one, it is the whole text or,
    where a number is wanted, the last number in it. How it is put earns nothing.
    """

    def of(self, replies: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(_is_right(reply, answer)) for reply, answer in zip(replies, answers, strict=True)]


class JsonSchema(Reward):
    """The reply is one JSON text, in a fence or bare, that fits the schema which the row has for an answer."""

    def __init__(self) -> None:
        self._validators: dict[str, Any] = {}

    def require(self) -> None:
        if importlib.util.find_spec("jsonschema_rs") is None:
            raise ConfigError("reason.reward json_schema needs a validator: pip install 'lora-ft[prefer]'.")

    def fault(self, answer: str) -> str | None:
        self.require()
        try:
            self._validator(answer)
        except (ValueError, RecursionError) as error:
            return f"is no JSON schema ({_line(error)}); give one, which refers to nothing outside of it"
        return None

    def of(self, replies: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(self._fits(reply, answer)) for reply, answer in zip(replies, answers, strict=True)]

    def _validator(self, schema: str) -> Any:
        if schema not in self._validators:
            import jsonschema_rs

            value = loads(schema)
            if not isinstance(value, dict | bool):
                raise ValueError("it is neither an object nor true or false")
            # Its patterns give up on what would take for ever, and nothing is fetched.
            self._validators[schema] = jsonschema_rs.validator_for(value, offline=True)
        return self._validators[schema]

    def _fits(self, reply: str, schema: str) -> bool:
        fenced = re.fullmatch(r"\s*```(?:json)?[ \t]*\n(.*?)```\s*", reply, re.DOTALL)
        try:
            return bool(self._validator(schema).is_valid(loads(fenced[1] if fenced else reply)))
        except (JsonError, ValueError, RecursionError):
            return False


class Pattern(Reward):
    """The reply, blanks around it left out, is matched from end to end by the row's regular expression (Python's)."""

    def __init__(self) -> None:
        self._told = False

    @cached_property
    def _cell(self) -> Cell:
        return Cell(_matches, seconds=PATTERN_S, memory_bytes=PATTERN_BYTES)

    def fault(self, answer: str) -> str | None:
        try:
            self._ask(answer, "")
        except (RaisedError, StoppedError) as error:
            return f"is no regular expression ({_line(error)}); mend it"
        return None

    def of(self, replies: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [self._match(reply, answer) for reply, answer in zip(replies, answers, strict=True)]

    def _match(self, reply: str, pattern: str) -> float:
        try:
            return float(self._ask(pattern, reply.strip()))
        except StoppedError as error:
            if not self._told:
                log.warning("the pattern %s %s on a reply: such replies earn nothing", json.dumps(pattern), error)
            self._told = True
            return 0.0

    def _ask(self, pattern: str, text: str) -> bool:
        try:
            return bool(self._cell.ask([pattern, text]))
        except DiedError as error:
            raise LoraFtError(f"reason.reward regex: the pattern {json.dumps(pattern[:200])}: {error}.") from error


class UnitTests(Reward):
    """The reply's program, its last fenced block or all of it, passes the row's tests: Python with `assert`."""

    def __init__(self) -> None:
        self._ready = False

    def require(self) -> None:
        sandbox.require()
        self._ready = True

    def admit(self) -> None:
        if not self._ready:
            sandbox.require(closed=True)
        self._ready = True

    def fault(self, answer: str) -> str | None:
        try:
            made = ast.parse(answer)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"is no Python ({_line(error)}); give tests that can be run after the reply"
        if not any(isinstance(node, ast.Assert) for node in ast.walk(made)):
            return "asserts nothing, so that any reply would pass; give tests with assert"
        return None

    def of(self, replies: Sequence[str], answers: Sequence[str]) -> list[float]:
        programs = [_program(reply) for reply in replies]
        return [float(well) for well in sandbox.passed(list(zip(programs, answers, strict=True)))]


class Own(Reward):
    """A function of the user's, `FILE.py:FUNCTION`: of a reply and the row's answer, both text, a finite number."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._function: Callable[[str, str], Any] | None = None

    @property
    def is_known(self) -> bool:  # type: ignore[override]
        return self._function is not None

    def require(self) -> None:
        """Runs the file, which whoever starts a training has named, as a module that finds its neighbours."""
        place, _, function = self.name.rpartition(":")
        spec = importlib.util.spec_from_file_location(f"lora_ft_reward_{Path(place).stem}", place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise ConfigError(f"reason.reward {self.name}: there is no Python file {place}.")
        module = importlib.util.module_from_spec(spec)
        # Where dataclasses and pickles look for it.
        sys.modules[spec.name] = module
        folder = str(Path(place).resolve().parent)
        sys.path.insert(0, folder)
        try:
            spec.loader.exec_module(module)
        # Whatever the user's own code raises is theirs to mend.
        except Exception as error:
            del sys.modules[spec.name]
            raise ConfigError(f"reason.reward {self.name}: the file raised {_named(error)}.") from error
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
        found = getattr(module, function, None)
        if not callable(found):
            raise ConfigError(f"reason.reward {self.name}: {place} has no function {function}.")
        self._function = found

    def admit(self) -> None:
        self._loaded()

    def of(self, replies: Sequence[str], answers: Sequence[str]) -> list[float]:
        function = self._loaded()
        return [self._of(function, reply, answer) for reply, answer in zip(replies, answers, strict=True)]

    def _loaded(self) -> Callable[[str, str], Any]:
        if self._function is None:
            raise LoraFtError(
                f"The reward is {self.name}, and no code is run because an adapter folder names it: name metrics to "
                "tell instead of it (--metrics exact_match), or call `reward.require` of the loaded task in Python."
            )
        return self._function

    def _of(self, function: Callable[[str, str], Any], reply: str, answer: str) -> float:
        try:
            value = float(function(reply, answer))
        except Exception as error:
            raise LoraFtError(f"reason.reward {self.name} raised {_named(error)} of {_short(reply)}.") from error
        if not math.isfinite(value):
            raise LoraFtError(f"reason.reward {self.name} gave {value} of {_short(reply)}; give a finite number.")
        return value


KINDS: dict[str, type[Reward]] = {
    "exact": Exact, "json_schema": JsonSchema, "regex": Pattern, "unit_tests": UnitTests,
}  # fmt: skip


def get(name: str) -> Reward:
    """Returns the reward called so, one of `config.REWARDS` or a function of the user's; nothing of theirs is run."""
    return KINDS[name]() if name in KINDS else Own(name)


def _program(reply: str) -> str:
    """Returns the last fenced block of Python in a reply, or all of it where there is none."""
    blocks = [block for _, tag, block in FENCED.findall(reply) if tag.lower() in PYTHON]
    return blocks[-1] if blocks else reply


def _is_right(reply: str, answer: str) -> bool:
    wanted, said = (text.rpartition(FINAL)[2].strip() for text in (answer, reply))
    number = _number(wanted)
    if number is None:
        return " ".join(said.split()) == " ".join(wanted.split())
    found = NUMBER.findall(said)
    return bool(found) and _number(found[-1]) == number


def _number(text: str) -> Decimal | None:
    """Returns the number that a text is, with commas or a currency in it or not; None where it is none."""
    text = text.strip().strip("$€£%").strip().rstrip(".")
    if not NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


def _matches(question: list[str]) -> bool:
    pattern, reply = question
    return re.fullmatch(pattern, reply, re.DOTALL) is not None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {_line(error)}"


def _short(reply: str) -> str:
    return f"the reply {json.dumps(reply[:200])}"
