"""The state of an optimizer as tensors and JSON, by the names of its parameters, and back into the optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from lora_ft.errors import AdapterError, StorageError

TENSORS, GROUPS = "optimizer.safetensors", "optimizer.json"
# What a configuration says of a group of parameters, and a resumed run may have been allowed to change.
CONFIGURED = ("initial_lr", "weight_decay", "betas", "eps")


def state(trainer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors of the optimizer as `PARAMETER.KEY`, and as JSON its groups and what is no tensor."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [
        {
            "parameters": [names[id(parameter)] for parameter in group["params"]],
            "options": {key: value for key, value in group.items() if key != "params"},
        }
        for group in trainer.optimizer.param_groups
    ]
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in trainer.optimizer.state.items():
        name = names[id(parameter)]
        tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
        numbers[name] = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    return on_cpu(tensors), {"groups": groups, "state": numbers}


def load(trainer: Any, place: Path) -> None:
    """Gives the optimizer its state back. Raises AdapterError where its groups hold other parameters."""
    stored, tensors = json_of(place / GROUPS), tensors_of(place / TENSORS)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    now = [[names[id(parameter)] for parameter in group["params"]] for group in trainer.optimizer.param_groups]
    if now != [group["parameters"] for group in stored["groups"]]:
        raise AdapterError(f"{place}: its optimizer trained other parameters, or in other groups, than this run does.")
    index = {name: i for i, name in enumerate(name for group in now for name in group)}
    state: dict[int, dict[str, Any]] = {index[name]: dict(numbers) for name, numbers in stored["state"].items()}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        state[index[name]][key] = tensor
    groups = []
    for made, group in zip(trainer.optimizer.param_groups, stored["groups"], strict=True):
        options = dict(group["options"])
        changed = made.get("initial_lr") != options.get("initial_lr")
        if changed and options.get("initial_lr"):
            options["lr"] *= made["initial_lr"] / options["initial_lr"]
        options |= {key: made[key] for key in CONFIGURED if key in made}
        groups.append({**options, "params": [index[name] for name in group["parameters"]]})
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if hasattr(trainer.lr_scheduler, "_last_lr"):
        trainer.lr_scheduler._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]


def on_cpu(tensors: Any) -> dict[str, torch.Tensor]:
    """Returns tensors as safetensors takes them: on the CPU, contiguous, none sharing its memory with another."""
    copied: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        copied[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
    return copied


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file. Raises StorageError where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(f"{file}: cannot be read: {error}.") from None


def json_of(file: Path) -> Any:
    """Returns what a JSON file holds. Raises StorageError where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{file}: cannot be read: {error}.") from None
