"""Every option of a run, with its unit, its bounds and what it goes together with. Never imports torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from lora_ft.foreign.adapter import MAX_ALPHA, MAX_RANK, is_pattern

TaskName = Literal["chat", "complete", "classify", "seq2seq", "tag", "embed", "prefer", "reason"]
PreferenceLoss = Literal["sigmoid", "ipo", "kto", "orpo"]
Quant = Literal["nf4", "int8", "none"]
Optimizer = Literal["adamw", "adamw-8bit", "adamw-paged-8bit"]
BaseCache = Literal["auto", "on", "off"]
TOOL_CALLS = "tool_calls"
METRICS = ("exact_match", "json_match", "rouge", "bleu", "chrf", TOOL_CALLS)
FROM_HUB = "hub:"
"""What the name of a metric on the hub begins with here: whoever types it lets its code run."""
HUB_METRIC = re.compile(r"hub:\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
REWARDS = ("exact", "json_schema", "regex", "unit_tests")
OWN_REWARD = re.compile(r".+\.py:[A-Za-z_]\w*", re.ASCII)
"""A function of the user's in a file: whoever types it lets its code run."""
COMPUTED = ("pissa", "olora", "eva")
"""Starts of an adapter that are computed, not drawn; what is saved has up to twice the rank that was asked for."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The low-rank adapter."""

    rank: int = 16
    """Rank r of the update B @ A."""
    alpha: float = 32.0
    """Scale numerator: the update is multiplied by alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input, in [0, 1). Layers that are computed whole draw one mask for queries,
    keys and values, and one for gate and up."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module-name suffixes to adapt; `all-linear` is every linear layer but the output head."""
    rslora: bool | None = None
    """Scale by alpha / sqrt(rank). Unset: on from rank 32, where alpha / rank shrinks the update so much
    that a higher rank learns no more (Kalajdzievski 2023, arXiv 2312.03732, section 3)."""
    dora: bool = False
    """Train each weight's magnitude apart from its direction (Liu et al. 2024, arXiv 2402.09353)."""
    plus_ratio: float | None = None
    """LoRA+: learning rate of B over that of A (Hayou et al. 2024, arXiv 2402.12354; 16 is usual)."""
    init: Literal["default", "eva", "loftq", "pissa", "olora"] = "default"
    """Start of A and B. `pissa` and `olora` rewrite the base weights and need `--quant none`."""
    save_modules: tuple[str, ...] = ()
    """Modules trained and saved whole, besides a task's own head."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank for modules whose name matches the key (a suffix or a regular expression)."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alpha for modules whose name matches the key."""
    train_tokens: tuple[str, ...] = ()
    """Tokens already in the vocabulary whose embedding rows are trained too."""

    def __post_init__(self) -> None:
        # What is saved must be loaded again. An adapter that moved its base is saved at twice its rank, and EVA gives
        # some layers up to twice the rank.
        twice = 2 if self.init in COMPUTED else 1
        ranks = {"lora.rank": self.rank} | {f"lora.rank-pattern {k}": v for k, v in self.rank_pattern.items()}
        for name, rank in ranks.items():
            at_least(name, rank, 1)
            _at_most(name, rank, MAX_RANK // twice)
        alphas = {"lora.alpha": self.alpha} | {f"lora.alpha-pattern {k}": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            _above(name, alpha, 0)
            _at_most(name, alpha, MAX_ALPHA / twice)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not is_pattern(pattern):
                raise ValueError(f"lora.rank-pattern and alpha-pattern take regular expressions; {pattern!r} is none.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}.")
        if self.plus_ratio is not None:
            at_least("lora.plus-ratio", self.plus_ratio, 1)
        if self.dora and self.init in ("pissa", "olora"):
            raise ValueError(
                f"lora.init={self.init} is saved as the difference of two adapters, and with lora.dora there is none: "
                "leave one of them out."
            )
        if not self.targets:
            raise ValueError("lora.targets is empty; name module suffixes such as q_proj, or all-linear.")

    @property
    def uses_rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(rank)."""
        return self.rank >= 32 if self.rslora is None else self.rslora


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows."""

    train: str | None = None
    """Training rows: a JSONL, JSON, CSV, Parquet or text file, or a hub data set (`NAME` or `NAME:SPLIT`)."""
    eval: str | None = None
    """Held-out rows: a file or hub data set, or the fraction of the training rows to hold out (such as 0.1)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names the rows use for known fields: `--data.columns prompt question completion reply`."""
    max_length: int = 1024
    """Longest row in tokens; longer ones are cut at the end."""
    special_tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary; only their embedding rows are trained."""
    metrics: tuple[str, ...] = ()
    """Metrics on replies generated for the held-out rows: exact_match, json_match, rouge, bleu, chrf, or hub:NAME for
    one of the hub's, whose code is fetched and run; or tool_calls, of a reply in the place of each call."""
    class_weights: Literal["balanced"] | None = None
    """Let rows of rare classes count more in the loss of training: `balanced` gives each class the same sum."""
    packing: bool = False
    """Fill rows of `max-length` tokens with several examples, none of which sees another; `batch-size` counts those."""
    streaming: bool = False
    """Render rows as they are read instead of all at the start; needs `--train.steps`."""

    def __post_init__(self) -> None:
        at_least("data.max-length", self.max_length, 8)
        known_metrics("data.metrics", self.metrics)
        fraction = self.eval_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"data.eval is a fraction in (0, 1) or a file, got {self.eval}.")
        if self.streaming and self.packing:
            raise ValueError("data.packing needs all rows at the start: leave out data.streaming.")
        if self.streaming and self.class_weights:
            raise ValueError("data.class-weights counts all rows at the start: leave out data.streaming.")
        if self.streaming and fraction is not None:
            raise ValueError("data.eval must be a file with data.streaming: the rows cannot be split unseen.")

    @property
    def eval_fraction(self) -> float | None:
        """The share of the training rows to hold out, where `eval` is a number."""
        try:
            return float(self.eval) if self.eval is not None else None
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, schedule and what is watched."""

    batch_size: int = 4
    """Rows in one forward pass on one device."""
    accumulate: int = 1
    """Forward passes added up, weighted by their trained tokens, before each optimizer step."""
    epochs: float = 3.0
    """Passes over the training rows."""
    steps: int | None = None
    """Optimizer steps; set, it replaces `epochs`."""
    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    optimizer: Optimizer = "adamw"
    """Bits of AdamW's moments: 32, or 8 in tensors of 4096 elements and more, which a full GPU can page out."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises from 0, in [0, 1)."""
    weight_decay: float = 0.0
    """AdamW's decay, on the matrices of the adapter."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    seed: int = 42
    """Seed of the adapter's start, of the order of the rows and of dropout."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype; `auto` takes what the device multiplies fastest and logs why."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: a third slower, far less memory. Unset, a run does so where its plan
    says that not even one row fits otherwise."""
    base_cache: BaseCache = "auto"
    """Hold 4-bit weights dense while training: quicker, more memory. `auto`: on a processor, up to 1 GiB if the plan
    says that it fits."""
    shard_base: bool = False
    """Spread a base that is not quantized over the processes of `torchrun` (FSDP2), instead of holding it in each."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations; unset, once at the end."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints; unset, only at an interrupt."""
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out loss; the best checkpoint is kept."""
    log_steps: int = 1
    """Optimizer steps between lines of metrics.jsonl."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers to send metrics to; none unless named. TensorBoard's files come to lie beside the adapter folder."""

    def __post_init__(self) -> None:
        at_least("train.batch-size", self.batch_size, 1)
        at_least("train.accumulate", self.accumulate, 1)
        _above("train.epochs", self.epochs, 0)
        _above("train.lr", self.lr, 0)
        for name in ("steps", "eval_steps", "save_steps", "patience"):
            value = getattr(self, name)
            if value is not None:
                at_least(f"train.{name.replace('_', '-')}", value, 1)
        at_least("train.log-steps", self.log_steps, 1)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"train.warmup must be in [0, 1), got {self.warmup}.")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.clip < math.inf):
            raise ValueError("train.weight-decay and train.clip must be at least 0.")
        if self.patience is not None and self.eval_steps is None:
            raise ValueError("train.patience needs train.eval-steps: it counts evaluations during training.")
        if self.eval_steps and self.save_steps and self.save_steps % self.eval_steps:
            raise ValueError(
                f"train.save-steps must be a multiple of train.eval-steps ({self.eval_steps}), got {self.save_steps}: "
                "the best checkpoint is chosen among those evaluated."
            )


