"""The fused layers are PEFT's in everything but speed: results, gradients, files, and what they fall back on."""

import contextlib
import copy
import logging
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_ft import adapters, base, config, fused, saved, tasks
from lora_ft.commands import doctor
from lora_ft.model import four_bits, modes
from tests import tiny
from tests.kernel_ops.accuracy import assert_as_good, error

# K is whole blocks of every size below: others bitsandbytes itself misreads on some processors (`four_bits.unpacked`).
M, N, K, RANK = 21, 80, 128, 8

KINDS = {
    "dense": {},
    "conv1d": {},
    "int8": {},
    "nf4-nested": {"quant_type": "nf4", "compress_statistics": True},
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4", "compress_statistics": True},
    "nf4-of-32": {"quant_type": "nf4", "compress_statistics": False, "blocksize": 32},
    "nf4-of-128": {"quant_type": "nf4", "compress_statistics": True, "blocksize": 128},
    "nf4-in-bfloat16": {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16},
}
"""The layers that users bring; for those in 4 bits, how they are quantized."""


class Model(nn.Module):
    """One linear layer, as a model that PEFT takes."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj
        self.is_loaded_in_4bit = isinstance(proj, bnb.nn.Linear4bit)
        self.is_loaded_in_8bit = isinstance(proj, bnb.nn.Linear8bitLt)

    def forward(self, x):
        return self.proj(x)


def frozen_layer(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    """Returns a frozen layer [N, K], the same for the same kind and dtype."""
    torch.manual_seed(0)
    weight, offset = torch.randn(N, K) / 8, torch.randn(N)
    if kind == "dense":
        layer = nn.Linear(K, N, bias)
        layer.weight.data = weight
    elif kind == "conv1d":
        layer = Conv1D(N, K)
        layer.weight.data = weight.t().contiguous()
    elif kind == "int8":
        layer = bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(K, N, bias, compute_dtype=dtype)
        layer.weight = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, module=layer, **KINDS[kind])
    if layer.bias is not None:
        layer.bias.data = offset
    four_bits.keep_in_place(layer)
    layer = layer.to("cpu")
    if kind in ("dense", "conv1d"):
        layer = layer.to(dtype)
    elif layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer.requires_grad_(False)


def exact_weight(layer: nn.Module) -> torch.Tensor:
    """Returns the frozen weight [N, K] as it was stored, in float64."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        return four_bits.unpacked(weight, state).double()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return weight.CB.double() * weight.SCB.double()[:, None] / 127
    return (weight.t() if isinstance(layer, Conv1D) else weight).double()


def adapted(layer: nn.Module, *, ours: bool, **settings) -> peft.PeftModel:
    """Returns a copy of the layer with an adapter that is not zero, the same for fused and plain."""
    made = peft.LoraConfig(**{"r": RANK, "lora_alpha": 24, "target_modules": ["proj"], **settings})
    if ours:
        fused.register(made)
    model = peft.get_peft_model(Model(copy.deepcopy(layer)), made)
    randomize(model)
    assert isinstance(model.base_model.model.proj, fused._Fused) == ours
    return model


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape) / 4)


