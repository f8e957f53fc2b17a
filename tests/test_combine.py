"""Combined adapters: each method against a float64 reference of our own, and a whole folder as any other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_ft import combine, difference, saved, seal
from lora_ft.cli import main
from lora_ft.commands.options import CombineConfig
from lora_ft.errors import AdapterError
from lora_ft.proof import environment
from tests import tiny

METHODS = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
)  # fmt: skip
DENSITY, SEED = 0.4, 7
# On a name of forty letters this takes years.
HOSTILE = r"([a-z_.0-9]+)+!"
WEIGHTS = (0.7, -0.4)


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tiny.Run]:
    """Two adapters of one base that learned other rows; one of them with rsLoRA, and on other layers too."""
    place = tmp_path_factory.mktemp("combine")
    base = tiny.model_folder(place / "base")
    later = [
        {**row, "labels": [-100 if label == -100 else label + 40 for label in row["labels"]]} for row in tiny.rows("")
    ]
    for row in later:
        row["input_ids"] = [2, *row["input_ids"][1:]]
    first = tiny.run(place / "first", base, targets=("q_proj", "v_proj"), quant="none")
    second = tiny.run(
        place / "second", base, targets=("q_proj", "down_proj"), rslora=True, features=later, quant="none"
    )
    return [first, second]


def copied(run: tiny.Run, folder: Path, **settings: Any) -> Path:
    """Returns a copy of an adapter folder with some of PEFT's settings changed."""
    shutil.copytree(run.folder, folder)
    file = folder / saved.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def configured(runs: list[tiny.Run], out: Path, **options: Any) -> CombineConfig:
    return CombineConfig(adapters=tuple(run.folder for run in runs), out=out, **options)


# The references, float64. Shapes: D adapters, then those of the tensors that are combined.


def pruned(tensors_D: torch.Tensor, draws: list[torch.Tensor] | None) -> torch.Tensor:
    """Returns each adapter's tensor with a share of its numbers: the largest (TIES, arXiv 2306.01708, section 3), or
    those drawn, scaled so that their mean stays (DARE, arXiv 2311.03099, eq. 3)."""
    if draws is not None:
        return tensors_D * torch.stack(draws).double() / DENSITY
    kept = torch.zeros_like(tensors_D)
    for index, tensor in enumerate(tensors_D):
        largest = tensor.abs().flatten().sort(descending=True).values[int(DENSITY * tensor.numel()) - 1]
        kept[index] = torch.where(tensor.abs() >= largest, tensor, 0.0)
    return kept


def combined(method: str, tensors: list[torch.Tensor], weights: list[float], draws: list[torch.Tensor]) -> torch.Tensor:
    """Returns one tensor of several."""
    tensors_D, weights_D = torch.stack(tensors).double(), torch.tensor(weights, dtype=torch.float64)
    weights_D = weights_D.reshape(-1, *[1] * (tensors_D.ndim - 1))
    kind = method.removesuffix("_svd")
    if kind in ("linear", "svd"):
        return (weights_D * tensors_D).sum(dim=0)
    kept_D = pruned(tensors_D, draws if kind.startswith("dare") else None)
    if kind == "dare_linear":
        return (weights_D * kept_D).sum(dim=0)
    # Of each number the sign with more mass is elected, and the mean is of those adapters that have it.
    elected = torch.where(kept_D.sum(dim=0) >= 0, 1.0, -1.0)
    agrees_D = kept_D.sign() == elected
    return (weights_D * kept_D * agrees_D).sum(dim=0) / agrees_D.sum(dim=0).clamp_min(1)


class Draws:
    """What PEFT draws as it combines, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[torch.Tensor] = []
        draw = torch.bernoulli
        monkeypatch.setattr(torch, "bernoulli", lambda chances: self.made.append(draw(chances)) or self.made[-1])

    def of(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the next for each of some tensors."""
        taken, self.made = self.made[: len(tensors)], self.made[len(tensors) :]
        assert [mask.shape for mask in taken] == [tensor.shape for tensor in tensors]
        return taken


