"""`config.json` of a base: what its class knows is read as transformers reads it, the rest goes nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lora_ft import base as bases
from lora_ft.errors import LoraFtError, SourceError
from lora_ft.foreign import model
from tests import tiny
from tests.reliability.cases import change

# Of well-known models, as they stand on the hub, with sizes made small.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 128, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "llama-3.1": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 128,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 32768,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "phi-2": {
        "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0,
        "eos_token_id": 50256, "hidden_act": "gelu_new", "hidden_size": 64, "intermediate_size": 128,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi", "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 4, "partial_rotary_factor": 0.4, "qk_layernorm": False,
        "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "torch_dtype": "float16", "vocab_size": 51200,
    },
    "pythia": {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 64, "intermediate_size": 128, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "model_type": "gpt_neox", "num_attention_heads": 4, "num_hidden_layers": 2, "rotary_emb_base": 20000,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16", "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 1024, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "bert": {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0.3,
        "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 64,
        "intermediate_size": 128, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0, "position_embedding_type": "absolute",
        "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522, "id2label": {"0": "no", "1": "yes", "2": "both"},
        "label2id": {"no": 0, "yes": 1, "both": 2}, "problem_type": "single_label_classification",
    },
    "flan-t5": {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 128, "d_kv": 16, "d_model": 64,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 2, "num_heads": 4, "num_layers": 2, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 32128,
    },
    "gemma-2": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 16, "hidden_act":
        "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 64, "intermediate_size": 128,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "float32", "vocab_size": 256000,
    },
}  # fmt: skip
NOT_HEEDED = {"transformers_version", "_name_or_path", "task_specific_params", "cache_implementation", "hidden_act"}


def both(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the configuration as it is read here, and as transformers reads it, without what no model heeds."""
    read = (bases.read_config(folder), AutoConfig.from_pretrained(folder))
    ours, theirs = ({k: v for k, v in one.to_dict().items() if k not in NOT_HEEDED} for one in read)
    return ours, theirs


@pytest.mark.parametrize("name", sorted(tiny.ARCHITECTURES))
def test_each_model_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    ours, theirs = both(tiny.model_folder(tmp_path, name))
    assert ours == theirs


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configurations_lose_nothing_that_a_model_heeds(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    ours, theirs = both(tmp_path)
    left_out = {key for key in theirs.keys() - ours.keys() if isinstance(theirs[key], dict | list | str)}
    assert left_out <= {"position_embedding_type"}
    assert ours == {key: value for key, value in theirs.items() if key not in left_out}


def test_what_no_model_knows_goes_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.model_folder(tmp_path / "base")
    evil = {
        "fusion_config": {"a": True},
        "distributed_config": {"enable_expert_parallel": True},
        "kernel_config": {"a": "evil/kernel"},
        "peft": {"x": 1},
        "custom_generate": "evil/x",
        "to_dict": 5,
    }
    change(folder / "config.json", **evil)
    with caplog.at_level("INFO", logger="lora_ft"):
        config = bases.load(str(folder), quant="none", dtype="float32", device="cpu").model.config
    assert not any(vars(config).get(key) == value for key, value in evil.items())
    assert "custom_generate, distributed_config, fusion_config" in caplog.text
    assert "is nothing that a llama model knows" in caplog.text


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("generation_config.json", {"cache_implementation": "evil"}),
        ("config.json", {"layer_types": 5}),
        ("config.json", {"pad_token_id": 10**12}),
        ("config.json", {"dtype": "load"}),
    ],
)
def test_what_transformers_cannot_load_is_one_message(tmp_path: Path, file: str, fields: dict[str, Any]) -> None:
    folder = tiny.model_folder(tmp_path / "base")
    (folder / file).touch()
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text() or "{}"), **fields}))
    with pytest.raises(LoraFtError, match=r"^base[: ]") as raised:
        bases.load(str(folder), quant="none", dtype="float32", device="cpu")
    assert len(str(raised.value)) < 600


def test_inner_configurations_are_of_what_is_known_too() -> None:
    from transformers import Gemma3Config

    found = {"model_type": "gemma3", "text_config": {"hidden_size": 8, "fusion_config": {"a": 1}}, "x": {"y": 1}}
    assert model.known(Gemma3Config, found) == {"model_type": "gemma3", "text_config": {"hidden_size": 8}}


def test_a_model_of_no_known_type_is_named(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "base")
    change(folder / "config.json", model_type="evil")
    with pytest.raises(LoraFtError, match="transformers does not know this model"):
        bases.load(str(folder), quant="none")
    change(folder / "config.json", model_type=["llama"])
    with pytest.raises(SourceError, match="model_type is missing"):
        bases.load(str(folder), quant="none")
