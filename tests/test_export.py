"""Exported files: what transformers and a real llama.cpp read in them is the merged model, or files are refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_ft import adapters, base, export, merge, saved, seal, tasks
from lora_ft.cli import main
from lora_ft.data.render import ChatRenderer
from lora_ft.errors import AdapterError, ProofError, StorageError, UnsupportedModelError
from lora_ft.export import model, modelfile, portable, vocabulary
from lora_ft.foreign import gguf as reader
from lora_ft.proof import environment
from lora_ft.settings import to_yaml
from tests import llama_cpp, tiny, tiny_words

USER = "zqalice"
TOKEN = "hf_" + "q" * 30
SHAPES = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "head_dim": 24}),
    "llama-untied": ("llama-untied", {}),
    "llama-3-positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear-positions": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no exported file may name."""
    made = tmp_path_factory.mktemp(USER)
    tiny_words.put(tiny.model_folder(made / "base", "llama", vocab_size=tiny_words.VOCAB))
    return made


@pytest.fixture(scope="module")
def run(place: Path) -> tiny.Run:
    """An adapter whose layers have scales that are not alpha / r, on a quantized base."""
    options = {"rslora": True, "alpha_pattern": {"v_proj": 3.0}, "rank_pattern": {"down_proj": 2}}
    return tiny.run(place / "adapter", place / "base", task="chat", quant="none", steps=10, **options)


@pytest.fixture(scope="module")
def merged(run: tiny.Run, place: Path) -> Path:
    merge.merge(run.folder, place / "merged", dtype="float16")
    return place / "merged"


def untrained(folder: Path, base_folder: Path, quant: str = "none", **lora: Any) -> Path:
    """Returns an adapter folder without a seal, its B random."""
    loaded = base.load(str(base_folder), quant=quant, dtype="float32", device="cpu")  # type: ignore[arg-type]
    settings = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora})
    made = peft.get_peft_model(loaded.model, settings)
    for parameter in adapters.trained(made).values():
        torch.nn.init.normal_(parameter, std=0.1)
    config = tiny.config.RunConfig(task="chat", base=str(base_folder), out=folder, quant=quant)  # type: ignore[arg-type]
    tiny.write(folder, loaded, made, tasks.get("chat"), config)
    return folder


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_llama_cpp_computes_what_transformers_does(shape: str, tmp_path: Path) -> None:
    architecture, sizes = SHAPES[shape]
    folder = tiny.model_folder(tmp_path / "model", architecture, vocab_size=tiny_words.VOCAB, **sizes)
    if shape == "llama-biased":
        shift_biases(folder)
    export.export(tiny_words.put(folder), tmp_path / "model.gguf")
    original = tasks.get("chat").model_class.from_pretrained(folder, dtype=torch.float32).eval()
    # Long enough for the rotation of positions to matter.
    prompt = [random.Random(shape).randrange(3, 300) for _ in range(100)]
    with llama_cpp.running(tmp_path / "model.gguf") as running:
        assert llama_cpp.agreed(original, prompt, *running.greedy(prompt, 8)) > 0


