"""Prefer: learn which of two replies is better, or which replies are good, against the base as the reference."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensor

from lora_ft.config import PreferConfig
from lora_ft.data import meetings
from lora_ft.data.examples import Chat as Conversation
from lora_ft.data.examples import Example
from lora_ft.data.preferences import Judged, Preference
from lora_ft.data.render import IGNORE
from lora_ft.errors import DataError
from lora_ft.model.head import Head, states
from lora_ft.model.modes import as_reference, evaluating, unwrapped
from lora_ft.scoring.preference import STATISTICS, Judge, Replies
from lora_ft.tasks import MADE_UP, Batch, Features, pad
from lora_ft.tasks.causal import Causal
from lora_ft.tasks.chat import Chat, first_system

log = logging.getLogger(__name__)

SIDES = (("input_ids", "targets"), ("second_ids", "second_targets"))


class Prefer(Chat):
    """Pairs of replies to a prompt, or replies that are good or bad, through the model's chat template.

    A row holds two texts: that of the chosen reply and of the rejected one or, where a reply is judged, that reply and
    one to another prompt, after its own. `targets` are their labels; `labels` say once a row that it counts, and
    whether a reply that is judged is good.
    """

    name = "prefer"
    accuracy_name = "reward_accuracy"
    shares_rows = False
    statistics = STATISTICS

    def __init__(self, system: str | None = None) -> None:
        super().__init__(system)
        self.configure(PreferConfig())

    def configure(self, options: PreferConfig) -> None:
        self.judge = Judge(options.loss, options.beta)
        self._others: dict[str, Judged] = {}

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        self.judge.require()
        openings = {first_system(getattr(example, "prompt", ())) for example in (*examples, *held_out)}
        self.system = openings.pop() if len(openings) == 1 else None
        if self.judge.judges_one:
            for rows, name in ((examples, "training"), (held_out, "held-out")):
                verdicts = {row.good for row in rows if isinstance(row, Judged)}
                if len(verdicts) == 1:
                    log.warning(
                        "all %s replies are %s: nothing is learned about what tells good from bad",
                        name, "good" if verdicts.pop() else "bad",
                    )  # fmt: skip

    def made_up(self) -> list[Example]:
        talks = list(meetings.rows(MADE_UP, "train"))
        made: list[Example] = []
        for place, talk in enumerate(talks):
            *asked, reply = talk.messages
            worse = next(t.messages[-1] for t in (*talks[place + 1 :], *talks) if t.messages[-1] != reply)
            if self.judge.judges_one:
                good = place % 2 == 0
                made.append(Judged(talk.where, tuple(asked), (reply if good else worse,), good))
            else:
                made.append(Preference(talk.where, tuple(asked), (reply,), (worse,)))
        return made

    def see(self, examples: Sequence[Example]) -> None:
        """Finds for each reply that is judged another prompt's: the next in the file, behind the last the first."""
        self._others = {}
        rows = [example for example in examples if isinstance(example, Judged)]
        if not self.judge.judges_one or len(rows) < len(examples):
            return
        other: Judged | None = None
        # From the end, twice, for what comes after the last row begins with the first.
        for place in range(2 * len(rows) - 1, -1, -1):
            row, following = rows[place % len(rows)], rows[(place + 1) % len(rows)]
            other = following if following.prompt != row.prompt else other
            if other is not None:
                self._others[row.where] = other
        if rows and other is None:
            raise DataError(
                [f"{rows[0].where}: no row has another prompt; prefer.loss kto compares each with a reply to another: "
                 "give rows of two prompts or more."]
            )  # fmt: skip

    def features(self, example: Example) -> Features:
        texts = [self.renderer.render(talk) for talk in self._talks(example)]
        self.rules = self.renderer.rules
        self.count_cut(sum(text.cut for text in texts))
        made: Features = {"labels": [IGNORE, int(getattr(example, "good", True))]}
        for (ids, targets), text in zip(SIDES, texts, strict=True):
            made |= {ids: text.input_ids, targets: text.labels}
        if not self.judge.judges_one and made["input_ids"] == made["second_ids"]:
            told = (
                f"in the {len(made['input_ids'])} tokens that --data.max-length leaves: raise it, or leave the row out."
                if any(text.cut for text in texts)
                else "once the chat template has written them: leave the row out."
            )
            raise DataError([f"{example.where}: both replies are the same {told}"])
        return made

    def _talks(self, example: Example) -> Iterator[Conversation]:
        """Yields the two conversations of a row. Raises DataError where it is of another kind."""
        if not self.judge.judges_one:
            if not isinstance(example, Preference):
                wanted = "a judged row has one reply" if isinstance(example, Judged) else "the row has no two replies"
                more = "train on it with --prefer.loss kto" if isinstance(example, Judged) else (
                    "prefer takes rows with input, preferred_output and non_preferred_output, or a prompt or "
                    "conversations with chosen and rejected"
                )  # fmt: skip
                raise DataError([f"{example.where}: {wanted}; {more}."])
            for reply in (example.chosen, example.rejected):
                yield Conversation(example.where, (*example.prompt, *reply), example.tools)
            return
        if not isinstance(example, Judged):
            raise DataError(
                [f"{example.where}: the row has no reply with a verdict; prefer.loss kto takes prompt, completion and "
                 "label, or messages with label or kto_tag, each true or false."]
            )  # fmt: skip
        if example.where not in self._others:
            raise DataError(
                [f"{example.where}: prefer.loss kto needs its rows at the start, to set each beside a reply to another "
                 "prompt; leave out --data.streaming."]
            )  # fmt: skip
        for reply in (example.reply, self._others[example.where].reply):
            yield Conversation(example.where, (*example.prompt, *reply), example.tools)

    def texts(self, row: Features) -> list[Features]:
        return [{"input_ids": row[ids], "labels": row[targets]} for ids, targets in SIDES]

    def longest(self) -> Features:
        tokens = [0] * self.max_length
        return {"labels": [IGNORE, 1], **{name: tokens for side in SIDES for name in side}}

    def lengths(self, row: Features) -> list[int]:
        return [len(row[ids]) for ids, _ in SIDES]

    def question(self, example: Example) -> tuple[list[int], str]:
        if isinstance(example, Preference):
            example = Conversation(example.where, (*example.prompt, *example.chosen), example.tools)
        elif isinstance(example, Judged):
            raise DataError([f"{example.where}: a judged row says of no reply that it is the one; evaluate the loss."])
        return super().question(example)

    def collate(self, rows: Sequence[Features]) -> Batch:
        """Returns texts [B, 2, T] and labels [B, 2]; of rows that are one of the texts, what chat does."""
        if "targets" not in rows[0]:
            return super().collate(rows)
        texts = [(row[ids], row[targets]) for row in rows for ids, targets in SIDES]
        flat = {
            "input_ids": pad([ids for ids, _ in texts], self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(ids) for ids, _ in texts], 0),
            "targets": pad([targets for _, targets in texts], IGNORE),
        }
        labels = torch.tensor([row["labels"] for row in rows])
        return {**{name: tensor.unflatten(0, (-1, 2)) for name, tensor in flat.items()}, "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns the sum of the rows' losses, 0-d float32; `numbers` has TRL's statistics of them."""
        said = self._said(model, batch)
        if isinstance(said.logp_B2, FakeTensor):
            return said.logp_B2.sum()  # there are no numbers to judge
        mean, numbers = self.judge(said)
        rows = len(batch["labels"])
        over = dict.fromkeys(numbers, rows)
        if self.judge.judges_one:
            good = int(said.good_B.sum())
            over |= {f"{what}/chosen": good for what in ("rewards", "logps")}
            over |= {f"{what}/rejected": rows - good for what in ("rewards", "logps")}
        self.numbers = {name: (value * over[name], over[name]) for name, value in numbers.items()}
        return mean * rows

    def together(self, row: Mapping[str, Any]) -> bool:
        return self.judge.judges_one

    def vectors(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns how far the model is from its reference in each row's reply to another prompt, and if it counts."""
        with evaluating(model):
            with as_reference(model):
                reference_B1 = _log_probs(model, batch, slice(1, 2))
            distance_B1 = _log_probs(model, batch, slice(1, 2)) - reference_B1
        return torch.cat([distance_B1, (batch["labels"][:, 1:] != IGNORE).float()], dim=1)

    def shared(self, vectors_RD: torch.Tensor) -> Batch:
        """Returns of each row `distance`, the mean over all that count, from which TRL's loss takes its estimate."""
        distance_R, counts_R = vectors_RD.unbind(1)
        mean = (distance_R * counts_R).sum() / counts_R.sum().clamp(min=1)
        return {"distance": mean.expand(len(vectors_RD))}

    def by_row(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns what was said of the replies of each row, for `settled` to judge: no row is judged alone."""
        said = self._said(model, batch)
        named = {"logp": said.logp_B2, "reference": said.reference_B2, "tokens": said.tokens_B2}
        made = {f"{name}{side}": pair_B2[:, side] for name, pair_B2 in named.items() for side in range(2)}
        return made | {"good": said.good_B}

    def settled(self, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns `nll`, the loss, `count`, 1, `right` and `reward_margin` of each row; a tie is half right."""
        of = lambda name: torch.tensor(np.stack([found[f"{name}{side}"] for side in range(2)], 1))  # noqa: E731
        said = Replies(of("logp"), of("reference"), of("tokens").long(), torch.tensor(found["good"]).bool())
        losses, margins = (np.array(numbers) for numbers in self.judge.of_each(said))
        right = (np.sign(margins) + 1) / 2
        return {"nll": losses, "count": np.ones(len(losses)), "right": right, "reward_margin": margins}

    def _said(self, model: nn.Module, batch: Batch) -> Replies:
        """Returns what the model, with gradients, and its reference say of the replies of a batch."""
        tokens_B2 = (batch["targets"][..., 1:] != IGNORE).sum(-1)
        # What a reply to another prompt says is compared and not learned from.
        learned = slice(0, 1) if self.judge.judges_one else slice(0, 2)
        zeros_B2 = torch.zeros_like(tokens_B2, dtype=torch.float32)
        reference_B2, beside_B2 = zeros_B2, zeros_B2[:, learned.stop :]
        if "distance" in batch:
            with evaluating(model), as_reference(model):
                reference_B1 = _log_probs(model, batch, learned)
            # Whose mean is that of the step, which these rows may be a part of.
            reference_B2 = torch.cat([reference_B1, -batch["distance"][:, None]], dim=1)
        elif self.judge.compares:
            with evaluating(model):
                with as_reference(model):
                    reference_B2 = _log_probs(model, batch, slice(0, 2))
                if self.judge.judges_one:
                    beside_B2 = _log_probs(model, batch, slice(1, 2))
        logp_B2 = torch.cat([_log_probs(model, batch, learned), beside_B2], dim=1)
        return Replies(logp_B2, reference_B2, tokens_B2, batch["labels"][:, 1] > 0)


def _log_probs(model: nn.Module, batch: Batch, sides: slice) -> torch.Tensor:
    """Returns the summed log-probabilities of the replies on these sides of each row, float32 [B, S]."""
    ids, mask, targets = (batch[name][:, sides] for name in ("input_ids", "attention_mask", "targets"))
    flat = {"input_ids": ids.flatten(0, 1), "attention_mask": mask.flatten(0, 1)}
    targets_RT = targets.flatten(0, 1)[:, 1:]
    inner = unwrapped(model)
    head = Head.of(inner)
    if head is None:
        scores = Causal.score(None, model, {**flat, "labels": targets.flatten(0, 1)})  # type: ignore[arg-type]
        row_N = scores.row_N
        logp_N = -nn.functional.cross_entropy(scores.logits_NV.float(), scores.targets_N, reduction="none")
    else:
        row_N, column_N = (targets_RT != IGNORE).nonzero(as_tuple=True)
        logp_N = head.log_probs(states(inner, flat)[row_N, column_N], targets_RT[row_N, column_N])
    sums_R = torch.zeros(len(targets_RT), device=logp_N.device).index_add(0, row_N, logp_N)
    return sums_R.unflatten(0, (-1, ids.shape[1]))
