"""A model of the Llama family as a GGUF file: its settings, its weights under llama.cpp's names, its tokenizer.

Names and settings are those of llama.cpp's own converter, through the tables of the `gguf` package. Weights are written
one after the other, so that memory holds one at a time. The same model gives the same bytes.

Shapes: M outputs, K inputs of a linear layer, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_ft import base as bases
from lora_ft import sources
from lora_ft.errors import UnsupportedModelError
from lora_ft.export import vocabulary
from lora_ft.model.weights import Weights, require

Kind = Literal["f16", "q8_0"]
FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
Q8_0 = gguf.GGMLQuantizationType.Q8_0
# Numbers that share a scale in q8_0; rows of another length stay in float16, as in llama.cpp.
BLOCK = gguf.GGML_QUANT_SIZES[Q8_0][0]
# Rows of a weight that are in float32 at a time.
ROWS = 4096
CONVERTER = "llama.cpp's convert_hf_to_gguf.py may know more: run it on the folder that `lora-ft merge` writes"


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls an architecture, and how it differs from transformers."""

    arch: gguf.MODEL_ARCH
    permuted: bool
    """Whether it rotates neighbouring numbers of a head, where transformers rotates its two halves."""
    frequencies: bool
    """Whether it reads rotary frequencies of its own from the file."""


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, permuted=True, frequencies=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, permuted=True, frequencies=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, permuted=False, frequencies=False),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, permuted=False, frequencies=False),
}


