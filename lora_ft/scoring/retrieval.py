"""What vectors of texts are good for, measured: to find a text that belongs to one, or to say how alike two are.

Shapes: R texts, D width of a vector, A anchors, C candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from lora_ft.data.mask import IGNORE
from lora_ft.scoring import class_metrics, losses
from lora_ft.scoring.losses import Losses
from lora_ft.tasks import Batch, Features, Task

log = logging.getLogger(__name__)

NEAREST = (1, 5, 10)


def measured(
    task: Task, model: nn.Module, rows: Sequence[Features], index: Sequence[Features], batch_size: int
) -> tuple[Losses, dict[str, float]]:
    """Returns the loss of each row among all of them, and what there is to say of all, by plain name.

    That is, of rows with a score, how the cosines agree with the scores; of others `recall@k`, the share of anchors
    that have a text which belongs to them among the k nearest. They look among the texts of `index`, and where rows are
    pairs among the positives of all of them; without an index, rows with labels look among the others.
    """
    found = losses.vectors(task, model, rows, batch_size)
    of_each = losses.contrasted(task, found, len(rows))
    if "score" in found:
        anchors_A = (found["labels"] != IGNORE).nonzero()[:, 0]
        # Of such rows the second text follows the first.
        cosines_A = (found["vector"][anchors_A] * found["vector"][anchors_A + 1]).sum(dim=1)
        return of_each, class_metrics.measure(
            "regression", cosines_A[:, None].numpy(), found["score"][anchors_A].tolist(), ()
        )
    if not index or "score" in index[0]:
        return of_each, recall(found, None)
    candidates = [text for row in index for text in task.candidates(row)]
    return of_each, recall(found, losses.vectors(task, model, candidates, batch_size))


def recall(found: Batch, known: Batch | None) -> dict[str, float]:
    """Returns `recall@k` of the anchors in `found`, of those that have something to be found.

    Args:
        found, known: of `losses.vectors`; the second is what to look among, if there is such.
    """
    anchors_A = (found["labels"] != IGNORE).nonzero()[:, 0]
    own = found["candidate"].bool()
    # Rows that are one text each are looked up among the others, unless there is an index for that.
    if known is not None and bool(own[anchors_A].any()):
        own = torch.zeros_like(own)
    index = {key: found[key][own] for key in ("vector", "group", "text")}
    place_C = own.nonzero()[:, 0]
    if known is not None:
        theirs = known["candidate"].bool()
        index = {key: torch.cat([index[key], known[key][theirs]]) for key in index}
        place_C = torch.cat([place_C, torch.full((int(theirs.sum()),), -1)])
    texts, number_C = index["text"].unique(return_inverse=True)
    hits: list[torch.Tensor] = []
    for at_A in losses.blocks(found["labels"], len(place_C)):
        itself_AC = at_A[:, None] == place_C
        right_AC = (found["group"][at_A][:, None] == index["group"]) & ~itself_AC
        right_AC |= _same_text(right_AC, number_C, len(texts)) & ~itself_AC
        cosines_AC = (found["vector"][at_A] @ index["vector"].T).masked_fill(itself_AC, -torch.inf)
        nearest = cosines_AC.topk(min(max(NEAREST), cosines_AC.shape[1]), dim=1).indices
        hits.append(right_AC.gather(1, nearest)[right_AC.any(dim=1)])
    found_AK = torch.cat(hits)
    if alone := len(anchors_A) - len(found_AK):
        log.warning("%d of %d held-out rows have no text to be found: recall is of the others", alone, len(anchors_A))
    if not len(found_AK):
        return {}
    return {f"recall@{k}": float(found_AK[:, :k].any(dim=1).double().mean()) for k in NEAREST}


def _same_text(right_AC: torch.Tensor, number_C: torch.Tensor, texts: int) -> torch.Tensor:
    """Returns which candidates have the very text of one that is right."""
    right_AU = torch.zeros(len(right_AC), texts).index_add(1, number_C, right_AC.float())
    return right_AU[:, number_C] > 0