def both(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True, **settings) -> list[peft.PeftModel]:
    """Returns the adapted layer in our form and in PEFT's."""
    layer = frozen_layer(kind, dtype, bias)
    return [adapted(layer, ours=ours, **settings) for ours in (True, False)]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(3, M // 3, K).to(dtype), torch.randn(3, M // 3, N).to(dtype)


def results(model: nn.Module, x: torch.Tensor, dy: torch.Tensor, autocast: torch.dtype | None = None):
    """Returns y and the gradients of x and of all that is trained, by name."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x)
    y.backward(dy.to(y.dtype))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def exact(layer: nn.Module, model: peft.PeftModel, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what `results` does, in float64."""
    inner = model.base_model.model.proj
    a, b = (part["default"].weight.double().detach().requires_grad_() for part in (inner.lora_A, inner.lora_B))
    x = x.double().requires_grad_()
    y = x @ exact_weight(layer).t() + inner.scaling["default"] * x @ a.t() @ b.t()
    y = y if layer.bias is None else y + layer.bias.double()
    y.backward(dy.double())
    prefix = "base_model.model.proj.lora_{}.default.weight"
    return {"y": y.detach(), "x": x.grad, prefix.format("A"): a.grad, prefix.format("B"): b.grad}


def path(model: nn.Module) -> str:
    (found,) = fused.paths(model)
    return found


def assert_same(found, wanted, within: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert error(value, wanted[name]) <= within, name


@pytest.mark.parametrize(("kind", "bias"), [*((kind, True) for kind in KINDS), ("dense", False), ("nf4", False)])
def test_in_float32_result_and_gradients_are_those_of_peft(kind, bias):
    ours, plain = both(kind, bias=bias)
    x, dy = inputs()
    assert_same(results(ours, x, dy), results(plain, x, dy))
    assert path(ours).startswith("fused")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_under_autocast_it_is_as_near_to_the_truth_as_peft(kind, dtype):
    layer = frozen_layer(kind, dtype)
    ours, plain = both(kind, dtype)
    x, dy = inputs(dtype)
    found, wanted = (results(model, x, dy, autocast=dtype) for model in (ours, plain))
    truth = exact(layer, ours, x, dy)
    assert found.keys() == wanted.keys() == truth.keys()
    for name in found:
        assert_as_good(found[name], wanted[name], truth[name])


@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4-nested", "int8"])
def test_what_is_wider_than_autocast_comes_back_in_the_dtype_that_peft_gives(kind):
    ours, plain = both(kind, torch.bfloat16)
    x, dy = inputs(torch.float32)
    found, wanted = (results(model, x, dy, autocast=torch.bfloat16) for model in (ours, plain))
    truth = exact(frozen_layer(kind, torch.bfloat16), ours, x, dy)
    assert path(ours).startswith("fused")
    for name in found:
        # Not by `assert_as_good`: what comes back in float32 was rounded to bfloat16 on the way.
        assert found[name].dtype == wanted[name].dtype
        assert error(found[name], truth[name]) <= 1.1 * error(wanted[name], truth[name])


@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4-nested", "int8"])
def test_a_backward_pass_within_autocast_is_that_outside_it(kind):
    ours, _ = both(kind, torch.bfloat16)
    x, dy = inputs(torch.bfloat16)
    found = []
    for within in (True, False):
        ours.zero_grad()
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            y.backward(dy)
        found.append([x.grad, *(p.grad for p in ours.parameters() if p.requires_grad)])
    assert all(error(one, other) < 1e-2 and one.dtype == other.dtype for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4-nested", "int8"])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, 4, K)])
def test_any_leading_dimensions(kind, shape):
    ours, plain = both(kind)
    torch.manual_seed(3)
    x = torch.randn(shape)
    with torch.no_grad():
        assert_same({"y": ours(x)}, {"y": plain(x)})
        assert ours(x).shape == (*shape[:-1], N)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"r": 1}, {"r": 40}, {"lora_alpha": 1}])
def test_the_scaling_and_the_rank_are_the_adapters(settings):
    ours, plain = both("nf4-nested", **settings)
    x, dy = inputs()
    assert_same(results(ours, x, dy), results(plain, x, dy))


def test_a_bias_that_is_trained_has_its_gradient():
    ours, plain = both("dense", bias=True)
    for model in (ours, plain):
        model.base_model.model.proj.base_layer.bias.requires_grad_()
    x, dy = inputs()
    found = results(ours, x, dy)
    assert "base_model.model.proj.base_layer.bias" in found
    assert_same(found, results(plain, x, dy))


@pytest.mark.parametrize("kind", ["dense", "nf4-nested", "int8"])
def test_dropout_is_that_of_a_seed_from_torch_and_only_in_training(kind):
    p = 0.3
    ours, plain = both(kind, lora_dropout=p)
    x, dy = inputs()
    torch.manual_seed(7)
    found = results(ours.train(), x, dy)
    torch.manual_seed(7)
    keep = lora_kernels.keep_mask(x.view(-1, K), p, lora_kernels.new_seed()).view(x.shape)
    assert 0.1 < 1 - float(keep.float().mean()) < 0.5
    plain.base_model.model.proj.lora_dropout["default"] = Masked(keep / (1 - p))
    assert_same(found, results(plain.train(), x, dy))
    plain.base_model.model.proj.lora_dropout["default"] = nn.Identity()
    assert_same(results(ours.eval(), x, dy), results(plain.eval(), x, dy))


