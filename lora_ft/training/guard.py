"""Steps whose loss or gradient is not a number are not made, are told with their rows, and in a row end the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_ft.errors import DivergedError
from lora_ft.training.exact import ExactSteps

log = logging.getLogger(__name__)

# Steps in a row after which it is not the rows.
TOO_MANY = 3
SHOWN = 8
# A step that has nothing to teach, which says nothing against the others.
UNSCORED = "no position is scored"
UNRANKED = "all replies to each prompt are worth the same"
UNTAUGHT = "no text has both one that belongs to it and one that does not"


class GuardedSteps(ExactSteps):
    """Mixin for a Trainer: a step that would put numbers that are not finite into the adapter is skipped.

    So is one that has nothing to teach, such as one without any scored position, for it would move the adapter by its
    momentum. What a gradient scaler of float16 skips while it looks for its scale is normal, and is left to it.
    """

    kept: tuple[str, ...] = ("bad_in_a_row", "steps_since_log", "skipped_since_log")

    row_names: Sequence[str] = ()
    """Where each row came from, such as `train.jsonl:17`."""
    skipped: str | None = None
    """Why the optimizer makes no step of what was computed."""
    bad_in_a_row: int = 0
    steps_since_log: int = 0
    skipped_since_log: int = 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # The Trainer adds it to a running sum, which a single NaN would spoil for good.
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.skipped = self._reason(norm)
        if self.skipped is not None:
            # The optimizer passes over parameters without a gradient, and leaves their momentum as it is.
            model.zero_grad(set_to_none=True)
        return norm

    def _reason(self, norm: Any) -> str | None:
        """Returns why the step must not be made, or None; waits for the device once."""
        trainer: Any = self
        losses = torch.stack(self.step_losses)
        norm = torch.as_tensor(norm, device=losses.device)
        scored = torch.as_tensor(1 if self.step_items is None else self.step_items, device=losses.device).sum()
        if bool(torch.isfinite(losses).all() & torch.isfinite(norm) & (scored > 0)):
            return None
        if not bool(torch.isfinite(losses).all()):
            return "the loss is not a number"
        if not bool(torch.isfinite(norm)):
            scaled = getattr(trainer.accelerator, "scaler", None) is not None
            return None if scaled else "the gradient is not a number"
        return UNSCORED

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.step_losses:
            self.steps_since_log += 1
            if self.skipped is None:
                self.bad_in_a_row = 0
            else:
                self.skipped_since_log += 1
                self._tell(self.skipped)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _tell(self, reason: str) -> None:
        """Warns of a skipped step, writes it into the metrics, and raises DivergedError where it was one too many."""
        trainer: Any = self
        step, rows = trainer.state.global_step, self._suspects()
        names = [self.row_names[row] if row < len(self.row_names) else f"row {row}" for row in rows]
        some = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        log.warning("step %d was skipped, %s: it was made of %s", step, reason, some)
        asked = trainer.control.should_log
        trainer.log({"event": "step skipped", "reason": reason, "rows": rows})
        # Any line counts as the one that was asked for, and the step's own is still to come.
        trainer.control.should_log = asked
        if reason in (UNSCORED, UNRANKED, UNTAUGHT):
            return
        self.bad_in_a_row += 1
        if self.bad_in_a_row < TOO_MANY:
            return
        self.bad_in_a_row = 0
        raise DivergedError(
            f"Stopped at step {step}: {reason}, in {TOO_MANY} steps in a row; the last was made of {some}. Lower "
            f"--train.lr (it was {self.step_lr:.3g} in this step), raise --train.warmup, use --train.dtype bfloat16 or "
            "float32 instead of float16, or take these rows out."
        )

    def _suspects(self) -> list[int]:
        """Returns the rows of the micro steps whose loss is not a number, or of all where none is."""
        trainer: Any = self
        broken = [i for i, loss in enumerate(self.step_losses) if not bool(torch.isfinite(loss))]
        step = trainer.state.global_step - 1
        return [row for i in broken or range(len(self.step_losses)) for row in self.rows_of(step, i)]

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            made = self.steps_since_log - self.skipped_since_log
            if self.skipped_since_log:
                # The Trainer divided by all steps since the last line.
                logs["loss"] = logs["loss"] * self.steps_since_log / made if made else float("nan")
            self.steps_since_log = self.skipped_since_log = 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
