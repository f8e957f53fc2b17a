"""What an adapter forgot: how far it moved its base on general text, which no task here trains on.

The text (`data/general.txt`) was written for this: prose and talk of many kinds, code, tables, arithmetic, some other
languages. Two figures, in nats per token: by how much the loss on it grew, and KL(base || adapter), which also sees
what moved without any loss.

Shapes: B rows, N scored positions, V words.
"""

from __future__ import annotations

import logging
from importlib import resources
from typing import Any

import numpy as np
import torch

from lora_ft import base as bases
from lora_ft import tasks
from lora_ft.data.tokens import adds_bos
from lora_ft.model.modes import unwrapped, without
from lora_ft.scoring import losses
from lora_ft.scoring.losses import Losses
from lora_ft.tasks import Batch, Features

log = logging.getLogger(__name__)

# Of two models the logits of so many passages exist at once: some 150 positions.
ROWS = 2
LOSS, KL = "drift.loss", "drift.kl"


def measure(model: Any, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what there is to say of the base and of the adapter on it, by plain name.

    `drift.loss` and `drift.kl`, in nats per token; the base is 0 from itself. Of the adapter `NAME_change_interval`,
    the 95% interval of its change from the base, by a paired bootstrap over passages. Nothing where the tokenizer makes
    no two tokens of any passage, which is said.
    """
    task = tasks.get("complete")
    task.prepare(tokenizer, bases.positions(unwrapped(model).config, "the base") or 2**31)
    rows = passages(tokenizer, task.max_length)
    if not rows:
        log.warning("drift was not measured: the tokenizer makes no two tokens of any general text")
        return {}, {}
    sums: np.ndarray = np.zeros((4, len(rows)))

    def take(chosen: list[int], batch: Batch) -> None:
        with without(model):
            before = task.score(model, batch)
        after = task.score(model, batch)
        for row, place in enumerate(chosen):
            here = after.row_N == row
            sums[:, place] = _of_row(before.logits_NV[here], after.logits_NV[here], after.targets_N[here])

    losses.each_batch(task, model, rows, ROWS, take)
    base_nll, nll, kl, count = sums
    nothing = np.zeros(len(rows))
    base_loss, loss = Losses(base_nll, count, nothing), Losses(nll, count, nothing)
    unmoved, moved = Losses(nothing, count, nothing), Losses(kl, count, nothing)
    intervals = {
        f"{name}_change_interval": list(found) if found else None
        for name, found in (
            (LOSS, losses.difference_interval(base_loss, loss)),
            (KL, losses.difference_interval(unmoved, moved)),
        )
    }
    return {LOSS: base_loss.mean, KL: 0.0}, {LOSS: loss.mean, KL: moved.mean, **intervals}


def passages(tokenizer: Any, max_length: int) -> list[Features]:
    """Returns the passages of the text as rows of which every token but the first is predicted; long ones are cut."""
    text = (resources.files("lora_ft.data") / "general.txt").read_text(encoding="utf-8")
    begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    made = [
        [*begin, *tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]][:max_length]
        for passage in text.strip().split("\n\n")
    ]
    return [{"input_ids": ids, "labels": ids} for ids in made if len(ids) > 1]


def _of_row(base_NV: torch.Tensor, adapter_NV: torch.Tensor, targets_N: torch.Tensor) -> list[float]:
    """Returns the base's and the adapter's negative log-likelihood, KL(base || adapter) and positions, each summed.

    KL is the sum of p * (q/p - 1 - log q/p), no term of which is negative: p * log p/q has both signs, and of two
    like distributions over 100,000 words their sum in float32 would be wrong by more than it is.
    """
    logp_NV, logq_NV = (torch.log_softmax(logits_NV.float(), dim=1) for logits_NV in (base_NV, adapter_NV))
    nll = [-logs_NV.gather(1, targets_N[:, None]).double().sum() for logs_NV in (logp_NV, logq_NV)]
    # Of a word that the adapter says 10^34 times as often as the base float32 could not hold the ratio.
    ratio_NV = logq_NV.sub_(logp_NV).clamp_(max=80)
    kl_N = torch.expm1(ratio_NV).sub_(ratio_NV).mul_(logp_NV.exp_()).sum(dim=1)
    return [*torch.stack([*nll, kl_N.double().sum()]).tolist(), float(len(targets_N))]