def reference(method: str, layer: Any, parts: list[str], draws: Draws) -> torch.Tensor:
    """Returns the update B A of the combined adapter at a layer, float64, before its rank is cut."""
    on = [(name, weight) for name, weight in zip(parts, WEIGHTS, strict=True) if name in layer.lora_A]
    a, b = ([getattr(layer, side)[name].weight.detach() for name, _ in on] for side in ("lora_A", "lora_B"))
    scales = [layer.scaling[name] for name, _ in on]
    weights = [weight for _, weight in on]
    updates = [s * bb.double() @ aa.double() for s, bb, aa in zip(scales, b, a, strict=True)]
    if method == "cat":
        return sum(w * update for w, update in zip(weights, updates, strict=True))  # type: ignore[return-value]
    if method.endswith("svd"):
        deltas = [update.float() for update in updates]
        return combined(method, deltas, weights, draws.of(deltas) if method.startswith("dare") else [])
    roots = [math.sqrt(abs(w * s)) for w, s in zip(weights, scales, strict=True)]
    signs = [math.copysign(1, w) for w in weights]
    masks_a, masks_b = (draws.of(factor) if method.startswith("dare") else [] for factor in (a, b))
    a_RK = combined(method, a, [root * sign for root, sign in zip(roots, signs, strict=True)], masks_a)
    return combined(method, b, roots, masks_b) @ a_RK


@pytest.fixture(scope="module")
def side_by_side(runs: list[tiny.Run]) -> tuple[peft.PeftModel, list[combine.Part]]:
    parts = [combine.Part.of(run.folder, weight) for run, weight in zip(runs, WEIGHTS, strict=True)]
    return combine._loaded_beside_each_other(parts, None).model, parts


@pytest.mark.parametrize("method", METHODS)
def test_equals_a_float64_reference(method: str, side_by_side, runs, tmp_path: Path, monkeypatch) -> None:
    model, parts = side_by_side
    if combine.COMBINED in model.peft_config:
        model.delete_adapter(combine.COMBINED)
    draws = Draws(monkeypatch)
    read = {"density": DENSITY} if method.startswith(("ties", "dare")) else {}
    read |= {"seed": SEED} if method.startswith("dare") else {}
    combine._combine(model, parts, configured(runs, tmp_path, method=method, **read))
    layers = [(n, m) for n, m in model.named_modules() if combine.COMBINED in (getattr(m, "lora_A", None) or ())]
    assert len(layers) == 6
    for name, layer in layers:
        found = layer.scaling[combine.COMBINED] * (
            layer.lora_B[combine.COMBINED].weight.double() @ layer.lora_A[combine.COMBINED].weight.double()
        )
        wanted = reference(method, layer, ["part0", "part1"], draws)
        if not method.endswith("svd"):
            torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5, msg=f"{name}: {method}")
            continue
        # No update of that rank is nearer (Eckart and Young), however alike two directions are.
        sizes = torch.linalg.svdvals(wanted)
        nearest = float(sizes[layer.r[combine.COMBINED] :].square().sum().sqrt())
        assert float((found - wanted).norm()) == pytest.approx(nearest, abs=1e-5 * float(wanted.norm())), name


def test_a_folder_is_whole_sealed_measured_and_loads_with_plain_peft(runs, tmp_path: Path, capsys) -> None:
    out = tmp_path / "zqalice" / "both"
    words = ["combine", *(str(run.folder) for run in runs), "--out", str(out), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    # Both learned all of their rows, on other layers for the greater part.
    for run, part in zip(runs, found["parts"], strict=True):
        assert part["kl_effect"] == pytest.approx(run.seal.effect)
        assert part["loss"]["alone"] < part["loss"]["base"]
        assert part["effect_kept"] == pytest.approx(1 - part["kl_combined"] / part["kl_effect"])
        gained = part["loss"]["base"] - part["loss"]["alone"]
        assert part["gain_kept"] == pytest.approx((part["loss"]["base"] - part["loss"]["combined"]) / gained)
    assert seal.verify(out).passed
    bare = transformers.AutoModelForCausalLM.from_pretrained(runs[0].base_folder)
    assert peft.PeftModel.from_pretrained(bare, out).peft_config["default"].r == 8
    first, second, both = (difference._changes(folder) for folder in (runs[0].folder, runs[1].folder, out))
    for name, change in both.items():
        parts = [each[name] for each in (first, second) if name in each]
        wanted = sum(part.b_MR @ part.a_RK for part in parts)
        torch.testing.assert_close(change.b_MR @ change.a_RK, wanted, atol=1e-6, rtol=1e-5)
    record = environment.read(out)["combined"]
    digests = [environment.file_sha256(run.folder / saved.WEIGHTS) for run in runs]
    assert [part["adapter_sha256"] for part in record["parts"]] == digests
    told = b"".join(file.read_bytes() for file in out.iterdir())
    assert b"zqalice" not in told
    assert str(runs[0].folder).encode() not in told
    card = (out / "README.md").read_text()
    assert "combined with lora-ft from 2 others of the task `complete`" in card
    assert all(digest in card for digest in digests)
    assert "Training" not in card
    assert "No rows were held out" not in card
    assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) == 0