def shift_biases(folder: Path) -> None:
    """Gives all biases other numbers than 0, which any order of them would be."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    biased = {k: torch.randn(t.shape, generator=generator) if k.endswith(".bias") else t for k, t in tensors.items()}
    saved.atomicio.disk.tensors(folder / "model.safetensors", biased, {"format": "pt"})


def test_an_order_of_rows_that_is_not_llama_cpps_is_seen(place: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(model.Described, "in_order", lambda self, name, tensor: tensor)
    export.export(place / "base", tmp_path / "wrong.gguf")
    original = tasks.get("chat").model_class.from_pretrained(place / "base", dtype=torch.float32).eval()
    prompt = list(range(20, 60))
    with llama_cpp.running(tmp_path / "wrong.gguf") as running, pytest.raises(AssertionError):
        llama_cpp.agreed(original, prompt, *running.greedy(prompt, 8))


def test_transformers_reads_back_every_weight_of_the_merged_model(run: tiny.Run, merged: Path, tmp_path: Path) -> None:
    export.export(run.folder, tmp_path / "model.gguf")
    read, tokenizer = reader.load(tmp_path / "model.gguf")
    wanted = load_file(merged / "model.safetensors")
    found = read.state_dict()
    assert wanted.keys() == found.keys() - {"lm_head.weight"}
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    assert tokenizer.chat_template == tiny_words.TEMPLATE
    assert tokenizer.get_vocab().items() >= run.base.tokenizer.get_vocab().items()


def test_llama_cpp_says_what_the_adapter_says_merged_and_beside_its_base(
    run: tiny.Run, merged: Path, tmp_path: Path
) -> None:
    export.export(merged, tmp_path / "merged.gguf")
    export.export(run.base_folder, tmp_path / "base.gguf")
    export.export(run.folder, tmp_path / "lora.gguf", form="gguf-lora")
    prompts = [row["input_ids"][:5] for row in run.rows]
    said = []
    for file, lora in ((tmp_path / "merged.gguf", None), (tmp_path / "base.gguf", tmp_path / "lora.gguf")):
        with llama_cpp.running(file, lora) as running:
            answers = [running.greedy(prompt, 4) for prompt in prompts]
        assert sum(llama_cpp.agreed(run.model, p, *answer) for p, answer in zip(prompts, answers, strict=True)) > 20
        said.append(answers)
    with llama_cpp.running(tmp_path / "base.gguf") as running:
        assert [running.greedy(prompt, 4)[0] for prompt in prompts] != [tokens for tokens, _ in said[1]]


def test_q8_0_is_within_half_a_step_of_every_number(place: Path, tmp_path: Path) -> None:
    export.export(place / "base", tmp_path / "half.gguf")
    size = export.export(place / "base", tmp_path / "model.gguf", kind="q8_0")
    assert size == (tmp_path / "model.gguf").stat().st_size < 0.7 * (tmp_path / "half.gguf").stat().st_size
    wanted = {t.name: t for t in gguf.GGUFReader(tmp_path / "half.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        exact = wanted[tensor.name].data.astype(np.float32)
        if tensor.data.ndim == 1:
            assert np.array_equal(tensor.data, exact)
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # The step itself is kept in float16.
        step = np.abs(exact.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
        assert (np.abs(found - exact).reshape(-1, 32) <= 0.6 * step + 1e-4).all(), tensor.name


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Returns conversations of all kinds of letters, spaces, numbers and breaks, some of them with a system turn."""
    rng = random.Random(1)
    words = [
        "the",
        "fox's",
        "JUMPS",
        "12",
        "3.5",
        "1234567",
        "  ",
        "\n\n",
        "é",
        "你好",
        "🙂",
        "don't",
        "I'LL",
        "a_b",
        "\t",
    ]

    def text() -> str:
        return (" ".join(rng.choice(words) for _ in range(rng.randrange(1, 12))).strip() or "yes") + rng.choice(
            ["", "?"]
        )

    made = []
    for number in range(count):
        turns = [{"role": "system", "content": text()}] if number % 3 == 0 else []
        for _ in range(rng.randrange(3)):
            turns += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        made.append([*turns, {"role": "user", "content": text()}])
    return made


@pytest.mark.parametrize("split", sorted(tiny_words.SPLITS))
def test_llama_cpp_asks_with_the_tokens_of_the_training(split: str, place: Path, tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "base", "llama", vocab_size=tiny_words.VOCAB)
    export.export(tiny_words.put(folder, split), tmp_path / "model.gguf")
    renderer = ChatRenderer(base.load_tokenizer(folder), 2048)
    with llama_cpp.running(tmp_path / "model.gguf") as running:
        for turns in conversations(50):
            assert running.prompt(turns) == renderer.prompt(turns), turns


