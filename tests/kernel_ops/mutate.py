"""Breaks the kernels and the code that launches them in one place at a time, and counts how often a test notices.

`python -m tests.kernel_ops.mutate` finds out once which tests run which lines. Then it forks a process for each mutant,
which imports the broken file in place of the real one and runs the tests of the broken line, the quickest first, until
one fails. Mutants that no test fails for have survived. Ends with status 1 where fewer than 95% are killed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.abc
import importlib.util
import json
import linecache
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pytest

from tests.kernel_ops.mutants import LEFT_ALONE, Mutant, mutants

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "kernels" / "lora_kernels"
SOURCES = {path: path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))}
"""Read once, so that whoever edits a file meanwhile breaks nothing else."""
FILES = [path for path in SOURCES if path.name not in ("__init__.py", "reference.py")]
ELSEWHERE = {"test_bounds.py", "test_compiled.py", "test_interpreter.py"}
"""Tests that start processes, which would import the files that are whole; `bounds_in_process` stands for the first."""
SUITES = [path for path in sorted(HERE.glob("*.py")) if path.match("test_*") and path.name not in ELSEWHERE]
SUITES.append(HERE / "bounds_in_process.py")

SETTINGS = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# What every process would spend more time on than on most mutants: bitsandbytes has torch compile what it does to odd
# shapes, and pytest loads each plugin that is installed.
SETTINGS |= {"TORCHDYNAMO_DISABLE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
WHOLE = ("torch.testing._internal.optests", "triton.runtime.interpreter", "bitsandbytes.functional")
WHOLE += ("transformers.models.llama.modeling_llama",)
"""What tests import besides the package: once, before the processes are forked."""
ENOUGH = 0.95
PROCESSES = 2
SPARE_S = 10.0
"""Processor time that a test may take beyond ten times what it took; then it counts as hanging."""
HANGS = "hangs"
DEATHS = {number: number.name for number in signal.Signals} | {signal.SIGPROF: HANGS}

Job = TypeVar("Job")
Result = TypeVar("Result")
Lines = dict[str, set[int]]


@dataclass(frozen=True, slots=True, eq=False)
class Test:
    name: str
    suite: Path
    seconds: float
    lines: Lines
    """What it runs of each file of the package."""

    def runs(self, mutant: Mutant) -> bool:
        lines = self.lines.get(str(mutant.file), set())
        return bool(lines) if mutant.runs_in is None else not lines.isdisjoint(mutant.runs_in)


class Source(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports files of the package from memory, and shows Triton's interpreter the same text."""

    def __init__(self, sources: dict[Path, bytes]):
        self.sources = sources
        for path, source in sources.items():
            lines = source.decode().splitlines(keepends=True)
            # Without a time of change, so that nobody compares it with the file.
            linecache.cache[str(path)] = len(source), None, lines, str(path)

    def find_spec(self, name: str, *_: Any) -> Any:
        path = Path(self.get_filename(name))
        return importlib.util.spec_from_file_location(name, path, loader=self) if path in self.sources else None

    def get_filename(self, name: str) -> str:
        path = PACKAGE.parent.joinpath(*name.split("."))
        return str(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))

    def get_data(self, path: Any) -> bytes:
        return self.sources[Path(path)]


class Tracer:
    """A plugin of pytest that notes what each test runs, and which fail."""

    def __init__(self, suite: Path):
        self.suite = suite
        self.tests: list[Test] = []
        self.failed: list[str] = []
        self.imported: Lines = defaultdict(set)
        """What runs before any test, such as the registration of operators."""
        self.lines = self.imported
        self.shared: Lines = defaultdict(set)
        """What fixtures run that several tests look at."""

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(str(PACKAGE)):
            return None
        self.lines[file].add(frame.f_lineno)
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.lines, start = defaultdict(set), time.process_time()
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.tests.append(Test(item.nodeid, self.suite, time.process_time() - start, self.lines))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        mine, self.lines = self.lines, self.shared
        try:
            return (yield)
        finally:
            self.lines = mine

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        for test in self.tests:
            for file, lines in self.shared.items():
                test.lines[file] |= lines
            for file, lines in test.lines.items():
                lines |= self.imported[file]


