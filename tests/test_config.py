"""The one parser: flags, files, round trips, messages, and the frozen list of options."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from lora_ft.cli import COMMANDS
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.errors import ConfigError
from lora_ft.settings import cli, from_yaml, to_yaml

REQUIRED = ["chat", "--base", "smollm2-135m", "--out", "runs/x"]

# Every option is a burden: adding one means adding it here, and at most 60 fit.
OPTIONS = [
    "task",
    "base",
    "out",
    "quant",
    "revision",
    "init_from",
    "resume",
    "allow_changed",
    "dry_run",
    "twin",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.targets",
    "lora.rslora",
    "lora.dora",
    "lora.plus_ratio",
    "lora.init",
    "lora.save_modules",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "lora.train_tokens",
    "data.train",
    "data.eval",
    "data.columns",
    "data.max_length",
    "data.special_tokens",
    "data.metrics",
    "data.class_weights",
    "data.packing",
    "data.streaming",
    "train.batch_size",
    "train.accumulate",
    "train.epochs",
    "train.steps",
    "train.lr",
    "train.optimizer",
    "train.schedule",
    "train.warmup",
    "train.weight_decay",
    "train.clip",
    "train.seed",
    "train.dtype",
    "train.checkpoint_activations",
    "train.base_cache",
    "train.shard_base",
    "train.eval_steps",
    "train.save_steps",
    "train.patience",
    "train.log_steps",
    "train.report_to",
    "prefer.loss",
    "prefer.beta",
    "reason.reward",
    "reason.samples",
    "reason.max_new_tokens",
]


def test_the_list_of_options_is_frozen() -> None:
    found = []
    for name, hint in get_type_hints(RunConfig).items():
        nested = dataclasses.is_dataclass(hint)
        found += [f"{name}.{f.name}" for f in dataclasses.fields(hint)] if nested else [name]
    assert sorted(found) == sorted(OPTIONS)
    assert len(found) < 60


OF_OTHERS = {
    "quickstart": "out resume",
    "plan": "device json",
    "evaluate": "adapter data columns metrics batch_size base json",
    "predict": "adapter input out columns batch_size max_new_tokens base",
    "chat": "adapter prompt system base max_new_tokens temperature",
    "verify": "adapter model base json",
    "merge": "adapter out onto dtype base",
    "export": "source out format quant base portable json",
    "combine": "adapters out method weights rank density seed data metrics base json",
    "diff": "first second json",
    "publish": "adapter repo public pr base",
    "report": "adapters out json",
    "data check": "file task base columns max_length show json",
    "data prepare": "file base yes json",
    "bench kernels": "json",
    "selftest": "run twin json",
    "serve": "home host port new_token results_base64",
    "doctor": "json",
}


def test_the_options_of_the_other_commands_are_frozen() -> None:
    found = {name: options for name, (options, _) in COMMANDS.items() if options is not RunConfig}
    training = {f.name for f in dataclasses.fields(RunConfig)}
    own = {
        name: [f.name for f in dataclasses.fields(o) if not issubclass(o, RunConfig) or f.name not in training]
        for name, o in found.items()
    }
    assert {name: " ".join(names) for name, names in own.items()} == OF_OTHERS


SECTIONS = {
    "LoraConfig": "lora",
    "DataConfig": "data",
    "TrainConfig": "train",
    "PreferConfig": "prefer",
    "ReasonConfig": "reason",
    "RunConfig": "",
}


def options_read(code: str) -> set[str]:
    """Returns the dotted options that the functions of a module read from what their annotations say is a config."""
    found: set[str] = set()
    for function in ast.walk(ast.parse(code)):
        if isinstance(function, ast.FunctionDef):
            held = {
                argument.arg: SECTIONS[name.id]
                for argument in (*function.args.args, *function.args.kwonlyargs)
                if argument.annotation is not None
                for name in ast.walk(argument.annotation)
                if isinstance(name, ast.Name) and name.id in SECTIONS
            }
            for node in ast.walk(function):
                for name, value in bindings(node):
                    if (section := section_of(value, held)) is not None:
                        held[name] = section
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and (section := section_of(node.value, held)) is not None:
                    found.add(f"{section}.{node.attr}".lstrip("."))
    return found


def bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yields each name that an assignment binds, with its value."""
    for target in node.targets if isinstance(node, ast.Assign) else ():
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=True)
            yield from ((name.id, value) for name, value in pairs if isinstance(name, ast.Name))


