"""OpenAI's client in environments of their own, made from the package index and kept between tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lora_ft.sources import cache_home

VERSIONS = ("1.109.1", "2.54.0", "3.54.0")
SCRIPTS = Path(__file__).parent / "openai_scripts"


def environment(version: str) -> Path:
    """Returns a folder with that version of the client and what it needs, and nothing else."""
    place = cache_home() / "test-clients" / f"openai-{version}-py{sys.version_info[0]}{sys.version_info[1]}"
    if not place.is_dir():
        fresh = place.with_name(f"{place.name}-{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(fresh), f"openai=={version}"]
        subprocess.run([*command, "--disable-pip-version-check"], check=True, capture_output=True)
        fresh.replace(place)
    return place


def run(version: str, url: str, token: str, script: str, *words: str, timeout: float = 300) -> str:
    """Returns what a script prints that sees that client and the standard library alone."""
    settings = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(environment(version)),
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": token,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # Without site-packages: none of ours can stand in for what the client would miss.
    command = [sys.executable, "-S", str(SCRIPTS / script), *words]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
