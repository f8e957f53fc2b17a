"""Requests for answers, as clients send them: what is honoured, what is taken and ignored, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_ft.serve.bodies import Body
from lora_ft.serve.refusals import RequestError, bad
from lora_ft.serve.sampling import Settings

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_ANSWERS = 128
"""Of all prompts of a request together."""
STOP_STRINGS, STOP_CHARS = 4, 256
MAX_MESSAGES, MAX_BIASES = 10_000, 1024
COMPLETION_TOKENS = 16
"""What `max_tokens` is for completions where it is not given, as the hosted service has it."""

# They change nothing that a client could miss: names, accounts, caches, tiers, and the style of other models.
Ignored = Annotated[Any, Field(None, exclude=True, description="Taken and ignored.")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Body):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Ignored


class Asked(Body):
    """What both kinds of requests share."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=MAX_BIASES)
    user: Ignored

    def settings(self, max_tokens: int, logprobs: int | None, ends: frozenset[int], vocabulary: int) -> Settings:
        """Returns how an answer is made. Raises RequestError for stop strings and tokens that cannot be."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > STOP_STRINGS or not all(stop) or any(len(one) > STOP_CHARS for one in stop):
            raise bad("stop", f"stop takes up to {STOP_STRINGS} strings of 1 to {STOP_CHARS} characters.")
        return Settings(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop),
            logprobs=logprobs,
            logit_bias=_biases(self.logit_bias or {}, vocabulary),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            ends=ends,
        )

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def refuse_stream_options(self) -> None:
        """Raises RequestError where options of a stream are given for none."""
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options", "stream_options is only allowed when stream is true.")


class JsonSchema(Body):
    """A schema that an answer must follow."""

    name: str | None = Field(None, max_length=64)
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Body):
    """What form an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Asked):
    """A conversation to be gone on with."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    metadata: Ignored
    store: Ignored
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored
    prompt_cache_options: Ignored
    reasoning_effort: Ignored
    verbosity: Ignored
    audio: Any = None
    web_search_options: Any = None
    prediction: Any = None
    functions: Any = None
    function_call: Any = None

    def refuse_unsupported(self) -> None:
        """Raises RequestError for what no model here can do."""
        self.refuse_stream_options()
        for name, why in (
            ("audio", "models here write text alone"),
            ("web_search_options", "nothing is searched for here"),
            ("prediction", "predicted outputs are not used here"),
            ("functions", "use tools"),
            ("function_call", "use tool_choice"),
        ):
            if getattr(self, name) is not None:
                raise bad(name, f"{name} is not supported: {why}.", "unsupported_parameter")
        if self.modalities not in (None, ["text"]):
            raise bad("modalities", "modalities must be [text]: models here write text alone.", "unsupported_parameter")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad("top_logprobs", "top_logprobs is only allowed when logprobs is true.")

    @property
    def told_logprobs(self) -> int | None:
        """How many likeliest tokens to tell at each place, None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that is asked for, in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_schema(self) -> tuple[Mapping[str, Any], str] | None:
        """The schema that the answer must follow, and the field that it came from."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "object"}, "response_format"
        if form.json_schema is None:
            raise bad("response_format.json_schema", "Missing required parameter: 'response_format.json_schema'.")
        return form.json_schema.json_schema or {}, "response_format.json_schema.schema"


class CompletionRequest(Asked):
    """A text to be gone on with."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        """Raises RequestError for what no model here can do."""
        self.refuse_stream_options()
        if self.suffix:
            raise bad("suffix", "suffix is not supported: models here go on with a text only.", "unsupported_parameter")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise bad("best_of", f"best_of is {self.best_of}; it must be at least n, {self.n or 1}.")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise bad("best_of", "best_of cannot be streamed: which answer is best is known at the end.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or tokens. Raises RequestError where there are too many."""
        given = self.prompt if self.prompt is not None else "<|endoftext|>"
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(one, int) for one in given):
            return [[int(one) for one in given]]  # type: ignore[arg-type]
        found = list(given)
        if not 0 < len(found) <= MAX_PROMPTS or not all(isinstance(one, str) or one for one in found):
            raise bad("prompt", f"prompt takes 1 to {MAX_PROMPTS} texts, or lists of at least one token.")
        return found  # type: ignore[return-value]


def _biases(given: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    wrong = [one for one in given if not (one.isascii() and one.isdigit() and len(one) < 9 and int(one) < vocabulary)]
    if wrong:
        raise bad("logit_bias", f"logit_bias: {wrong[0][:20]!r} is no token; the model has 0 to {vocabulary - 1}.")
    return {int(token): bias for token, bias in given.items()}


def too_long(prompt: int, answer: int, context: int, param: str) -> RequestError:
    """Returns the refusal of a prompt and an answer that do not fit the model together."""
    told = f"This model's maximum context length is {context} tokens. However, you requested {prompt + answer} tokens"
    parts = f"({prompt} in the {param}, {answer} in the completion). Please reduce the length of either."
    return bad(param, f"{told} {parts}", "context_length_exceeded")