def section_of(value: ast.expr, held: dict[str, str]) -> str | None:
    """Returns the section that an expression is ("" for the whole configuration), or None."""
    if isinstance(value, ast.Name):
        return held.get(value.id)
    if isinstance(value, ast.Attribute) and section_of(value.value, held) == "" and value.attr in SECTIONS.values():
        return value.attr
    return None


def test_every_option_is_read_by_the_library() -> None:
    library = Path(__file__).parents[1] / "lora_ft"
    files = [path for path in library.rglob("*.py") if path.name not in ("config.py", "settings.py")]
    read = set().union(*(options_read(path.read_text(encoding="utf-8")) for path in files))
    # Two are read through the property that gives their default or their text a meaning.
    through = {"lora.rslora": "lora.uses_rslora", "data.eval": "data.eval_fraction"}
    unread = [option for option in OPTIONS if through.get(option, option) not in read]
    assert not unread


def test_a_field_of_that_name_elsewhere_does_not_count_as_read() -> None:
    code = (
        "def a(train: TrainConfig, fit): return fit.steps, train.lr\n"
        "def b(config: RunConfig | None):\n    out, lora = config.out, config.lora\n    return lora.rank, out.clip\n"
        "def c(train, data): return train.warmup, data.eval"
    )
    assert options_read(code) == {"train.lr", "out", "lora", "lora.rank"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--lora.rank-pattern", "q_proj", "4", "v_proj", "8", "--lora.alpha-pattern", "q_proj", "2.5"],
        ["--lora.rslora", "False", "--lora.dora", "--lora.targets", "q_proj", "v_proj", "--lora.plus-ratio", "16"],
        ["--train.lr", "1e-4", "--train.steps", "7", "--train.report-to", "wandb", "--train.checkpoint-activations"],
        [
            "--data.columns",
            "prompt",
            "a question",
            "completion",
            "b",
            "--data.train",
            "rows.jsonl",
            "--data.eval",
            "0.1",
        ],
        ["--data.streaming", "--train.steps", "3", "--data.special-tokens", "<a>", "<b>", "--quant", "none"],
    ],
)
def test_a_saved_run_reads_back_equal(words: list[str], tmp_path: Path) -> None:
    config = cli(RunConfig, [*REQUIRED, *words])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(RunConfig, saved) == config


def test_resume_and_dry_run_belong_to_one_call_and_are_not_saved(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(cli(RunConfig, [*REQUIRED, "--resume", "--dry-run"])), encoding="utf-8")
    again = cli(RunConfig, ["--config", str(saved), "--resume"])
    assert again.resume
    assert not again.dry_run


def test_a_bare_flag_in_a_file_counts(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(
        yaml.safe_dump({"task": "chat", "base": "b", "out": "o", "resume": True, "lora": {"dora": True}}),
        encoding="utf-8",
    )
    config = from_yaml(RunConfig, saved)
    assert config.resume
    assert config.lora.dora


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(cli(RunConfig, [*REQUIRED, "--lora.rank", "4"])), encoding="utf-8")
    assert cli(RunConfig, [f"--config={saved}", "--lora.rank", "6"]).lora.rank == 6


