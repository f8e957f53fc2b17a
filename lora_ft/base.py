"""Load the frozen base, quantized, with its tokenizer."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from lora_ft.config import Quant
from lora_ft.errors import LoraFtError, SourceError, UnsupportedModelError
from lora_ft.foreign import growth
from lora_ft.foreign.model import check_tokenizer, open_config
from lora_ft.foreign.reading import first_line, opened
from lora_ft.model import four_bits
from lora_ft.sources import Source, count_numbers, resolve
from lora_ft.system import allowance, heap, processes

log = logging.getLogger(__name__)


class _Once(logging.Filter):
    """Lets each message through once: bitsandbytes repeats one for every layer of every int8 forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.msg not in self.seen
        self.seen.add(record.msg)
        return new


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())

# Numbers that the files may lack: the new head of a task, or embeddings tied to those they hold.
MADE_ANEW = 1 << 24

# What transformers puts on the body of an encoder, for the state of the first token.
SPARE = "pooler"
# Sub-configurations that mark a model as one of images, sound or video.
OTHER_MODALITIES = ("vision_config", "audio_config", "speech_config", "image_config", "video_config", "num_mel_bins")


@dataclass
class Base:
    """A frozen model, its tokenizer and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    quant: Quant
    dtype: torch.dtype
    """The dtype activations and dequantized weights are computed in."""
    left_whole: tuple[str, ...]
    """Linear layers that are not quantized although quantization was asked for."""
    task_heads: tuple[str, ...]
    """Modules on top of the body that a task trains and saves whole, such as a classifier."""

    @property
    def device(self) -> torch.device:
        return self.model.device


def load(
    name: str | Source,
    *,
    quant: Quant = "nf4",
    model_class: Any = AutoModelForCausalLM,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 42,
    config_changes: dict[str, Any] | None = None,
    why_dtype: str = "asked for",
) -> Base:
    """Returns the base `name` with frozen weights, quantized as it is read, one tensor at a time.

    Args:
        name: an alias, a local folder, a `.gguf` file, a hub id, or a source already resolved.
        quant: `nf4` (4 bits, double quantization; Dettmers et al. 2023, arXiv 2305.14314), `int8`
            (Dettmers et al. 2022, arXiv 2208.07339) or `none`. A base that is already quantized keeps its own.
        model_class: an `AutoModelFor...` class; a head that the weights lack is made from `seed`.
        revision: branch, tag or commit of a hub base.
        dtype: `auto`, or a torch dtype by name.
        device: `cuda`, `cpu`, ...; unset, the GPU where there is one.
        config_changes: fields of the model's configuration to set, such as `num_labels`.
        why_dtype: why a dtype is named, for the log.

    Raises:
        SourceError: the weights could not be had, are stored in another quantization than asked for, or are not
            all that the configuration calls for.
        UnsupportedModelError: not a text model, not one that `model_class` can be, or quantized by other means.
    """
    source = name if isinstance(name, Source) else resolve(name, revision)
    device = device or processes.gpu() or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        allowance.allot(torch.get_num_threads, torch.set_num_threads)
    compute_dtype, why = choose_dtype(dtype, device)
    log.info("computing in %s: %s", str(compute_dtype).removeprefix("torch."), why if dtype == "auto" else why_dtype)
    config = text_config(source, model_class)
    for key, value in (config_changes or {}).items():
        setattr(config, key, value)
    tokenizer = load_tokenizer(source.folder)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    stored = stored_quant(config, source, quant)
    outline = skeleton(source.name, config, model_class)
    _compare_size(source, outline)
    output, task_heads = heads(outline)
    misread = four_bits.misread(outline, but=output + task_heads) if quant == "nf4" and device == "cpu" else ()
    if misread and not stored:
        log.info("%s; %d layers stay whole", four_bits.MISREAD, len(misread))
    set_seed(seed)
    disable_progress_bar()  # one bar a tensor, gone in seconds
    with heap.large_blocks_returned():
        model, loading = opened(
            model_class,
            source.folder,
            lambda reason: SourceError(f"{source.name}: transformers cannot load it: {reason}."),
            config=config,
            dtype=compute_dtype,
            device_map={"": device},
            use_safetensors=True,
            quantization_config=None if stored else quantization(quant, compute_dtype, output + task_heads + misread),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_complete(source, model, loading, task_heads)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if stored:
        _recast(model, compute_dtype)
        wrong = [name for name in misread if isinstance(model.get_submodule(name), bnb.nn.Linear4bit)]
        if wrong:
            raise UnsupportedModelError(
                f"{source.name}: {four_bits.MISREAD}, as of {wrong[0]}: use the unquantized model."
            )
    four_bits.keep_in_place(model)
    left_whole = whole_linears(model) if quant != "none" else ()
    if left_whole:
        log.info("not quantized: %s", ", ".join(left_whole))
    return Base(model, tokenizer, source, quant, compute_dtype, left_whole, task_heads)


def load_tokenizer(folder: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in `folder`; one without a padding token pads with its end of text.

    That is safe here because masks are made by position, never by comparing ids.
    """
    check_tokenizer(folder)

    def failed(reason: str) -> SourceError:
        return SourceError(f"{folder.name}: the base has no tokenizer that transformers can read: {reason}.")

    options = {}
    if (folder / "config.json").exists():
        # Else transformers reads it on its own, to choose the class, with whatever stands in it.
        try:
            options["config"] = open_config(folder)
        except LoraFtError:
            raise
        except Exception as error:
            reason = first_line(error)
            raise UnsupportedModelError(f"{folder.name}: transformers does not know this model: {reason}.") from None
    tokenizer = opened(AutoTokenizer, folder, failed, **options)
    # Also those that transformers made of other files.
    for problem in growth.problems_of(tokenizer):
        raise SourceError(f"{folder.name}: the tokenizer's {problem}: take the tokenizer from its makers.")
    # From a folder without one, transformers makes a tokenizer of its special tokens and, at most, a space.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise SourceError(f"{folder.name}: the base has no tokenizer: add its files, such as tokenizer.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def choose_dtype(asked: str, device: str) -> tuple[torch.dtype, str]:
    """Returns the compute dtype and the reason for it."""
    if asked != "auto":
        return getattr(torch, asked), "asked for"
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float16, "this GPU has no native bfloat16"
    if device == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "this processor multiplies bfloat16 natively"
        return torch.float32, "this processor has no bfloat16 instructions, and emulating them is slower"
    return torch.float32, f"the safe choice on {device}"


