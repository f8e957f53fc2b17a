"""What an adapter does to the weights of its base, one change a parameter, by PEFT's own account of the adapter.

Shapes: M outputs, K inputs, R rank, V tokens of the vocabulary, H hidden size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft import saved
from lora_ft.errors import AdapterError, ProofError, UnsupportedModelError
from lora_ft.foreign import tensors

PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class LowRank:
    """W + s B A, and with a magnitude m (DoRA, arXiv 2402.09353, eq. 5) that times m / its norm over the inputs."""

    a_RK: torch.Tensor
    b_MR: torch.Tensor
    scaling: float
    transposed: bool
    """Whether the stored weight is [K, M], as in GPT-2."""
    magnitude_M: torch.Tensor | None = None

    def rows(self, weight_mK: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns some rows of the merged weight, float32 [m, K], from the same rows of the base's."""
        merged_mK = weight_mK + self.scaling * (self.b_MR[rows].float() @ self.a_RK.float())
        if self.magnitude_M is not None:
            norm_m = torch.linalg.norm(merged_mK, dim=1)
            merged_mK *= (self.magnitude_M[rows].float() / norm_m)[:, None]
        return merged_mK


@dataclass(frozen=True, eq=False)
class LowRankRows:
    """The low-rank change of an embedding: E + s (B A)^T."""

    a_RV: torch.Tensor
    b_HR: torch.Tensor
    scaling: float
    transposed: bool = False

    def rows(self, weight_vH: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns some rows of the merged embeddings, float32 [v, H]."""
        return weight_vH + self.scaling * (self.b_HR.float() @ self.a_RV[:, rows].float()).T


@dataclass(frozen=True, eq=False)
class Tokens:
    """Rows of an embedding that were trained, in place of the base's."""

    indices: tuple[int, ...]
    trained_NH: torch.Tensor
    transposed: bool = False

    def rows(self, weight_vH: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns some rows of the embeddings, float32 [v, H]."""
        replaced_vH = weight_vH.clone()
        for i, index in enumerate(self.indices):
            if rows.start <= index < rows.stop:
                replaced_vH[index - rows.start] = self.trained_NH[i].float()
        return replaced_vH


@dataclass(frozen=True, eq=False)
class Bias:
    """b + s b_B, where B has a bias."""

    bias_M: torch.Tensor
    scaling: float
    transposed: bool = False

    def rows(self, weight_m: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns some entries of the merged bias, float32 [m]."""
        return weight_m + self.scaling * self.bias_M[rows].float()


@dataclass(frozen=True, eq=False)
class Whole:
    """A parameter that was trained whole, in place of the base's if that has it."""

    value: torch.Tensor


Change = LowRank | LowRankRows | Tokens | Bias | Whole


def read(folder: Path, skeleton: PreTrainedModel) -> dict[str, Change]:
    """Returns the change of each parameter that the adapter in `folder` touches, by the model's names.

    Args:
        skeleton: the model on the meta device, with the adapter's vocabulary; the adapter is put into it.

    Raises:
        ProofError: a tensor of the adapter has no place in the model, or one that it should have is missing.
        UnsupportedModelError: the adapter is of a kind that cannot be merged file by file.
    """
    settings = saved.lora_settings(folder)
    # On the meta device too, for what is put in may be of any rank.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        inner = saved.inject(skeleton, settings, folder).get_base_model()
    taken = _Taken(tensors.load(folder / saved.WEIGHTS, AdapterError))
    found: dict[str, Change] = {}
    tied: list[tuple[str, Any]] = []
    token_changes: dict[int, Change] = {}
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer):
            found.update(_low_rank(name, module, taken))
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save["default"]
            found.update({f"{name}.{key}": Whole(taken(f"{name}.{key}")) for key, _ in trained.named_parameters()})
        elif isinstance(module, TrainableTokensWrapper):
            adapter = module.token_adapter
            if adapter.tied_adapter is not None:
                tied.append((name, adapter.tied_adapter))
                continue
            indices = tuple(adapter.token_indices["default"])
            change = Tokens(indices, taken(f"{name}.token_adapter.trainable_tokens_delta"))
            found[f"{name}.weight"] = token_changes[id(adapter)] = change
    found.update({f"{name}.weight": token_changes[id(adapter)] for name, adapter in tied})
    taken.done(folder)
    return found


class _Taken:
    """The adapter's tensors, each to be taken once."""

    def __init__(self, held: dict[str, torch.Tensor]) -> None:
        self.left = dict(held)
        self.missing: list[str] = []

    def __call__(self, name: str) -> torch.Tensor:
        if PREFIX + name not in self.left:
            self.missing.append(name)
            return torch.empty(0)
        return self.left.pop(PREFIX + name)

    def done(self, folder: Path) -> None:
        problems = [f"{name} is missing" for name in self.missing]
        problems += [f"{name} has no place in the model" for name in sorted(self.left)]
        if problems:
            shown = "\n".join(f"  {problem}" for problem in problems[:8])
            raise ProofError(f"{folder / saved.WEIGHTS}: merging would drop parts of the adapter:\n{shown}")


def _low_rank(name: str, module: LoraLayer, taken: _Taken) -> dict[str, Change]:
    base, scaling = module.get_base_layer(), module.scaling["default"]
    dora = "default" in (module.lora_magnitude_vector or {})
    if isinstance(base, nn.Embedding) and not dora:
        return {
            f"{name}.weight": LowRankRows(taken(f"{name}.lora_embedding_A"), taken(f"{name}.lora_embedding_B"), scaling)
        }
    if not (isinstance(base, Conv1D) or type(base) is nn.Linear):
        kind = f"{type(base).__name__}{' with DoRA' if dora else ''}"
        raise UnsupportedModelError(f"{name}: an adapter on a {kind} cannot be merged file by file; use it as it is.")
    magnitude = taken(f"{name}.lora_magnitude_vector") if dora else None
    a, b = taken(f"{name}.lora_A.weight"), taken(f"{name}.lora_B.weight")
    changes: dict[str, Change] = {f"{name}.weight": LowRank(a, b, scaling, isinstance(base, Conv1D), magnitude)}
    if module.lora_bias["default"]:
        changes[f"{name}.bias"] = Bias(taken(f"{name}.lora_B.bias"), scaling)
    return changes