@dataclass(frozen=True, kw_only=True)
class PreferConfig:
    """What the task `prefer` learns from replies that are compared or judged."""

    loss: PreferenceLoss = "sigmoid"
    """`sigmoid` is DPO (Rafailov et al. 2023, arXiv 2305.18290); `ipo`, and `orpo` without a reference, take pairs too;
    `kto` takes replies that are good or bad."""
    beta: float = 0.1
    """How strongly the model is held to its base; in ipo the tau, in orpo the weight of the odds ratio."""

    def __post_init__(self) -> None:
        _above("prefer.beta", self.beta, 0)


@dataclass(frozen=True, kw_only=True)
class ReasonConfig:
    """What the task `reason` is rewarded for: replies that it samples (GRPO, Shao et al. 2024, arXiv 2402.03300)."""

    reward: str = "exact"
    """What checks a reply against its row's answer: exact, json_schema, regex, unit_tests, or FILE.py:FUNCTION for one
    of yours, which takes both as text and returns a number."""
    samples: int = 8
    """Replies to each prompt, which are compared with each other; each row of a batch takes so many."""
    max_new_tokens: int = 256
    """Longest reply in tokens."""

    def __post_init__(self) -> None:
        if self.reward not in REWARDS and not OWN_REWARD.fullmatch(self.reward):
            raise ValueError(f"reason.reward takes {', '.join(REWARDS)} or FILE.py:FUNCTION, got {self.reward}.")
        at_least("reason.samples", self.samples, 2)
        at_least("reason.max-new-tokens", self.max_new_tokens, 1)