@dataclass
class Described:
    """A model as llama.cpp is told of it."""

    family: Family
    config: PreTrainedConfig
    skeleton: PreTrainedModel
    """On the meta device."""

    @classmethod
    def of(cls, folder: Path) -> Described:
        """Returns the model that the configuration in `folder` describes.

        Raises:
            UnsupportedModelError: llama.cpp would compute something else of it, or it is not known that it does not.
        """
        config = bases.read_config(folder)
        family = FAMILIES.get(config.model_type)
        if family is None or type(config) not in AutoModelForCausalLM._model_mapping:
            raise UnsupportedModelError(
                f"{folder.name}: a {config.model_type} model is not written as GGUF; {', '.join(sorted(FAMILIES))} "
                f"are. {CONVERTER}."
            )
        heads = [name for name in config.architectures or () if not name.endswith("ForCausalLM")]
        problems = [f"it is a {heads[0]}, which generates nothing"] if heads else []
        if config.hidden_act != "silu":
            problems.append(f"its hidden_act is {config.hidden_act}, and llama.cpp computes silu")
        rope = config.rope_parameters["rope_type"]
        if rope not in ("default", "linear", "llama3") or (rope == "llama3" and not family.frequencies):
            problems.append(f"its rotary positions are of the kind {rope}")
        if config.rope_parameters.get("partial_rotary_factor", 1) != 1:
            problems.append("it rotates a part of each head only")
        if problems:
            raise UnsupportedModelError(f"{folder.name} is not written as GGUF: {'; '.join(problems)}. {CONVERTER}.")
        return cls(family, config, bases.skeleton(folder.name, config, AutoModelForCausalLM))

    @property
    def head_size(self) -> int:
        """Numbers of a head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def name_of(self, parameter: str) -> str:
        """Returns llama.cpp's name of a parameter. Raises UnsupportedModelError where it has none."""
        names = gguf.get_tensor_name_map(self.family.arch, self.config.num_hidden_layers)
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(f"{parameter} has no name in llama.cpp's {self.config.model_type} models.")
        return name

    def in_order(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the rows [M, ...] of a parameter in the order in which llama.cpp has them."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(parameter.split(".")[-2])
        if not self.family.permuted or count is None:
            return tensor
        halves = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    def is_tied(self) -> bool:
        """Returns whether the output embeddings are the input embeddings."""
        return bool(self.config.tie_word_embeddings)

    def add_settings(self, writer: gguf.GGUFWriter) -> None:
        """Writes the sizes of the model."""
        config = self.config
        writer.add_vocab_size(config.vocab_size)
        # llama.cpp lets these models look back without limit, which beyond a window is another model.
        writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        if config.rope_parameters["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(config.rope_parameters["factor"]))

    def frequencies(self) -> np.ndarray[Any, Any] | None:
        """Returns what llama.cpp divides its rotary frequencies by, float32 [head size / 2], None for nothing."""
        if self.config.rope_parameters["rope_type"] != "llama3":
            return None
        exponents = torch.arange(0, self.head_size, 2, dtype=torch.int64).float() / self.head_size
        plain = 1.0 / (self.config.rope_parameters["rope_theta"] ** exponents)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        return (plain / scaled).numpy()


def write(folder: Path, file: Path, kind: Kind, name: str) -> None:
    """Writes the model in a folder of plain safetensors, with its tokenizer and chat template, as one GGUF file.

    Args:
        kind: of the weights; what is no matrix is float32, as in llama.cpp.
        name: of the model, for people.

    Raises:
        UnsupportedModelError: the model or its tokenizer has no exact counterpart in llama.cpp.
    """
    sources.check_files(folder)
    model = Described.of(folder)
    tokenizer = bases.load_tokenizer(folder)
    vocabulary.check(folder.name, tokenizer, model.config.vocab_size)
    weights = Weights(folder, model.skeleton, "none", torch.float32, set())
    if weights.prequantized:
        raise UnsupportedModelError(f"{folder.name} is stored quantized by bitsandbytes: export the 16-bit model.")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[model.family.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    model.add_settings(writer)
    vocabulary.add(writer, tokenizer, model.config.vocab_size)
    with weights.opened() as reader:
        stored = _stored(model, weights, reader)
        frequencies = model.frequencies()
        if frequencies is not None:
            writer.add_tensor_info("rope_freqs.weight", frequencies.shape, frequencies.dtype, frequencies.nbytes)
        for parameter in stored:
            shape = tuple(model.skeleton.get_parameter(parameter).shape)
            _announce(writer, model.name_of(parameter), shape, kind)
        try:
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if frequencies is not None:
                writer.write_tensor_data(frequencies)
            for parameter in stored:
                weight = reader.original(parameter)
                if weight.shape != model.skeleton.get_parameter(parameter).shape:
                    raise UnsupportedModelError(
                        f"{folder.name}: {parameter} is not of the shape that config.json says."
                    )
                writer.write_tensor_data(_encoded(parameter, model.in_order(parameter, weight), kind))
        finally:
            writer.close()


def _stored(model: Described, weights: Weights, reader: Any) -> list[str]:
    """Returns the parameters to write, in the model's order. Raises UnsupportedModelError where one is not there."""
    embedding, head = model.skeleton.get_input_embeddings(), model.skeleton.get_output_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.skeleton.named_modules()}
    inputs, outputs = names[id(embedding)], names[id(head)]
    found = [name for name, _ in model.skeleton.named_parameters(remove_duplicate=False)]
    found = list(dict.fromkeys(found if outputs in found else [*found, outputs]))
    # Without output embeddings of its own llama.cpp takes the input embeddings.
    if model.is_tied() and (
        outputs not in weights.stored_name or torch.equal(reader.original(outputs), reader.original(inputs))
    ):
        found.remove(outputs)
    require(weights, [name for name in found if name not in weights.stored_name], "the model")
    return found


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    if _is_q8_0(shape, kind):
        bytes_shape = gguf.quant_shape_to_byte_shape(shape, Q8_0)
        writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), int(np.prod(bytes_shape)), Q8_0)
        return
    dtype = np.dtype(np.float16 if len(shape) > 1 else np.float32)
    writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)


def _encoded(parameter: str, tensor: torch.Tensor, kind: Kind) -> np.ndarray[Any, Any]:
    """Returns a parameter as its kind has it."""
    if _is_q8_0(tuple(tensor.shape), kind):
        return np.concatenate([gguf.quants.quantize(rows.float().numpy(), Q8_0) for rows in _blocks(tensor)])
    if tensor.ndim == 1:
        return tensor.float().numpy()
    half = tensor.to(torch.float16).contiguous()
    if not torch.isfinite(half).all():
        raise UnsupportedModelError(f"{parameter} holds numbers too large for f16: use --quant q8_0.")
    return half.numpy()


def _is_q8_0(shape: tuple[int, ...], kind: Kind) -> bool:
    return kind == "q8_0" and len(shape) > 1 and shape[-1] % BLOCK == 0


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from tensor.split(ROWS)
