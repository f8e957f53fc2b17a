"""What the documents say of the server, held to what it does."""

import re
from pathlib import Path

from lora_ft.serve import routes_answers, routes_files, routes_jobs, routes_models

ROOT = Path(__file__).parents[1]


def test_every_route_stands_in_the_table_and_no_other():
    text = (ROOT / "docs" / "openai_api.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `((?:GET|POST|DELETE) /v1/[^`]+)` \|", text, re.MULTILINE))
    there = {
        f"{method} {route.path.replace(':path', '')}"
        for module in (routes_answers, routes_files, routes_jobs, routes_models)
        for route in module.router.routes
        for method in route.methods
    }
    assert told == there
