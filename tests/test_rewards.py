"""Rewards: what earns one and what must not, and programs that a reply must not be able to run."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.foreign.cell import DiedError
from lora_ft.scoring import rewards, sandbox

GSM8K = "She sold 48/2 = 24 clips.\nTogether 48+24 = 72.\n#### 72"


@pytest.mark.parametrize(
    ("reply", "answer", "worth"),
    [
        ("So the answer is 72.", GSM8K, 1),
        ("24 + 48 = 72 clips\n#### 72", GSM8K, 1),
        ("72 at first, then 24", GSM8K, 0),
        ("#### 24, not 72", GSM8K, 1),  # the last number after the mark
        ("no number", GSM8K, 0),
        ("", "72", 0),
        ("It costs $1,250.00", "1250", 1),
        (" 1250.5", "1,250.50", 1),
        ("80-72", "72", 1),
        ("x72", "72", 0),
        ("-72", "72", 0),
        ("= -72.", "-72", 1),
        ("72%", "72%", 1),
        ("Paris", "Paris", 1),
        ("Let me think.\n####  New   York", "New York", 1),
        ("paris", "Paris", 0),
        ("It is Paris", "Paris", 0),
    ],
)
def test_exact_reads_the_answer_and_not_how_it_is_put(reply, answer, worth):
    assert rewards.get("exact").of([reply], [answer]) == [worth]


SCHEMA = json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}})


@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        ('{"a": 1}', 1),
        ('```json\n{"a": 1}\n```', 1),
        ('{"a": "1"}', 0),
        ('{"a": 1} and more', 0),
        ('{"a": 1, "a": 2}', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_json_schema_takes_one_json_text_that_fits(reply, worth):
    pytest.importorskip("jsonschema_rs")
    assert rewards.get("json_schema").of([reply], [SCHEMA]) == [worth]


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [("{", "no JSON schema"), ('{"type": 5}', "no JSON schema"), ("3", "neither an object"),
     ('{"$ref": "http://127.0.0.1:1/x"}', "no JSON schema")],
)  # fmt: skip
def test_a_schema_that_is_none_or_must_be_fetched_is_told(answer, phrase):
    pytest.importorskip("jsonschema_rs")
    assert phrase in (rewards.get("json_schema").fault(answer) or "")


def test_a_schema_whose_pattern_takes_for_ever_earns_nothing():
    pytest.importorskip("jsonschema_rs")
    schema = json.dumps({"type": "string", "pattern": r"^(a+)+\1$"})
    assert rewards.get("json_schema").of([json.dumps("a" * 40 + "b")], [schema]) == [0]


def test_a_pattern_matches_from_end_to_end():
    found = rewards.get("regex").of([" 12 apples\n", "12 apples, 3", "twelve"], [r"\d+ \w+"] * 3)
    assert found == [1, 0, 0]
    assert "unterminated" in (rewards.get("regex").fault("[a") or "")


def test_a_pattern_that_takes_for_ever_is_ended_and_the_next_one_answered(caplog, monkeypatch):
    monkeypatch.setattr(rewards, "PATTERN_S", 0.2)
    reward = rewards.get("regex")
    with caplog.at_level("WARNING", logger="lora_ft"):
        assert reward.of(["a" * 40 + "!", "aaa", "a" * 40 + "!"], ["(a+)+"] * 3) == [0, 1, 0]
    assert caplog.text.count("such replies earn nothing") == 1


TESTS = "assert add(1, 2) == 3\ndef test_more():\n    assert add(-1, 1) == 0"
ADD = "def add(a, b):\n    return a + b\n"
CRAFTY = "class Same:\n    def __eq__(self, other):\n        return True\n"


def test_unit_tests_run_the_last_fenced_program():
    reward = rewards.get("unit_tests")
    reward.require()
    fenced = f"First:\n```python\nnot this\n```\nBetter:\n```python\n{ADD}```\nDone."
    wrong = "def add(a, b):\n    return abs(a) + abs(b)\n"  # the function among the tests alone notices
    assert reward.of([ADD, fenced, wrong, "I do not know."], [TESTS] * 4) == [1, 1, 0, 0]
    assert "asserts nothing" in (reward.fault("add(1, 2)") or "")
    assert "no Python" in (reward.fault("assert (") or "")
    assert reward.fault(TESTS) is None


@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        ("```bash\npip install it\n```\nThen that:\n```\n{ADD}```\n", 1),
        ("```python\n{ADD}```\nRun it:\n```bash\npytest\n```", 1),
        ("```Python3\n{ADD}```", 1),
        ("```python title=add.py\n{ADD}```", 1),
        ('````py\n{ADD}inside = """\n```\n"""\n````', 1),
        ("```python\n{ADD}", 1),
        ("```js\n{ADD}```", 0),
        ("```" + 200_000 * "a", 0),  # looked through once
    ],
)
def test_the_last_block_of_python_is_the_program(reply, worth):
    assert rewards.get("unit_tests").of([reply.replace("{ADD}", ADD)], [TESTS]) == [worth]