def test_transformers_asks_with_the_tokens_of_the_training(tmp_path: Path) -> None:
    """Of the file's tokenizer transformers knows one way of splitting, that of GPT-2."""
    folder = tiny.model_folder(tmp_path / "base", "llama", vocab_size=tiny_words.VOCAB)
    export.export(tiny_words.put(folder, "gpt-2"), tmp_path / "model.gguf")
    trained, read = (
        ChatRenderer(t, 2048) for t in (base.load_tokenizer(folder), reader.load(tmp_path / "model.gguf")[1])
    )
    for turns in conversations(50):
        assert read.prompt(turns) == trained.prompt(turns)


def test_the_same_model_gives_the_same_bytes_and_none_names_this_machine(
    run: tiny.Run, merged: Path, place: Path, tmp_path: Path, monkeypatch
) -> None:
    forms: dict[str, tuple[Path, dict[str, Any]]] = {
        "one.gguf": (merged, {}),
        "lora.gguf": (run.folder, {"form": "gguf-lora"}),
        "ollama": (merged, {"form": "ollama", "kind": "q8_0"}),
    }
    written = []
    for folder in (place / "out", tmp_path):
        monkeypatch.chdir(place if folder == tmp_path else tmp_path)
        for name, (source, options) in forms.items():
            export.export(source, folder / name, **options)
        written.append({f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()})
    assert written[0] == written[1]
    assert len(written[0]) == 4
    canaries = [USER, TOKEN, str(tmp_path), os.environ["LORA_FT_HOME"], str(Path.home())]
    assert not [(n, c) for n, data in written[0].items() for c in canaries if c.encode() in data]
    assert sorted(path.name for path in (place / "out").iterdir()) == sorted(forms)


def test_nothing_is_left_of_a_file_that_was_not_written_whole(merged: Path, tmp_path: Path, monkeypatch) -> None:
    made = model._encoded
    count = iter(range(100))

    def fails(*arguments: Any) -> Any:
        if next(count) == 5:
            raise OSError(28, "No space left on device")
        return made(*arguments)

    monkeypatch.setattr(model, "_encoded", fails)
    with pytest.raises(StorageError, match="free some space"):
        export.export(merged, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_as_it_is(run: tiny.Run, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    for form in ("gguf", "gguf-lora", "ollama"):
        with pytest.raises(StorageError, match="stays as it is"):
            export.export(run.folder, tmp_path / "a.gguf", form=form)
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_what_is_not_proven_is_not_exported(run: tiny.Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(seal, "drift", lambda *arguments: 9.0)
    with pytest.raises(ProofError, match=r"KL to the adapter is 9 nats"):
        export.export(run.folder, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head is trained whole"),
        ({"trainable_token_indices": [5, 7]}, "single tokens are trained"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "one of two embeddings"),
    ],
    ids=str,
)
def test_an_adapter_that_llama_cpp_would_take_half_of_is_refused(
    options: dict[str, Any], reason: str, place: Path, tmp_path: Path
) -> None:
    folder = untrained(tmp_path / "adapter", place / "base", **options)
    with pytest.raises(AdapterError, match=f"{reason}.*--format gguf"):
        export.export(folder, tmp_path / "lora.gguf", form="gguf-lora")
    # Told before it is tried, and before it is trained.
    answers = {answer.program: answer for answer in portable.answers(folder)}
    assert not answers["llama.cpp"].takes
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_embeddings_of_their_own_are_adapted_in_llama_cpp_too(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "base", "llama-untied", vocab_size=tiny_words.VOCAB)
    adapter = untrained(
        tmp_path / "adapter", tiny_words.put(folder), target_modules=["q_proj", "embed_tokens", "lm_head"]
    )
    export.export(folder, tmp_path / "base.gguf")
    export.export(adapter, tmp_path / "lora.gguf", form="gguf-lora")
    live = saved.load(adapter).model
    prompt = list(range(30, 50))
    with llama_cpp.running(tmp_path / "base.gguf", tmp_path / "lora.gguf") as running:
        assert llama_cpp.agreed(live, prompt, *running.greedy(prompt, 6)) > 0


def test_models_and_tokenizers_that_llama_cpp_reads_otherwise_are_refused(tmp_path: Path) -> None:
    other = tiny_words.put(tiny.model_folder(tmp_path / "gpt2", "gpt2", vocab_size=tiny_words.VOCAB))
    with pytest.raises(UnsupportedModelError, match="a gpt2 model is not written as GGUF"):
        export.export(other, tmp_path / "a.gguf")
    words = tiny.model_folder(tmp_path / "words", "llama")
    with pytest.raises(UnsupportedModelError, match=r"it is WordLevel, not a byte-level BPE"):
        export.export(words, tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match="neither adapter_config"):
        export.export(tmp_path, tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match="it is a whole model"):
        export.export(words, tmp_path / "a.gguf", form="gguf-lora")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda rules: rules["pre_tokenizer"].update(add_prefix_space=True), "splits texts in a way"),
        (lambda rules: rules.update(normalizer={"type": "Lowercase"}), "changes texts first, by Lowercase"),
        (lambda rules: rules["added_tokens"][1].update(lstrip=True), "swallows spaces"),
        (lambda rules: rules["added_tokens"][1].update(single_word=True), "is none within a word"),
        (lambda rules: rules["model"].update(byte_fallback=True), "SentencePiece's"),
    ],
)
def test_a_tokenizer_that_differs_in_one_rule_is_refused(changed: Any, reason: str, tmp_path: Path) -> None:
    made = tiny_words.tokenizer("gpt-2")
    vocabulary.check("it", made, tiny_words.VOCAB)
    rules = json.loads(made.backend_tokenizer.to_str())
    changed(rules)
    made._tokenizer = type(made.backend_tokenizer).from_str(json.dumps(rules))
    with pytest.raises(UnsupportedModelError, match=reason):
        vocabulary.check("it", made, tiny_words.VOCAB)


