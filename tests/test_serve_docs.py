"""What the documents say of the server, held to what it does."""

import re
from pathlib import Path

import pytest

from lora_ft.serve import asked, bodies, events, routes_answers, routes_files, routes_jobs, routes_models
from lora_ft.serve.states import ACTIONS, RUNNING

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "openai_api.md").read_text(encoding="utf-8")
ROUTE = re.compile(r"`((?:GET|POST|DELETE) /v1/[^`]+)`")


def rows() -> dict[str, list[tuple[str, str]]]:
    """Returns the table by endpoint: the fields of each row, and what is said of them."""
    told: dict[str, list[tuple[str, str]]] = {}
    endpoint = ""
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.split(" |")]
        if not line.startswith("| ") or len(cells) < 4:
            continue
        first = cells[0].removeprefix("|").strip()
        endpoint = first or endpoint
        if found := ROUTE.fullmatch(endpoint):
            told.setdefault(found[1], []).append((cells[1].strip(), cells[2].strip()))
    return told


def test_every_route_stands_in_the_table_and_no_other():
    there = {
        f"{method} {route.path.replace(':path', '')}"
        for module in (routes_answers, routes_files, routes_jobs, routes_models)
        for route in module.router.routes
        for method in route.methods
    }
    assert rows().keys() == there


# What else the rows of an endpoint name: hyperparameters.
INNER = {"n_epochs", "batch_size", "learning_rate_multiplier"}


@pytest.mark.parametrize(
    ("endpoint", "model"),
    [
        ("POST /v1/fine_tuning/jobs", routes_jobs.NewJob),
        ("POST /v1/chat/completions", asked.ChatRequest),
        ("POST /v1/completions", asked.CompletionRequest),
    ],
)
def test_every_field_of_a_request_stands_in_the_table_and_no_other(endpoint: str, model: type[bodies.Body]) -> None:
    named = {name.split(".")[0] for fields, _ in rows()[endpoint] for name in re.findall(r"`([\w.]+)`", fields)}
    assert named - INNER == model.model_fields.keys()


@pytest.mark.parametrize(
    ("endpoint", "field", "said"),
    [
        ("GET /v1/fine_tuning/jobs", "limit", f"1 to {routes_jobs.jobs.LISTED}"),
        ("GET /v1/fine_tuning/jobs/{job_id}/events", "limit", f"1 to {events.EVENTS_LISTED}"),
        ("GET /v1/fine_tuning/jobs/{job_id}/checkpoints", "limit", f"1 to {events.CHECKPOINTS_LISTED}"),
        ("POST /v1/chat/completions", "n", f"{asked.MAX_CHOICES} at most"),
        ("POST /v1/chat/completions", "stop", f"{asked.STOP_STRINGS} strings of {asked.STOP_CHARS} characters"),
        ("POST /v1/chat/completions", "messages", f"1 to {asked.MAX_MESSAGES:,}"),
        ("POST /v1/chat/completions", "logit_bias", f"{asked.MAX_BIASES:,} tokens"),
        ("POST /v1/completions", "prompt", f"{asked.MAX_PROMPTS} prompts at most"),
        ("POST /v1/completions", "n", f"times the prompts, {asked.MAX_ANSWERS} at most"),
    ],
)
def test_limits_are_told(endpoint: str, field: str, said: str) -> None:
    assert [text for fields, text in rows()[endpoint] if f"`{field}`" in fields and said in text]


def test_what_can_be_paused_is_told() -> None:
    assert "pause" in ACTIONS[RUNNING]
    assert "of running jobs, before their first step too" in TEXT
