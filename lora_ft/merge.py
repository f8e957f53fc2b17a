"""Adapter and base -> one plain model: safetensors of the base's layout, with the adapter's tokenizer and template.

Two weights can be merged onto: the original ones, and those that quantized training computed with. Both lose
something, and which loses less depends on the run, so `auto` builds both and measures.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lora_ft import adapters, saved, seal
from lora_ft import base as bases
from lora_ft.errors import AdapterError, LoraFtError, ProofError, UnsupportedModelError
from lora_ft.model import changes
from lora_ft.model.changes import Change, Whole
from lora_ft.model.weights import Weights, require
from lora_ft.proof import environment, recorded
from lora_ft.seal import Seal
from lora_ft.sources import Source
from lora_ft.system import atomicio
from lora_ft.tasks import Task

log = logging.getLogger(__name__)

REPORT = "merge_report.json"
Onto = Literal["original", "dequantized"]
# A block of rows in float32 is 16 MiB, so that no layer is ever whole in float32.
BLOCK = 1 << 22
# Below it, rounding to the saved dtype visibly weakens the adapter.
ENOUGH_SURVIVES = 0.9


def merge(
    folder: Path,
    out: Path,
    *,
    onto: Literal["auto", "original", "dequantized"] = "auto",
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    base_name: str | None = None,
) -> dict[str, Any]:
    """Returns the report on the merged model written to `out`, which it holds as `merge_report.json`.

    Peak memory stays under two shards of the base and 1 GB, whatever the size of the model.

    Args:
        onto: `original` weights, the `dequantized` ones that training saw, or `auto`, the closer of the two.
        dtype: of the merged weights; unset, what most of the base is stored in.
        base_name: where to find the base, when it has moved.

    Raises:
        AdapterError: `out` is not empty, or the adapter, its seal or its base are not what they should be.
        UnsupportedModelError: weights of this model cannot be merged file by file.
        ProofError: part of the adapter would be lost, or the merged model is too far from the adapter; then the
            report says by how much, and `out` is kept to look at.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} exists and is not an empty folder; merge into a new one.")
    parts = _Parts.of(folder, base_name)
    kinds = _kinds(parts, onto)
    saved_dtype = getattr(torch, dtype) if dtype else parts.weights.stored_dtype
    with ExitStack() as stack:
        drafts = {kind: stack.enter_context(atomicio.draft(out)) for kind in kinds}
        survivals: dict[str, dict[str, float]] = {}
        candidates: dict[str, dict[str, Any]] = {}
        for kind in kinds:
            survivals[kind] = _write(parts, drafts[kind], kind, saved_dtype)
            merged, _ = seal.load_merged(parts.task, drafts[kind].path, "cpu")
            distance = seal.drift(parts.sealed, parts.task, merged)
            del merged
            # JSON has no word for what is not a number.
            measured = distance if math.isfinite(distance) else None
            candidates[kind] = {"kl": measured, "passes": distance <= seal.SHARE * parts.sealed.effect}
            log.info("merged onto %s weights: KL to the adapter is %.3g nats", kind, distance)
        chosen = min(kinds, key=lambda kind: math.inf if candidates[kind]["kl"] is None else candidates[kind]["kl"])
        report = _report(parts, chosen, saved_dtype, candidates, survivals[chosen])
        drafts[chosen].write_json(REPORT, report)
        drafts[chosen].commit(out)
    if not candidates[chosen]["passes"]:
        found = candidates[chosen]["kl"]
        raise ProofError(
            f"{out} was written, but is not proven: KL to the adapter is "
            f"{'not a number' if found is None else f'{found:.3g} nats'}, and must be at most "
            f"{report['threshold']:.3g}, a tenth of what the adapter changes. {' '.join(report['hints'])}"
        )
    return report


@dataclass
class _Parts:
    """What a merge is made of."""

    folder: Path
    source: Source
    task: Task
    sealed: Seal
    record: dict[str, Any]
    quant: str
    config: PreTrainedConfig
    """The merged model's, with the adapter's vocabulary and the task's labels."""
    architecture: str
    weights: Weights
    changed: dict[str, Change]
    groups: dict[str, set[str]]
    """Parameters that are one and the same in the base, by any of their names."""
    shapes: dict[str, torch.Size]
    files: dict[str, Any]
    """What other libraries read beside the model, by name."""

    @classmethod
    def of(cls, folder: Path, base_name: str | None) -> _Parts:
        """Returns the parts, read from an adapter folder; the weights stay on disk."""
        record = recorded.read(folder)
        saved.lora_settings(folder)
        sealed = seal.read(folder)
        source = saved.find_base(folder, record["base"], base_name)
        run, task = recorded.task(folder, record)
        tokenizer = bases.load_tokenizer(folder)
        try:
            config = bases.read_config(source.folder)
        except LoraFtError:
            raise
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(f"{source.name}: transformers does not know this model: {reason}") from None
        for key, value in task.config_changes().items():
            setattr(config, key, value)
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, len(tokenizer))
        skeleton = _skeleton(task, config)
        dtype = getattr(torch, record["dtype"])
        weights = Weights(source.folder, skeleton, record["quant"], dtype, set(record["left_whole"]))
        groups, shapes = _groups(skeleton), {name: t.shape for name, t in skeleton.state_dict().items()}
        changed = changes.read(folder, skeleton)
        architecture = type(skeleton).__name__
        return cls(
            folder,
            source,
            task,
            sealed,
            record,
            record["quant"],
            config,
            architecture,
            weights,
            changed,
            groups,
            shapes,
            task.files(config, bases.longest_row(source, task.model_class, run.data.max_length)),
        )


