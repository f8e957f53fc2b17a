"""The pages of runs in a headless Chromium: light and dark, wide and narrow, without an error or a request."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from lora_ft import report
from lora_ft.pages import comparison
from tests import cdp
from tests.test_report import classified, lines, summary

pytestmark = pytest.mark.skipif(cdp.program() is None, reason="there is no Chromium here")

LAYERS = [
    {"name": f"model.layers.{depth}.{kind}", "norm": 0.1 + depth * 0.02, "effective_rank": 1.0 + depth % 5}
    for depth in range(30)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
PLAN = {"bytes": {"weights": 2**30, "logits": 2**20, "workspace": 0}, "rows": 4, "tokens": 2048, "measured_rows": True}
# The least contrast that letters may have with what is behind them (WCAG 2.2, 1.4.3, for large ones).
CONTRAST = """
  (() => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = (text) => {
      const [r, g, b] = text.match(/[\\d.]+/g).map((v) => linear(v / 255));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (one) => {
      for (; one; one = one.parentElement) {
        const found = getComputedStyle(one).backgroundColor;
        if (!found.startsWith("rgba(0, 0, 0, 0")) return found;
      }
      return "rgb(255, 255, 255)";
    };
    const worst = [99, ""];
    for (const one of document.querySelectorAll("body *:not(svg *)")) {
      if (![...one.childNodes].some((part) => part.nodeType === 3 && part.textContent.trim())) continue;
      if (!one.getClientRects().length) continue;
      const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < worst[0]) [worst[0], worst[1]] = [ratio, one.outerHTML.slice(0, 80)];
    }
    return worst;
  })()
"""
# Where each section and drawing is, in pixels of the page.
BOXES = """
  [...document.querySelectorAll("header, section, svg")].map((one) => one.getBoundingClientRect())
    .filter((box) => box.width).map((box) => [box.left, box.top + scrollY, box.right, box.bottom + scrollY])
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cdp.Browser]:
    with cdp.Browser(tmp_path_factory.mktemp("profile")) as page:
        for room in ("Runtime", "Log", "Page", "Network"):
            page.call(f"{room}.enable")
        yield page


def problems(page: cdp.Browser) -> list[Any]:
    """Returns the errors that the console has shown."""
    told = [
        event for event in page.events if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    ]
    return told + [event for event in page.events if event["method"] == "Log.entryAdded"]


def shot(page: cdp.Browser, file: Path, scheme: str, width: int) -> np.ndarray:
    """Returns a picture of the whole page, [height, width, 3] from 0 to 1."""
    page.events.clear()
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.open(file.as_uri())
    page.until(f"document.readyState === 'complete' && location.href.endsWith('{file.name}')")
    taken = page.call("Page.captureScreenshot", captureBeyondViewport=True)
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(taken["data"])))[..., :3]


def check(page: cdp.Browser, file: Path) -> None:
    """Holds a page to what it promises, in both schemes and widths."""
    for width in (1200, 400):
        inked = []
        for scheme, dark in (("light", False), ("dark", True)):
            picture = shot(page, file, scheme, width)
            paper = picture[2, 2]
            assert (paper.mean() < 0.2) if dark else (paper.mean() > 0.9), "the paper is dark where that is asked for"
            assert page.value("document.documentElement.scrollWidth <= innerWidth"), f"no part is wider than {width}"
            ratio, worst = page.value(CONTRAST)
            assert ratio >= 3, (scheme, worst)
            ink = np.abs(picture - paper).max(axis=2) > 0.1
            for left, top, right, bottom in page.value(BOXES):
                part = ink[int(top) : int(bottom), max(0, int(left)) : int(right)]
                assert part.size == 0 or part.mean() > 0.002, f"{scheme}: nothing is drawn at {top:.0f}"
            inked.append(ink)
            assert problems(page) == []
            asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
            assert asked == [file.as_uri()], "nothing else is loaded"
        light, night = inked
        assert light.shape == night.shape
        # The same marks in the same places, whatever their colours.
        assert (light & night).sum() / (light | night).sum() > 0.9


def write(place: Path, text: str) -> Path:
    place.write_text(text, encoding="utf-8")
    return place


def test_the_report_of_a_run(browser: cdp.Browser, tmp_path: Path) -> None:
    text = report.page(summary(layers=LAYERS, plan=PLAN), lines())
    assert len(text.encode()) < 1_000_000
    check(browser, write(tmp_path / "report.html", text))
    assert browser.value("document.querySelectorAll('figure.map svg').length") == 2
    assert "Proven" in browser.value("document.body.innerText")


def test_the_report_of_a_classifier(browser: cdp.Browser, tmp_path: Path) -> None:
    told = classified(["bad", "good", "plain"], [[9, 1, 0], [0, 8, 2], [1, 0, 9]])
    check(browser, write(tmp_path / "classes.html", report.page(told, lines())))


def test_runs_side_by_side(browser: cdp.Browser, tmp_path: Path) -> None:
    runs = [comparison.Run(name, summary(), lines(20 + 5 * number)) for number, name in enumerate("abcdefg")]
    check(browser, write(tmp_path / "runs.html", comparison.page(runs)))
    assert browser.value("document.querySelectorAll('table thead th').length") == 8


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("prefers-color-scheme: dark", "prefers-color-scheme: none"),
        ("--soft: #5d646d", "--soft: #f5f3ee"),
        ("</h1>", '</h1><p style="width: 3000px; white-space: nowrap">wide</p>'),
        ("</h1>", '</h1><img src="https://example.invalid/x.png">'),
        ("svg { display: block", "svg { opacity: 0; display: block"),
    ],
    ids=["no dark", "pale words", "too wide", "a picture from elsewhere", "no drawing"],
)
def test_the_check_notices(browser: cdp.Browser, tmp_path: Path, old: str, new: str) -> None:
    text = report.page(summary(layers=LAYERS), lines())
    assert old in text
    with pytest.raises(AssertionError):
        check(browser, write(tmp_path / "broken.html", text.replace(old, new, 1)))
