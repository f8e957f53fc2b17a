"""The compiled loops of a CPU beside what torch does in several passes, and the compiling of them."""

import ctypes
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.cpu import build, loops
from tests.kernel_ops import forms, loops_in_bounds

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _compiled():
    with torch.device("cpu"), forms.computed_by("loops"):
        yield


@pytest.fixture
def fresh_build(tmp_path, monkeypatch):
    """Compiling as on a machine that has not done it yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return build.library.__wrapped__


def test_the_exponential_is_exact_to_two_units_in_the_last_place():
    gate = torch.linspace(-86, 88, 100_001)
    # Where silu is x / (1 + e^-x), far to the left, it is x e^x.
    (h, e) = torch.empty(1, len(gate)), gate.double().exp()
    loops.swiglu_into(h, gate[None], torch.ones(1, len(gate)))
    exact = gate.double() * e / (1 + e)
    off = ((h[0].double() - exact) / exact)[gate != 0].abs()
    assert off.max() < 4 * torch.finfo(FP32).eps


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_an_activation_is_rounded_as_transformers_does(dtype):
    gate, up, dh = (torch.randn(63, 130).to(dtype) for _ in range(3))
    found = [torch.empty_like(gate) for _ in range(4)]
    loops.swiglu_into(found[0], gate, up)
    loops.differentiate_swiglu_into(*found[1:], dh, gate, up)
    h, _, dup, h_again = found[0], *found[1:]
    assert torch.equal(h, h_again)
    silu = torch.nn.functional.silu(gate)
    for one, other in ((h, silu * up), (dup, silu * dh)):
        if dtype == BF16:
            assert (one != other).float().mean() < 1e-3
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_what_is_no_number_stays_none():
    nan = float("nan")
    for dtype in (BF16, FP32):
        for sign in (1, -1):
            x = torch.zeros(2, 40, dtype=dtype)
            x[1, 7] = sign * nan
            one, weight = torch.ones(2, 40, dtype=dtype), torch.ones(40, dtype=dtype)
            y, h, rstd = torch.empty_like(x), x[:0], torch.empty(2)
            loops.rms_norm_into(y, h, rstd, x, None, weight, 1e-5)
            dx = torch.empty_like(x)
            loops.differentiate_rms_norm_into(dx, x, None, one, torch.ones(2), weight)
            activated = [torch.empty_like(x) for _ in range(4)]
            loops.swiglu_into(activated[0], x, one)
            loops.differentiate_swiglu_into(*activated[1:], one, x, one)
            logits = x.clone()
            nll = loops.differentiate_logits_(logits, torch.tensor([1, 1]), 1.0, True)
            p, ds = x.clone()[None], torch.ones(1, 2, 40, dtype=dtype)
            loops.differentiate_scores_(p, ds, 2, 0, 1.0)
            for found in (y, dx, logits, nll, p[0], ds[0]):
                assert not found[0].isnan().any()
                assert found[1].isnan().all()
            for found in activated:
                assert found.isnan().sum() == 1
                assert found[1, 7].isnan()


def test_an_infinite_logit_is_one_that_cannot_be():
    logits = torch.tensor([[0.0, -float("inf"), 1.0]])
    nll = loops.differentiate_logits_(logits, torch.tensor([0]), 1.0, True)
    wanted = torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(nll, -wanted[:1].log())
    torch.testing.assert_close(logits, torch.stack([wanted[0] - 1, torch.tensor(0.0), wanted[1]])[None])


@pytest.mark.parametrize("case", loops_in_bounds.CASES)
def test_the_number_of_threads_changes_nothing(case):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found.append(loops_in_bounds.CASES[case](200, 129))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_no_loop_leaves_its_tensors():
    command = [sys.executable, "-m", "tests.kernel_ops.loops_in_bounds"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{case}-{side}" for case in loops_in_bounds.CASES for side in ("start", "end")]
    wild = subprocess.run([*command, "wild"], capture_output=True, text=True, timeout=300)
    assert wild.returncode == -signal.SIGSEGV


def test_what_is_not_taken():
    x = torch.zeros(4, 8)
    assert loops.takes(x, None, x.bfloat16().float())
    assert loops.takes(torch.nn.Parameter(x))
    for other in (
        x.half(),
        x.double(),
        x.to("meta"),
        x.t(),
        x.bfloat16(),
        x.as_subclass(type("Own", (torch.Tensor,), {})),
    ):
        assert not loops.takes(x, other)
    assert not loops.takes(x.half())


# Compiling.


def test_they_are_compiled_once(fresh_build, tmp_path, monkeypatch):
    assert isinstance(fresh_build(BF16), ctypes.CDLL)
    kept = list(tmp_path.rglob("*"))
    assert [path.suffix for path in kept if path.is_file()] == [".so"]
    asked = []
    monkeypatch.setattr(build, "_output", lambda *command: asked.append(command[1]) or version)
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    assert isinstance(fresh_build(BF16), ctypes.CDLL)
    assert asked == ["--version"]
    assert list(tmp_path.rglob("*")) == kept


def test_another_processor_has_a_file_of_its_own(fresh_build, tmp_path, monkeypatch):
    for instructions in ("flags: a", "flags: a b"):
        monkeypatch.setattr(build, "_instructions", lambda found=instructions: found)
        fresh_build(FP32)
    assert len(list(tmp_path.rglob("*.so"))) == 2


def test_the_threads_are_those_of_torch():
    maps = Path("/proc/self/maps").read_text()
    runtime = build._openmp_of_torch()
    assert runtime is not None
    linked = subprocess.run(["ldd", build.library(BF16)._name], capture_output=True, text=True, check=True).stdout
    (needed,) = re.findall(r"(lib(?:gomp|iomp5)\S*) =>", linked)
    loaded = {Path(name).name for name in re.findall(r"\S*/" + re.escape(needed), maps)}
    assert loaded == {needed}
    assert Path(runtime).name.startswith(needed.partition(".so")[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sys.platform": "darwin"}, "they are compiled on Linux only, this is darwin"),
        ({"shutil.which": lambda name: None}, "there is no C++ compiler: install g++ or set CXX"),
        ({"lora_kernels.cpu.build._openmp_of_torch": lambda: None}, "torch has loaded no OpenMP"),
        ({"lora_kernels.cpu.build.FLAGS": ("-fno-such-flag",)}, "g++ failed: "),
        ({"lora_kernels.cpu.build.LONGEST_S": 1e-6}, "TimeoutExpired: "),
    ],
)
def test_why_there_are_none(fresh_build, change, said, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(name, value)
    assert said in fresh_build(BF16)


def test_a_cache_that_cannot_be_written(fresh_build, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fresh_build(BF16).startswith("NotADirectoryError: ")


def test_what_the_last_bits_depend_on(monkeypatch):
    assert re.fullmatch(r"loops-[0-9a-f]{16}", build.name(BF16))
    assert build.name(BF16) != build.name(FP32)
    monkeypatch.setattr(build, "library", lambda dtype: "there is no C++ compiler")
    assert build.name(BF16) == "torch"


def test_where_there_are_none_torch_computes(monkeypatch):
    monkeypatch.setattr(loops, "library", lambda dtype: "there is no C++ compiler")
    assert not loops.takes(torch.zeros(2, 2))