@pytest.fixture
def open_system(monkeypatch):
    monkeypatch.setattr(sandbox, "_open_to", lambda: ("network",))


@pytest.mark.usefixtures("open_system")
def test_programs_are_not_run_unfenced_because_a_folder_names_them(caplog):
    reward = rewards.get("unit_tests")
    with pytest.raises(ConfigError, match="cannot keep the programs of replies from network, and the adapter's folder"):
        reward.admit()
    with caplog.at_level("WARNING", logger="lora_ft"):
        reward.require()
    assert "run in a container" in caplog.text
    reward.admit()  # of whoever has typed its name


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory and calls are Linux's")
OTHERS = "import os\nother = os.getppid()\n"
# Each changes nothing where it is let.
HOSTILE = {
    "parent's limits": OTHERS + "import resource\nresource.prlimit(other, 7, resource.prlimit(other, 7))",
    "parent's processors": OTHERS + "os.sched_setaffinity(other, os.sched_getaffinity(other))",
    "parent's priority": OTHERS + "os.setpriority(0, other, os.getpriority(0, other))",
    "parent's scheduling": OTHERS + "os.sched_setscheduler(other, os.sched_getscheduler(other), os.sched_param(0))",
    "memory that stays": "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.shmget(1, 0, 0) < 0 and ctypes.get_errno() == errno.EPERM:\n    raise PermissionError",
    "many files": "import time\nfor n in range(40):\n    open(str(n), 'wb').write(bytes(2**20))\ntime.sleep(2)",
    "many folders": "import os, time\nfor n in range(400):\n    os.mkdir(str(n))\ntime.sleep(2)",
    "exit": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "memory": "held = bytearray(2**34)",
    "another program": "import subprocess\nsubprocess.run(['true'])",
    "becomes another": "import os\nos.execv('/bin/true', ['true'])",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "network": "import socket\nsocket.socket()",
    "signals": "import os\nos.kill(os.getppid(), 0)",
    "writes elsewhere": "open({elsewhere!r}, 'w').write('x')",
    "deletes": "import os\nos.remove({victim!r})",
    "permissions": "import os\nos.chmod({victim!r}, 0)",
    "reads files": "open({victim!r}).read()",
    "parent's environment": "open('/proc/%d/environ' % __import__('os').getppid(), 'rb').read()",
    "a large file": "open('large', 'wb').write(bytes(2**24))",
    "raises what it likes": "raise KeyboardInterrupt",
    "floods the verdict": "import os\nfor end in range(3, 2000):\n    try:\n        os.write(end, b'x' * 100)\n"
    "    except OSError:\n        pass",
}


@linux
def test_hostile_programs_do_not_pass_and_do_no_harm(tmp_path):
    victim, elsewhere = tmp_path / "victim", tmp_path / "elsewhere"
    victim.write_text("mine")
    mode = victim.stat().st_mode
    programs = [
        (
            code.replace("{victim!r}", repr(str(victim))).replace("{elsewhere!r}", repr(str(elsewhere))) + f"\n{ADD}",
            TESTS,
        )
        for code in HOSTILE.values()
    ]
    assert dict(zip(HOSTILE, sandbox.passed(programs), strict=True)) == dict.fromkeys(HOSTILE, False)
    assert victim.read_text() == "mine"
    assert victim.stat().st_mode == mode
    assert not elsewhere.exists()