def test_the_modelfile_asks_as_the_training_did(merged: Path, tmp_path: Path) -> None:
    export.export(merged, tmp_path / "ollama", form="ollama", kind="q8_0")
    assert sorted(path.name for path in (tmp_path / "ollama").iterdir()) == ["Modelfile", "model.gguf"]
    assert (tmp_path / "ollama" / "Modelfile").read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|start|>system\n{{ .Content }}<|end|>\n'
        '{{ else if eq .Role "user" }}<|start|>user\n{{ .Content }}<|end|>\n'
        '{{ else if eq .Role "assistant" }}<|start|>assistant\n{{ .Content }}<|end|>\n{{ end }}{{ end }}'
        '<|start|>assistant\n"""\n'
        'SYSTEM """Be brief."""\n'
        'PARAMETER stop "<|end|>"\n'
    )


TEMPLATES = {
    "numbers its turns": (
        "{% for m in messages %}{{ loop.index }}{{ m['role'] }}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ messages | length }}assistant{% endif %}",
        "",
    ),
    "strips what is said": (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] | replace('\\n', ' ') }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "",
    ),
    "drops earlier answers": (
        "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}{{ m['role'] }}:{{ m['content'] }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        "",
    ),
}


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_a_template_that_does_more_than_wrap_its_turns_is_refused(kind: str) -> None:
    made = tiny_words.tokenizer()
    made.chat_template = TEMPLATES[kind][0]
    with pytest.raises(UnsupportedModelError, match=r"cannot be written for Ollama.*--jinja"):
        modelfile.of("it", made, "model.gguf", None)


WRAPPED = (
    "{%% for m in messages %%}({{ m['role'] }}){{ m['content'] }}%s{%% endfor %%}"
    "{%% if add_generation_prompt %%}(assistant)%s{%% endif %%}"
)


