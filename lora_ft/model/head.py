"""The loss of a causal language model's head, at labelled positions only: the logits of a batch never exist.

Shapes: B rows, T tokens, N labelled positions, K width of a hidden state, V words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

from lora_ft.model.attention import filled_up, unpacked
from lora_kernels import linear_cross_entropy

log = logging.getLogger(__name__)

# Hidden states whose logits exist at a time where the head is more than a matrix.
ROWS = 256
PROBE_TOKENS = 6
# The model's own logits and ours may be rounded at other places; another scale is off by far more.
ROUNDING = 0.02


@dataclass(frozen=True)
class Head:
    """How a model makes logits of hidden states: softcap * tanh(z / softcap), if any, of z = scale * module(h)."""

    module: nn.Module
    scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(cls, model: Any) -> Head | None:
        """Returns the head of a transformers model, None where its logits are not made by the rule above.

        That is seen, once a model, on a few tokens; fake tensors are taken for what the configuration says.
        """
        if model not in _heads:
            _heads[model] = _found(cls, model)
            if _heads[model] is None:
                log.info("the head of %s is run by its own forward, on whole rows", type(model).__name__)
        return _heads[model]

    @property
    def is_matrix(self) -> bool:
        """Whether the head is one dense matrix that nobody watches: LoRA in it, for one, makes it more."""
        hooked = self.module._forward_hooks or self.module._forward_pre_hooks
        return type(self.module) is nn.Linear and not hooked and not hasattr(self.module.weight, "__tensor_flatten__")

    def loss(self, h_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """Returns the summed negative log-likelihood of the labels, 0-d float32."""
        if self.is_matrix:
            matrix: Any = self.module
            options = {"bias": matrix.bias, "scale": self.scale, "softcap": self.softcap}
            return linear_cross_entropy(h_NK.to(matrix.weight.dtype), matrix.weight, labels_N, **options)[0]
        sums = [
            checkpoint(self._chunk_loss, h, labels, use_reentrant=False)
            for h, labels in zip(h_NK.split(ROWS), labels_N.split(ROWS), strict=True)
        ]
        return torch.stack(sums).sum()

    def log_probs(self, h_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """Returns the log-probability of each label, float32 [N]; unlike that of `loss`, each has its own gradient."""
        module: Any = self.module
        if self.is_matrix and not any(p.requires_grad for p in module.parameters()):
            made = (module.weight, module.bias, self.scale, self.softcap)
            return _LogProbs.apply(h_NK.to(module.weight.dtype), labels_N, *made)
        parts = [
            checkpoint(self._chunk_log_probs, h, labels, use_reentrant=False)
            for h, labels in zip(h_NK.split(ROWS), labels_N.split(ROWS), strict=True)
        ]
        return torch.cat(parts)

    def logits(self, h_NK: torch.Tensor) -> torch.Tensor:
        """Returns the logits [N, V] of hidden states."""
        z_NV = self.module(h_NK)
        if self.scale != 1.0:
            z_NV = z_NV * self.scale
        return torch.tanh(z_NV / self.softcap) * self.softcap if self.softcap else z_NV

    def _chunk_loss(self, h_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(h_NK).float(), labels_N, reduction="sum")

    def _chunk_log_probs(self, h_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        return -nn.functional.cross_entropy(self.logits(h_NK).float(), labels_N, reduction="none")


class _LogProbs(torch.autograd.Function):
    """Log-probabilities by the kernel that sums them.

    That computes the gradient of its sum with the loss, and in it a hidden state has a part of its own: multiplied by
    what is asked of its token, that is the gradient of any other sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_NK: torch.Tensor,
        labels_N: torch.Tensor,
        weight_VK: torch.Tensor,
        bias_V: torch.Tensor | None,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(wanted):
            h = h_NK.detach().requires_grad_(wanted)
            loss, nll_N = linear_cross_entropy(h, weight_VK, labels_N, bias=bias_V, scale=scale, softcap=softcap)
            if wanted:
                ctx.save_for_backward(*torch.autograd.grad(loss, h))
        return -nll_N.detach()

    @staticmethod
    def backward(ctx: Any, *asked: torch.Tensor) -> Any:
        (dh_NK,) = ctx.saved_tensors
        return -asked[0][:, None].to(dh_NK.dtype) * dh_NK, None, None, None, None, None


# Not a field of the model: that would be saved and copied with it.
_heads: WeakKeyDictionary[Any, Head | None] = WeakKeyDictionary()


def states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the last hidden states [B, T, K] of a transformers model, those that its head is run on.

    Of rows that lie end to end there may be some more after all others (`attention.filled_up`).
    """
    inputs = filled_up(model, inputs)
    return model.base_model(**inputs, use_cache=False)[0]


def _found(make: Callable[..., Head], model: Any) -> Head | None:
    """Returns the head that makes the model's own logits of its hidden states, to within rounding."""
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    if module is None or model.base_model is model:
        return None
    # Cohere multiplies logits, Granite divides them, Gemma 2 caps them.
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    head = make(module, scale, getattr(config, "final_logit_softcapping", None) or 0.0)
    if isinstance(module.weight, FakeTensor):
        return head  # there are no numbers to see it on
    was_training, device = model.training, next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, PROBE_TOKENS), generator=draw).to(device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    model.eval()
    try:
        with torch.no_grad(), unpacked(model):
            own = model(**inputs, use_cache=False).logits.float()
            error = (head.logits(states(model, inputs)).float() - own).norm() / own.norm()
    finally:
        model.train(was_training)
    return head if error <= ROUNDING else None
