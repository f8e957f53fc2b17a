"""The options of the commands that are no training; those of a training are `config.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from lora_ft.config import RunConfig, TaskName, at_least, known_metrics

Adapter = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Fine-tune SmolLM2-135M to read meetings, prove it and merge it."""

    out: Path | None = None
    """Folder for the rows, the adapter and the merged model; unset, runs/quickstart, numbered if that is taken."""
    resume: bool = False
    """Go on with the quickstart that was interrupted in the folder."""


@dataclass(frozen=True, kw_only=True)
class TwinConfig(RunConfig):
    """The options of `train` where `--twin` is among them: what is not made needs no name."""

    base: str = ""
    """Base model; unset, an architecture that is usual for the task."""
    out: Path = Path("runs/twin")
    """Nothing is written."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure an adapter and its base on rows."""

    adapter: Adapter
    """The adapter folder."""
    data: str
    """Rows: a file or a hub data set."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names the rows use for known fields."""
    metrics: tuple[str, ...] = ()
    """Metrics on generated replies: exact_match, json_match, rouge, bleu, chrf, or hub:NAME for one of the hub's, whose
    code is fetched and run."""
    batch_size: int = 4
    """Rows in one forward pass."""
    base: str | None = None
    """Where the base is, if it has moved."""
    json: bool = False
    """Print one JSON object: the adapter's metrics by plain name, and the base's under `base`."""

    def __post_init__(self) -> None:
        at_least("batch-size", self.batch_size, 1)
        known_metrics("metrics", self.metrics)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Write what an adapter says to each row of a file, beside the fields of the row."""

    adapter: Adapter
    """The adapter folder."""
    input: str
    """Rows, which need no label or answer: a file or a hub data set."""
    out: Path
    """The file to write: .jsonl, or .csv, where what is a list or an object is written as JSON."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names the rows use for known fields: `--columns prompt ask`."""
    batch_size: int = 8
    """Rows in one forward pass."""
    max_new_tokens: int = 512
    """Longest reply in tokens, where the task writes text."""
    base: str | None = None
    """Where the base is, if it has moved."""

    def __post_init__(self) -> None:
        at_least("batch-size", self.batch_size, 1)
        at_least("max-new-tokens", self.max_new_tokens, 1)
        if self.out.suffix.lower() not in (".jsonl", ".csv"):
            raise ValueError(f"out must end in .jsonl or .csv, got {self.out.name}.")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talk to an adapter."""

    adapter: Adapter
    """The adapter folder."""
    prompt: str | None = None
    """One message to answer; without it, a conversation starts."""
    system: str | None = None
    """The system turn; unset, the one that all rows of the training began with, empty for none."""
    base: str | None = None
    """Where the base is, if it has moved."""
    max_new_tokens: int = 512
    """Longest reply in tokens."""
    temperature: float = 0.0
    """Randomness of the reply; 0 takes the likeliest token."""

    def __post_init__(self) -> None:
        at_least("max-new-tokens", self.max_new_tokens, 1)
        at_least("temperature", self.temperature, 0)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """Say how much memory a training takes at its largest, and what of it fits; no weight is loaded."""

    out: Path = Path("runs")
    """Nothing is written: the options of a training may stand here as they are."""
    device: str | None = None
    """A card such as "RTX 3060", a GPU of a size such as 12GiB, or cpu, also as cpu:8GiB; unset, this machine."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Replay an adapter's seal and say whether it still does what it did after training."""

    adapter: Adapter
    """The adapter folder."""
    model: Path | None = None
    """A merged model to check against the adapter's seal, instead of the adapter itself."""
    base: str | None = None
    """Where the base is, if it has moved."""
    json: bool = False
    """Print the verdict as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge an adapter into its base: plain safetensors that need no adapter."""

    adapter: Adapter
    """The adapter folder."""
    out: Path
    """Folder for the merged model."""
    onto: Literal["auto", "original", "dequantized"] = "auto"
    """Weights to merge onto: the 16-bit ones, what training saw, or whichever is closer to the live adapter."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the merged weights; unset, that of the base."""
    base: str | None = None
    """Where the base is, if it has moved."""


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig:
    """Check a file of rows against a task and a model's template; show what would be trained."""

    file: tyro.conf.Positional[str]
    """Rows: a file or a hub data set."""
    task: TaskName = "chat"
    """The task they are for."""
    base: str = "smollm2-135m"
    """The model whose tokenizer and template to use."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names the rows use for known fields."""
    max_length: int = 1024
    """Longest row in tokens."""
    show: int = 0
    """Rows to print with the trained tokens coloured."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        at_least("max-length", self.max_length, 8)
        at_least("show", self.show, 0)


@dataclass(frozen=True, kw_only=True)
class DataPrepareConfig:
    """Look a file of rows over, mend it as far as you agree, and split it for training."""

    file: tyro.conf.Positional[Path]
    """Rows: CSV, TSV, TXT, JSON, JSONL or Parquet."""
    base: str = "smollm2-135m"
    """The model they are for."""
    yes: bool = False
    """Agree to all that is advised."""
    json: bool = False
    """Print one JSON object, and agree to nothing but with --yes."""


@dataclass(frozen=True, kw_only=True)
class SelftestConfig:
    """Check on a few rows that a configuration trains what it says; takes the base in float32, else as it is stored."""

    run: Adapter
    """The configuration: `config.yaml` of a run, or one of your own."""
    twin: bool = False
    """Check it on a small random model of the base's kind, in seconds, with made-up rows where it names none."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer OpenAI's fine-tuning API on this machine: files, jobs, events, checkpoints, chat."""

    home: Path
    """Folder of the server: its database, files, adapters, and models.json, which names its bases."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than loopback's is reached from other machines, by whoever has the token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    new_token: bool = False
    """Make another token in place of the one printed at the first start."""
    results_base64: bool = False
    """Hand result files out in base64, as the hosted service does and some scripts expect."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}.")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine has and can do."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Check and time the kernels; on a GPU, tune them for it."""

    json: bool = False
    """Print one JSON object."""