# Groups of options that one task alone reads, which has the name of its group.
OF_ONE_TASK = ("prefer", "reason")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fine-tune a base model on rows and write a proven adapter folder."""

    task: tyro.conf.Positional[TaskName]
    """What to learn."""
    base: str
    """Base model: an alias (smollm2-135m, minilm), a hub id, a local folder or a .gguf file."""
    out: Path
    """The adapter folder to write."""
    quant: Quant = "nf4"
    """How the frozen base weights are stored."""
    revision: str | None = None
    """Branch, tag or commit of a hub base; the commit it resolves to is recorded."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)
    reason: ReasonConfig = field(default_factory=ReasonConfig)
    init_from: Path | None = None
    """Adapter folder to go on from: its weights, rank, alpha and targets; the base must be the one it was made on."""
    resume: bool = False
    """Go on from the newest checkpoint in the adapter folder."""
    allow_changed: tuple[str, ...] = ()
    """Keys, such as `train.lr`, that may differ from how the run that is resumed was started."""
    dry_run: bool = False
    """Check the rows, the loss mask and the plan, then stop before any weight is loaded."""
    twin: bool = False
    """Try the recipe out in seconds: train, reload and merge a random model, two layers deep, of the base's kind on a
    few rows. Nothing is fetched, and nothing kept in `out`."""

    def __post_init__(self) -> None:
        if self.lora.init in ("pissa", "olora") and self.quant != "none":
            raise ValueError(
                f"lora.init={self.lora.init} rewrites the base weights, which a {self.quant} base cannot hold: "
                "use --quant none, or --lora.init eva or loftq."
            )
        if self.init_from is not None and self.lora.init != "default":
            raise ValueError(
                f"lora.init={self.lora.init} starts an adapter anew, and init-from goes on with one: leave one of them "
                "out."
            )
        if self.train.shard_base and self.quant != "none":
            raise ValueError(
                "train.shard-base spreads a base over processes, and packed weights were corrupted by that elsewhere: "
                f"use --quant none with it, or leave it out, and each process holds the {self.quant} base whole."
            )
        for name in OF_ONE_TASK:
            group = getattr(self, name)
            if self.task != name and group != type(group)():
                raise ValueError(
                    f"{name}.* are options of the task {name}, and the task is {self.task}: leave them out."
                )
        if self.task == "reason" and (self.data.streaming or self.data.packing):
            given = "streaming" if self.data.streaming else "packing"
            raise ValueError(f"data.{given} is for rows with replies, and reason samples its own: leave it out.")
        if self.task == "prefer" and self.prefer.loss == "kto" and self.data.streaming:
            raise ValueError(
                "prefer.loss kto sets each row beside a reply to another prompt, so all are needed at the start: leave "
                "out data.streaming."
            )
        if self.lora.init == "loftq" and self.quant != "nf4":
            raise ValueError(f"lora.init=loftq corrects the error of nf4, but quant is {self.quant}.")
        if self.allow_changed and not self.resume:
            raise ValueError("allow-changed needs resume: a run that starts anew is compared with nothing.")
        if self.twin and (self.resume or self.dry_run):
            raise ValueError("twin is a whole run that keeps nothing: leave out resume and dry-run.")
        if self.data.streaming and self.train.steps is None:
            raise ValueError("data.streaming needs train.steps: the number of rows is not known.")


def _finite(name: str, value: float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}.")


def known_metrics(name: str, metrics: Sequence[str]) -> None:
    """Raises ValueError where one of the metrics is none of ours, nor called as those on the hub are."""
    for metric in metrics:
        if metric not in METRICS and not HUB_METRIC.fullmatch(metric):
            raise ValueError(f"{name} takes {', '.join(METRICS)} or hub:NAME, got {metric}.")
    if TOOL_CALLS in metrics and len(metrics) > 1:
        raise ValueError(
            f"{name}: {TOOL_CALLS} asks in the place of each call, others at the end of a row; name it alone."
        )


def at_least(name: str, value: float, least: float) -> None:
    _finite(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _at_most(name: str, value: float, most: float) -> None:
    if value > most:
        raise ValueError(f"{name} must be at most {most:g}, got {value}.")


def _above(name: str, value: float, bound: float) -> None:
    _finite(name, value)
    if value <= bound:
        raise ValueError(f"{name} must be above {bound}, got {value}.")