def test_the_same_parts_give_the_same_bytes(runs, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        done = combine.combine(configured(runs, tmp_path / name / "both", method="dare_ties_svd"))
        written.append({f.name: f.read_bytes() for f in done.folder.iterdir()})
    assert written[0] == written[1]


def test_rows_named_for_an_adapter_are_measured_before_and_after(runs, tmp_path: Path, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{n} w{n + 1} w4 w5"}) + "\n" for n in range(4)))
    words = ["combine", *(str(run.folder) for run in runs), "--out", str(tmp_path / "both"), "--data", *[str(rows)] * 2]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "gain kept" in told
    assert "token_accuracy" in told
    assert "| 1 | `token_accuracy` |" in (tmp_path / "both" / "README.md").read_text()
    assert main(["report", str(tmp_path / "both")]) == 0
    page = (tmp_path / "both" / "report.html").read_text()
    assert "gain kept" in page
    assert "part, on rows named for it" in page
    assert "training rows" not in page
    assert "<h2>Plan</h2>" not in page


def test_adapters_that_do_not_go_together_are_refused_with_every_reason(runs, tmp_path: Path) -> None:
    other = tiny.run(
        tmp_path / "other",
        tiny.model_folder(tmp_path / "base2", seed=1),
        quant="none",
        steps=2,
        lr=0.05,
        rank=2,
        dora=True,
    )
    config = CombineConfig(adapters=(runs[0].folder, other.folder), out=tmp_path / "out", method="ties")
    with pytest.raises(AdapterError) as refused:
        combine.combine(config)
    for reason in ("the base is another", "it is a DoRA", "ties needs one rank", "4, 2", "ties_svd"):
        assert reason in str(refused.value)
    assert not config.out.exists()


def test_heads_and_tasks_of_their_own_are_refused(runs, tmp_path: Path) -> None:
    headed = tiny.run(tmp_path / "headed", runs[0].base_folder, task="classify", quant="none", steps=3)
    with pytest.raises(AdapterError, match=r"(?s)the task is another.*holds .*score whole"):
        combine.combine(CombineConfig(adapters=(runs[0].folder, headed.folder), out=tmp_path / "out"))


def test_a_part_whose_weights_were_changed_after_sealing_is_refused(runs, tmp_path: Path) -> None:
    changed = copied(runs[1], tmp_path / "changed")
    tensors = load_file(changed / saved.WEIGHTS)
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, changed / saved.WEIGHTS, metadata={"format": "pt"}
    )
    with pytest.raises(AdapterError, match=r"changed.*the weights were changed after they were sealed"):
        combine.combine(CombineConfig(adapters=(runs[0].folder, changed), out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"target_modules": HOSTILE}, "takes more than 1 s"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "PEFT cannot use it"),
        ({"r": 4096}, "does not fit its base"),
    ],
    ids=str,
)
def test_settings_of_a_later_part_are_held_to_what_the_first_ones_are(
    changed: dict[str, Any], reason: str, runs, tmp_path: Path
) -> None:
    other = copied(runs[1], tmp_path / "other", **changed)
    parts = [combine.Part.of(folder, 1.0) for folder in (runs[0].folder, other)]
    with pytest.raises(AdapterError, match=rf"other.*{reason}"):
        combine._loaded_beside_each_other(parts, None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"adapters": (Path("a"),)}, "at least 2"),
        ({"weights": (1.0,)}, "one for each adapter"),
        ({"weights": (1.0, float("nan"))}, "finite"),
        ({"rank": 4}, "rank is for svd"),
        ({"density": 0.0, "method": "ties"}, r"density must be in \(0, 1\]"),
        ({"density": 0.5, "method": "svd"}, "density is for ties and dare; svd reads none"),
        ({"seed": 42, "method": "ties"}, "seed is for dare; ties reads none"),
        ({"metrics": ("rouge",)}, "metrics need rows"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CombineConfig(**{"adapters": (Path("a"), Path("b")), "out": Path("c"), **options})


# What two adapters differ in


def test_the_norms_are_those_of_the_updates(runs) -> None:
    found = difference.of(*(run.folder for run in runs))
    layers = {layer.name: layer for layer in found.layers}
    scale = {0: 16 / 4, 1: 16 / 4**0.5}
    held = [load_file(run.folder / saved.WEIGHTS) for run in runs]

    def update(number: int, name: str) -> torch.Tensor:
        a, b = (held[number][f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        return scale[number] * b @ a

    assert len(layers) == 6
    for name, layer in layers.items():
        if name.endswith("q_proj"):
            one, two = update(0, name), update(1, name)
            assert layer.first == pytest.approx(float(one.norm()), rel=1e-9)
            assert layer.difference == pytest.approx(float((one - two).norm()), rel=1e-9)
            assert layer.cosine == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), rel=1e-9)
        else:
            assert (layer.first is None) != (layer.second is None)
            assert layer.cosine is None
    assert found.facts["configuration"]["lora.rslora"] == (difference.ABSENT, True)
    (of_q, *_) = [kind for kind in found.kinds() if kind.name == "all q_proj"]
    whole = [torch.cat([update(i, n) for n in layers if n.endswith("q_proj")]) for i in (0, 1)]
    assert of_q.difference == pytest.approx(float((whole[0] - whole[1]).norm()), rel=1e-9)
    assert of_q.cosine == pytest.approx(
        float((whole[0] * whole[1]).sum() / whole[0].norm() / whole[1].norm()), rel=1e-6
    )
    assert found.facts["base"] == {}
    assert set(found.facts["seal"]) >= {"kl_effect"}


def test_other_factors_of_one_update_are_no_difference(runs, tmp_path: Path, capsys) -> None:
    same = tmp_path / "same"
    shutil.copytree(runs[0].folder, same)
    tensors = load_file(same / saved.WEIGHTS)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    tensors = {k: turned @ t if "lora_A" in k else t @ turned.T for k, t in tensors.items()}
    save_file(tensors, same / saved.WEIGHTS, metadata={"format": "pt"})
    for layer in difference.of(runs[0].folder, same).layers:
        assert layer.difference < 1e-5 * layer.first
    assert main(["diff", str(runs[0].folder), str(runs[0].folder)]) == 0
    told = capsys.readouterr().out
    assert told.count("the same") == 9
    # A small change of a large update is not rounding.
    name = next(k for k in tensors if "lora_B" in k)
    held = load_file(runs[0].folder / saved.WEIGHTS)
    held[name] = held[name] + 1e-6
    save_file(held, same / saved.WEIGHTS, metadata={"format": "pt"})
    (layer,) = difference.of(runs[0].folder, same).layers
    a_RK = held[name.replace("lora_B", "lora_A")].double()
    moved = held[name].double() - load_file(runs[0].folder / saved.WEIGHTS)[name].double()
    assert layer.difference == pytest.approx(float((4 * moved @ a_RK).norm()), rel=1e-9)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_diff_refuses_numbers_that_are_none(number: float, runs, tmp_path: Path) -> None:
    broken = copied(runs[0], tmp_path / "broken")
    tensors = load_file(broken / saved.WEIGHTS)
    name = sorted(tensors)[-1]
    tensors[name][0, 0] = number
    save_file(tensors, broken / saved.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=rf"broken.*{name}.* is not finite"):
        difference.of(runs[0].folder, broken)


def test_diff_matches_patterns_as_peft_does_and_for_no_longer_than_a_second(runs, tmp_path: Path) -> None:
    patterns = {"layers.1.+q_proj": 4.0, ".*q_proj": 8.0}
    told = difference._changes(copied(runs[0], tmp_path / "patterned", alpha_pattern=patterns))
    plain = difference._changes(runs[0].folder)
    for name, change in told.items():
        factor = 1.0 if "q_proj" not in name else 4 / 16 if "layers.1." in name else 8 / 16
        torch.testing.assert_close(change.a_RK, factor * plain[name].a_RK)
    hostile = copied(runs[0], tmp_path / "hostile", alpha_pattern={HOSTILE: 4.0})
    with pytest.raises(AdapterError, match=r"hostile.*takes more than 1 s"):
        difference.of(runs[0].folder, hostile)


def test_diff_takes_adapters_of_others_and_refuses_what_is_none(runs, tmp_path: Path, capsys) -> None:
    adapters_only = tmp_path / "plain"
    saved.atomicio.make_folder(adapters_only)
    for name in (saved.WEIGHTS, saved.CONFIG):
        (adapters_only / name).write_bytes((runs[1].folder / name).read_bytes())
    assert main(["diff", str(runs[1].folder), str(adapters_only), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == []
    assert found["seal"]["kl_effect"][1] == difference.ABSENT
    assert "there is no seal" in found["notes"][0]
    assert main(["diff", str(runs[1].folder), str(tmp_path)]) == 1
    other = tiny.run(
        tmp_path / "other", tiny.model_folder(tmp_path / "wide", hidden_size=32), quant="none", steps=2, sealed=False
    )
    assert main(["diff", str(runs[0].folder), str(other.folder)]) == 1
    assert "they are of other bases" in capsys.readouterr().err
