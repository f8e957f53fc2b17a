"""Canary prompts and what the model said to them, kept with an adapter; `verify` replays them on a fresh load.

Shapes: B rows, T tokens, N scored positions, K kept classes (20 or all), V classes or vocabulary.
"""

from __future__ import annotations

import collections
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors
import safetensors.torch
import torch

from lora_ft import base as bases
from lora_ft import saved, sources
from lora_ft.base import Base
from lora_ft.errors import AdapterError, ProofError, SourceError
from lora_ft.foreign import tensors
from lora_ft.foreign.files import object_of
from lora_ft.foreign.reading import opened
from lora_ft.model import modes
from lora_ft.proof import environment, recorded
from lora_ft.proof.replies import ask, canaries, distance, kl_kept, likeliest, of_classes
from lora_ft.proof.verdict import Checks, Verdict
from lora_ft.system import atomicio
from lora_ft.tasks import Batch, Features, Task

log = logging.getLogger(__name__)

FILES = ("seal.safetensors", "seal.json")
FORMAT = 3

# Two float32 replays on one machine differ by some 1e-13 nats, so a tenth of this is still told from noise.
LEAST_EFFECT = 1e-7
# Share of the effect that may be lost or added; quantization noise of another device stays below it.
SHARE = 0.1
# The effect is computed anew from what is kept; how an exponential rounds may differ between processors.
SAME_EFFECT = 1e-3

# What `seal.json` must hold.
RECORD: dict[str, Any] = {
    "kl_effect": float,
    "classes": int,
    "vocabulary": int,
    "architecture": str,
    "tied_embeddings": bool,
    "heads": list,
    "base_sha256": str,
    "adapter_sha256": str,
    "adapter_tensors": dict,
    "tokenizer_sha256": str,
    "seal_sha256": str,
}
BATCH = re.compile(r"batch[0-9]{1,4}\.[a-z_]{1,40}")
TENSORS = ("adapter_ids", "adapter_logp", "base_logp", "base_ids", "base_own_logp")


@dataclass(frozen=True)
class Seal:
    """What an adapter folder says about itself, and the replies it is held to."""

    record: dict[str, Any]
    """The contents of `seal.json`."""
    batches: list[Batch]
    """Canary rows ready for the model, with `labels`."""
    adapter_ids: torch.Tensor
    """The adapter's likeliest classes at each position, int64 [N, K]."""
    adapter_logp: torch.Tensor
    """Their log-probabilities, float32 [N, K]."""
    base_logp: torch.Tensor
    """The base's log-probabilities of the same classes, float32 [N, K]."""
    base_ids: torch.Tensor
    """The base's own likeliest classes, int64 [N, K]."""
    base_own_logp: torch.Tensor
    """Their log-probabilities, float32 [N, K]."""

    @property
    def effect(self) -> float:
        """KL(adapter, base) in nats per position, as sealed: of the tensors kept, whose digest was compared."""
        return kl_kept(self.adapter_logp, self.base_logp, self.record["classes"])


def make(task: Task, base: Base, model: peft.PeftModel, rows: Sequence[Features], folder: Path) -> Seal:
    """Returns the seal of the adapter that was saved in `folder`, having written it there.

    Args:
        rows: features, held-out ones where there are any, else those trained on; up to 16 are kept, cut at 256 tokens,
            with 16 scored positions each.

    Raises:
        ProofError: the adapter changes nothing, or no row has a scored position.
    """
    batches = canaries(task, rows)
    adapter_replies = ask(task, model, batches)
    with modes.without(model):
        base_replies = ask(task, model, batches)
    adapter_ids, adapter_logp = likeliest(adapter_replies)
    base_ids, base_own_logp = likeliest(base_replies)
    base_logp, classes = of_classes(adapter_ids, base_replies), adapter_replies[0].shape[1]
    effect = kl_kept(adapter_logp, base_logp, classes)
    if not effect > LEAST_EFFECT:
        raise ProofError(
            f"The adapter has no effect: at {len(adapter_ids)} positions of the rows kept KL(adapter, base) is "
            f"{effect:.2g} nats, and must be above {LEAST_EFFECT:g}. Train for more steps or at a higher --train.lr, "
            "and look in metrics.jsonl whether the loss moved."
        )
    kept = {
        "adapter_ids": adapter_ids,
        "adapter_logp": adapter_logp,
        "base_logp": base_logp,
        "base_ids": base_ids,
        "base_own_logp": base_own_logp,
    }
    stored = {**kept, **{f"batch{i}.{key}": t for i, batch in enumerate(batches) for key, t in batch.items()}}
    atomicio.write(folder / FILES[0], safetensors.torch.save({key: t.contiguous() for key, t in stored.items()}))
    record = {
        "format": FORMAT,
        "lora_ft": environment.versions()["lora_ft"],
        "kl_effect": effect,
        "positions": len(adapter_ids),
        "classes": classes,
        "vocabulary": base.model.get_input_embeddings().weight.shape[0],
        "architecture": type(model.get_base_model()).__name__,
        "tied_embeddings": environment.embeddings_are_tied(base.model),
        "heads": list(base.task_heads),
        "base_sha256": sources.weights_digest(base.source.folder),
        "adapter_sha256": environment.file_sha256(folder / saved.WEIGHTS),
        "adapter_tensors": _shapes(folder / saved.WEIGHTS),
        "tokenizer_sha256": environment.tokenizer_sha256(bases.load_tokenizer(folder)),
        "seal_sha256": environment.file_sha256(folder / FILES[0]),
    }
    atomicio.write_json(folder / FILES[1], record, sort_keys=True)
    return Seal(record, batches, **kept)


