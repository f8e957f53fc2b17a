"""Streaming: what is read before the first step does not grow with the file, and what a large file is known by."""

import json
import os
from pathlib import Path

import pytest
from transformers import TrainerCallback

from lora_ft import runs
from lora_ft.config import DataConfig, RunConfig, TrainConfig
from lora_ft.errors import ConfigError
from lora_ft.proof import environment
from lora_ft.proof.environment import PIECE_BYTES, PIECES, file_sha256, streamed_facts
from lora_ft.training import started
from tests import tiny

COUNTERS = Path("/proc/self/io")
ROWS, MIB = 200, 2**20
# Of a file that large a digest reads pieces, here each of the one size.
SAMPLE = PIECES * PIECE_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def rows(file: Path, size: int) -> Path:
    """Returns a file that begins with rows and then has a hole, so large that it takes no room but time to read."""
    turns = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5"}]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(ROWS)))
    os.truncate(file, size)
    return file


def bytes_read() -> int:
    """Returns the bytes that this process has asked the system for, whatever read them."""
    return int(next(line for line in COUNTERS.read_text().splitlines() if line.startswith("rchar")).split()[1])


class FirstStep(TrainerCallback):
    def __init__(self) -> None:
        self.begun = bytes_read()
        self.read = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.read = bytes_read() - self.begun


@pytest.mark.skipif(not COUNTERS.is_file(), reason="the system counts no bytes")
def test_what_is_read_before_the_first_step_does_not_grow_with_the_file(tmp_path, folder):
    read = []
    for size in (64 * MIB, 64 * MIB, 4096 * MIB):
        look, out = FirstStep(), tmp_path / f"run-{len(read)}"
        train = TrainConfig(steps=2, batch_size=4, dtype="float32")
        data = DataConfig(train=str(rows(tmp_path / "rows.jsonl", size)), streaming=True)
        config = RunConfig(task="chat", base=str(folder), out=out, quant="none", data=data, train=train)
        done = runs.run(config, watch=lambda *_, look=look: [look])
        done.release()
        read.append(look.read)
        told = environment.read(out)["data"]["train"]
        # Two batches, and what is read ahead of them: far from the last of the rows, which the hole follows.
        assert 8 <= told["rows_read"] <= 16
        assert (told["rows"], told["sha256"]) == (None, None)
        assert f"of a sample: `{told['sampled_sha256']}`" in (out / "README.md").read_text()
    # The first run reads modules too.
    assert read[2] == pytest.approx(read[1], abs=MIB)
    assert read[2] < SAMPLE + 16 * MIB


def test_a_small_file_is_known_by_all_its_bytes(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(os.urandom(SAMPLE))
    assert streamed_facts(file) == {"sha256": file_sha256(file)}


@pytest.mark.parametrize("size", [SAMPLE + 1, SAMPLE + PIECE_BYTES, 3 * SAMPLE + 17])
def test_a_large_file_is_known_by_its_size_and_pieces_up_to_its_ends(tmp_path, size):
    file = rows(tmp_path / "rows.jsonl", size)
    before = streamed_facts(file)
    assert before == streamed_facts(file)
    for place in (0, PIECE_BYTES - 1, size - PIECE_BYTES, size - 1):
        changed_at(file, place)
        assert streamed_facts(file) != before
        changed_at(file, place)
        assert streamed_facts(file) == before
    os.truncate(file, size + 1)
    assert streamed_facts(file) != before
    os.truncate(file, size - 1)
    assert streamed_facts(file) != before


def changed_at(file: Path, place: int) -> None:
    """Turns a bit over."""
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def test_a_run_on_a_large_file_is_not_resumed_on_another(tmp_path):
    def keep(digest: str, name: str = "rows.jsonl", **changes) -> None:
        data = DataConfig(train=name, streaming=True)
        config = RunConfig(task="chat", base="b", out=tmp_path, data=data, train=TrainConfig(steps=2), **changes)
        facts = {"train": {"name": "rows.jsonl", "rows": None, "sha256": None, "sampled_sha256": digest}}
        started.keep_or_compare(config, facts, "0", {"weights_sha256": "c"})

    keep("a")
    keep("a", name="elsewhere/rows.jsonl", resume=True)  # a file may be moved
    with pytest.raises(ConfigError, match=r"add --allow-changed rows\.train\.sampled_sha256"):
        keep("b", resume=True)
    keep("b", resume=True, allow_changed=("rows.train.sampled_sha256",))


def test_after_a_bad_row_the_digest_that_the_file_has_is_named(tmp_path):
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    for facts, allowed in [
        ({"sha256": "a"}, " --allow-changed rows.train.sha256."),
        ({"sha256": None, "sampled_sha256": "a"}, " --allow-changed rows.train.sampled_sha256."),
        ({"sha256": None}, "--resume."),
    ]:
        assert started.after_bad_row(tmp_path, facts).endswith(allowed)
