"""The losses of preference training, which are TRL's: log-probabilities of replies in, loss and statistics out.

TRL's trainers themselves are not used. Their constructors change the model (see `borrowed`), and they take the mean
over each batch, so that a row of a short batch counts more than another, and accumulating or halving a batch would
change what is learned. Their losses are theirs to the letter: here each gets the numbers that it would have computed,
and that of replies that are judged the mean over the whole step where it would take one over the batch.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from lora_ft.errors import ConfigError

# What TRL says of a batch and can be said of log-probabilities alone.
STATISTICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "kl",
)  # fmt: skip


@dataclass(frozen=True)
class Replies:
    """What a model and its reference say of two replies to each of B prompts.

    They are the chosen and the rejected one or, where a single reply is judged, that one and a reply to another prompt,
    from which TRL estimates how far the model is from its reference.
    """

    logp_B2: torch.Tensor
    """Log-probabilities, summed over the tokens of a reply, float32."""
    reference_B2: torch.Tensor
    """Those of the reference, float32; zeros for a loss that asks for none."""
    tokens_B2: torch.Tensor
    """Tokens summed over, int64."""
    good_B: torch.Tensor
    """Whether a reply that is judged is good, bool; True for pairs."""

    def __getitem__(self, rows: slice) -> Replies:
        return Replies(self.logp_B2[rows], self.reference_B2[rows], self.tokens_B2[rows], self.good_B[rows])


class Judge:
    """TRL's loss by its name (`config.PreferenceLoss`), with a beta."""

    def __init__(self, loss: str, beta: float) -> None:
        self.loss, self.beta = loss, beta

    def require(self) -> None:
        """Raises ConfigError where TRL is not installed."""
        if importlib.util.find_spec("trl") is None:
            raise ConfigError("preference training takes its losses from TRL: pip install 'lora-ft[prefer]'.")

    @cached_property
    def _trainer(self) -> Any:
        """The trainer of TRL that has the loss, without what its constructor makes: nothing but what the loss reads."""
        self.require()
        if self.loss == "orpo":
            with warnings.catch_warnings():  # that the room may change, which constraints.txt answers
                warnings.simplefilter("ignore")
                from trl.experimental.orpo import ORPOTrainer as Trainer
        elif self.loss == "kto":
            from trl import KTOTrainer as Trainer
        else:
            from trl import DPOTrainer as Trainer
        made, alone = object.__new__(Trainer), lambda tensor: tensor
        vars(made).update(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(gather=alone, gather_for_metrics=alone),
            beta=self.beta,
            loss_type=self.loss,
            loss_types=[self.loss],
            loss_weights=[1.0],
            label_smoothing=0.0,
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            use_weighting=False,
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            calculate_KL=True,
            desirable_weight=1.0,
            undesirable_weight=1.0,
            _compute_kl_logps=lambda model, batch: batch["KL_logps"],
            _total_train_tokens=0,
            _tp_size=1,
        )
        return made

    @property
    def compares(self) -> bool:
        """Whether the loss compares the model with a reference."""
        return self.loss != "orpo"

    @property
    def judges_one(self) -> bool:
        """Whether rows have one reply that is good or bad, instead of two."""
        return self.loss == "kto"

    def __call__(self, said: Replies) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the mean loss of the rows, 0-d float32 with its gradient, and TRL's statistics of them."""
        self._trainer.accelerator.device = said.logp_B2.device
        if self.loss == "orpo":
            return self._odds(said)
        self._trainer._metrics = {"train": defaultdict(list)}
        inputs = self._judged(said) if self.judges_one else self._paired(said)
        logp = inputs.pop("logp")
        # A whole reply stands where a token would: what is asked of tokens, such as entropy, is not said of it.
        nothing = torch.zeros_like(logp)
        outputs = SimpleNamespace(log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
        loss = self._trainer._compute_loss(lambda **_: outputs, inputs, False)
        found = self._trainer._metrics["train"]
        return loss, {name: found[name][-1] for name in STATISTICS if name in found}

    def of_each(self, said: Replies) -> tuple[list[float], list[float]]:
        """Returns the loss of each row and its reward margin, the numbers on the processor.

        Of replies that are judged, all rows are needed for what is subtracted from each, and the margin of a row is its
        share in the difference of the mean rewards of good ones and of bad ones.
        """
        rows = len(said.good_B)
        if self.judges_one:
            # Each row by itself has the estimate of all.
            distance = (said.logp_B2[:, 1] - said.reference_B2[:, 1]).mean()
            reference_B2 = said.reference_B2.clone()
            reference_B2[:, 1] = said.logp_B2[:, 1] - distance
            said = Replies(said.logp_B2, reference_B2, said.tokens_B2, said.good_B)
        losses, margins = [], []
        for row in range(rows):
            loss, numbers = self(said[row : row + 1])
            losses.append(loss.item())
            if self.judges_one:
                good = bool(said.good_B[row])
                alike = int((said.good_B == good).sum())
                reward = numbers["rewards/chosen" if good else "rewards/rejected"]
                margins.append((reward if good else -reward) * rows / alike)
            else:
                margins.append(numbers["rewards/margins"])
        return losses, margins

    def _paired(self, said: Replies) -> dict[str, torch.Tensor]:
        """Returns the inputs of TRL's loss of pairs: all that were chosen, then all that were rejected."""
        chosen_B, rejected_B = said.reference_B2.unbind(1)
        return {
            **_as_tokens(said.logp_B2.T.flatten(), said.tokens_B2.T.flatten()),
            "ref_chosen_logps": chosen_B,
            "ref_rejected_logps": rejected_B,
        }

    def _judged(self, said: Replies) -> dict[str, torch.Tensor]:
        return {
            **_as_tokens(said.logp_B2[:, 0], said.tokens_B2[:, 0]),
            "label": said.good_B,
            "ref_logps": said.reference_B2[:, 0],
            "KL_logps": said.logp_B2[:, 1].detach(),
            "ref_KL_logps": said.reference_B2[:, 1],
        }

    def _odds(self, said: Replies) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the loss of ORPO: the chosen reply's mean negative log-likelihood and the log odds ratio.

        Both are of the reply, and each row counts the same (Hong et al. 2024, arXiv 2403.07691, equations 4 to 7).
        """
        chosen_B, rejected_B = (said.logp_B2 / said.tokens_B2).unbind(1)
        odds_B, better_B, worse_B, *_ = self._trainer.odds_ratio_loss(chosen_B, rejected_B)
        numbers = {
            "rewards/chosen": better_B.mean(),
            "rewards/rejected": worse_B.mean(),
            "rewards/margins": (better_B - worse_B).mean(),
            "rewards/accuracies": (better_B > worse_B).float().mean(),
            "logps/chosen": chosen_B.detach().mean(),
            "logps/rejected": rejected_B.detach().mean(),
        }
        return (-chosen_B - odds_B).mean(), {name: value.item() for name, value in numbers.items()}


def _as_tokens(logp_S: torch.Tensor, tokens_S: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns S replies as sequences of two tokens, the second of which is scored and stands for all of them.

    The mask, of which TRL takes the sum for the number of tokens, says how many they are.
    """
    ids_S2 = torch.zeros(len(logp_S), 2, dtype=torch.int64, device=logp_S.device)
    return {
        "logp": logp_S[:, None],
        "input_ids": ids_S2,
        "attention_mask": torch.ones_like(ids_S2),
        "completion_mask": torch.stack([torch.zeros_like(tokens_S), tokens_S], dim=1),
    }