def heads(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the output embeddings and of the task's own heads; neither is ever quantized.

    The first are tied to the input embeddings or as sensitive as they are; the second are trained whole.
    """
    embeddings = model.get_output_embeddings()
    output = tuple(n for n, m in model.named_modules() if embeddings is not None and m is embeddings)
    if not hasattr(model, model.base_model_prefix):
        return output, ()
    body = model.base_model_prefix
    on_top = (n for n, m in model.named_children() if n != body and any(True for _ in m.parameters()))
    return output, tuple(n for n in on_top if not any(name.split(".")[0] == n for name in output))


def is_spare(name: str) -> bool:
    """Returns whether a weight of a model belongs to what transformers puts on an encoder and no task reads.

    Many encoders come without it: it is made anew then, and nothing is made of it.
    """
    return name.split(".")[0] == SPARE


def whole_linears(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of linear layers kept in full precision."""
    return tuple(n for n, m in model.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear)


def read_config(folder: Path) -> PreTrainedConfig:
    """Returns the model's configuration, without any name in it that makes transformers fetch code.

    `attn_implementation` and `experts_implementation` can name a kernel on the hub, which loading the model downloads
    and imports; which one to use is for this machine to say, not for the base.
    """
    config = open_config(folder)
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation = None
    config._experts_implementation = None
    return config


def longest_row(source: Source, model_class: Any, asked: int) -> int:
    """Returns how many tokens a row may have: `asked`, or as many as the base has positions for, and then says so."""
    held = positions(text_config(source, model_class), source.name)
    if held is None or asked <= held:
        return asked
    log.info("rows end at %d tokens, for which %s has positions, and not at %d", held, source.name, asked)
    return held


def positions(config: PreTrainedConfig, name: str) -> int | None:
    """Returns how many tokens in a row a model was made for, None where nothing bounds them.

    More find no row in a table of positions. Rotary ones could be computed, but the model never saw them.
    """
    count = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return None
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        return count
    # Models after RoBERTa count from the row after that of the padding.
    for place, table in skeleton(name, config, AutoModel).named_modules():
        if place.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            return table.num_embeddings - table.padding_idx - 1
    return count


def text_config(source: Source, model_class: Any) -> PreTrainedConfig:
    """Returns the configuration of a base. Raises UnsupportedModelError where `model_class` cannot be made of it."""
    try:
        config = read_config(source.folder)
    except LoraFtError:
        raise
    # Not only ValueError: a number where a list should be makes a configuration raise anything.
    except Exception as error:
        reason = first_line(error)
        raise UnsupportedModelError(f"{source.name}: transformers does not know this model: {reason}.") from None
    other = next((name for name in OTHER_MODALITIES if getattr(config, name, None) is not None), None)
    if other is not None:
        raise UnsupportedModelError(
            f"{source.name} is a {config.model_type} model with a {other}: models of images, sound or video are out "
            "of scope; use a text-only base."
        )
    if type(config) not in model_class._model_mapping:
        raise UnsupportedModelError(
            f"{source.name} is a {config.model_type} model, which has no {model_class.__name__.removeprefix('Auto')} "
            "form: choose a task that fits it."
        )
    reads_ahead = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if model_class is AutoModelForCausalLM and reads_ahead:
        raise UnsupportedModelError(
            f"{source.name} is a {config.model_type} model, which sees the words it would have to predict: choose "
            "a task that fits it, such as classify, or a base that generates."
        )
    if model_class is AutoModel and config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{source.name} is a {config.model_type} model, which reads one text to write another: choose a task that "
            "fits it, such as seq2seq, or an encoder or a decoder."
        )
    return config


