"""What `verify` asked of an adapter folder or a merged model, and the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import AdapterError, ConfigError, ProofError


@dataclass(frozen=True)
class Check:
    """One thing that was asked, and the answer."""

    name: str
    passed: bool
    found: str
    rule: str


@dataclass(frozen=True)
class Verdict:
    """All checks of one adapter folder or merged model."""

    checks: tuple[Check, ...]
    kl_live: float
    """KL(seal, live) in nats per position; not a number where it could not be measured."""
    kl_effect: float
    """KL(adapter, base) in nats per position, as sealed."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def require(self, what: Path) -> None:
        """Raises ProofError, naming each check that failed, unless all passed."""
        failed = "; ".join(f"{check.name} ({check.found})" for check in self.checks if not check.passed)
        if failed:
            raise ProofError(f"{what} does not do what its seal says. Failed: {failed}.")

    def as_dict(self) -> dict[str, Any]:
        """Returns the verdict as JSON; what could not be measured is null."""
        return {
            "passed": self.passed,
            "kl_live": self.kl_live if self.kl_live == self.kl_live else None,
            "kl_effect": self.kl_effect if self.kl_effect == self.kl_effect else None,
            "checks": [asdict(check) for check in self.checks],
        }


class Checks:
    """Gathers answers, so that one failure does not hide the next."""

    def __init__(self) -> None:
        self.made: list[Check] = []

    def add(self, name: str, passed: bool, found: str, rule: str) -> None:
        """Takes one answer."""
        self.made.append(Check(name, bool(passed), found, rule))

    def attempt(self, name: str, rule: str, action: Callable[[], Any]) -> Any:
        """Returns what `action` does, or None where it raised for a bad folder, which fails the check `name`."""
        try:
            result = action()
        except (AdapterError, ConfigError) as error:
            self.add(name, False, str(error), rule)
            return None
        self.add(name, True, "yes", rule)
        return result

    def verdict(self, kl_live: float, kl_effect: float) -> Verdict:
        """Returns all answers; `kl_live` and `kl_effect` in nats per position."""
        return Verdict(tuple(self.made), kl_live, kl_effect)
