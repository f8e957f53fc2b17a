"""The compiled loops of a CPU beside what torch does in several passes, and the compiling of them."""

import ctypes
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels
from lora_kernels.cpu import build, loops
from tests.kernel_ops import forms, loops_in_bounds

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IN_BOUNDS = [sys.executable, "-m", "tests.kernel_ops.loops_in_bounds"]
LOOPS = set(re.findall(r"^void (\w+)\(", build.SOURCE.read_text(), re.MULTILINE))


@pytest.fixture(autouse=True)
def ran():
    """The names of the loops that have run."""
    with forms.computed_by("loops") as ran:
        yield ran


@pytest.fixture
def fresh_build(tmp_path, monkeypatch):
    """Compiling as on a machine that has not done it yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return build.library.__wrapped__


def operations(dtype, trained=False, softcap=0.0):
    """Runs every operation that has loops, there and back."""
    gate, up, x = (torch.randn(9, 32).to(dtype).requires_grad_() for _ in range(3))
    weight, q, head = torch.ones(32, dtype=dtype), torch.randn(2, 9, 16).to(dtype), torch.randn(40, 32).to(dtype)
    q, head = q.requires_grad_(), head.requires_grad_(trained)
    found = [
        lora_kernels.swiglu_lora(gate, up, None).square().sum(),
        lora_kernels.rms_norm_lora(x, up, weight.requires_grad_(trained), None, 1e-5)[0].square().sum(),
        lora_kernels.rope(q[None], q[None], torch.ones(1, 9, 16), torch.ones(1, 9, 16))[0].square().sum(),
        lora_kernels.packed_attention(q, q, q, [0, 4, 9], scale=0.3, softcap=softcap).square().sum(),
        lora_kernels.linear_cross_entropy(x, head, torch.arange(9), softcap=softcap)[0],
    ]
    torch.autograd.backward(found)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_operations_reach_their_loops(dtype, ran, monkeypatch):
    monkeypatch.setattr("lora_kernels.backend._cpu_multiplies", lambda dtype: True)
    operations(dtype)
    assert ran == LOOPS


def test_operations_without_loops_reach_none(ran):
    operations(FP16)
    assert not ran
    operations(FP32, trained=True, softcap=3.0)
    assert ran == LOOPS - {"differentiate_rms_norm", "differentiate_scores", "differentiate_logits"}


def test_the_exponential_is_exact_to_two_units_in_the_last_place():
    differences = torch.linspace(-87.2, 0, 100_001)
    logits = torch.stack([torch.zeros_like(differences), differences], dim=1)
    loops.differentiate_logits_(logits, torch.zeros(len(logits), dtype=torch.int64), 1.0, True)
    e = differences.double().exp()
    off = (logits[:, 1].double() / (e / (1 + e)) - 1).abs()
    assert off.max() < 2 * torch.finfo(FP32).eps


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


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_parts_go_and_come_back(dtype):
    x, parts = torch.randn(20, 3, 8).to(dtype).transpose(0, 1), [slice(2, 7), slice(7, 8), slice(11, 20)]
    stacked, back = torch.full((3, 3, 9, 8), float("nan"), dtype=dtype), torch.zeros(3, 20, 8, dtype=dtype)
    loops.gather_into(stacked, x, parts)
    loops.scatter_into(back, stacked, parts)
    wanted = torch.zeros_like(back)
    for part, found in zip(parts, stacked, strict=True):
        size = part.stop - part.start
        assert torch.equal(found[:, :size], x[:, part])
        assert not found[:, size:].any()
        wanted[:, part] = x[:, part]
    assert torch.equal(back, wanted)
    sums = torch.ones(3, 20, 8)
    loops.scatter_add(sums, stacked, parts)
    assert torch.equal(sums, 1 + wanted.float())


@pytest.mark.parametrize("window", [0, 5])
def test_scores_of_rows_that_registers_fill_and_of_others(window):
    """Reading past what a query sees, in a row of 64, gives what a row of 61 does."""
    scores, dp = (torch.randn(2, 3 * 61, 61) for _ in range(2))
    wide = [torch.nn.functional.pad(x.view(2, 3, 61, 61), (0, 3, 0, 3), value=7.0).flatten(1, 2) for x in (scores, dp)]
    loops.differentiate_scores_(scores, dp, 61, window, 0.3)
    loops.differentiate_scores_(*wide, 64, window, 0.3)
    for one, other in zip((scores, dp), wide, strict=True):
        other = other.view(2, 3, 64, 64)[:, :, :61]
        assert not other[..., 61:].any()
        torch.testing.assert_close(one.view(2, 3, 61, 61), other[..., :61], rtol=1e-5, atol=1e-7)


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
            # In a row that registers fill, too, not where nothing is seen.
            p, ds = torch.zeros(1, 64, 64, dtype=dtype), torch.ones(1, 64, 64, dtype=dtype)
            p[0, 7, 3] = sign * nan
            loops.differentiate_scores_(p, ds, 64, 0, 1.0)
            for found in (p[0], ds[0]):
                assert found.isnan().nonzero().tolist() == [[7, key] for key in range(8)]


def test_an_infinite_logit_is_one_that_cannot_be():
    logits = torch.tensor([[0.0, -float("inf"), 1.0]])
    nll = loops.differentiate_logits_(logits, torch.tensor([0]), 1.0, True)
    wanted = torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(nll, -wanted[:1].log())
    torch.testing.assert_close(logits, torch.stack([wanted[0] - 1, torch.tensor(0.0), wanted[1]])[None])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_word(label):
    with pytest.raises(IndexError, match=f"a label is {label}, and there are 3 words, from 0 on"):
        loops.differentiate_logits_(torch.zeros(2, 3), torch.tensor([0, label]), 1.0, True)


@pytest.mark.parametrize("case", loops_in_bounds.CASES)
def test_the_number_of_threads_changes_nothing(case):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found.append(loops_in_bounds.CASES[case](200, 129, BF16))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_no_loop_leaves_its_tensors():
    done = subprocess.run(IN_BOUNDS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4 * len(loops_in_bounds.CASES)


@pytest.mark.parametrize("case", loops_in_bounds.CASES)
def test_a_loop_that_leaves_its_tensors_is_caught(case):
    wild = subprocess.run([*IN_BOUNDS, case], capture_output=True, text=True, timeout=300)
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
    assert not loops.takes(torch._neg_view(x))


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


def test_a_damaged_file_is_made_anew(fresh_build, tmp_path, monkeypatch):
    fresh_build(FP32)
    (whole,) = tmp_path.rglob("*.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    damaged = tmp_path / "other" / "lora_kernels" / whole.name
    damaged.parent.mkdir(0o700, parents=True)
    damaged.write_bytes(whole.read_bytes()[:100])
    assert isinstance(fresh_build(FP32), ctypes.CDLL)
    assert damaged.read_bytes() == whole.read_bytes()


def test_the_threads_are_those_of_torch():
    maps = Path("/proc/self/maps").read_text()
    linked = subprocess.run(["ldd", build.library(BF16)._name], capture_output=True, text=True, check=True).stdout
    (needed,) = re.findall(r"(lib(?:gomp|iomp5|omp)\b\S*) =>", linked)
    assert Path(build._openmp_of_torch()).name.startswith(needed.partition(".so")[0])
    assert {Path(name).name for name in re.findall(r"\S*/" + re.escape(needed), maps)} == {needed}


def test_torchs_threads_go_before_those_of_others(tmp_path, monkeypatch):
    home, link = tmp_path / "real" / "torch", tmp_path / "link"
    home.mkdir(parents=True)
    link.symlink_to(tmp_path / "real")
    maps = [f"7f00-7f01 r-xp 00 00:00 1 {path}" for path in ("/a b/libgomp.so.1", f"{home}/lib/libgomp-1.so.1", "/c")]
    monkeypatch.setattr(Path, "read_bytes", lambda path: "\n".join(["7f02-7f03 rw-p 00 00:00 0", *maps]).encode())
    assert build._openmp_of_torch() == "/a b/libgomp.so.1"
    monkeypatch.setattr(torch, "__file__", str(link / "torch" / "__init__.py"))
    assert build._openmp_of_torch() == f"{home}/lib/libgomp-1.so.1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sys.platform": "darwin"}, "they are compiled on Linux only, this is darwin"),
        ({"shutil.which": lambda name: None}, "there is no C++ compiler: install g++, or set CXX"),
        ({"lora_kernels.cpu.build.FLAGS": ("-fno-such-flag",)}, "g++ failed: "),
        ({"lora_kernels.cpu.build.LONGEST_S": 1e-6}, "TimeoutExpired: "),
        ({"pathlib.Path.read_bytes": lambda path: b""}, "OSError: torch has loaded no OpenMP"),
        ({"os.getuid": lambda: -1}, "must be yours, and nobody else may write there"),
    ],
)
def test_why_there_are_none(fresh_build, change, said, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(name, value)
    assert said in fresh_build(BF16)


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("/no/g++", "$CXX is '/no/g++', which is no command: install g++"), ("false", "false failed: "), ("g++ -m64", "")],
)
def test_a_compiler_of_ones_own(fresh_build, compiler, said, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    found = fresh_build(BF16)
    assert found.startswith(said) if said else isinstance(found, ctypes.CDLL)


def test_a_cache_that_cannot_be_written(fresh_build, tmp_path, monkeypatch):
    (tmp_path / "lora_kernels").mkdir()
    (tmp_path / "lora_kernels").chmod(0o777)
    assert fresh_build(BF16).startswith("PermissionError: ")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fresh_build(BF16).startswith("NotADirectoryError: ")


def test_what_the_last_bits_depend_on(monkeypatch):
    digest = build.digest.__wrapped__
    assert re.fullmatch("[0-9a-f]{64}", digest(BF16))
    assert digest(BF16) != digest(FP32)
    monkeypatch.setattr(build, "library", lambda dtype: "there is no C++ compiler")
    assert digest(BF16) == "torch"


def test_where_there_are_none_torch_computes(monkeypatch):
    monkeypatch.setattr(loops, "library", lambda dtype: "there is no C++ compiler")
    assert not loops.takes(torch.zeros(2, 2))
