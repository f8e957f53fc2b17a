"""The commands that hand adapters on or hold them side by side: export, combine, diff, publish, report."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.commands.options import CombineConfig, DiffConfig, ExportConfig, PublishConfig, ReportConfig
from lora_ft.config import RunConfig
from lora_ft.settings import from_yaml
from lora_ft.system.terminal import say, table

if TYPE_CHECKING:
    from lora_ft.difference import Layer

# Layers that are shown one by one, those that differ most.
SHOWN = 12


def export(config: ExportConfig) -> None:
    """Writes an adapter for other programs, or says which take it."""
    if config.portable:
        _tell_who_takes(config)
        return
    from lora_ft.export import export as write

    assert config.out is not None  # noqa: S101 - `ExportConfig` has seen to it
    form, quant = config.format or "gguf", config.quant or "f16"
    size = write(config.source, config.out, form=form, kind=quant, base_name=config.base)
    kind = "float32" if form == "gguf-lora" else quant
    if config.json:
        say(json.dumps({"format": form, "quant": kind, "bytes": size}))
        return
    say(f"{config.out}: {form}, {kind}, {size / 2**20:.1f} MiB")
    if form == "ollama":
        say(f"Put it into Ollama there: ollama create NAME -f {config.out / 'Modelfile'}")


def _tell_who_takes(config: ExportConfig) -> None:
    from lora_ft.export import portable
    from lora_ft.training import origin

    source: Path | RunConfig = config.source
    if config.source.is_file():
        source, _ = origin.adopted(from_yaml(RunConfig, config.source))
    answers = portable.answers(source, config.base)
    if config.json:
        say(json.dumps({answer.program: asdict(answer) | {"takes": answer.takes} for answer in answers}))
        return
    for answer in answers:
        say(f"{answer.program}: {'yes' if answer.takes else 'no, ' + '; '.join(answer.why)}")
        for line in ([f"{'' if answer.takes else 'instead: '}{answer.how}"] if answer.how else []) + answer.notes:
            say(f"    {line}")


def combine(config: CombineConfig) -> None:
    """Combines adapters and shows what each keeps."""
    from lora_ft.combine import combine as combine_adapters

    done = combine_adapters(config)
    if config.json:
        say(json.dumps(done.as_dict()))
        return
    rows = []
    for folder, part in zip(config.adapters, done.parts, strict=True):
        measured = {name: found["loss"] for name, found in part.rows.items()} or part.loss
        losses = [measured[name] for name in ("base", "alone", "combined")]
        gain = "none to keep" if part.gain_kept is None else f"{part.gain_kept:.0%}"
        rows.append([str(folder), part.weight, *losses, gain, f"{part.effect_kept:.0%}"])
    table(["adapter", "weight", "loss of the base", "alone", "combined", "gain kept", "effect kept"], rows)
    for folder, part in zip(config.adapters, done.parts, strict=True):
        named = {key: value for key, value in part.rows.get("combined", {}).items() if isinstance(value, int | float)}
        if len(named) > 1:
            told = [[key, *(part.rows[name].get(key) for name in ("base", "alone", "combined"))] for key in named]
            table([str(folder), "base", "alone", "combined"], told)
    say(f"{done.folder}: {config.method} of {len(done.parts)} adapters, rank {done.rank}, loaded anew and verified")


def diff(config: DiffConfig) -> None:
    """Shows in what two adapters differ."""
    from lora_ft import difference

    found = difference.of(config.first, config.second)
    if config.json:
        say(json.dumps(found.as_dict()))
        return
    for name, rows in found.facts.items():
        if not rows:
            say(f"{name}: the same")
            continue
        table([name, str(config.first), str(config.second)], [[key, *pair] for key, pair in rows.items()])
    if not found.layers:
        say("weights: the same")
        return
    say(f"{len(found.layers)} weights are changed otherwise: norms of both changes, of their difference, their cosine")
    for kind in found.kinds() if len(found.layers) > SHOWN else ():
        say(_line(kind))
    for layer in found.layers[:SHOWN]:
        say(_line(layer))
    if len(found.layers) > SHOWN:
        say(f"... and {len(found.layers) - SHOWN} more, which --json holds")
    for note in found.notes:
        say(note)


def _line(layer: Layer) -> str:
    numbers = (layer.first, layer.second, layer.difference, layer.cosine)
    return " ".join([*("         -" if one is None else f"{one:10.4g}" for one in numbers), "", layer.name])


def publish(config: PublishConfig) -> None:
    """Puts an adapter on a model hub."""
    from lora_ft import publish as publishing

    done = publishing.publish(
        config.adapter, config.repo, public=config.public, as_request=config.pr, base_name=config.base
    )
    say(done.told())


def report(config: ReportConfig) -> None:
    """Draws the report of an adapter anew, or sets several side by side."""
    from lora_ft.memory import planned
    from lora_ft.pages import comparison

    if len(config.adapters) == 1 and not config.json:
        say(str(planned.report(config.adapters[0])))
        return
    runs = comparison.read(config.adapters)
    if config.json:
        say(json.dumps([comparison.known(run) for run in runs]))
    else:
        table(["", *[run.name for run in runs]], [[name, *cells] for name, cells in comparison.rows(runs)])
        for told in comparison.warnings(runs):
            say(told)
    if config.out is not None:
        comparison.write(config.out, runs)
        if not config.json:
            say(str(config.out))
