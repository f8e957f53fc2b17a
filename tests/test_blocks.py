"""Decoder layers computed whole do what they do a part at a time, and only where a probe has proven it."""

import contextlib
import copy
import functools
import logging
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import lora_kernels
from lora_ft import adapters, config, fused, saved
from lora_ft.commands import doctor
from lora_ft.model import blocks, modes
from lora_kernels import backend, dispatch, group, linear
from tests import tiny
from tests.kernel_ops.accuracy import error
from tests.test_fused import on_base, plainly

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models in bfloat16, whose weights are the same in every dtype."""
    made = tmp_path_factory.mktemp("bases")
    return {name: tiny.model_folder(made / name, name, dtype="bfloat16") for name in (*FAMILIES, "granite")}


def adapted(folder: Path, quant: str = "nf4", dtype: str = "float32", **lora_settings) -> peft.PeftModel:
    """Returns a tiny model with an adapter that changes what it says a little, lest rounding grows into chaos."""
    task, loaded = on_base(folder, quant, dtype)
    model = adapters.attach(loaded, config.LoraConfig(**{"rank": 4, **lora_settings}), peft_task=task.peft_task)
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape) / 20)


def layers(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, blocks._Whole)]


def in_parts(model: peft.PeftModel) -> peft.PeftModel:
    """Returns a copy whose layers are computed a part at a time."""
    model = copy.deepcopy(model)
    for layer in layers(model):
        layer.unproven = "a test wants it so"
    return model


def is_whole(model: nn.Module) -> bool:
    return set(blocks.paths(model)) == {"whole"}


def batch(seed: int = 2) -> dict[str, torch.Tensor]:
    """Rows of unlike length, padded."""
    torch.manual_seed(seed)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(6, tiny.VOCAB, (3, 9)), "attention_mask": mask}


def results(model: nn.Module, seed: int = 2) -> dict[str, torch.Tensor]:
    """Returns the logits of a batch and the gradients of all that is trained, by name."""
    model.zero_grad()
    given = batch(seed)
    torch.manual_seed(3)
    with modes.mixed_precision(model):
        logits = model(**given).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, within: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert error(value, wanted[name]) <= within, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_results_and_gradients_are_those_of_parts_and_of_peft(folders, family, quant, monkeypatch):
    model = adapted(folders[family], quant)
    assert is_whole(model)
    found = results(model)
    assert_same(found, results(in_parts(model)))
    plainly(monkeypatch)
    plain = adapted(folders[family], quant)
    assert not layers(plain)
    assert_same(found, results(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_in_parts(folders, family):
    exact = adapted(folders[family], "none", "float32").eval()
    model = adapted(folders[family], "none", "bfloat16").eval()
    assert is_whole(model)
    apart, off = in_parts(model), {"whole": 0.0, "in parts": 0.0}
    for seed in range(6):  # one batch alone has them apart by chance: by 0.7 to 1.3 times
        wanted = results(exact, seed)
        for way, one in (("whole", model), ("in parts", apart)):
            off[way] += sum(error(value, wanted[name]) for name, value in results(one, seed).items())
    assert off["whole"] <= 1.1 * off["in parts"]


@pytest.mark.parametrize("settings", [{"rank": 1}, {"rank": 20}, {"rslora": True}, {"rank_pattern": {"k_proj": 7}}])
def test_any_rank_and_scaling(folders, settings):
    model = adapted(folders["llama"], **settings)
    assert is_whole(model)
    assert_same(results(model), results(in_parts(model)))


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_dropout_drops_for_adapters_alone_one_share_for_each_input(folders, quant, monkeypatch):
    model = adapted(folders["llama"], quant, dropout=0.4).train()
    assert is_whole(model)
    first, again = results(model), results(model)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["logits"], results(model.eval())["logits"])
    # With one seed for all, layers that share an input draw the mask that they share when computed whole.
    monkeypatch.setattr(fused, "draw_seed", lambda x, dropout: 7)
    model.train()
    found, wanted = results(model), results(in_parts(model))
    assert error(found["logits"], first["logits"]) > 1e-3
    assert_same(found, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_computes_the_same_again(folders, reentrant, dropout):
    model = adapted(folders["llama"], dropout=dropout).train()
    wanted = results(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    for layer in layers(model):
        layer._whole = functools.partial(lambda whole, *args: calls.append(1) or whole(*args), layer._whole)
    assert_same(results(model), wanted, within=0)
    assert len(calls) == 2 * len(layers(model))


def test_the_same_text_is_generated_with_and_without_a_cache(folders):
    model = adapted(folders["llama"]).eval()
    prompt = {name: value[:, :4] for name, value in batch().items()}
    said = [
        one.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=cached)
        for one in (model, in_parts(model))
        for cached in (True, False)
    ]
    assert all(torch.equal(said[0], other) for other in said[1:])


def test_attention_is_what_transformers_was_told_to_use(folders, monkeypatch):
    model, seen = adapted(folders["mistral"]).train(), []
    for layer in layers(model):
        layer.self_attn.attention_dropout = 0.25

    def attention(module, q, k, v, mask, **options):
        seen.append((type(module).__name__, q.shape, k.shape, options))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "ours", attention)
    model.get_base_model().config._attn_implementation = "ours"
    assert_same(results(model), results(in_parts(model)))
    whole, apart = seen[:2], seen[2:]
    assert len(whole) == len(apart) == 2
    for one, other in zip(whole, apart, strict=True):
        assert one[:3] == other[:3]
        assert one[3].keys() == other[3].keys()
        assert {"position_ids", "sliding_window", "scaling", "dropout"} <= one[3].keys()
        assert one[3]["sliding_window"] == other[3]["sliding_window"] is not None
        assert one[3]["dropout"] == other[3]["dropout"] == 0.25


def test_states_and_attentions_are_still_handed_out(folders):
    model = adapted(folders["llama"]).eval()
    model.get_base_model().config._attn_implementation = "eager"
    with torch.no_grad():
        wanted = in_parts(model)(**batch(), output_hidden_states=True, output_attentions=True)
        found = model(**batch(), output_hidden_states=True, output_attentions=True)
    for one, other in zip(
        found.hidden_states + found.attentions, wanted.hidden_states + wanted.attentions, strict=True
    ):
        assert torch.equal(one, other)
    assert set(blocks.paths(model)) == {"a part at a time, a hook watches LlamaAttention"}


# What is computed a part at a time, and what is said of it.


def second_adapter(model: peft.PeftModel) -> None:
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])


def watch(name: str):
    def change(model: peft.PeftModel) -> None:
        model.get_submodule(f"base_model.model.model.layers.0.{name}").register_forward_hook(lambda *_: None)
        model.get_submodule(f"base_model.model.model.layers.1.{name}").register_forward_hook(lambda *_: None)

    return change


def train_norms(model: peft.PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.requires_grad_()


def drop_unlike(model: peft.PeftModel) -> None:
    for layer in layers(model):
        layer.self_attn.k_proj.lora_dropout["default"] = nn.Dropout(0.5)


FALLBACKS = {
    "several": (second_adapter, "q_proj: 2 adapters are active"),
    "none": (lambda model: model.base_model.set_adapter([]), "q_proj: 0 adapters are active"),
    "merged": (lambda model: model.merge_adapter(), "q_proj: the adapter is merged"),
    "watched attention": (watch("self_attn"), "a hook watches LlamaAttention"),
    "watched norm": (watch("input_layernorm"), "a hook watches LlamaRMSNorm"),
    "watched projection": (watch("mlp.up_proj"), "up_proj: a hook watches it"),
    "watched adapter": (watch("mlp.up_proj.lora_A.default"), "up_proj: a hook watches a part of the layer"),
    "norm": (train_norms, "a norm is trained"),
    "dropout": (drop_unlike, "projections of one input drop out unlike shares of it"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("why", FALLBACKS)
def test_what_stands_against_it_is_named_and_computed_in_parts(folders, why):
    change, said = FALLBACKS[why]
    model = adapted(folders["llama"], "none").train()
    change(model)
    assert set(blocks.paths(model)) == {f"a part at a time, {said}"}
    apart = in_parts(model)
    for one in (model, apart):
        torch.manual_seed(4)
        one.seen = one(**batch()).logits
    assert torch.equal(model.seen, apart.seen)


@pytest.mark.filterwarnings("ignore")
def test_merged_and_taken_out_again_it_is_whole_again(folders):
    model = adapted(folders["llama"], "none").eval()
    wanted = results(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert is_whole(model)
    assert_same(results(model), wanted)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_an_adapter_of_zeros_says_what_its_base_does(folders, quant):
    model = adapted(folders["llama"], quant, "bfloat16").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with torch.no_grad(), modes.mixed_precision(model):
        for parts in (False, True):
            with blocks.in_parts(model) if parts else contextlib.nullcontext():
                model.eval()
                found = model(**batch()).logits
                model.train()  # what is off drops nothing out
                with model.disable_adapter():
                    assert is_whole(model) == (not parts)
                    assert torch.equal(model(**batch()).logits, found)


def test_switched_off_a_spoiled_adapter_spoils_nothing(folders):
    model = adapted(folders["llama"]).eval()
    with torch.no_grad(), model.disable_adapter():
        wanted = model(**batch()).logits
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(float("nan"))
        assert is_whole(model)
        assert torch.equal(model(**batch()).logits, wanted)


def test_a_norm_that_is_trained_has_its_gradient(folders):
    model = adapted(folders["llama"])
    train_norms(model)
    assert sum("layernorm" in name for name in results(model)) == 4


def test_a_batch_of_several_adapters_is_computed_in_parts(folders):
    model = adapted(folders["llama"]).eval()
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        found, plain = (model(**batch(), adapter_names=names).logits, in_parts(model)(**batch(), adapter_names=names))
        assert torch.equal(found, plain.logits)
        assert not torch.equal(found, model(**batch()).logits)
    assert is_whole(model)


def said_by_blocks(caplog):
    return [record.message for record in caplog.records if record.name == "lora_ft.model.blocks"]


def test_an_input_that_does_not_fit_is_computed_in_parts_and_said_once(folders, caplog):
    caplog.set_level(logging.INFO, "lora_ft.model.blocks")
    blocks._say_once.cache_clear()
    model = adapted(folders["llama"], "nf4", "bfloat16").eval()
    caplog.clear()
    with torch.no_grad():
        # Without autocast the adapters are in float32.
        assert torch.equal(model(**batch()).logits, in_parts(model)(**batch()).logits)
        said = "q_proj does not compute in bfloat16, as the input is"
        assert set(blocks.paths(model)) == {f"a part at a time, {said}"}
        assert said_by_blocks(caplog) == [f"a decoder layer is computed a part at a time: {said}"]
        with modes.mixed_precision(model):
            model(**batch())
            assert is_whole(model)
            (layer,) = layers(model)[:1]
            x, angles = torch.randn(1, 4, 64), torch.randn(2, 1, 4, 16).bfloat16()
            adapters = layer.active()
            assert layer._misfit(x, angles, adapters) == "the input is float32 and a norm bfloat16"
            assert layer._misfit(x.bfloat16(), angles[..., :8], adapters) == "heads are not rotated as a whole"
            assert layer._misfit(x.bfloat16(), None, adapters) == "there are no rows, or no rotation of them"
            assert layer(x, position_embeddings=tuple(angles)).dtype == torch.float32


@pytest.mark.parametrize(
    ("quant", "settings", "said"),
    [
        ("int8", {}, "q_proj is a Linear8bitLt of lora_ft.fused"),
        ("nf4", {"targets": ("q_proj", "v_proj")}, "k_proj is a Linear4bit of bitsandbytes.nn.modules"),
        ("nf4", {"dora": True}, "it was not proven: q_proj: the adapter is a DoraLinearVariant"),
        (
            "none",
            {"save_modules": ("input_layernorm",)},
            "input_layernorm is a ModulesToSaveWrapper of peft.utils.other",
        ),
    ],
)
def test_a_structure_that_is_not_the_familys_is_named(folders, quant, settings, said):
    model = adapted(folders["llama"], quant, **settings)
    assert set(blocks.paths(model)) == {f"a part at a time, {said}"}
    assert results(model)


def test_a_model_of_no_known_family_is_left_alone(folders):
    model = adapted(folders["granite"])
    assert blocks.paths(model) == {}
    assert not layers(model)


# The probe.


def scaled(layer, x, **kwargs):
    """What Granite does: the residual gets a part of what is computed."""
    x = x + 0.9 * layer.self_attn(layer.input_layernorm(x), position_ids=None, attention_mask=None, **kwargs)[0]
    return x + 0.9 * layer.mlp(layer.post_attention_layernorm(x))


def normed_otherwise(norm, x):
    """What Gemma does: the weight is added to one."""
    return (1 + norm.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def interleaved(q, k, cos, sin, **_):
    """What GPT-J does: neighbours are rotated, not halves."""

    def turned(x):
        one, other = x[..., ::2], x[..., 1::2]
        half = cos.shape[-1] // 2
        c, s = cos[:, None, :, :half], sin[:, None, :, :half]
        return torch.stack([one * c - other * s, one * s + other * c], dim=-1).flatten(-2)

    return turned(q), turned(k)


LIES = {
    "the residual": (modeling_llama.LlamaDecoderLayer, "forward", scaled),
    "the norm": (modeling_llama.LlamaRMSNorm, "forward", normed_otherwise),
    "the activation": (modeling_llama.LlamaMLP, "forward", lambda mlp, x: mlp.down_proj(mlp.up_proj(x))),
    "the rotation": (modeling_llama, "apply_rotary_pos_emb", interleaved),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_is_not_what_it_seems_is_refused_by_name(folders, lie, dtype, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lora_ft.model.blocks")
    monkeypatch.setattr(*LIES[lie])
    model = adapted(folders["llama"], "nf4", dtype)
    (path,) = blocks.paths(model)
    assert path == "a part at a time, the probe found that it computes something else"
    assert said_by_blocks(caplog) == [f"2 decoder layers are computed {path}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("wrong", [False, True])
def test_the_way_that_training_takes_is_probed_too(folders, wrong, monkeypatch):
    """A few rows of a packed weight go to the kernel of bitsandbytes, many to a product with the adapter inside."""
    model = adapted(folders["llama"], "nf4", "float32")
    monkeypatch.setattr(dispatch, "gpu", lambda device: dispatch.Gpu("a card", "sm_89", 128))
    if wrong:
        product = group._product_inside
        monkeypatch.setattr(group, "_product_inside", lambda *args: product(*args).mul_(1.1))
    with backend.triton_anywhere():
        assert linear.choose_path(torch.empty(blocks.PROBE_ROWS, 64), packed_weight(model)) == "gemm_4bit"
        found = [blocks._difference(layer) for layer in layers(model)]
    assert found == [("the probe found that it computes something else" if wrong else None)] * 2


def packed_weight(model: nn.Module) -> lora_kernels.Frozen:
    return layers(model)[0].self_attn.q_proj.frozen()


def test_another_activation_is_refused(folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SILU", ())
        assert set(blocks.paths(adapted(folders["llama"]))) == {"a part at a time, its activation is SiLUActivation"}


def test_the_probe_leaves_nothing_behind(folders):
    task, loaded = on_base(folders["llama"], "nf4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "compute_whole", lambda model: None)
        model = adapters.attach(loaded, config.LoraConfig(dropout=0.1), peft_task=task.peft_task).train()
    model.get_submodule("base_model.model.model.layers.1.mlp").eval()
    modes = [module.training for module in model.modules()]
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    blocks.compute_whole(model)
    assert is_whole(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_without_numbers_nothing_is_proven(folders):
    model = adapted(folders["llama"], "none")
    for layer in layers(model):
        assert blocks._difference(layer.to("meta")) == "there are no numbers to prove it on"


def test_a_layer_is_still_of_its_class(folders):
    model = adapted(folders["llama"])
    for layer in layers(model):
        assert isinstance(layer, modeling_llama.LlamaDecoderLayer)
        assert type(layer).__name__ in model.get_base_model()._no_split_modules
    assert type(layers(model)[0]) is type(layers(model)[1])


def test_what_is_loaded_is_whole_and_gives_the_same(folders, tmp_path):
    done = tiny.run(tmp_path / "adapter", folders["llama"], steps=3, sealed=False)
    assert is_whole(done.model)
    loaded = saved.load(done.folder)
    assert is_whole(loaded.model)
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch()).logits, done.model.eval()(**batch()).logits)


def test_where_a_device_is_computed_whole_is_said_and_decided_in_one_place(folders, monkeypatch):
    monkeypatch.setattr(doctor, "_hub_answers", lambda: "answers")
    assert doctor.examine()["decoder_layers"] == "whole, where proven: llama, mistral, qwen2, qwen3"
    model = adapted(folders["llama"])
    monkeypatch.setattr(fused, "refusal_of_device", lambda device: "a test says so")
    assert doctor.examine()["decoder_layers"] == "a part at a time: a test says so"
    assert set(blocks.paths(model)) == {"a part at a time, q_proj: a test says so"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_each_input_is_read_once_for_all_adapters_and_by_the_kernels_of_a_gpu_not_again(folders, monkeypatch):
    """Those make the image of an input with it; on a CPU that of the activation alone is, whose memory it spares."""
    model, calls = adapted(folders["llama"]).eval(), []
    down = lora_kernels.lora.down
    monkeypatch.setattr(lora_kernels.lora, "down", lambda *args: calls.append(1) or down(*args))
    model(**batch())
    assert len(calls) == 3 * len(layers(model))
    calls.clear()
    with backend.triton_anywhere(), torch.no_grad():
        model(**batch())
    assert len(calls) == len(layers(model))
