"""The exceptions a user can meet, each with the exit status of the command that raised it.

A message names the place, what was found, the rule and the remedy, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_ft.system.redaction import redacted


def printable(text: str) -> str:
    """Returns `text` with escapes for what does not print: a file's words must not steer the terminal, or turn it."""
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LoraFtError(Exception):
    """Something the user can mend; the command prints the message alone and exits with `exit_status`."""

    exit_status = 1

    def __str__(self) -> str:
        return printable(redacted(super().__str__()))


class ConfigError(LoraFtError, ValueError):
    """The command line or a configuration file is wrong."""

    exit_status = 2


class SourceError(LoraFtError, OSError):
    """A base model could not be had from any of its sources, or what came is not what was asked for."""


class StorageError(LoraFtError, OSError):
    """A file could not be written, or is no longer what was written."""

    full: bool = False
    """Whether the disk, or the user's share of it, is full."""
    damaged: bool = False
    """Whether the bytes that were read are others than were written; not being able to read them says nothing."""

    @classmethod
    def of_damage(cls, message: str) -> StorageError:
        """Returns the error of bytes that are others than were written."""
        error = cls(message)
        error.damaged = True
        return error


class BusyError(LoraFtError, RuntimeError):
    """Another process holds the folder or the device that this one needs."""


class OutOfMemoryError(LoraFtError, RuntimeError):
    """The memory of the device does not suffice, however a step is divided."""


class UnsupportedModelError(LoraFtError, ValueError):
    """The model is of a kind that this library does not fine-tune."""


class DataError(LoraFtError, ValueError):
    """Rows are malformed, or the tokens they train on are not the ones they should.

    Carries every problem found, one line each, so that a file is mended in one pass.
    """

    SHOWN = 20

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = list(self.problems[: self.SHOWN])
        if len(self.problems) > self.SHOWN:
            shown.append(f"... and {len(self.problems) - self.SHOWN} more problems.")
        super().__init__("\n".join(shown))

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class MaskError(DataError):
    """The loss mask breaks its contract; training would not teach what the rows say."""


class AdapterError(LoraFtError, ValueError):
    """An adapter folder is incomplete, or does not fit the base it is loaded on."""


class DivergedError(LoraFtError, ArithmeticError):
    """Training met numbers that are not finite, again and again or in the adapter itself."""


class ProofError(LoraFtError, RuntimeError):
    """A run or a check could not prove what it claims."""

    exit_status = 3


class Interrupted(LoraFtError):  # noqa: N818 - it is no error, only an end
    """The run was asked to stop, and has saved a checkpoint that it can go on from."""

    exit_status = 130