@pytest.mark.parametrize(
    ("template", "end", "system", "reason"),
    [
        (WRAPPED % ("{{ '\"' * 3 }}<|end|>", ""), None, None, "a text of a Modelfile"),
        (WRAPPED % ("<|end|>", "{{ '\"' }}"), None, None, "a text of a Modelfile"),
        (WRAPPED % ("<|end|>", ""), None, 'Say "no"', "a text of a Modelfile"),
        (WRAPPED % ("<|end|>", ""), '<|"\nFROM x|>', None, "it stops at"),
        (WRAPPED % ("<|end|>", ""), "<|\nFROM x|>", None, "it stops at"),
    ],
    ids=["made in the template", "before the end", "system", "quote in a stop", "line break in a stop"],
)
def test_no_text_ends_where_a_modelfile_would_go_on(
    template: str, end: str | None, system: str | None, reason: str
) -> None:
    made = tiny_words.tokenizer()
    made.chat_template = template
    if end is not None:
        made.eos_token = end
    with pytest.raises(UnsupportedModelError, match=reason):
        modelfile.of("it", made, "model.gguf", system)


def test_a_modelfile_holds_the_system_turn_of_the_training_and_no_bos_twice() -> None:
    made = tiny_words.tokenizer()
    assert 'SYSTEM """Be kind."""' in modelfile.of("it", made, "model.gguf", "Be kind.")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}({{ m['role'] }}){{ m['content'] }}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}(assistant){% endif %}"
    )
    # llama.cpp writes none of its own for this tokenizer, and one for the next.
    assert '"""<|start|>{{ range .Messages }}' in modelfile.of("it", made, "model.gguf", None)
    made._tokenizer.post_processor = tiny_words.with_bos()
    assert "<|start|>" not in modelfile.of("it", made, "model.gguf", None)


@pytest.mark.parametrize(
    ("options", "refusing"),
    [
        ({}, ["Ollama"]),
        ({"rank": 64}, ["Ollama"]),
        ({"rank": 1024}, ["vLLM", "Ollama"]),
        ({"rank": 300, "init": "pissa"}, ["vLLM", "Ollama"]),
        ({"dora": True}, ["vLLM", "llama.cpp", "Ollama"]),
        ({"save_modules": ("lm_head",)}, ["vLLM", "llama.cpp", "Ollama"]),
        ({"train_tokens": ("a",)}, ["vLLM", "llama.cpp", "Ollama"]),
        ({"targets": ("q_proj", "lm_head")}, ["llama.cpp", "Ollama"]),
        ({"task": "classify"}, ["vLLM", "llama.cpp", "Ollama"]),
        ({"task": "tag"}, ["vLLM", "llama.cpp", "Ollama"]),
        ({"task": "embed"}, ["vLLM", "llama.cpp", "Ollama"]),
    ],
    ids=str,
)
def test_who_will_take_an_adapter_is_known_before_it_is_trained(
    options: dict[str, Any], refusing: list[str], place: Path, tmp_path: Path, capsys
) -> None:
    lora = {key: value for key, value in options.items() if key != "task"}
    config = tiny.config.RunConfig(
        task=options.get("task", "chat"),
        base=str(place / "base"),
        out=tmp_path / "run",
        quant="none",
        lora=tiny.config.LoraConfig(**lora),
    )
    text = to_yaml(config).replace("base: base", f"base: {place / 'base'}")
    (tmp_path / "run.yaml").write_text(text)
    assert main(["export", str(tmp_path / "run.yaml"), "--portable", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name for name, answer in found.items() if not answer["takes"]} == set(refusing)
    assert all(answer["why"] or answer["how"] for answer in found.values())
    if options == {"rank": 64}:
        assert "--max-lora-rank 64" in found["vLLM"]["how"]
        assert any("rsLoRA" in note for note in found["llama.cpp"]["notes"])


def changed(run: tiny.Run, folder: Path, file: str, **keys: Any) -> Path:
    """Returns a copy of an adapter folder with some keys of a JSON file in it changed."""
    shutil.copytree(run.folder, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | keys))
    return folder


