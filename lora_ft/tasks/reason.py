"""Reason: learn from rewards for the model's own replies, of which only the answer is known and can be checked."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

from lora_ft.config import ReasonConfig, RunConfig
from lora_ft.data.examples import Chat as Conversation
from lora_ft.data.examples import Example, Pair
from lora_ft.data.problems import Problem
from lora_ft.data.questions import PROBLEMS
from lora_ft.data.render import IGNORE
from lora_ft.data.tokens import adds_bos
from lora_ft.errors import ConfigError, DataError, MaskError
from lora_ft.scoring import rewards
from lora_ft.tasks import MADE_UP, Features
from lora_ft.tasks.causal import Causal
from lora_ft.tasks.chat import Chat


class Reason(Chat):
    """Prompts with an answer, of which `rollouts` samples replies.

    A question, or a list of messages, goes through the model's chat template; a prompt that is text is gone on from as
    it stands. A row's text is the prompt and its answer, by which an adapter is sealed; nothing is trained on it.
    """

    name = "reason"
    questions = PROBLEMS
    accuracy_name = ""
    shares_rows = False
    trainer = "rollouts.Rollouts"
    reward: rewards.Reward

    def __init__(self, system: str | None = None, prompts: str | None = None) -> None:
        super().__init__(system)
        if prompts not in (None, "text", "messages"):
            raise TypeError("prompts is text, messages or null")
        self.prompts = prompts
        """`text` where all prompts are gone on from as they stand, else `messages`; None where that was not told."""
        self.configure(ReasonConfig())

    def configure(self, options: ReasonConfig) -> None:
        self.options = options
        self.reward = rewards.get(options.reward)

    def rehearsed(self, config: RunConfig) -> RunConfig:
        # No reply of a random model is right: it is told to make its replies of an even length, as half of them are.
        asked = config.reason
        tokens = min(asked.max_new_tokens, config.data.max_length // 4)
        options = dataclasses.replace(asked, reward="regex", samples=min(asked.samples, 4), max_new_tokens=tokens)
        return dataclasses.replace(config, data=dataclasses.replace(config.data, train=None), reason=options)

    def made_up(self) -> list[Example]:
        return [Problem(f"made up:{n + 1}", f"{n} plus {n * n} is", "(..)*") for n in range(MADE_UP)]

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        if importlib.util.find_spec("trl") is None:
            raise ConfigError("reason is trained by TRL: pip install 'lora-ft[prefer]'.")
        self.reward.require()
        prompts = [row.prompt for row in (*examples, *held_out) if isinstance(row, Problem)]
        super().learn([Conversation("", () if isinstance(prompt, str) else prompt) for prompt in prompts])
        texts = [isinstance(row, Problem) and isinstance(row.prompt, str) for row in (*examples, *held_out)]
        self.prompts = None if not texts else "text" if all(texts) else "messages"

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "prompts": self.prompts}

    def prepare(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.chat_template:
            super().prepare(tokenizer, max_length)
        else:
            Causal.prepare(self, tokenizer, max_length)
        if max_length <= self.options.max_new_tokens:
            raise ConfigError(
                f"reason.max-new-tokens {self.options.max_new_tokens} leaves no room for a prompt in the {max_length} "
                "tokens of a row: lower it, or raise --data.max-length."
            )

    def features(self, example: Example) -> Features:
        prompt, answer = self.question(example)
        room = self.max_length - self.options.max_new_tokens
        if len(prompt) > room:
            raise DataError([
                f"{example.where}: the prompt has {len(prompt)} tokens, and with --reason.max-new-tokens "
                f"{self.options.max_new_tokens} there are {room} for it: shorten it, or raise --data.max-length."
            ])  # fmt: skip
        told = self.tokenizer(answer, add_special_tokens=False)["input_ids"][: self.max_length - len(prompt)]
        labels = [*[IGNORE] * len(prompt), *told]
        return {"input_ids": [*prompt, *told], "labels": labels, "prompt": prompt, "answer": answer}

    def question(self, example: Example) -> tuple[list[int], str]:
        if isinstance(example, Pair):
            prompt: Any = ({"role": "user", "content": example.prompt},)
            answer = example.completion
        elif isinstance(example, Problem):
            prompt, answer = example.prompt, example.answer
        else:
            raise DataError([
                f"{example.where}: a {type(example).__name__.lower()} row has no answer to check replies against; "
                "reason takes rows with prompt and answer, or question and answer."
            ])  # fmt: skip
        if fault := self.reward.fault(answer):
            raise DataError([f"{example.where}: the answer {fault}, or choose another --reason.reward."])
        return self._ids(example.where, prompt), answer

    def asked(self, example: Example) -> Features:
        if isinstance(example, Problem):
            return {"input_ids": self._ids(example.where, example.prompt)}
        self._require_template(example.where)
        return super().asked(example)

    def _ids(self, where: str, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
            return [self.tokenizer.bos_token_id, *ids] if adds_bos(self.tokenizer) else ids
        self._require_template(where)
        try:
            return self.renderer.prompt(list(prompt))
        except MaskError as error:
            raise DataError([f"{where}: {told.removeprefix('prompt: ')}" for told in error.problems]) from None

    def _require_template(self, where: str) -> None:
        if not self.tokenizer.chat_template:
            raise DataError([
                f"{where}: the base has no chat template to put a question in: give the text to go on from as prompt, "
                "or take the base's instruct version."
            ])  # fmt: skip

    def longest(self) -> Features:
        tokens = [0] * self.max_length
        return {"input_ids": tokens, "labels": tokens, "prompt": tokens[self.options.max_new_tokens :]}

    def passes(self, row: Features) -> list[Features]:
        new = [0] * self.options.max_new_tokens
        made = {"input_ids": [*row["prompt"], *new], "labels": [*[IGNORE] * len(row["prompt"]), *new]}
        return [made] * self.options.samples

    def lengths(self, row: Features) -> list[int]:
        return [len(made["input_ids"]) for made in self.passes(row)]

    def end_ids(self) -> list[int]:
        return super().end_ids() if self.tokenizer.chat_template else []