def _kinds(parts: _Parts, onto: str) -> list[Onto]:
    """Returns the weights to merge onto, each to be tried."""
    if parts.weights.prequantized:
        if onto == "original":
            raise AdapterError(
                f"{parts.source.name} is stored quantized, so there are no original weights to merge onto; use "
                "--onto dequantized, or name the 16-bit model of the same weights as a base and train on that."
            )
        return ["dequantized"]
    if parts.quant == "none":
        if onto == "dequantized":
            log.info("the base was not quantized, so the dequantized weights are the original ones")
        return ["original"]
    both: list[Onto] = ["dequantized", "original"]
    return both if onto == "auto" else [kind for kind in both if kind == onto]


def _skeleton(task: Task, config: PreTrainedConfig) -> PreTrainedModel:
    """Returns the model without memory for its weights."""
    with torch.device("meta"):
        model = task.model_class.from_config(config)
    model.tie_weights()
    return model


def _groups(skeleton: PreTrainedModel) -> dict[str, set[str]]:
    """Returns, for each parameter, the names of all parameters that are the same one."""
    same: dict[int, set[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), set()).add(name)
    return {name: names for names in same.values() for name in names}


@dataclass
class _Layout:
    """Which parameters are written, each from which stored one."""

    source: dict[str, str] = field(default_factory=dict)
    """Parameter to write -> parameter in the base's files that it is made from."""
    unties: bool = False


def _layout(parts: _Parts) -> _Layout:
    """Returns what to write. Tied parameters are written once, unless the adapter changes one and not the other."""
    stored, layout = parts.weights.stored_name, _Layout()
    done: set[str] = set()
    with parts.weights.opened() as reader:
        for name in stored:
            if name in done:
                continue
            group = parts.groups.get(name, {name})
            held = [member for member in stored if member in group]
            # Tied by the configuration, stored twice with different values: transformers leaves them apart.
            if any(not torch.equal(reader.original(held[0]), reader.original(other)) for other in held[1:]):
                layout.source.update({member: member for member in held})
                done.update(held)
                continue
            done.update(group)
            if len({id(parts.changed.get(member)) for member in group}) == 1:
                layout.source[name] = name
                continue
            if parts.config.is_encoder_decoder:
                raise AdapterError(
                    f"The adapter changes one of {', '.join(sorted(group))}, which are tied, and a "
                    f"{parts.config.model_type} cannot be written untied: leave them out of --lora.targets."
                )
            layout.unties = True
            layout.source.update(dict.fromkeys(sorted(group), name))
    whole = {name for name, change in parts.changed.items() if isinstance(change, Whole)}
    supplied = layout.source.keys() | whole
    absent = [name for name, group in parts.groups.items() if not group & supplied]
    for name, change in parts.changed.items():
        same = {member for member in parts.groups.get(name, {name}) if parts.changed.get(member) is change}
        if not same & supplied:
            absent.append(name)
    absent = [name for name in absent if not bases.is_spare(name)]
    require(parts.weights, absent, parts.source.name)
    return layout


