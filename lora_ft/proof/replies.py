"""Canary rows, and what a model says at their scored positions: kept short, and compared as probabilities.

Shapes: B rows, T tokens, N scored positions, K kept classes (20 or all), V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lora_ft.data.render import IGNORE
from lora_ft.errors import ProofError
from lora_ft.model import blocks
from lora_ft.model.modes import evaluating
from lora_ft.scoring import losses
from lora_ft.tasks import Batch, Features, Task

KEPT_CLASSES = 20
ROWS = 16
POSITIONS_PER_ROW = 16
ROW_TOKENS = 256
# Logits of four rows of 256 tokens over 128k words stay under half a GiB.
BATCH_ROWS = 4
# Probability outside the kept classes that is rounding and nothing else.
NO_REST = 1e-7


def canaries(task: Task, rows: Sequence[Features]) -> list[Batch]:
    """Returns up to 16 rows spread over `rows`, cut and batched by length."""
    paired = task.peft_task == "SEQ_2_SEQ_LM"
    spread = [task.canary(row) for row in rows[:: -(-len(rows) // ROWS) or 1]]
    # Of such a row no label is that of a token, however many it has.
    per_row = task.peft_task in ("SEQ_CLS", "FEATURE_EXTRACTION")
    cut = [row for row in (_cut(row, paired, per_row) for row in spread) if row is not None]
    if not cut:
        raise ProofError("No row has a position to score, so the adapter cannot be sealed; give more or longer rows.")
    cut.sort(key=lambda row: len(row["input_ids"]))
    return [task.collate(cut[start : start + BATCH_ROWS]) for start in range(0, len(cut), BATCH_ROWS)]


def _cut(row: Features, paired: bool, per_row: bool) -> Features | None:
    """Returns the row with at most 256 tokens and 16 scored positions, None where none is scored.

    Args:
        paired: the labels are a text of their own, and not the tokens of the row.
        per_row: the labels are of the row as a whole.
    """
    if per_row:
        inputs = {key: value for key, value in row.items() if key != "labels"}
        return {**_window(inputs, len(row["input_ids"]), slice(ROW_TOKENS)), "labels": row["labels"]}
    scored = [i for i, label in enumerate(row["labels"]) if label != IGNORE][:POSITIONS_PER_ROW]
    if not scored:
        return None
    end = scored[-1] + 1
    if paired:
        inputs = {key: value for key, value in row.items() if key != "labels"}
        return {**_window(inputs, len(row["input_ids"]), slice(ROW_TOKENS)), "labels": row["labels"][:end]}
    # A long prompt loses its beginning rather than the row its answer.
    return _window(row, len(row["input_ids"]), slice(max(0, end - ROW_TOKENS), end))


def _window(row: Features, length: int, window: slice) -> Features:
    """Returns the row with each of its lists of `length` cut to `window`."""
    return {k: v[window] if isinstance(v, list | tuple) and len(v) == length else v for k, v in row.items()}


def ask(task: Task, model: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Returns the logits [N, V] at the scored positions of each batch, on the processor.

    Layers are computed a part at a time, as those of a merged model are.
    """
    device = next(model.parameters()).device
    with evaluating(model), blocks.in_parts(model):
        return [task.said(model, losses.to(batch, device)).cpu() for batch in batches]


def distance(ids_NK: torch.Tensor, logp_NK: torch.Tensor, replies: Sequence[torch.Tensor]) -> float:
    """Returns the mean KL over the positions of all batches; float64 never exists for more than one of them."""
    sizes = [len(logits_NV) for logits_NV in replies]
    parts = zip(ids_NK.split(sizes), logp_NK.split(sizes), replies, sizes, strict=True)
    return sum(size * kl(ids, logp, logits_NV) for ids, logp, logits_NV, size in parts) / len(ids_NK)


def likeliest(replies: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the likeliest classes, int64 [N, K], and their log-probabilities, float32 [N, K]."""
    best = [_log_softmax(logits_NV).topk(min(KEPT_CLASSES, logits_NV.shape[1]), dim=1) for logits_NV in replies]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best]).float()


def of_classes(ids_NK: torch.Tensor, replies: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the log-probabilities of chosen classes, float32 [N, K]."""
    parts = zip(ids_NK.split([len(logits_NV) for logits_NV in replies]), replies, strict=True)
    return torch.cat([_log_softmax(logits_NV).gather(1, ids) for ids, logits_NV in parts]).float()


def kl(ids_NK: torch.Tensor, logp_NK: torch.Tensor, logits_NV: torch.Tensor) -> float:
    """Returns KL(kept, live) in nats, mean over positions, over the kept classes and one bucket for the rest.

    Args:
        ids_NK: classes kept at each position, int64.
        logp_NK: their log-probabilities, float32.
        logits_NV: what is compared with them, any float dtype; computed in float64.
    """
    return kl_kept(logp_NK, _log_softmax(logits_NV).gather(1, ids_NK), logits_NV.shape[1])


def kl_kept(logp_NK: torch.Tensor, other_NK: torch.Tensor, classes: int) -> float:
    """Returns KL(kept, other) in nats, mean over positions, of log-probabilities of the same K of `classes` classes.

    The rest of the classes is one bucket; computed in float64. A single class has no probability: it is the mean of a
    normal distribution of unit variance, of which the same formula gives half the squared difference.
    """
    kept_NK, live_NK = logp_NK.double(), other_NK.double()
    if classes == 1:
        return float((kept_NK - live_NK).square().mean() / 2)
    kl_N = (kept_NK.exp() * (kept_NK - live_NK)).sum(dim=1)
    if kept_NK.shape[1] < classes:
        kept_rest_N, live_rest_N = (1 - p_NK.exp().sum(dim=1) for p_NK in (kept_NK, live_NK))
        ratio_N = kept_rest_N.clamp_min(NO_REST).log() - live_rest_N.clamp_min(NO_REST).log()
        kl_N = kl_N + torch.where(kept_rest_N > NO_REST, kept_rest_N * ratio_N, 0.0)
    # Log-probabilities kept in float32 can put it a hair below zero; what is not a number stays so.
    return float(kl_N.mean().clamp_min(0))


def _log_softmax(logits_NV: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_NV.double(), dim=1) if logits_NV.shape[1] > 1 else logits_NV.double()
