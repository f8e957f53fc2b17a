"""Hostile files by the hundred: `python -m tests.reliability.hostile --count 300`.

Each adapter, base, template and configuration is made by `corpus.py` and opened in a process of its own, forked off one
that has everything imported. None may load or run code, and each must be refused in words within 2 s of processor time
and 500 MB above what the process began with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ft import base as bases
from lora_ft import saved, sources
from lora_ft.config import RunConfig
from lora_ft.data.examples import Chat
from lora_ft.data.render import ChatRenderer
from lora_ft.errors import LoraFtError
from lora_ft.settings import from_yaml
from tests import tiny
from tests.reliability.cases import Bomb, Case, Good
from tests.reliability.corpus import cases
from tests.reliability.hostile_runs import make_run, open_run

SECONDS = 2.0
BYTES = 500 * 10**6
# A process that sleeps or waits uses no processor time.
PATIENCE_S = 60.0

# What running code, or reaching for the network, does first.
EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
)
ROW = Chat("rows:1", ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}))


@dataclass
class Outcome:
    """What became of one case."""

    case: Case
    ending: str
    """refused, loaded, traceback or killed."""
    said: str = ""
    seconds: float = 0.0
    grown_bytes: int = 0
    ran: list[str] = field(default_factory=list)
    """Signs of code that ran, or of the network."""

    @property
    def fault(self) -> str:
        """What is wrong with the outcome, else empty."""
        if self.ending != "refused":
            return f"{self.ending} after {self.seconds:.2f} s"
        if not re.search(self.case.phrase, self.said):
            return f"refused for another reason than {self.case.phrase!r}"
        if self.ran:
            return f"ran {', '.join(self.ran)}"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.1f} s"
        if self.grown_bytes > BYTES:
            return f"took {self.grown_bytes / 1e6:.0f} MB"
        if not self.said.strip() or not all(line.isprintable() for line in self.said.splitlines()):
            return "said nothing, or what does not print"
        return ""


def open_adapter(good: Good, folder: Path) -> None:
    base = folder.parent / "other" if (folder / "other_base").exists() else good.base
    record = json.loads((good.adapter / "environment.json").read_text())["base"]["weights_sha256"]
    same = True
    if (folder / "environment.json").is_file():
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            same = json.loads((folder / "environment.json").read_text())["base"]["weights_sha256"] == record
    # Where the record lies about the base, it is looked for as the record says.
    saved.load(folder, str(base) if same else None, "cpu")


def open_base(good: Good, folder: Path) -> None:
    gguf = folder / "evil.gguf"
    source = sources.resolve(str(gguf if gguf.exists() else folder))
    source.record()  # as a run does before it loads anything
    bases.load(source, quant="none", dtype="float32", device="cpu")


def open_template(good: Good, folder: Path) -> None:
    ChatRenderer(bases.load_tokenizer(folder), 512).render(ROW)


def open_config(good: Good, folder: Path) -> None:
    from_yaml(RunConfig, folder / "run.yaml")


OPENERS: dict[str, Callable[[Good, Path], None]] = {
    "adapter": open_adapter, "base": open_base, "template": open_template, "config": open_config,
    "run": open_run,
}  # fmt: skip


def prepare(scratch: Path) -> Good:
    """Returns a good base and an adapter of it, with bait for those who leave their folder."""
    base = tiny.model_folder(scratch / "good" / "base")
    made = tiny.run(scratch / "good" / "adapter", base, task="complete", quant="none", steps=2, sealed=False)
    outside = scratch / "outside"
    outside.mkdir()
    (outside / "bomb.pt").write_bytes(pickle.dumps(Bomb(outside / "canary")))
    (outside / "secret").write_text("{}")
    (outside / "pointer").write_text(str(base))
    tiny.model_folder(scratch / "other", seed=1)
    good = Good(base, made.folder, outside / "canary")
    return dataclasses.replace(good, run=make_run(good, scratch / "good" / "run"))


def attempt(case: Case, good: Good, scratch: Path) -> Outcome:
    """Returns what became of a case, opened in a process forked off this one."""
    folder = scratch / "work" / case.kind
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree({"adapter": good.adapter, "run": good.run}.get(case.kind, good.base), folder)
    shutil.copytree(scratch / "other", folder.parent / "other")
    evil = (
        "from pathlib import Path\nPath("
        + repr(str(good.canary))
        + ").touch()\nclass C: pass\nclass M: pass\nclass T: pass\n"
    )
    (folder / "evil.py").write_text(evil)
    case.make(folder)
    good.canary.unlink(missing_ok=True)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _open(case, good, folder, writer)
    os.close(writer)
    told, ended = b"", False
    deadline = time.monotonic() + PATIENCE_S
    while not ended and (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            read = os.read(reader, 1 << 16)
            told, ended = told + read, not read
    os.close(reader)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    try:
        found = json.loads(told)
    except ValueError:
        found = {"ending": "killed", "said": f"status {status}", "grown_bytes": 0, "ran": []}
    outcome = Outcome(case, seconds=used.ru_utime + used.ru_stime, **found)
    if good.canary.exists():
        outcome.ran.append("the canary")
    return outcome


def _open(case: Case, good: Good, folder: Path, writer: int) -> None:
    """Opens what the case made, tells the parent and ends the process."""
    ran: list[str] = []

    def watch(event: str, args: Any) -> None:
        if event in EVENTS:
            ran.append(event)

    began = _peak_bytes(resource.RUSAGE_SELF)
    os.chdir(folder.parent)
    sys.addaudithook(watch)
    try:
        OPENERS[case.kind](good, folder)
        ending, said = "loaded", ""
    except LoraFtError as error:
        ending, said = "refused", str(error)
    except BaseException:
        ending, said = "traceback", traceback.format_exc()
    from lora_ft.foreign import templates

    # So that what the process of the templates used is counted as this one's.
    if templates._RENDERER.cell is not None:
        templates._RENDERER.cell.close()
    grown = max(_peak_bytes(resource.RUSAGE_SELF), _peak_bytes(resource.RUSAGE_CHILDREN)) - began
    found = {"ending": ending, "said": said, "grown_bytes": grown, "ran": ran}
    os.write(writer, json.dumps(found).encode()[: 1 << 16])
    os._exit(0)


def _peak_bytes(whose: int) -> int:
    peak = resource.getrusage(whose).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(count: int, seed: int = 0, note: Callable[[str], None] = lambda text: None) -> list[Outcome]:
    """Returns what became of `count` cases."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["LORA_FT_HOME"] = str(scratch / "home")
        good = prepare(scratch)
        whole = shutil.copytree(good.run, scratch / "whole")
        for kind, opened in (
            ("adapter", good.adapter),
            ("base", good.base),
            ("template", good.base),
            ("run", whole),
        ):
            OPENERS[kind](good, opened)  # a harness that refuses everything would prove nothing
        from_yaml(RunConfig, good.adapter / "config.yaml")
        outcomes = []
        for case in cases(good, count, seed):
            outcomes.append(attempt(case, good, scratch))
            note(f"{case.kind}: {case.name}: {outcomes[-1].fault or outcomes[-1].ending}")
        return outcomes


def summary(outcomes: list[Outcome]) -> str:
    """Returns the figure in one line."""
    kinds = Counter(outcome.case.kind for outcome in outcomes)
    endings = Counter(outcome.ending for outcome in outcomes)
    many = ", ".join(f"{kinds[kind]} {kind}s" for kind in OPENERS)
    return (
        f"{len(outcomes)} hostile files ({many}): {endings['refused']} refused, {endings['loaded']} loaded, "
        f"{sum(bool(o.ran) for o in outcomes)} ran code or reached for the network, {endings['traceback']} tracebacks, "
        f"{endings['killed']} killed; at most {max(o.seconds for o in outcomes):.2f} s of processor time and "
        f"{max(o.grown_bytes for o in outcomes) / 1e6:.0f} MB above the imported process"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print each case and what was said")
    chosen = parser.parse_args()
    outcomes = run(chosen.count, chosen.seed)
    for outcome in outcomes:
        if outcome.fault or chosen.show:
            print(
                f"{outcome.case.kind}: {outcome.case.name}: {outcome.fault or outcome.ending}\n  {outcome.said[-1500:]}"
            )
    print(summary(outcomes))
    return 1 if any(outcome.fault for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
