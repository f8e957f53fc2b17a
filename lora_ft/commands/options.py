"""The options of the commands that are no training; those of a training are `config.RunConfig`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from lora_ft.config import RunConfig, TaskName, at_least, known_metrics

Adapter = tyro.conf.Positional[Path]
# As huggingface_hub checks it, but with a namespace always.
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![.-])", re.ASCII)


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
    code is fetched and run; or tool_calls, of a reply in the place of each call."""
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
class ExportConfig:
    """Write an adapter, or its merged model, for llama.cpp or Ollama; or say who will take it."""

    source: tyro.conf.Positional[Path]
    """An adapter folder or a merged model; with --portable also the configuration of a run to come."""
    out: Path | None = None
    """The file to write, or for Ollama the folder."""
    format: Literal["gguf", "gguf-lora", "ollama"] | None = None
    """`gguf` (if unset) is the merged model with tokenizer and template, `gguf-lora` the adapter alone, for its base in
    llama.cpp, `ollama` a folder of merged model and Modelfile."""
    quant: Literal["f16", "q8_0"] | None = None
    """Kind of the weights; unset, f16. Smaller ones, such as q4_k_m, are made of an f16 file by llama.cpp's
    llama-quantize."""
    base: str | None = None
    """Where the base is, if it has moved."""
    portable: bool = False
    """Write nothing: say which of vLLM, llama.cpp, Ollama and older PEFT take the adapter, and why others do not."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.portable == (self.out is not None):
            raise ValueError("out is the file to write; with portable nothing is written, and it is left out.")
        for name, given in (("format", self.format), ("quant", self.quant)):
            if self.portable and given is not None:
                raise ValueError(f"{name} is of a file, and with portable nothing is written: leave it out.")
        if self.format == "gguf-lora" and self.quant is not None:
            raise ValueError("quant is of merged weights; an adapter alone is always written in float32: leave it out.")


@dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """Combine adapters of one base and task into one, and measure what each keeps of its effect."""

    adapters: tyro.conf.Positional[tuple[Path, ...]]
    """Two adapter folders or more."""
    out: Path
    """Folder for the combined adapter."""
    method: Literal[
        "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"
    ] = "cat"
    """PEFT's: `cat` adds up the updates B A exactly, at the sum of the ranks. `svd` and those that end in it work on
    the updates and keep their largest directions; the others work on A and B apart, a rough but small way."""
    weights: tuple[float, ...] = ()
    """Weight of each adapter, in their order; unset, 1 each."""
    rank: int | None = None
    """Rank of the result, for `svd` and those that end in it; unset, the largest of theirs."""
    density: float | None = None
    """Share of the numbers that `ties` and `dare` keep, in (0, 1]: `ties` the largest, `dare` any; unset, 0.5."""
    seed: int | None = None
    """Seed of what `dare` drops; unset, 42."""
    data: tuple[str, ...] = ()
    """Rows for each adapter, in their order, to measure it on before and after: files or hub data sets."""
    metrics: tuple[str, ...] = ()
    """Metrics on replies generated for those rows, as `evaluate` has them."""
    base: str | None = None
    """Where the base is, if it has moved."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if len(self.adapters) < 2:
            raise ValueError(f"adapters must be at least 2, got {len(self.adapters)}.")
        for name, given in (("weights", self.weights), ("data", self.data)):
            if given and len(given) != len(self.adapters):
                raise ValueError(f"{name} must be one for each adapter, {len(self.adapters)}; got {len(given)}.")
        if not all(math.isfinite(weight) and weight for weight in self.weights):
            raise ValueError("weights must be finite and not 0; leave such an adapter out.")
        if self.rank is not None:
            at_least("rank", self.rank, 1)
            if not self.method.endswith("svd"):
                raise ValueError(
                    f"rank is for svd and methods that end in it; {self.method} has its own: leave it out."
                )
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}.")
        for name, value, kinds in (("density", self.density, ("ties", "dare")), ("seed", self.seed, ("dare",))):
            if value is not None and not self.method.startswith(kinds):
                raise ValueError(f"{name} is for {' and '.join(kinds)}; {self.method} reads none: leave it out.")
        known_metrics("metrics", self.metrics)
        if self.metrics and not self.data:
            raise ValueError("metrics need rows: name them with data.")


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """Say in what two adapters differ: configuration, rows, base, versions, weights, effect."""

    first: tyro.conf.Positional[Path]
    """An adapter folder."""
    second: tyro.conf.Positional[Path]
    """Another."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Publish a proven adapter to a model hub, in one commit with a tag; private unless it is to be public."""

    adapter: Adapter
    """The adapter folder."""
    repo: str
    """Repository to publish to, NAMESPACE/NAME; made where there is none."""
    public: bool = False
    """Let everybody read the repository; with pr, agree that everybody can read the request on a public one."""
    pr: bool = False
    """Open a pull request on the repository, which may be another's, instead of changing it."""
    base: str | None = None
    """Hub id of the base, where the adapter was trained on a local copy: its weights must be the same, but for GGUF."""

    def __post_init__(self) -> None:
        for name, value in (("repo", self.repo), ("base", self.base)):
            if value is not None and not HUB_ID.fullmatch(value):
                raise ValueError(f"{name} must be NAMESPACE/NAME, as in a hub's addresses, got {value}.")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Set runs side by side; of a single one, draw its report anew with the plan beside what was measured."""

    adapters: tyro.conf.Positional[tuple[Path, ...]]
    """The adapter folders."""
    out: Path | None = None
    """HTML file for the comparison; unset, it is only printed."""
    json: bool = False
    """Print a JSON list of what is known of each run."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ValueError("report needs the folder of an adapter, or of several.")
        if len(self.adapters) == 1 and self.out is not None:
            raise ValueError("the report of a single adapter is in its folder: leave out out.")


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