def skeleton(name: str, config: PreTrainedConfig, model_class: Any) -> PreTrainedModel:
    """Returns the model on the meta device."""
    try:
        with torch.device("meta"):
            return model_class.from_config(config)
    # As above: sizes that do not go together raise what the arithmetic does.
    except Exception as error:
        raise UnsupportedModelError(f"{name}: config.json describes no model: {first_line(error)}.") from None


def _compare_size(source: Source, skeleton: PreTrainedModel) -> None:
    """Raises SourceError where the weight files hold far fewer numbers than the model is made of.

    A weight that the files lack, or hold in another shape, is made anew by transformers, as large as the
    configuration says.
    """
    called_for = sum(parameter.numel() for parameter in skeleton.parameters())
    held = count_numbers(source.folder)
    if called_for > 2 * held + MADE_ANEW:
        raise SourceError(
            f"{source.name}: config.json calls for {called_for:,} numbers, but the weight files hold {held:,}: they "
            "are not of one model; fetch the base again."
        )


def stored_quant(config: PreTrainedConfig, source: Source, quant: Quant) -> bool:
    """Returns whether the weights are already quantized, having checked that `quant` says the same."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method", "bitsandbytes")
    if method == "bitsandbytes":
        four_bits = stored.get("bnb_4bit_quant_type", "fp4") if stored.get("load_in_4bit") else "unknown"
        method = "int8" if stored.get("load_in_8bit") else four_bits
    if method not in ("nf4", "int8"):
        raise UnsupportedModelError(
            f"{source.name} is stored in {method} quantization; the nf4 and int8 of bitsandbytes are supported. Use "
            "the unquantized model."
        )
    if method != quant:
        raise SourceError(f"{source.name} is stored as {method}, but --quant is {quant}: use --quant {method}.")
    return True


def _check_complete(source: Source, model: PreTrainedModel, loading: Any, task_heads: tuple[str, ...]) -> None:
    """Raises SourceError where a weight below the task's heads was not in the files, or had another shape there.

    transformers fills such weights with random numbers and goes on; of quantized ones it does not compare the shape.
    """
    unlike = {name for name, *_ in loading["mismatched_keys"]}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            state = getattr(module.weight, "quant_state", None)
            shape = module.weight.shape if state is None else state.shape
            if tuple(shape) != (module.out_features, module.in_features):
                unlike.add(f"{name}.weight")
    missing = set(loading["missing_keys"])
    for names, what in ((missing, "not there"), (unlike, "of another shape")):
        below = sorted(n for n in names if n.split(".")[0] not in task_heads and not (names is missing and is_spare(n)))
        if below:
            more = f" and {len(below) - 1} more" if below[1:] else ""
            raise SourceError(
                f"{source.name}: {below[0]}{more}, which config.json and the task call for, {'are' if more else 'is'} "
                f"{what} in its weight files: fetch the base again, or choose another."
            )


def _recast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Computes in `dtype` what a stored quantization left whole, and with what it quantized, as in any other base.

    transformers leaves a base that is already quantized in the dtype of the machine that stored it.
    """
    in_float32 = [re.compile(name.replace("*", ".*")) for name in model._get_dtype_plan(dtype)]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(kept.search(name) for kept in in_float32):
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype


def quantization(quant: Quant, dtype: torch.dtype, skipped: tuple[str, ...]) -> BitsAndBytesConfig | None:
    if quant == "none":
        return None
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skipped))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(skipped),
    )
