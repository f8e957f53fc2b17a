"""The optimizer of a run, and its state as tensors and JSON, by the names of its parameters, and back into it."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import safetensors
import torch
from bitsandbytes.optim import GlobalOptimManager
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors.torch import load_file
from torch import nn

from lora_ft.config import TrainConfig
from lora_ft.errors import AdapterError, StorageError

log = logging.getLogger(__name__)

TENSORS, GROUPS = "optimizer.safetensors", "optimizer.json"
# What a configuration says of a group of parameters, and a resumed run may have been allowed to change.
CONFIGURED = ("initial_lr", "weight_decay", "betas", "eps")
# Moments of 8 bits, and the tables of what the 8 bits stand for, which all tensors share and bitsandbytes makes.
MOMENTS, TABLES = ("state1", "state2"), ("qmap1", "qmap2")
# Elements from which a tensor's moments are of 8 bits: what bitsandbytes takes. The adapters of SmolLM2-135M at rank 16
# are above it but for B of keys and values (192 x 16), and those of a model of 7B all are.
LEAST = 4096
# Elements from which bitsandbytes pages a tensor's moments; smaller ones stay on the GPU.
LEAST_PAGED = 100_000


class BlockwiseAdamW(bnb.optim.AdamW8bit):
    """AdamW with moments of 8 bits, by blocks of 256 with a scale each (Dettmers et al. 2022, arXiv 2110.02861).

    Args:
        paged: large moments lie in memory that a GPU gives up when it has no more, and fetches for its step.
    """

    def __init__(self, params: Any, *, paged: bool = False, **options: Any) -> None:
        super().__init__(params, is_paged=paged, min_8bit_size=LEAST, **options)
        # The library's own manager is one for the whole process, and knows parameters by place and id, which those of
        # another run have too.
        self.mng = object.__new__(GlobalOptimManager)
        self.mng.initialize()

    def keep_whole(self, parameters: Iterable[nn.Parameter]) -> None:
        """Has the moments of these in 32 bits, whatever their size."""
        self.mng.override_config(list(parameters), "optim_bits", 32)

    def in_8_bits(self) -> int:
        """Returns of how many tensors the moments are, or will be, of 8 bits."""
        return sum(
            parameter.numel() >= LEAST and self.get_config(g, i, group)["optim_bits"] == 8
            for g, group in enumerate(self.param_groups)
            for i, parameter in enumerate(group["params"])
        )

    def paged(self) -> list[torch.Tensor]:
        """Returns the moments that a GPU need not hold all at once."""
        large = [state for p, state in self.state.items() if self.is_paged and p.numel() >= LEAST_PAGED]
        return [state[key] for state in large for key in MOMENTS]

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # A plan for a GPU has its tensors on the processor, where the library would warn that it pages nothing.
        return torch.zeros_like(p, dtype=dtype) if p.device.type == "cpu" else super().get_state_buffer(p, dtype)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As the library's, with the tables that a checkpoint leaves out, and what was paged paged again."""
        super().load_state_dict(state_dict, move_to_device and not self.is_paged)
        for parameter, state in self.state.items():
            for key, value in state.items():
                if self.is_paged and isinstance(value, torch.Tensor):
                    # The library leaves the moments wherever they were read to.
                    place = self.get_state_buffer(parameter, value.dtype) if key in MOMENTS else None
                    state[key] = value.to(parameter.device) if place is None else place.copy_(value)
            if state["state1"].dtype == torch.uint8:
                for key, name in zip(TABLES, ("dynamic", "udynamic"), strict=True):
                    state[key] = self.name2qmap[name] = self.name2qmap[name].to(parameter.device)