def test_no_path_of_the_machine_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data.train", str(tmp_path / "in" / "rows.jsonl"), "--data.eval", "/elsewhere/held_out.jsonl"]
    text = to_yaml(cli(RunConfig, ["chat", "--base", "/models/tiny", "--out", str(tmp_path / "out"), *words]))
    tree = yaml.safe_load(text)
    assert (tree["base"], tree["out"]) == ("tiny", "out")
    assert (tree["data"]["train"], tree["data"]["eval"]) == ("in/rows.jsonl", "held_out.jsonl")
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora:\n  rnak: 4\n", "unknown key `lora.rnak`; did you mean `lora.rank`?"),
        ("zzz: 4\n", "unknown key `zzz`; known: task"),
        ("- a\n", "expected `key: value` lines"),
        ("lora: 4\n", "expected `key: value` lines under lora"),
        ("a: [\n", "cannot be read as YAML"),
        ("task: chat\nbase: b\nout: o\nlora: {rank: many}\n", "Error parsing --lora.rank: invalid literal for int"),
        ("task: chat\nbase: b\nout: o\nlora: {rank: 0}\n", "lora.rank must be at least 1, got 0."),
        ("task: sing\nbase: b\nout: o\n", "invalid choice 'sing' for argument 'task'."),
        ("task: chat\nbase: b\n", "--out PATH"),
    ],
)
def test_a_wrong_file_is_named_with_its_remedy(text: str, message: str, tmp_path: Path, capfd) -> None:
    saved = tmp_path / "run.yaml"
    saved.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        from_yaml(RunConfig, saved)
    assert message in str(caught.value)
    assert "run.yaml" in str(caught.value)
    assert "--help" not in str(caught.value)
    assert not any(capfd.readouterr())


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--config: there is no file nowhere\.yaml"):
        cli(RunConfig, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(rank=0), "lora.rank must be at least 1, got 0."),
        (lambda: LoraConfig(dropout=1.0), "lora.dropout must be in"),
        (lambda: LoraConfig(rank_pattern={"q_proj": 0}), "lora.rank-pattern q_proj must be at least 1"),
        (lambda: LoraConfig(rank=4097), "lora.rank must be at most 4096, got 4097."),
        (lambda: LoraConfig(rank=2049, init="pissa"), "lora.rank must be at most 2048, got 2049."),
        (lambda: LoraConfig(alpha=float("nan")), "lora.alpha must be a finite number, got nan."),
        (lambda: LoraConfig(alpha_pattern={"(": 4.0}), "take regular expressions; '(' is none"),
        (lambda: LoraConfig(targets=()), "lora.targets is empty"),
        (lambda: TrainConfig(lr=float("nan")), "train.lr must be a finite number, got nan."),
        (lambda: TrainConfig(epochs=float("inf")), "train.epochs must be a finite number, got inf."),
        (lambda: TrainConfig(clip=float("nan")), "must be at least 0"),
        (lambda: LoraConfig(init="pissa", dora=True), "lora.init=pissa is saved as the difference"),
        (lambda: LoraConfig(init="olora", dora=True), "lora.init=olora is saved as the difference"),
        (lambda: DataConfig(eval="1.5"), "data.eval is a fraction"),
        (lambda: DataConfig(eval="0.1", streaming=True), "data.eval must be a file"),
        (lambda: TrainConfig(lr=0), "train.lr must be above 0"),
        (lambda: TrainConfig(patience=2), "train.patience needs train.eval-steps"),
        (lambda: TrainConfig(eval_steps=4, save_steps=6), "train.save-steps must be a multiple"),
        (lambda: cli_run(lora=LoraConfig(init="pissa")), "lora.init=pissa rewrites the base weights"),
        (lambda: cli_run(lora=LoraConfig(init="loftq"), quant="none"), "lora.init=loftq corrects the error of nf4"),
        (lambda: cli_run(allow_changed=("train.lr",)), "allow-changed needs resume"),
        (lambda: cli_run(data=DataConfig(streaming=True)), "data.streaming needs train.steps"),
    ],
)
def test_a_value_out_of_range_says_the_rule(make, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert message in str(caught.value)


def cli_run(**changes) -> RunConfig:
    return RunConfig(task="chat", base="b", out=Path("o"), **changes)


def test_rank_32_and_up_scales_by_the_root_of_the_rank() -> None:
    assert not LoraConfig(rank=31).uses_rslora
    assert LoraConfig(rank=32).uses_rslora
    assert not LoraConfig(rank=64, rslora=False).uses_rslora
    assert LoraConfig(rank=4, rslora=True).uses_rslora
