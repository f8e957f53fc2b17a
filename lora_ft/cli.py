"""The commands. Each is a function of its options; heavy modules are imported inside the functions."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_ft import __version__
from lora_ft.commands.options import (
    BenchConfig,
    ChatConfig,
    CombineConfig,
    DataCheckConfig,
    DataPrepareConfig,
    DiffConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    MergeConfig,
    PlanConfig,
    PredictConfig,
    PublishConfig,
    QuickstartConfig,
    ReportConfig,
    SelftestConfig,
    ServeConfig,
    TwinConfig,
    VerifyConfig,
)
from lora_ft.commands.rowfiles import check, prepare
from lora_ft.commands.sharing import combine, diff, export, publish, report
from lora_ft.config import RunConfig
from lora_ft.errors import DivergedError, Interrupted, LoraFtError
from lora_ft.settings import cli, from_yaml, refuse_code
from lora_ft.system import locks, processes
from lora_ft.system.terminal import ask, quiet, say, table

MadeRows = Callable[[], tuple[Sequence[Any], Sequence[Any]]]
"""Returns rows to train on and rows held out (`examples.Example`)."""


def quickstart(config: QuickstartConfig) -> None:
    from lora_ft.commands.quickstart import quickstart as start

    start(config.out, resume=config.resume)


def train(config: RunConfig, made: MadeRows | None = None) -> None:
    if config.twin:
        from lora_ft.proof.rehearsal import rehearse

        rehearse(config, say)
        return
    examples, held_out = made() if made is not None and config.data.train is None else (None, None)
    if config.dry_run:
        from lora_ft import runs

        say(json.dumps(runs.dry_run(config, examples, held_out), indent=2))
        return
    # Before torch is imported, which takes seconds.
    with locks.run_folder(config.out) if processes.is_first() else nullcontext():
        from lora_ft import runs

        finished = runs.run(config, examples=examples, held_out=held_out)
        finished.prove()
    say(f"{finished.folder}: adapter of {finished.page.adapter_bytes / 2**20:.1f} MiB, loaded anew and verified")
    say(finished.summary())


def plan(config: PlanConfig) -> None:
    from lora_ft import memory

    found = memory.plan(config, config.device)
    if config.json:
        steps = {"asked": found.asked, "fitting": found.fitting}
        told: dict[str, Any] = {
            name: step and asdict(step) | {"peak_bytes": step.peak_bytes} for name, step in steps.items()
        }
        told |= {"device": asdict(found.device), "fits": found.fits, "options": found.options()}
        told |= {"accumulate": found.accumulate}
        told |= {"tokens_per_epoch": found.tokens_per_epoch, "seconds_per_epoch": found.seconds_per_epoch}
        say(json.dumps(told))
    else:
        _show_plan(found)
    if found.fitting is None:
        smaller = "a smaller base" if config.quant == "nf4" else "--quant nf4, or a smaller base"
        raise LoraFtError(f"Not even one row fits: take shorter rows (--data.max-length), {smaller}.")


def _show_plan(found: Any) -> None:
    from lora_ft import memory

    shown = {"as asked": found.asked}
    if found.fitting is not None and found.fitting is not found.asked:
        shown["what fits"] = found.fitting
    rows = [[kind, *[f"{step.bytes[kind] / 2**30:.2f}" for step in shown.values()]] for kind in memory.KINDS]
    rows.append(["at the peak, GiB", *[f"{step.peak_bytes / 2**30:.2f}" for step in shown.values()]])
    rows.append(["rows in a pass", *[str(step.rows) for step in shown.values()]])
    rows.append(["tokens in a pass", *[str(step.tokens) for step in shown.values()]])
    rows.append(["checkpointing", *[step.checkpointing for step in shown.values()]])
    table(["", *shown], rows)
    say(f"{found.device.name} has {found.device.usable_bytes / 2**30:.2f} GiB for tensors.")
    if found.fitting is None:
        return
    if found.seconds_per_epoch is not None:
        say(f"An epoch of {found.tokens_per_epoch:,} tokens takes about {found.seconds_per_epoch / 60:.1f} minutes.")
    if not found.options():
        say("It fits.")
    elif found.fits:
        say(f"It fits. The largest passes of the same global batch that do: {found.options()}")
    else:
        say(f"It does not fit. With the same global batch this does: {found.options()}")


def evaluate(config: EvaluateConfig) -> None:
    from lora_ft import evaluate as evaluation
    from lora_ft import saved, tasks
    from lora_ft.data import formats
    from lora_ft.scoring import class_metrics

    examples = formats.read(config.data, config.columns)
    loaded = saved.load(config.adapter, config.base)
    loaded.prepare_task()
    evaluation.require(loaded.task, config.metrics)
    rows = tasks.featurize(loaded.task, examples)
    tasks.tell_of_cut_rows(loaded.task)
    found = evaluation.compare(
        loaded.task, loaded.model, examples, rows, names=config.metrics, batch_size=config.batch_size
    )
    if config.json:
        say(json.dumps({**found.adapter, "base": found.base}))
        return
    plain = {key: value for key, value in found.adapter.items() if key not in class_metrics.TABLES}
    table(["", "base", "adapter"], [[key, found.base.get(key), value] for key, value in plain.items()])
    if per_class := found.adapter.get("per_class"):
        table(
            ["class", "precision", "recall", "f1", "rows"], [[name, *row.values()] for name, row in per_class.items()]
        )


def predict(config: PredictConfig) -> None:
    from rich.console import Console

    from lora_ft.predict import predict as answer

    done = answer(config, Console(stderr=True))
    say(f"{config.out}: {done.rows:,} rows, {done.rows / done.seconds:.1f} rows/s")


def chat(config: ChatConfig) -> None:
    from lora_ft import saved
    from lora_ft.generate import Sampling, generate

    loaded = saved.load(config.adapter, config.base)
    if loaded.task.name not in ("chat", "prefer", "reason"):
        raise LoraFtError(f"{config.adapter} was trained for the task {loaded.task.name}; only chat adapters converse.")
    loaded.prepare_task()
    sampling = Sampling(config.max_new_tokens, config.temperature)
    messages = _opening(config.system, loaded.task.facts()["system"])

    def answer(text: str) -> str:
        messages.append({"role": "user", "content": text})
        prompt = loaded.task.renderer.prompt(messages)  # type: ignore[attr-defined]
        reply = generate(
            loaded.model, loaded.base.tokenizer, [prompt], sampling=sampling, stop_ids=loaded.task.end_ids()
        )
        messages.append({"role": "assistant", "content": reply[0]})
        return reply[0]

    if config.prompt is not None:
        say(answer(config.prompt))
        return
    print("Type a message; an empty line or Ctrl-D ends the conversation.", file=sys.stderr)
    while text := ask():
        say(answer(text))


def _opening(asked: str | None, trained: str | None) -> list[dict[str, Any]]:
    """Returns the turns that a conversation begins with: the system turn asked for, else that of the training."""
    if asked is None and trained:
        print(f"system: {trained}  (of the training rows; --system gives another)", file=sys.stderr)
    system = trained if asked is None else asked
    return [{"role": "system", "content": system}] if system else []


def verify(config: VerifyConfig) -> None:
    from lora_ft import seal

    verdict = seal.verify(config.adapter, model_folder=config.model, base_name=config.base)
    if config.json:
        say(json.dumps(verdict.as_dict()))
    else:
        for check in verdict.checks:
            say(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.found}; {check.rule}")
    verdict.require(config.model or config.adapter)


def merge(config: MergeConfig) -> None:
    from lora_ft.merge import merge as merge_adapter

    done = merge_adapter(config.adapter, config.out, onto=config.onto, dtype=config.dtype, base_name=config.base)
    for name, candidate in done["candidates"].items():
        distance = "not a number" if candidate["kl"] is None else f"{candidate['kl']:.3g} nats"
        say(f"onto {name}: KL to the adapter {distance}")
    say(f"{config.out}: merged onto {done['onto']} weights, {done['dtype']}")


def selftest(config: SelftestConfig) -> None:
    from lora_ft.proof import selftest as checks

    run = from_yaml(RunConfig, config.run)
    refuse_code(run, (), str(config.run), "leave it out of the file that is checked; no check needs it.")
    # The model is made three times.
    logging.getLogger("lora_ft").setLevel(logging.WARNING)
    found = checks.check(run, twin=config.twin)
    if config.json:
        say(json.dumps(found.as_dict()))
    else:
        for answer in found.answers:
            say(str(answer))
        say(f"{found.rows} rows in float32, peak {found.peak_bytes / 2**30:.2f} GiB")
    found.require(config.run)


def serve(config: ServeConfig) -> None:
    try:
        from lora_ft.serve.serving import serve as run
    except ModuleNotFoundError as missing:
        raise LoraFtError(
            f"{missing.name} is not installed: `pip install 'lora-ft[serve]'` brings the server."
        ) from None
    # Line by line also into a file, where the address and the token are waited for.
    run(
        config.home,
        config.host,
        config.port,
        new_token=config.new_token,
        results_base64=config.results_base64,
        say=lambda text: print(text, flush=True),
    )


def doctor(config: DoctorConfig) -> None:
    from lora_ft.commands.doctor import examine

    found = examine()
    if config.json:
        say(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        say(f"{key:<20} {json.dumps(value) if isinstance(value, dict | list) else value}")


def bench_kernels(config: BenchConfig) -> None:
    from rich.console import Console

    from lora_ft.errors import ProofError
    from lora_ft.speed import bench, twins

    with Console(stderr=True).status("") as status:
        checks, rated, timed, written = bench.kernels(status.update)
    if config.json:
        found: dict[str, Any] = {"checks": [asdict(one) for one in checks], "tuned": written}
        found |= {"operations": [asdict(one) for one in rated], "times": [asdict(one) for one in timed]}
        say(json.dumps(found))
    else:
        table(
            ["operation", "error", "its twin's", "allowed", ""],
            [[one.op, one.error, one.plain, one.allowed, "" if one.passed else "WRONG"] for one in checks],
        )
        rivals = list(dict.fromkeys(name for op in rated for name in op.rivals))
        table(
            ["operation", "ms", "GB/s", "TFLOP/s", "of roofline", *[f"{name} takes" for name in rivals]],
            [
                [op.op, 1e3 * op.seconds, op.gigabytes_per_s, op.teraflops, f"{op.share:.0%}"]
                + ["" if (ratio := op.ratio(name)) is None else f"{ratio:.2f}x" for name in rivals]
                for op in rated
            ],
        )
        rivals = list(timed[0].rivals)
        table(
            ["rows", "weight", "dtype", "ms", "of matmul", *[f"{name} takes" for name in rivals]],
            [
                [one.rows, f"{one.weight}", one.dtype, 1e3 * one.seconds, f"{one.share:.0%}"]
                + [f"{one.ratio(name):.2f}x" for name in rivals]
                for one in timed
            ],
        )
        if written:
            say(f"The fastest way of each shape is in {written}, and used from now on.")
    wrong = [one.op for one in checks if not one.passed]
    if wrong:
        raise ProofError(f"{', '.join(wrong)}: further from float64 than {twins.WORST} times the plain way.")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "quickstart": (QuickstartConfig, quickstart),
    "train": (RunConfig, train),
    "plan": (PlanConfig, plan),
    "evaluate": (EvaluateConfig, evaluate),
    "predict": (PredictConfig, predict),
    "chat": (ChatConfig, chat),
    "verify": (VerifyConfig, verify),
    "merge": (MergeConfig, merge),
    "export": (ExportConfig, export),
    "combine": (CombineConfig, combine),
    "diff": (DiffConfig, diff),
    "publish": (PublishConfig, publish),
    "report": (ReportConfig, report),
    "data check": (DataCheckConfig, check),
    "data prepare": (DataPrepareConfig, prepare),
    "bench kernels": (BenchConfig, bench_kernels),
    "selftest": (SelftestConfig, selftest),
    "serve": (ServeConfig, serve),
    "doctor": (DoctorConfig, doctor),
}
# First words that a second one must follow.
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done and proven, 1 for the user to mend, 2 wrong usage, 3 disproven, 130 stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(words[:2]) if words[:1] and words[0] in GROUPS else " ".join(words[:1])
    if {"-h", "--help"} & set(name.split()):
        return _finish(lambda: print(_usage()), words)
    if not name or name in GROUPS:
        print(_usage(), file=sys.stderr)
        return 2
    if name == "--version":
        return _finish(lambda: print(f"lora-ft {__version__}"), words)
    if name not in COMMANDS:
        print(f"lora-ft has no command {name!r}.\n\n{_usage()}", file=sys.stderr)
        return 2
    options, command = COMMANDS[name]
    if command is train and "--twin" in words:
        options = TwinConfig
    return _finish(
        lambda: command(cli(options, words[len(name.split()) :], prog=f"lora-ft {name}")), [_program(), *words]
    )


def _program() -> str:
    """Returns how to start this program again: by the path it was started by, which need not be where shells look."""
    return sys.argv[0] if Path(sys.argv[0]).stem == "lora-ft" else "lora-ft"


def run_recipe(recipe: type[RunConfig], argv: Sequence[str] | None = None, made: MadeRows | None = None) -> int:
    """Returns the exit status of a recipe: `lora-ft train` with the recipe's own defaults.

    Args:
        made: returns rows to train on and rows held out, of a recipe that makes its own where it is given none.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return _finish(lambda: train(cli(recipe, words), made), ["python", sys.argv[0], *words])