class Chosen:
    """A plugin of pytest that runs these tests and no others, in their order, and notes which fails."""

    def __init__(self, tests: list[Test]):
        self.seconds = {test.name: test.seconds for test in tests}
        self.failed = "importing it"

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.seconds if name in found]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        die_after(SPARE_S + 10 * self.seconds[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid


def die_after(seconds: float) -> None:
    """Ends this process, by SIGPROF, once it has taken so much more processor time; not the clock's, as others run."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def run_tests(suites: Iterable[Path], plugin: object, *options: str) -> int:
    marks = "not slow and not gpu and not network"
    quiet = ("-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-m", marks)
    return pytest.main([*quiet, *options, *map(str, suites)], plugins=[plugin])


def traced(suite: Path) -> tuple[list[Test], list[str]]:
    """Returns the tests of a file, and the names of those that fail."""
    sys.meta_path.insert(0, Source(SOURCES))
    tracer = Tracer(suite)
    sys.settrace(tracer.trace)
    status = run_tests([suite], tracer)
    return tracer.tests, tracer.failed or ([suite.name] if status else [])


def killer(mutant: Mutant, tests: list[Test]) -> str | None:
    """Returns the name of a test that fails for a mutant, None where all pass."""
    if not tests:
        return None
    sys.meta_path.insert(0, Source(SOURCES | {mutant.file: mutant.applied_to(SOURCES[mutant.file])}))
    chosen = Chosen(tests)
    die_after(6 * SPARE_S)
    return chosen.failed if run_tests(dict.fromkeys(test.suite for test in tests), chosen, "-x") else None


def forked(work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result | None, str]]:
    """Yields each job with what `work` returns for it in a process of its own, or else with how that process died."""
    context = multiprocessing.get_context("fork")

    def run(job: Job, sender: Connection) -> None:
        # A mutant may fill the memory or the disk: it is the first to die, and leaves no dump.
        Path("/proc/self/oom_score_adj").write_text("1000")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for output in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        try:
            sender.send((work(job), ""))
        except Exception:
            sender.send((None, traceback.format_exc()))

    waiting = iter(jobs)
    running: dict[Any, tuple[Job, Any]] = {}
    while True:
        while len(running) < PROCESSES and (job := next(waiting, None)) is not None:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=run, args=(job, sender))
            process.start()
            sender.close()
            running[receiver] = job, process
        if not running:
            return
        for receiver in wait(list(running)):
            job, process = running.pop(receiver)
            try:
                (result, error), end = receiver.recv(), ""
            except EOFError:
                process.join()
                result, error, end = None, "", DEATHS[-process.exitcode]
            process.join()
            if error:
                raise RuntimeError(error)
            yield job, result, end


def prepare() -> None:
    """Sets up this process as those of the tests, which are forked from it, are to be."""
    os.environ.update(SETTINGS)
    os.chdir(HERE.parents[1])
    for module in WHOLE:
        importlib.import_module(module)
    # What is there before a fork need not be looked through for garbage after it.
    gc.freeze()


def report(killed_by: dict[Mutant, str | None]) -> None:
    """Prints a table of files and kinds, each cell survivors / mutants, with what is killed of each file."""
    kinds = sorted({mutant.kind for mutant in killed_by})
    print(" " * 22 + "".join(f"{kind:>11}" for kind in kinds) + f"{'killed':>9}")
    for file in (*FILES, None):
        ours = [mutant for mutant in killed_by if file in (mutant.file, None)]
        if not ours:
            continue
        row = f"{name(file) if file else 'all':22}"
        for kind in kinds:
            cell = [killed_by[mutant] is None for mutant in ours if mutant.kind == kind]
            row += f"{f'{sum(cell)}/{len(cell)}' if cell else '':>11}"
        print(row + f"{sum(killed_by[mutant] is not None for mutant in ours) / len(ours):>9.1%}")


def name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def described(mutant: Mutant) -> str:
    return f"{name(mutant.file)}:{mutant.line}:{mutant.column} {mutant.kind}: {mutant.before} -> {mutant.after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutants and what is left alone; run nothing")
    names = list(map(name, FILES))
    parser.add_argument("--only", nargs="+", metavar="FILE", choices=names, default=names, help="such as gpu/norm.py")
    parser.add_argument("--sample", type=int, help="at most so many mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--json", type=Path, help="write every mutant and what killed it")
    options = parser.parse_args()
    found: list[Mutant] = []
    for file in FILES:
        if name(file) in options.only:
            every = mutants(file, SOURCES[file])
            chosen = random.Random(options.seed).sample(every, min(options.sample or len(every), len(every)))
            found += sorted(chosen, key=every.index)
    if options.list:
        print(*(f"left alone: {what}: {why}" for what, why in LEFT_ALONE.items()), sep="\n")
        print(*map(described, found), sep="\n")
        return
    prepare()
    tests: list[Test] = []
    for suite, outcome, death in forked(traced, SUITES):
        found_tests, failed = outcome or ([], [death])
        if failed:
            sys.exit(f"{suite.name} fails for kernels that are whole: {', '.join(failed)}")
        tests += found_tests
    print(f"{len(found)} mutants, {len(tests)} tests", flush=True)
    killed_by: dict[Mutant, str | None] = {}
    kills: Counter[tuple[Path, str]] = Counter()

    def work(mutant: Mutant) -> str | None:
        # The cheapest first, those that have killed others in the file above all.
        cost = {test: test.seconds / (1 + kills[mutant.file, test.name]) for test in tests if test.runs(mutant)}
        return killer(mutant, sorted(cost, key=cost.__getitem__))

    for mutant, test, death in forked(work, found):
        killed_by[mutant] = test or death or None
        kills[mutant.file, test or ""] += 1
        if not killed_by[mutant] or killed_by[mutant] == HANGS:
            fate = killed_by[mutant] or "survived"
            print(f"[{len(killed_by)}] {fate}: {described(mutant)}", flush=True)
    report(killed_by)
    if options.json:
        options.json.write_text(json.dumps({described(mutant): killed_by[mutant] for mutant in killed_by}, indent=1))
    sys.exit(sum(map(bool, killed_by.values())) < ENOUGH * len(killed_by))


if __name__ == "__main__":
    main()
