"""The engine by itself: rows that fail beside others, that come without a limit, that outgrow the batch, and none."""

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_ft import sources
from lora_ft.serve import engine, held
from lora_ft.serve.decoding import Decoder, Piece
from lora_ft.serve.sampling import Settings
from tests import tiny_server

WORDS = tiny_server.tokenizer()


@dataclass
class Told:
    """What one row was told."""

    text: str = ""
    errors: list[Exception] = field(default_factory=list)
    finish: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, piece: Piece | Exception) -> None:
        if isinstance(piece, Exception):
            self.errors.append(piece)
        else:
            self.text, self.finish = self.text + piece.text, piece.finish
        if self.errors or self.finish:
            self.ended.set()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> held.Home:
    source = sources.resolve(str(tiny_server.base_folder(tmp_path_factory.mktemp("engine") / "base")))
    return held.Home(source, sources.weights_digest(source.folder), dtype="float32")


@pytest.fixture
def running() -> Iterator[engine.Engine]:
    made = engine.Engine()
    yield made
    made.stop()


def row(home: held.Home, text: str = "hello", most: int = 12, **more: Any) -> engine.Row:
    settings = Settings(max_tokens=most, temperature=0.0, **more.pop("settings", {}))
    return engine.Row(home, None, WORDS(text)["input_ids"], settings, Decoder(WORDS, ()), Told(), **more)


def answered(running: engine.Engine, rows: list[engine.Row], seconds: float = 60) -> list[Told]:
    """Returns what each of the rows was told, all of them asked at once."""
    running.submit(rows)
    told: list[Any] = [one.tell for one in rows]
    assert all(one.ended.wait(seconds) for one in told)
    return told


class Breaks:
    """A grammar that cannot be followed beyond its second token."""

    done, taken = False, 0

    def allowed(self, size: int) -> torch.Tensor:
        if self.taken == 2:
            raise ValueError("the grammar broke")
        return torch.ones(size, dtype=torch.bool)

    def take(self, token: int) -> None:
        self.taken += 1


def no_numbers(home: held.Home, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> engine.Row:
    """Returns a row whose logits are no numbers from its second token on."""
    failing, choose = row(home), engine.Chooser.choose

    def spoiled(chooser: engine.Chooser, logits: torch.Tensor) -> Any:
        if chooser.settings is failing.settings and chooser.counts:
            logits[:] = torch.nan
        return choose(chooser, logits)

    failing.settings = Settings(max_tokens=12, **settings)
    monkeypatch.setattr(engine.Chooser, "choose", spoiled)
    return failing


FAILING: dict[str, Callable[[held.Home, pytest.MonkeyPatch], engine.Row]] = {
    "grammar": lambda home, _: row(home, grammar=Breaks()),
    "greedy choice": lambda home, patch: no_numbers(home, patch, temperature=0.0),
    "drawn choice": lambda home, patch: no_numbers(home, patch, temperature=1.0),
    "bias": lambda home, _: row(home, settings={"logit_bias": {10**6: 1.0}}),
    "echo": lambda home, _: row(home, echo=-1),
    "adapter": lambda home, _: engine.Row(home, Path("none"), [5], Settings(max_tokens=9), Decoder(WORDS, ()), Told()),
    "tokenizer": lambda home, _: engine.Row(home, None, [5], Settings(max_tokens=9), Decoder(None, ()), Told()),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_row_that_fails_ends_no_other(home, running, monkeypatch, what):
    (alone,) = answered(running, [row(home, "other", 12)])
    failing = FAILING[what](home, monkeypatch)
    failed, beside = answered(running, [failing, row(home, "other", 12)])
    assert len(failed.errors) == 1
    assert (beside.text, beside.finish, beside.errors) == (alone.text, "length", [])


def test_rows_that_cannot_be_taken_in_end_none_that_run(home, running, monkeypatch):
    (alone,) = answered(running, [row(home, "other", 40)])
    run, begun = held.Held.run, threading.Event()

    def breaks(base, names, **inputs):
        if begun.is_set() and inputs["input_ids"].shape[1] > 1:
            raise MemoryError
        begun.set()
        return run(base, names, **inputs)

    monkeypatch.setattr(held.Held, "run", breaks)
    first, late = row(home, "other", 40), row(home, "too much")
    running.submit([first])
    assert begun.wait(60)
    (failed,) = answered(running, [late])
    assert isinstance(failed.errors[0], MemoryError)
    assert first.tell.ended.wait(60)
    assert (first.tell.text, first.tell.errors) == (alone.text, [])


def test_rows_without_a_limit_go_together_and_never_outgrow_the_batch(home, running, monkeypatch):
    def asked() -> list[engine.Row]:
        rows = [row(home, text, 100) for text in ("hello", "other", "a longer one")]
        draw = Settings(max_tokens=100, temperature=1.0, seed=3)
        return [*rows, engine.Row(home, None, WORDS("drawn")["input_ids"], draw, Decoder(WORDS, ()), Told())]

    alone = [answered(running, [one])[0] for one in asked()]
    sizes, run = [], held.Held.run

    def watched(base, names, **inputs):
        sizes.append((len(names), inputs["attention_mask"].shape[1]))
        return run(base, names, **inputs)

    monkeypatch.setattr(held.Held, "run", watched)
    # One that was thought to be as long as it may be would leave no room for a second.
    monkeypatch.setattr(engine, "BATCH_TOKENS", 200)
    monkeypatch.setattr(engine, "ROOM", 10)
    told = answered(running, asked())
    assert [(one.text, one.finish) for one in told] == [(one.text, "length") for one in alone]
    assert max(rows for rows, _ in sizes) == 4
    assert max(rows * length for rows, length in sizes) <= 200
    assert [rows for rows, _ in sizes].index(3) < [rows for rows, _ in sizes].index(2), "one after the other waits"


def test_a_base_that_nobody_asks_is_let_go_and_loaded_anew(home, running, monkeypatch):
    monkeypatch.setattr(engine, "IDLE_S", 1.0)
    (before,) = answered(running, [row(home)])
    model = weakref.ref(running._held.model)
    end = time.monotonic() + 30
    while model() is not None and time.monotonic() < end:
        time.sleep(0.05)
    assert model() is None
    (after,) = answered(running, [row(home)])
    assert after.text == before.text
    answered(running, [row(home)])


def test_the_base_before_is_gone_before_another_is_loaded(home, running, monkeypatch):
    alive, made = [], []

    class Watched(held.Held):
        def __init__(self, home: held.Home) -> None:
            alive.append(sum(model() is not None for model in made))
            super().__init__(home)
            made.append(weakref.ref(self.model))

    monkeypatch.setattr(engine, "Held", Watched)
    for dtype in ("float32", "bfloat16", "float32"):
        answered(running, [row(dataclasses.replace(home, dtype=dtype))])
    assert alive == [0, 0, 0]
