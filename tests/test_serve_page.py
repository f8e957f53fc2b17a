"""The server's page in a headless Chromium: jobs, curves, events, checkpoints, and two models asked side by side."""

import json
from pathlib import Path

import pytest

from tests import cdp, tiny_server

pytestmark = pytest.mark.skipif(cdp.program() is None, reason="there is no Chromium here")

ROWS = "document.querySelectorAll('#{} tr').length"
POINTS = "(document.querySelector('[data-kind={}]')?.getAttribute('points') ?? '').split(' ').filter(Boolean).length"

# Has each look take longer than the time between two, and counts those on their way.
COUNTED = """
  window.looks = window.most = 0; let now = 0; const real = window.fetch;
  window.fetch = async (path, options) => {
    if (!String(path).endsWith("jobs?limit=50")) return real(path, options);
    window.looks++; window.most = Math.max(window.most, ++now);
    await new Promise((done) => setTimeout(done, 3500));
    try { return await real(path, options); } finally { now--; }
  };
"""


def test_the_page_shows_a_job_as_it_goes_on_and_asks_two_models(tmp_path: Path) -> None:
    base = tiny_server.base_folder(tmp_path / "base")
    with tiny_server.Server(tiny_server.home(tmp_path / "home", base)) as server, cdp.Browser(tmp_path / "p") as page:
        files = [server.upload(tiny_server.chats(12)), server.upload(tiny_server.chats(4, seed=1))]
        more = {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 10}}
        job = server.start_job(files[0], validation_file=files[1], **more)
        page.call("Runtime.enable")
        page.open(f"{server.url}/#token=wrong")
        page.until("document.querySelector('#told')?.innerText.includes('Incorrect API key')")
        assert page.value("document.querySelector('main').hidden")
        page.open(f"{server.url}/?again#token={server.token}")
        page.until(f"document.querySelector('#jobs')?.innerText.includes('{job}')")
        assert server.token not in page.value("location.href"), "the token does not stay in the address"
        page.until("document.querySelector('#about').innerText.startsWith('succeeded')", 120)
        assert page.until(POINTS.format("train_loss")) == 6
        assert page.value(POINTS.format("valid_loss")) == 6
        assert page.value(POINTS.format("full_valid_loss")) == 2
        assert page.until(ROWS.format("checkpoints")) == 2
        told = page.value("document.querySelector('#events').innerText")
        assert "Fine-tuning job started" in told
        assert told.count("Step ") == 6
        assert page.value("[...document.querySelectorAll('[data-ask]')].every((button) => button.disabled)")

        made = server.job(job)["fine_tuned_model"]
        page.until(f"[...document.querySelector('#right').options].some((one) => one.value === {json.dumps(made)})")
        page.value("document.querySelector('#left').value = 'tiny'")
        page.value(f"document.querySelector('#right').value = {json.dumps(made)}")
        page.value("document.querySelector('#prompt').value = 'say abcd'; document.querySelector('#tokens').value = 5")
        page.value("document.querySelector('#ask button').click()")
        ask = {"messages": [{"role": "user", "content": "say abcd"}], "temperature": 0, "max_tokens": 5}
        for side, name in (("left", "tiny"), ("right", made)):
            answer = server.ask("POST", "/v1/chat/completions", {"model": name, **ask})[1]
            want = json.dumps(answer["choices"][0]["message"]["content"])
            page.until(f"document.querySelector('#answer-{side}').textContent === {want}")

        # A job that is not shown tells its step too; then it is paused from the page.
        long = server.start_job(files[0], hyperparameters={"n_epochs": 30, "batch_size": 1})
        row = f"[...document.querySelectorAll('#jobs tr')].find((row) => row.innerText.includes('{long}'))"
        page.until(f"/^[1-9]\\d*\\/360$/.test({row}?.children[3].innerText)", 120)
        assert page.value("document.querySelector('#name').innerText") == job
        page.until(f"{row} && !!({row}.click(), true)")
        page.until("document.querySelector('[data-ask=pause]').disabled === false", 120)
        page.until(f"{POINTS.format('train_loss')} > 2", 120)
        page.value("document.querySelector('[data-ask=pause]').click()")
        page.until("document.querySelector('#about').innerText.startsWith('paused')")
        assert server.job(long)["status"] == "paused"
        # The events that are known were not fetched again.
        for one in (job, long):
            asked = f"performance.getEntriesByType('resource').filter((it) => it.name.includes('{one}/events'))"
            whole = page.value(f"{asked}.filter((it) => it.name.includes('limit=1000')).length")
            assert 1 <= whole < page.value(f"{asked}.length")
            assert whole <= 2, "once, and perhaps once before the first event"
        page.value(COUNTED)
        page.until("window.looks > 2", 30)
        assert page.value("window.most") == 1, "one look at a time"
        # Nothing was fetched from anywhere else.
        names = page.value("performance.getEntriesByType('resource').map((one) => one.name)")
        assert names
        assert all(name.startswith(server.url) for name in names)