def read(folder: Path) -> Seal:
    """Returns the seal in `folder`. Raises AdapterError where it is missing, of another format or altered."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder}: there is no {' and no '.join(missing)}, so nothing says what the adapter does.")
    record = object_of(folder / FILES[1], AdapterError)
    if record.get("format") != FORMAT:
        raise AdapterError(f"{folder / FILES[1]}: format {record.get('format')!r}; this version reads format {FORMAT}.")
    problems = recorded.unlike(record, RECORD)
    if problems:
        raise AdapterError(f"{folder / FILES[1]}: {'; '.join(problems)}: the file was damaged.")
    digest = environment.file_sha256(folder / FILES[0])
    if digest != record["seal_sha256"]:
        raise AdapterError(
            f"{folder / FILES[0]}: its sha256 is {digest[:16]}, {FILES[1]} says {record['seal_sha256'][:16]}: "
            "the seal was altered after it was made."
        )
    stored = tensors.load(folder / FILES[0], AdapterError)
    batches: dict[int, Batch] = {}
    for name in [name for name in stored if BATCH.fullmatch(name)]:
        number, key = name.removeprefix("batch").split(".")
        batches.setdefault(int(number), {})[key] = stored.pop(name)
    if stored.keys() != set(TENSORS) or not batches:
        raise AdapterError(f"{folder / FILES[0]}: holds {_some(sorted(stored))}, not {', '.join(TENSORS)} and batches.")
    sealed = Seal(record, [batches[i] for i in sorted(batches)], **stored)
    if not math.isclose(sealed.effect, record["kl_effect"], rel_tol=SAME_EFFECT):
        raise AdapterError(
            f"{folder / FILES[1]}: kl_effect is {record['kl_effect']:.4g} nats, but the replies kept in {FILES[0]} are "
            f"{sealed.effect:.4g} apart: the seal was altered after it was made."
        )
    return sealed


def verify(
    folder: Path, *, model_folder: Path | None = None, base_name: str | None = None, device: str | None = None
) -> Verdict:
    """Returns the verdict on the adapter in `folder` freshly loaded, or on the merged model in `model_folder`.

    All checks that can still run do, whatever failed before them.

    Raises:
        AdapterError: one of the folders is not there.
        SourceError: the base of the adapter cannot be found.
    """
    for needed in (folder, model_folder or folder):
        if not needed.is_dir():
            raise AdapterError(f"{needed}: there is no such folder.")
    checks = Checks()
    sealed = checks.attempt("seal", "the files of the seal are there and as they were made", lambda: read(folder))
    if sealed is None:
        return checks.verdict(float("nan"), float("nan"))
    _check_tokenizer(checks, sealed, model_folder or folder)
    if model_folder is not None:
        kl_live = _verify_merged(checks, sealed, folder, model_folder, device)
    else:
        _verify_file(checks, sealed, folder)
        kl_live = _verify_adapter(checks, sealed, folder, base_name, device)
    return checks.verdict(kl_live, sealed.effect)


def drift(sealed: Seal, task: Task, model: torch.nn.Module) -> float:
    """Returns KL(seal, live) in nats per position: how far `model` is from the adapter when it was sealed."""
    return distance(sealed.adapter_ids, sealed.adapter_logp, ask(task, model, sealed.batches))


def load_merged(task: Task, folder: Path, device: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Returns a merged model, on a CPU backed by its files, and what transformers missed or did not expect in them.

    Raises:
        AdapterError: the folder is not a model that loads from safetensors, without code of its own.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        sources.check_files(folder)
        model, info = opened(
            task.model_class,
            folder,
            lambda reason: AdapterError(f"{folder}: {reason}."),
            config=bases.read_config(folder),
            dtype="auto",
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
    except AdapterError:
        raise
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{folder}: {error}") from None
    model.requires_grad_(False)
    if bases.choose_dtype("auto", device)[0] == torch.float32:
        _compute_in_float32(model)
    return model, info


def _compute_in_float32(model: Any) -> None:
    """Makes a model of 16-bit weights compute in float32, a block at a time; its weights stay in their files.

    For devices that would emulate the 16-bit products, which takes up to ten times as long. What was lost by storing
    the weights in 16 bits stays lost.
    """

    def widen(module: torch.nn.Module, args: Any) -> None:
        for parameter in parameters_of[module]:
            stored[parameter].append(parameter.data)
            parameter.data = parameter.data.float()

    def narrow(module: torch.nn.Module, args: Any, output: Any) -> None:
        for parameter in parameters_of[module]:
            parameter.data = stored[parameter].pop()

    stored: dict[torch.nn.Parameter, list[torch.Tensor]] = collections.defaultdict(list)
    parameters_of: dict[torch.nn.Module, list[torch.nn.Parameter]] = {}
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, torch.nn.ModuleList):
            parameters_of |= {block: list(block.parameters()) for block in module}
            inside.update(module.modules())
        elif isinstance(module, torch.nn.Embedding):
            # A few rows of a large table: widened once they are read.
            module.register_forward_hook(lambda module, args, rows: rows.float())
        else:
            parameters_of[module] = list(module.parameters(recurse=False))
    for module in parameters_of:
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(narrow, always_call=True)
    model.computes_in_float32 = True


def _check_tokenizer(checks: Checks, sealed: Seal, folder: Path) -> None:
    """The replay holds token ids: another tokenizer or template would make other ones of the same words."""
    was = sealed.record["tokenizer_sha256"]
    try:
        digest = environment.tokenizer_sha256(bases.load_tokenizer(folder))
    except SourceError as error:
        digest = str(error)
    checks.add("tokenizer", digest == was, digest[:16] if len(digest) == len(was) else digest,
               f"rules, vocabulary and chat template have the sha256 of those sealed: {was[:16]}")  # fmt: skip


def _verify_file(checks: Checks, sealed: Seal, folder: Path) -> None:
    """What the adapter file alone can tell."""
    path = folder / saved.WEIGHTS
    was = sealed.record["adapter_sha256"]
    digest = environment.file_sha256(path) if path.is_file() else "no file"
    checks.add("file", digest == was, digest[:16],
               f"the sha256 of {path.name} is that of the file sealed: {was[:16]}")  # fmt: skip
    rule = "the adapter file has the tensors that were sealed, of the same shapes"
    try:
        found = _shapes(path)
        loaded = tensors.load(path, AdapterError)
    except (OSError, AdapterError) as error:
        checks.add("tensors", False, f"{path.name} cannot be read: {error}", rule)
        return
    wanted = sealed.record["adapter_tensors"]
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
    checks.add("tensors", not problems, _some(problems) or f"all {len(wanted)} of them", rule)
    heads = sealed.record["heads"]
    absent = [head for head in heads if not any(f".{head}." in name for name in found)]
    checks.add("heads", not absent, f"no tensor of {_some(absent)}" if absent else _some(heads) or "the task has none",
               "every head that the task trains is in the adapter file")  # fmt: skip
    broken = [name for name, t in sorted(loaded.items()) if not torch.isfinite(t).all()]
    checks.add("finite", not broken, _some(broken) or "all", "every number of the adapter is finite")
    outputs = [t for name, t in loaded.items() if ".lora_B" in name or ".lora_embedding_B" in name]
    moved = sum(bool(t.any()) for t in outputs)
    checks.add("lora_B", moved > 0 or not outputs, f"{moved} of {len(outputs)} are not zero",
               "some lora_B is not zero: with B zero the adapter adds nothing")  # fmt: skip


def _verify_adapter(checks: Checks, sealed: Seal, folder: Path, base_name: str | None, device: str | None) -> float:
    """Returns KL(seal, live) of the adapter loaded on its base, not a number where it does not load."""

    def same_base() -> None:
        record = recorded.read(folder)["base"]
        if record["weights_sha256"] != sealed.record["base_sha256"]:
            raise AdapterError(f"{environment.FILE} names another base than the seal does.")
        saved.find_base(folder, record, base_name)

    checks.attempt("base", "the base has the weights that the adapter was trained on", same_base)
    loaded = checks.attempt(
        "load",
        "the folder loads on its base, every tensor in its place",
        lambda: saved.load(folder, base_name, device),
    )
    if loaded is None:
        return float("nan")
    tied, was_tied = environment.embeddings_are_tied(loaded.base.model), sealed.record["tied_embeddings"]
    checks.add("tied", tied == was_tied, _tied(tied), f"the embeddings are {_tied(was_tied)}, as when sealed")
    effect = sealed.effect
    with modes.without(loaded.model):
        base_replies = ask(loaded.task, loaded.model, sealed.batches)
    from_base = distance(sealed.base_ids, sealed.base_own_logp, base_replies)
    checks.add("base replay", from_base <= SHARE * effect, _nats(from_base),
               f"KL(sealed base, live base) is at most {SHARE:g} of the effect: {_nats(SHARE * effect)}")  # fmt: skip
    replies = ask(loaded.task, loaded.model, sealed.batches)
    kl_live = distance(sealed.adapter_ids, sealed.adapter_logp, replies)
    _check_replay(checks, kl_live, effect)
    live_effect = distance(*likeliest(replies), base_replies)
    least = max(LEAST_EFFECT, SHARE * effect)
    checks.add("effect", live_effect >= least, _nats(live_effect), f"KL(live, live base) is at least {_nats(least)}")
    return kl_live


def _verify_merged(checks: Checks, sealed: Seal, folder: Path, model_folder: Path, device: str | None) -> float:
    """Returns KL(seal, live) of a merged model, not a number where it does not load."""
    task = checks.attempt("record", "the adapter folder says which task this is", lambda: _task(folder))
    if task is None:
        return float("nan")

    loaded = checks.attempt("load", "the folder loads as a plain model, from safetensors alone",
                            lambda: load_merged(task, model_folder, device))  # fmt: skip
    if loaded is None:
        return float("nan")
    model, info = loaded
    found = type(model).__name__
    written = list(model.config.architectures or ["none"])
    fits = found == sealed.record["architecture"] and written == [found]
    checks.add(
        "architecture", fits, f"{_some(written)}, loaded as {found}", f"the model is a {sealed.record['architecture']}"
    )
    missing = sorted(name for name in info["missing_keys"] if not bases.is_spare(name))
    lost = [*missing, *(f"{name} is unexpected" for name in sorted(info["unexpected_keys"]))]
    lost += [f"{item[0]} has another shape" for item in sorted(info["mismatched_keys"])]
    checks.add("tensors", not lost, _some(lost) or "all", "every weight of the model is in its files, and no other")
    absent = [head for head in sealed.record["heads"] if any(name.startswith(f"{head}.") for name in missing)]
    checks.add("heads", not absent, _some(absent) or "none is missing", "no head was made anew for want of its weights")
    _check_merged_tying(checks, sealed, model, model_folder)
    size, wanted = model.get_input_embeddings().weight.shape[0], sealed.record["vocabulary"]
    checks.add("vocabulary", size == wanted, f"{size} tokens", f"the embeddings hold {wanted} tokens")
    if size != wanted:
        return float("nan")
    replies, classes = ask(task, model, sealed.batches), sealed.record["classes"]
    told, places = replies[0].shape[1], sum(map(len, replies))
    fits = told == classes and places == len(sealed.adapter_ids)
    found = str(told) if told != classes else f"{told}, at {places} places"
    checks.add(
        "classes", fits, found, f"the model tells {classes} classes or tokens apart, at as many places as sealed"
    )
    if not fits:
        return float("nan")
    kl_live = distance(sealed.adapter_ids, sealed.adapter_logp, replies)
    _check_replay(checks, kl_live, sealed.effect)
    return kl_live


def _task(folder: Path) -> Task:
    return recorded.task(folder, recorded.read(folder))[1]


def _check_merged_tying(checks: Checks, sealed: Seal, model: Any, model_folder: Path) -> None:
    was_tied, tied = sealed.record["tied_embeddings"], environment.embeddings_are_tied(model)
    found = _tied(tied)
    if was_tied and not getattr(model.config.get_text_config(), "tie_word_embeddings", True):
        found += ", and tie_word_embeddings is false"
    outputs = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is outputs} if outputs is not None else set()
    stored = {name for file in sources.safetensors_files(model_folder) for name in sources.safetensors_header(file)[1]}
    if was_tied and any(f"{name}.weight" in stored for name in names) and not tied:
        found += ", and the files hold output embeddings of their own"
    checks.add("tied", found == _tied(was_tied), found, f"the embeddings are {_tied(was_tied)}, as when sealed")


def _check_replay(checks: Checks, kl_live: float, effect: float) -> None:
    checks.add("replay", kl_live <= SHARE * effect, _nats(kl_live),
               f"KL(seal, live) is at most {SHARE:g} of KL(adapter, base): {_nats(SHARE * effect)}")  # fmt: skip


def _shapes(file: Path) -> dict[str, list[int]]:
    """Returns the shape of each tensor of a safetensors file."""
    return {k: spec["shape"] for k, spec in sources.safetensors_header(file)[1].items()}


def _some(items: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


def _tied(tied: bool) -> str:
    return "tied" if tied else "not tied"


def _nats(value: float) -> str:
    return f"{value:.3g} nats"
