"""Complete: learn to continue plain text, without any chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_ft.data.examples import Example, Pair, Text
from lora_ft.data.questions import PROMPTS
from lora_ft.data.render import IGNORE, render_completion, render_prompt
from lora_ft.errors import DataError
from lora_ft.tasks import MADE_UP, Answering, Features, replied
from lora_ft.tasks.causal import Causal


class Complete(Causal):
    """Texts learned whole, or completions learned after their prompts, both up to the end of text."""

    name = "complete"
    questions = PROMPTS

    def made_up(self) -> list[Example]:
        return [Pair(f"made up:{n + 1}", f"{n} plus {n * n} is", f" {n + n * n}") for n in range(MADE_UP)]

    def features(self, example: Example) -> Features:
        if not isinstance(example, Text | Pair):
            raise DataError([f"{example.where}: a {type(example).__name__.lower()} row is not plain text; "
                             "complete takes text or prompt/completion rows, `chat` takes conversations."])  # fmt: skip
        rendered = render_completion(self.tokenizer, example, self.max_length)
        self.count_cut(rendered.cut)
        return {"input_ids": rendered.input_ids, "labels": rendered.labels}

    def question(self, example: Example) -> tuple[list[int], str]:
        if not isinstance(example, Pair):
            return super().question(example)
        rendered = render_completion(self.tokenizer, example, self.max_length)
        trained = next(i for i, label in enumerate(rendered.labels) if label != IGNORE)
        return rendered.input_ids[:trained], example.completion

    def asked(self, example: Example) -> Features:
        if not isinstance(example, Text | Pair):
            return super().asked(example)
        prompt = example.prompt if isinstance(example, Pair) else example.text
        return {"input_ids": render_prompt(self.tokenizer, prompt, example.where)}

    def predict(self, model: Answering, rows: Sequence[Features]) -> list[dict[str, Any]]:
        return replied(model, [row["input_ids"] for row in rows])