def choose(name: str, device: str) -> tuple[str, list[str]]:
    """Returns the optimizer that a type of device can have for the one asked for, and why it is another, if it is."""
    told: list[str] = []
    if name == "adamw-paged-8bit" and device != "cuda":
        told.append(f"train.optimizer {name} pages the memory of a GPU, and this is none: adamw-8bit takes its place")
        name = "adamw-8bit"
    if name == "adamw-8bit" and device != "cuda" and (lack := _lack(device)) is not None:
        version = importlib.metadata.version("bitsandbytes")
        told.append(f"train.optimizer {name}: bitsandbytes {version} cannot step here ({lack}): adamw takes its place")
        name = "adamw"
    return name, told


def _lack(device: str) -> str | None:
    """Returns why a device cannot make a step with moments of 8 bits, None where it can."""
    tried = nn.Parameter(torch.zeros(LEAST, device=device))
    tried.grad = torch.ones_like(tried)
    try:
        BlockwiseAdamW([tried], lr=1e-3).step()
    except RuntimeError as error:  # as is what torch raises where a device has no such operation
        return str(error).partition("\n")[0].rstrip(".")
    return None


def made_of(train: TrainConfig, device: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Returns the class of a run's optimizer on a type of device, and its options."""
    name, _ = choose(train.optimizer, device)
    options: dict[str, Any] = {"lr": train.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if name == "adamw":
        return torch.optim.AdamW, options | {"fused": True}
    return BlockwiseAdamW, options | {"paged": name == "adamw-paged-8bit"}


def keep_embeddings_whole(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Has the moments of embeddings in 32 bits, without which training may break (arXiv 2110.02861, section 2.3)."""
    if isinstance(optimizer, BlockwiseAdamW):
        rooms = [m for m in model.modules() if isinstance(m, nn.Embedding | TrainableTokensLayer)]
        optimizer.keep_whole({p: None for room in rooms for p in room.parameters() if p.requires_grad})


class ChosenOptimizer:
    """Mixin for a Trainer: its optimizer as told to it; B learns `plus_ratio` times as fast as A where that is set."""

    plus_ratio: float | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        trainer: Any = self
        if trainer.optimizer is not None:
            return super().create_optimizer()  # type: ignore[misc]
        if self.plus_ratio is None:
            super().create_optimizer()  # type: ignore[misc]
        else:
            kind, options = trainer.optimizer_cls_and_kwargs
            decay = trainer.args.weight_decay
            trainer.optimizer = create_loraplus_optimizer(
                trainer.model,
                kind,
                loraplus_lr_ratio=self.plus_ratio,
                weight_decay=decay,
                loraplus_weight_decay=decay,
                **options,
            )
        made: Any = trainer.optimizer
        keep_embeddings_whole(made, trainer.model)
        if isinstance(made, BlockwiseAdamW):
            narrow, all_of_them = made.in_8_bits(), sum(len(group["params"]) for group in made.param_groups)
            told = "moments are of 8 bits in %d of %d tensors; those of fewer than %d elements and embeddings keep 32"
            log.info(told, narrow, all_of_them, LEAST)
        return made


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
        kept = {key: value for key, value in state.items() if key not in TABLES}
        tensors |= {f"{name}.{key}": value for key, value in kept.items() if isinstance(value, torch.Tensor)}
        numbers[name] = {key: value for key, value in kept.items() if not isinstance(value, torch.Tensor)}
    return on_cpu(tensors), {"kind": _kind(trainer), "groups": groups, "state": numbers}


def load(trainer: Any, place: Path) -> None:
    """Gives the optimizer its state back. Raises AdapterError where it is another, or its groups hold others."""
    stored, tensors = json_of(place / GROUPS), tensors_of(place / TENSORS)
    # An earlier version did not say.
    if (kind := stored.get("kind", _kind(trainer))) != _kind(trainer):
        raise AdapterError(
            f"{place}: its optimizer was {kind}, and this run's is {_kind(trainer)}, which cannot go on from the state "
            "of another: resume with the --train.optimizer that it was started with, or start anew."
        )
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


def _kind(trainer: Any) -> str:
    """Returns what optimizer a Trainer has: one class for moments of 8 bits, paged or not."""
    return type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__


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