@linux
def test_harmless_programs_pass(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    harmless = {
        "long": f"long = {'x' * 500_000!r}",
        "prints a lot": "for _ in range(50):\n    print('x' * 10**6)",
        "its own file": "open('mine', 'w').write('x')\nassert open('mine').read() == 'x'",
        "a thread": "import threading\none = threading.Thread(target=int)\none.start()\none.join()",
        "its own limits": "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
        "no environment": "import os\nassert not set(os.environ) - {'LC_CTYPE'}",
        "no main": "if __name__ == '__main__':\n    raise SystemExit",
    }
    found = sandbox.passed([(f"{code}\n{ADD}", TESTS) for code in harmless.values()])
    assert dict(zip(harmless, found, strict=True)) == dict.fromkeys(harmless, True)


@linux
def test_what_takes_for_ever_is_ended_with_all_that_it_started(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    monkeypatch.setattr(sandbox, "PATIENCE_S", 3.0)
    busy, waits = "while True:\n    pass", "import time\ntime.sleep(1000)"
    assert sandbox.passed([(busy, TESTS), (waits, TESTS)]) == [False, False]
    left = psutil.Process().children(recursive=True)
    assert not [process for process in left if str(sandbox.CAGED) in process.cmdline()]


@linux
def test_without_its_token_a_pass_is_none(monkeypatch):
    """The mutation: whoever ends well would pass, and the first hostile program with it."""

    class Well:
        def token_hex(self, size):
            return ""

    monkeypatch.setattr(sandbox, "secrets", Well())
    assert sandbox.passed([(HOSTILE["exit at once"], TESTS)]) == [True]


def test_the_users_own_function(tmp_path):
    place = tmp_path / "mine.py"
    place.write_text("def length(reply, answer):\n    return len(reply) / float(answer)\n\nlist_ = [1]\n")
    reward = rewards.get(f"{place}:length")
    with pytest.raises(LoraFtError, match="no code is run because an adapter folder names it"):
        reward.of(["ab"], ["4"])
    reward.require()
    assert reward.of(["ab", ""], ["4", "4"]) == [0.5, 0]
    with pytest.raises(LoraFtError, match=r'ZeroDivisionError.*the reply "ab"'):
        reward.of(["ab"], ["0"])
    with pytest.raises(LoraFtError, match="gave nan"):
        reward.of(["ab"], ["nan"])
    for name, phrase in (("none", "has no function none"), ("list_", "has no function list_")):
        with pytest.raises(ConfigError, match=phrase):
            rewards.get(f"{place}:{name}").require()
    with pytest.raises(ConfigError, match="there is no Python file"):
        rewards.get(f"{tmp_path}/other.py:length").require()
    place.write_text("1 / 0")
    with pytest.raises(ConfigError, match="the file raised ZeroDivisionError"):
        rewards.get(f"{place}:length").require()


def test_a_function_finds_its_neighbours_and_may_be_in_a_file_with_dataclasses(tmp_path):
    (tmp_path / "beside_it.py").write_text("WORTH = 3\n")
    place = tmp_path / "json.py"  # in no module's place
    place.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_it import WORTH\n"
        "@dataclass\nclass Answer:\n    text: str\n    worth: int = WORTH\n"
        "def own(reply, answer):\n    return Answer(reply).worth\n"
    )
    before = list(sys.path)
    reward = rewards.get(f"{place}:own")
    reward.require()
    assert reward.of(["a"], ["b"]) == [3]
    assert sys.path == before
    assert sys.modules["json"] is json


def test_a_process_that_is_killed_is_told_as_an_error_of_the_run(monkeypatch):
    def killed(self, question):
        raise DiedError("the process it runs in was ended twice (SIGKILL)")

    monkeypatch.setattr(rewards.Cell, "ask", killed)
    for asked in (lambda reward: reward.of(["a"], ["a+"]), lambda reward: reward.fault("a+")):
        with pytest.raises(LoraFtError, match=r'the pattern "a\+": the process it runs in was ended twice'):
            asked(rewards.get("regex"))


def test_a_missing_validator_is_one_error(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="json_schema needs a validator: pip install"):
        rewards.get("json_schema").fault(SCHEMA)