def test_nobody_is_sent_to_an_export_that_would_be_refused(tmp_path: Path, capsys) -> None:
    words = tiny.model_folder(tmp_path / "words", "llama")
    (tmp_path / "run.yaml").write_text(f"task: chat\nbase: {words}\nout: {tmp_path / 'run'}\nlora:\n  dora: true\n")
    assert main(["export", str(tmp_path / "run.yaml"), "--portable", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for program in ("llama.cpp", "Ollama"):
        assert not found[program]["takes"]
        assert "export" not in found[program]["how"]


def test_numbers_too_large_for_16_bits_are_no_dead_end(run: tiny.Run, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def merged(source: Path, out: Path, *, dtype: str, base_name: str | None) -> None:
        asked.append(dtype)
        merge._cast("model.norm.weight", torch.tensor([1e5]), getattr(torch, dtype))
        raise ProofError(f"{out} but is not proven: Rounding loses part of the adapter: try --dtype float32.")

    monkeypatch.setattr(merge, "merge", merged)
    with pytest.raises(AdapterError, match=r"norm.weight holds numbers too large for float16: use --quant q8_0\.$"):
        export.export(run.folder, tmp_path / "a.gguf", kind="f16")
    with pytest.raises(ProofError, match=r"keep it whole with lora-ft merge --dtype float32\.$"):
        export.export(run.folder, tmp_path / "a.gguf", kind="q8_0")
    assert asked == ["float16", "float32"]


def test_a_run_that_goes_on_from_an_adapter_has_its_rank(run: tiny.Run, place: Path, tmp_path: Path, capsys) -> None:
    wide = changed(run, tmp_path / "wide", saved.CONFIG, r=40)
    lines = ["task: chat", f"base: {place / 'base'}", f"out: {tmp_path / 'run'}", "quant: none", f"init_from: {wide}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert main(["export", str(tmp_path / "run.yaml"), "--portable", "--json"]) == 0
    assert "--max-lora-rank 64" in json.loads(capsys.readouterr().out)["vLLM"]["how"]


@pytest.mark.parametrize(("task", "facts"), [("classify", {"labels": ["a", "b"]}), ("embed", {"pooling": "mean"})])
@pytest.mark.parametrize("form", ["gguf", "gguf-lora"])
def test_an_adapter_on_a_model_that_does_not_generate_is_refused(
    form: str, task: str, facts: dict[str, Any], run: tiny.Run, tmp_path: Path, capsys
) -> None:
    folder = changed(run, tmp_path / "other", environment.FILE, task=facts)
    settings = folder / "config.yaml"
    settings.write_text(settings.read_text().replace("task: chat", f"task: {task}"))
    assert main(["export", str(folder), "--format", form, "--out", str(tmp_path / "a.gguf")]) == 1
    assert "GGUF is for models that generate: merge it" in capsys.readouterr().err


def test_who_takes_an_adapter_is_told_of_its_folder_in_words(run: tiny.Run, capsys) -> None:
    assert main(["export", str(run.folder), "--portable"]) == 0
    told = capsys.readouterr().out
    for phrase in ("vLLM: yes", "llama.cpp: yes", "Ollama: no, from 0.34.1", "--format ollama", "from PEFT 0.14 on"):
        assert phrase in told
    assert main(["export", "nowhere", "--portable"]) == 1
    for words, reason in (
        ([], "out is the file"),
        (["--portable", "--format", "gguf"], "format is of a file"),
        (["--portable", "--quant", "f16"], "quant is of a file"),
        (["--out", "a", "--format", "gguf-lora", "--quant", "f16"], "quant is of merged weights"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(run.folder), *words])
        assert reason in capsys.readouterr().err


def test_an_adapter_is_merged_and_exported_by_one_command(run: tiny.Run, tmp_path: Path, capsys) -> None:
    assert main(["export", str(run.folder), "--out", str(tmp_path / "a.gguf"), "--quant", "q8_0"]) == 0
    assert re.search(r"a\.gguf: gguf, q8_0, 0\.\d MiB", capsys.readouterr().out)
    reader.check(tmp_path / "a.gguf", AdapterError)
