"""GRPO: TRL's trainer on our model, which samples replies to each prompt and learns from how they compare.

What TRL does here is what makes it GRPO: advantages within the replies to one prompt, the loss, what is logged. Ours
are the rows and their order, the sampling, and the log-probabilities, which come through the fused head.

Shapes: B replies, T tokens of a prompt and its reply, C tokens of the longest reply, N tokens of all replies, K wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

from lora_ft.config import RunConfig
from lora_ft.errors import OutOfMemoryError
from lora_ft.generate import end_ids
from lora_ft.model.head import ROWS, Head, states
from lora_ft.model.modes import mixed_precision, unwrapped
from lora_ft.system.devices import is_out_of_memory
from lora_ft.tasks import Features
from lora_ft.training import judged
from lora_ft.training.borrowed import Borrowed
from lora_ft.training.guard import UNRANKED
from lora_ft.training.trainers import Proven


class OwnRows:
    """Mixin before a trainer of TRL that repeats rows: a batch is of rows, each of them once, as for other tasks."""

    def get_train_dataloader(self) -> Any:
        return Trainer.get_train_dataloader(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return Trainer._get_train_sampler(self, train_dataset)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        # The statistics belong to the line of the step.
        if "event" in logs:
            return Trainer.log(self, logs, *args, **kwargs)
        return super().log(logs, *args, **kwargs)  # type: ignore[misc]


class Rollouts(Proven, OwnRows, Borrowed, GRPOTrainer):
    """The Trainer of the task `reason`: a row of a batch is a prompt with all replies to it.

    The replies of a step are sampled at its beginning, all with the same adapter, from a generator that the place of
    the step has seeded, so that a resumed run samples the same ones. The loss is summed over the tokens of all replies
    of the step and divided by their count, so that accumulating changes nothing.
    """

    arguments_class = GRPOConfig
    task: Any
    """A task with a reward, the options of `config.ReasonConfig`, and the tokens of prompts in its rows."""
    worth: list[float]
    """The rewards of the replies last sampled, in their order, before anything is computed of them."""

    def __init__(self, task: Any, *args: Any, **kwargs: Any) -> None:
        def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
            self.worth = task.reward.of(completions, answer)
            return self.worth

        super().__init__(task, *args, reward_funcs=[reward], processing_class=task.tokenizer, **kwargs)
        trainer: Any = self
        trainer.data_collator = list
        # It says how many passes share what was sampled; the constructor wants it to divide other numbers too.
        trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps
        trainer.eos_token_ids = sorted({*end_ids(trainer.model, task.tokenizer), *task.end_ids()})
        self.of_step: list[list[Features]] = []
        self.asked: list[Features] = []
        self.sampled: list[dict[str, Any]] = []

    @classmethod
    def own_arguments(cls, config: RunConfig) -> dict[str, Any]:
        return {
            "num_generations": config.reason.samples,
            "max_completion_length": config.reason.max_new_tokens,
            "steps_per_generation": config.train.accumulate * config.reason.samples,
            "temperature": 1.0,
            "beta": 0.0,
            # It takes dropout out, which is ours to decide.
            "disable_dropout": False,
            "shuffle_dataset": True,
            "per_device_eval_batch_size": config.train.batch_size * config.reason.samples,
        }

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.of_step, count = super().get_batch_samples(*args, **kwargs)
        return self.of_step, count

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        replies = self.task.options.samples * len(inputs)
        smaller = "halve --train.batch-size and double --train.accumulate, which trains the same"
        if len(inputs) == 1:
            smaller = "lower --reason.samples or --reason.max-new-tokens, or see what `lora-ft plan reason` says"
        raise OutOfMemoryError(f"A pass over {replies} replies does not fit the memory: {smaller}.")

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Returns the replies to the rows of a pass, which are sampled with all of its step before the first."""
        if not self.step_losses:
            self.sampled = self._sample()
        return self.sampled[len(self.step_losses)]

    def _sample(self) -> list[dict[str, Any]]:
        trainer: Any = self
        samples = self.task.options.samples
        self.asked = [row for batch in self.of_step for row in batch for _ in range(samples)]
        made = trainer._generate_and_score_completions([{"prompt": "", "answer": row["answer"]} for row in self.asked])
        # What is left of equal rewards less their mean is rounding, which TRL divides by a deviation of nearly nothing.
        rewards_QS = torch.tensor(self.worth, dtype=torch.float64).view(-1, samples)
        alike_Q = (rewards_QS == rewards_QS[:, :1]).all(dim=1)
        made["advantages"][alike_Q.repeat_interleave(samples).to(made["advantages"].device)] = 0
        # TRL takes the steps of a generation to be all there; the last one of an epoch may have fewer passes.
        tokens = made.pop("num_items_in_batch") * trainer.args.steps_per_generation / len(self.of_step)
        passes, first = [], 0
        for batch in self.of_step:
            last = first + samples * len(batch)
            passes.append({name: value[first:last] for name, value in made.items()} | {"num_items_in_batch": tokens})
            first = last
        return passes

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [row["prompt"] for row in self.asked], None, {}

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        trainer: Any = self
        return judged.replies(self.task, trainer.model, self.asked, temperature=1.0, top_k=0), None

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Returns log-probabilities and entropies of the tokens of replies, float32 [B, C], 0 where there is none."""
        trainer: Any = self
        ids_BT, mask_BT, row_N, column_N, slot_N = _unpadded(input_ids, attention_mask, logits_to_keep)
        targets_N = ids_BT[row_N, column_N + 1]
        inner = unwrapped(trainer.model)
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        head = Head.of(inner)
        with mixed_precision(model):
            if head is None:
                logits_NV = inner(**inputs, use_cache=False).logits[row_N, column_N].float()
                logp_N = -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
                entropy_N = _entropy(logits_NV.detach())
            else:
                h_NK = states(inner, inputs)[row_N, column_N]
                logp_N = head.log_probs(h_NK, targets_N)
                with torch.no_grad():
                    entropy_N = torch.cat([_entropy(head.logits(h).float()) for h in h_NK.detach().split(ROWS)])
        empty = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        return empty.index_put((row_N, slot_N), logp_N), empty.index_put((row_N, slot_N), entropy_N), None

    def _reason(self, norm: Any) -> str | None:
        """Returns why the step must not be made: besides those of all tasks, that its replies do not compare."""
        ranked = any(bool(one["advantages"].any()) for one in self.sampled)
        return super()._reason(norm) or (None if ranked else UNRANKED)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens_seen += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Returns the mean reward of the likeliest replies to the held-out rows, and as the loss its opposite."""
        trainer: Any = self
        with self.interrupt.evaluation():
            found = judged.judge(self.task, trainer.model, self.eval_rows if eval_dataset is None else eval_dataset)
        mean = float(found.rewards.mean())
        metrics = {f"{metric_key_prefix}_loss": -mean, f"{metric_key_prefix}_reward": mean}
        training = trainer.model.training
        # By which TRL tells whose statistics to add.
        trainer.model.eval()
        trainer.log(metrics)
        trainer.model.train(training)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


def _unpadded(ids_BT: torch.Tensor, mask_BT: torch.Tensor, longest: int) -> tuple[torch.Tensor, ...]:
    """Returns rows with their padding on the right alone, their mask, and of each token of a reply where it is told.

    TRL pads prompts on the left, and numbers their tokens from there. Of each token come its row, the column before it,
    whose state tells it, and its place in the reply: int64 [N] each.
    """
    columns_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    first_B1 = mask_BT.argmax(dim=1, keepdim=True)
    length_B1 = mask_BT.sum(dim=1, keepdim=True)
    whole_BT = (columns_T + first_B1).clamp(max=ids_BT.shape[1] - 1)
    row_N, slot_N = mask_BT[:, -longest:].nonzero(as_tuple=True)
    column_N = slot_N + (ids_BT.shape[1] - longest) - first_B1[row_N, 0] - 1
    most = int(length_B1.max())
    return ids_BT.gather(1, whole_BT)[:, :most], (columns_T < length_B1).long()[:, :most], row_N, column_N, slot_N


def _entropy(logits_NV: torch.Tensor) -> torch.Tensor:
    """Returns the entropy of each row in nats, float32 [N]."""
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    return -(logp_NV.exp() * logp_NV).sum(dim=-1)