def _finish(action: Callable[[], None], command: Sequence[str]) -> int:
    """Returns the exit status of `action`, having printed what the user should know of its failure."""
    quiet()
    try:
        with _terminated_as_interrupted():
            action()
            sys.stdout.flush()
    except Interrupted as stopped:
        again = [word for word in command if word != "--resume"]
        if processes.is_first():
            print(f"{stopped}\n  {shlex.join([*again, '--resume'])}", file=sys.stderr, flush=True)
        processes.end_together()
        return stopped.exit_status
    except DivergedError as error:
        if processes.is_first():
            print(error, file=sys.stderr, flush=True)
        processes.end_together()
        return error.exit_status
    except LoraFtError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return Interrupted.exit_status
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            sys.stdout.close()
        print("Stopped: nobody reads the output any more.", file=sys.stderr)
        return LoraFtError.exit_status
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Raises KeyboardInterrupt on SIGTERM too, in the block."""
    if threading.current_thread() is not threading.main_thread():  # which alone may take signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{(options.__doc__ or '').splitlines()[0]}" for name, (options, _) in COMMANDS.items()]
    return "\n".join(["usage: lora-ft COMMAND [options]", "", *lines, "", "lora-ft COMMAND --help lists its options."])


if __name__ == "__main__":
    sys.exit(main())
