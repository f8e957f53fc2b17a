"""Settings of every test. Tests share two cores with whatever else runs, so thread pools must not spin."""

import logging
import os

# Set before torch starts its pool: spinning threads on a busy machine turn seconds into minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# Side by side (`pytest -n`), each process has one core: two that take two threads each wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Triton decides when it is imported whether kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _level_of_the_log() -> None:
    """Has each test find the log as a new process does: commands that tests run in their own process set its level."""
    logging.getLogger("lora_ft").setLevel(logging.NOTSET)