def _write(parts: _Parts, draft: atomicio.Draft, kind: Onto, dtype: torch.dtype) -> dict[str, float]:
    """Writes the merged model and returns, for each adapted layer, the share of its delta that survives rounding."""
    layout, survival = _layout(parts), {}
    weight_map: dict[str, str] = {}
    total, heads = 0, {n: c for n, c in parts.changed.items() if isinstance(c, Whole) and n not in layout.source}
    with parts.weights.opened() as reader:
        for file in parts.weights.files:
            shard: dict[str, torch.Tensor] = {}
            here = set(parts.weights.names_in(file))
            for name, from_name in layout.source.items():
                if from_name not in here:
                    continue
                weight = reader.original(from_name) if kind == "original" else reader.dequantized(from_name)
                written = parts.weights.written_name[name] if name == from_name else name
                shard[written], share = _changed(name, weight, parts.changed.get(name), parts.shapes[name], dtype)
                if share is not None:
                    survival[name] = share
            if file == parts.weights.files[-1]:
                shard.update({name: _cast(name, head.value, dtype) for name, head in heads.items()})
            if not shard:
                continue
            draft.tensors(file.name, shard, {"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file.name))
            total += sum(t.numel() * t.element_size() for t in shard.values())
    if len(parts.weights.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        draft.write_json("model.safetensors.index.json", index)
    _write_config(parts, draft, dtype, layout.unties)
    draft.write_files(parts.files)
    return survival


def _write_config(parts: _Parts, draft: atomicio.Draft, dtype: torch.dtype, unties: bool) -> None:
    config = copy.deepcopy(parts.config)
    config.architectures, config.dtype = [parts.architecture], dtype
    if unties:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    draft.library(config.save_pretrained)
    draft.library(bases.load_tokenizer(parts.folder).save_pretrained)
    generation = parts.source.folder / "generation_config.json"
    if generation.is_file():
        draft.copy(generation)


def _changed(
    name: str, weight: torch.Tensor, change: Change | None, shape: torch.Size, dtype: torch.dtype
) -> tuple[torch.Tensor, float | None]:
    """Returns a parameter as it is saved, and the share of its change that survives the rounding to `dtype`."""
    if isinstance(change, Whole):
        return _cast(name, change.value, dtype), None
    if weight.ndim and weight.shape[1:] == shape[1:] and len(weight) < shape[0]:
        weight = adapters.enlarged(weight, shape[0])
    if weight.shape != shape:
        raise ProofError(f"{name}: the base holds {tuple(weight.shape)}, the merged model needs {tuple(shape)}.")
    if change is None:
        return _cast(name, weight, dtype), None
    base = weight.T if change.transposed else weight
    merged = torch.empty(base.shape, dtype=dtype)
    kept, whole = 0.0, 0.0
    step = max(1, BLOCK // max(1, base[0].numel()))
    for start in range(0, len(base), step):
        rows = slice(start, min(start + step, len(base)))
        before = base[rows].float()
        after = change.rows(before, rows)
        merged[rows] = after.to(dtype)
        delta = after - before
        moved = merged[rows].float() - before.to(dtype).float()
        kept, whole = kept + float((moved * delta).sum()), whole + float(delta.square().sum())
    share = kept / whole if whole else 1.0
    return _cast(name, merged.T if change.transposed else merged, dtype), share


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and not torch.isfinite(cast).all():
        raise AdapterError(f"{name} holds numbers too large for float16: use --dtype bfloat16 or float32.")
    return cast


def _report(
    parts: _Parts, chosen: str, dtype: torch.dtype, candidates: dict[str, Any], survival: dict[str, float]
) -> dict[str, Any]:
    """Returns the contents of `merge_report.json`; distances in nats per position."""
    name = str(dtype).removeprefix("torch.")
    passes = candidates[chosen]["passes"]
    worst = min(survival, key=lambda layer: survival[layer]) if survival else None
    notes, hints = [], []
    if parts.quant == "none":
        notes.append("The base was not quantized, so the dequantized weights are the original ones.")
    if parts.weights.prequantized:
        notes.append("The base is stored quantized, so there are no original weights.")
    if parts.weights.unused:
        notes.append(f"Not part of this model, left out: {', '.join(parts.weights.unused)}.")
    weak = worst is not None and survival[worst] < ENOUGH_SURVIVES
    others = parts.quant != "none" and chosen == "original"
    if weak and name != "float32":
        finer = "float16 or float32" if name == "bfloat16" else "float32"
        hints.append(f"Rounding to {name} loses part of the adapter: try --dtype {finer}.")
    elif not passes and others:
        hints.append("The adapter itself is whole; the original weights are not the quantized ones that training saw.")
    elif not passes and name != "float32":
        hints.append(f"The adapter itself is whole, but all weights are rounded to {name}: try --dtype float32.")
    if not passes and parts.quant != "none" and len(candidates) == 1 and not parts.weights.prequantized:
        hints.append("Try --onto auto, which takes the closer of the original and the dequantized weights.")
    return {
        "onto": chosen,
        "dtype": name,
        "passes": passes,
        "candidates": candidates,
        "kl_effect": parts.sealed.effect,
        "threshold": seal.SHARE * parts.sealed.effect,
        "delta_survival": {
            "min": survival[worst] if worst is not None else None,
            "median": statistics.median(survival.values()) if survival else None,
            "worst": worst,
        },
        "base": parts.record["base"],
        "adapter_sha256": environment.file_sha256(parts.folder / saved.WEIGHTS),
        "notes": notes,
        "hints": hints,
    }