class Masked(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize("kind", ["conv1d", "nf4-nested", "int8"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_again(kind, reentrant):
    ours, _ = both(kind, lora_dropout=0.4)
    x, dy = inputs()

    class Checkpointed(Model):
        def forward(self, x):
            return checkpoint(self.proj, x, use_reentrant=reentrant)

    torch.manual_seed(5)
    wanted = results(ours, x, dy)
    torch.manual_seed(5)
    found = results(Checkpointed(ours), x, dy)
    assert all(torch.equal(found[name if name in ("x", "y") else f"proj.{name}"], wanted[name]) for name in wanted)
    torch.manual_seed(6)
    assert not torch.equal(results(ours, x, dy)["y"], wanted["y"])


@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4-nested"])
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_data_get_shapes_and_gradients(kind, device):
    ours, _ = both(kind, lora_dropout=0.1)
    on_fakes = FakeTensorMode(allow_non_fake_inputs=True) if device == "fake" else contextlib.nullcontext()
    if device == "meta":
        for name, parameter in list(ours.named_parameters()):
            if "lora_" in name or kind != "nf4-nested":
                layer = ours.get_submodule(name.rpartition(".")[0])
                setattr(layer, name.rpartition(".")[2], nn.Parameter(parameter.to("meta"), parameter.requires_grad))
    with on_fakes:
        y = ours(torch.empty(2, 5, K, device="meta" if device == "meta" else "cpu"))
        y.sum().backward()
    assert y.shape == (2, 5, N)
    assert ours.base_model.model.proj.lora_A["default"].weight.grad.shape == (RANK, K)


# What PEFT computes instead, and what is said of it.


def two_adapters(model: peft.PeftModel) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["proj"])
    model.add_adapter("second", settings)
    model.base_model.set_adapter(["default", "second"])
    randomize(model)


def hooked(model: peft.PeftModel) -> None:
    model.base_model.model.proj.lora_A["default"].register_forward_hook(lambda *_: None)


FALLBACKS = {
    "several": ({}, two_adapters, "2 adapters are active"),
    "none": ({}, lambda model: model.base_model.set_adapter([]), "0 adapters are active"),
    "merged": ({}, lambda model: model.merge_adapter(), "the adapter is merged"),
    "off": ({}, lambda model: model.base_model.disable_adapter_layers(), "the adapter is switched off"),
    "dora": ({"use_dora": True}, lambda model: None, "the adapter is a DoraLinearVariant"),
    "bias": ({"lora_bias": True}, lambda model: None, "the adapter has a bias"),
    "hook": ({}, hooked, "a hook watches a part of the layer"),
}


@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4-nested"])
@pytest.mark.parametrize("why", FALLBACKS)
@pytest.mark.filterwarnings("ignore")
def test_what_the_kernels_do_not_take_is_computed_and_named_by_peft(kind, why):
    settings, change, said = FALLBACKS[why]
    ours, plain = both(kind, **settings)
    for model in (ours, plain):
        change(model)
    assert fused.paths(ours.base_model.model) == {f"through PEFT, {said}": ["proj"]}
    x, _ = inputs()
    with torch.no_grad():
        assert torch.equal(ours.base_model(x), plain.base_model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4-nested", "int8"])
def test_merged_and_taken_out_again_it_is_fused_again(kind):
    ours, plain = both(kind)
    x, _ = inputs()
    with torch.no_grad():
        for model in (ours, plain):
            model.merge_adapter()
        assert torch.equal(ours(x), plain(x))
        for model in (ours, plain):
            model.unmerge_adapter()
        assert path(ours).startswith("fused")
        assert_same({"y": ours(x)}, {"y": plain(x)})
        with ours.disable_adapter(), plain.disable_adapter():
            assert torch.equal(ours(x), plain(x))


def test_a_batch_of_several_adapters_goes_through_peft():
    ours, plain = both("nf4-nested")
    x, _ = inputs()
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        found, wanted = (model.eval()(x, adapter_names=names) for model in (ours, plain))
        assert torch.equal(found, wanted)
        assert not torch.equal(found, ours(x))


def test_a_base_that_is_trained_goes_through_peft():
    ours, plain = both("dense")
    for model in (ours, plain):
        model.base_model.model.proj.base_layer.weight.requires_grad_()
    x, dy = inputs()
    found = results(ours, x, dy)
    assert "base_model.model.proj.base_layer.weight" in found
    assert_same(found, results(plain, x, dy), within=0)
    assert path(ours) == "through PEFT, the base is trained too"


class Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_goes_through_peft():
    louder = Louder(K, N)
    louder.load_state_dict(frozen_layer("dense").state_dict())
    ours, plain = (adapted(louder.requires_grad_(False), ours=ours) for ours in (True, False))
    x, _ = inputs()
    assert torch.equal(ours(x), plain(x))
    assert path(ours) == "through PEFT, the base is a Louder of Parameter"


def test_dtypes_that_do_not_meet_go_through_peft_and_are_said_once(caplog):
    caplog.set_level(logging.INFO, "lora_ft")
    fused._say_once.cache_clear()
    ours, plain = both("nf4-nested", torch.bfloat16)
    x, dy = inputs(torch.bfloat16)
    for _ in range(2):
        assert_same(results(ours, x, dy), results(plain, x, dy), within=0)
    why = "the base computes in bfloat16 and the adapter in float32, outside torch.autocast"
    assert path(ours) == f"through PEFT, {why}"
    assert [record.message for record in caplog.records] == [f"a layer goes through PEFT: {why}"]
    results(ours, x, dy, autocast=torch.bfloat16)
    assert path(ours) == "fused, 4-bit base"


@pytest.mark.parametrize("x", [torch.randn(2, K + 1), torch.randn(2, K, dtype=torch.float64)])
def test_what_peft_refuses_is_refused(x):
    ours, plain = both("dense")
    with pytest.raises(RuntimeError) as wanted:
        plain(x)
    with pytest.raises(RuntimeError, match=str(wanted.value)[:20]):
        ours(x)


@pytest.mark.parametrize("made", ["there is no C++ compiler", object()])
def test_what_makes_a_cpu_slower_is_told(made, caplog, monkeypatch):
    monkeypatch.setattr(fused, "library", lambda dtype: made if dtype == torch.float32 else "")
    ours, _ = both("dense")
    with caplog.at_level("INFO", "lora_ft"):
        fused.tell(ours)
    told = [record.message for record in caplog.records if "torch several passes" in record.message]
    assert told == (
        ["norms, activations and losses take torch several passes each, for want of compiled loops: " + made]
        if isinstance(made, str)
        else []
    )


def test_no_rows_are_no_rows():
    ours, _ = both("nf4")
    assert ours(torch.randn(0, K)).shape == (0, N)


@pytest.mark.parametrize(
    ("device", "change", "said"),
    [
        ("cpu", {}, None),
        ("cuda", {}, None),
        ("mps", {}, "there are no kernels for mps yet"),
        ("cuda", {"torch.version.hip": "6.4"}, "there are no kernels for AMD GPUs yet"),
        ("cuda", {"importlib.util.find_spec": lambda name: None}, "triton is not installed"),
        ("cuda", {"shutil.which": lambda name: None}, "Triton finds no C compiler"),
        (
            "cuda",
            {"torch.cuda.is_available": lambda: True, "torch.cuda.get_device_capability": lambda device: (7, 5)},
            "the kernels need compute capability 8.0",
        ),
    ],
)
def test_a_device_without_kernels_is_named(device, change, said, monkeypatch):
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    for name, value in change.items():
        monkeypatch.setattr(name, value)
    found = fused.refusal_of_device.__wrapped__(torch.device(device))
    assert found is None if said is None else found.startswith(said)


def test_doctor_says_what_computes_here(monkeypatch):
    monkeypatch.setattr(doctor, "_hub_answers", lambda: "answers")
    if not torch.cuda.is_available():
        told = "fused: CPU form, as there is no GPU, with its loops"
        with monkeypatch.context() as here:
            here.setattr(fused, "library", lambda dtype: object())
            assert doctor.examine()["kernels"] == f"{told} compiled"
            here.setattr(fused, "library", lambda dtype: "there is no C++ compiler")
            assert doctor.examine()["kernels"] == f"{told} by torch: there is no C++ compiler"
    monkeypatch.setattr(fused, "refusal_of_device", lambda device: "triton is not installed")
    assert fused.implementation(torch.device("cuda")) == "through PEFT: triton is not installed"
    monkeypatch.setattr(fused, "refusal_of_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.7.1")
    assert fused.implementation(torch.device("cuda")) == "fused: Triton 3.7.1 on sm_89"


# Files.


def plainly(monkeypatch) -> None:
    """Makes `adapters` and `saved` use PEFT's own layers."""
    monkeypatch.setattr(fused, "register", lambda settings: None)


def on_base(folder: Path, quant: str, dtype: str = "float32") -> tuple[tasks.Task, base.Base]:
    """Returns the task that fits the tiny model in a folder named for its architecture, and the model as a base."""
    name = tiny.TASK_OF.get(folder.name, "complete")
    task = tasks.get(name, {"labels": list(tiny.LABELS)} if name == "classify" else {})
    loaded = base.load(
        str(folder),
        quant=quant,
        model_class=task.model_class,
        dtype=dtype,
        device="cpu",
        config_changes=task.config_changes(),
    )
    task.tokenizer = loaded.tokenizer
    return task, loaded


def attached(folder: Path, quant: str, **lora_settings) -> peft.PeftModel:
    task, loaded = on_base(folder, quant)
    batch = task.collate(tiny.rows(task.name))
    settings = config.LoraConfig(**{"rank": 4, **lora_settings})
    batches = [{name: value for name, value in batch.items() if name != "labels"}] * 8
    return adapters.attach(loaded, settings, peft_task=task.peft_task, batches=batches)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("bases")
    return {name: tiny.model_folder(made / name, name) for name in ("llama", "gpt2", "bert", "t5")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "quant", "lora_settings"),
    [
        ("llama", "nf4", {}),
        ("llama", "int8", {"rslora": True}),
        ("llama", "nf4", {"dora": True}),
        ("llama", "none", {"init": "eva"}),
        ("llama", "none", {"init": "pissa"}),
        ("llama", "nf4", {"init": "olora"}),
        ("llama", "nf4", {"init": "loftq"}),
        ("gpt2", "none", {"targets": ("c_attn",)}),
        ("gpt2", "nf4", {}),
        ("bert", "none", {}),
        ("t5", "nf4", {}),
    ],
)
def test_names_and_files_are_those_of_plain_peft(folders, architecture, quant, lora_settings, tmp_path, monkeypatch):
    ours = attached(folders[architecture], quant, **lora_settings)
    plainly(monkeypatch)
    plain = attached(folders[architecture], quant, **lora_settings)
    kinds = [{type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)} for model in (ours, plain)]
    assert all(issubclass(kind, fused._Fused) for kind in kinds[0])
    assert not any(issubclass(kind, fused._Fused) for kind in kinds[1])
    found, wanted = ours.state_dict(), plain.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for name, model in (("ours", ours), ("plain", plain)):
        randomize(model)
        saved.save(model, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


@pytest.mark.parametrize(("architecture", "quant"), [("llama", "nf4"), ("gpt2", "none"), ("bert", "int8")])
def test_what_was_trained_fused_loads_in_plain_peft_and_back(folders, architecture, quant, tmp_path, monkeypatch):
    task_name = tiny.TASK_OF.get(architecture, "complete")
    out, back = tmp_path / "ours", tmp_path / "plain"
    done = tiny.run(out, folders[architecture], task=task_name, quant=quant, steps=5, sealed=False)
    batch = done.task.collate(done.rows)
    loaded = saved.load(out)
    _, inner = on_base(folders[architecture], quant)
    plain = peft.PeftModel.from_pretrained(inner.model, out).eval()
    assert not any(isinstance(module, fused._Fused) for module in plain.modules())
    assert set(fused.paths(loaded.model)) <= {"fused, 4-bit base", "fused, dense base", "fused adapter on an int8 base"}
    with torch.no_grad():
        live, again, wanted = (m(**batch).logits for m in (done.model.eval(), loaded.model, plain))
        assert torch.equal(again, live)
        assert error(again, wanted) < 1e-5
        with modes.without(loaded.model):
            assert error(loaded.model(**batch).logits, wanted) > 1e-2
    plainly(monkeypatch)
    tiny.run(back, folders[architecture], task=task_name, quant=quant, steps=5, sealed=False)
    monkeypatch.undo()
    fused_again, plain_again = saved.load(back), peft.PeftModel.from_pretrained(inner.model, back, "again")
    plain_again.set_adapter("again")
    assert all(isinstance(m, fused._Fused) for m in fused_again.model.modules() if isinstance(m, lora.LoraLayer))
    with torch.no_grad():
        assert error(fused_again.model(**batch).logits, plain_again.eval()(**batch).logits) < 1e-5


def test_the_log_names_every_layer_once_with_its_path(folders, caplog):
    caplog.set_level(logging.INFO, "lora_ft.fused")
    attached(folders["t5"], "nf4", targets=("q", "wo", "shared"))
    assert [record.message for record in caplog.records if record.name == "lora_ft.fused"] == [
        "1 layers through PEFT, there is no kernel for Embedding: shared",
        "6 layers fused, 4-bit base: SelfAttention.q, EncDecAttention.q",
        "4 layers fused, dense base: DenseReluDense.wo",
    ]
