"""One module of the library writes files; whatever else could is found in the code."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "lora_ft"

# A scratch folder of the system for pip to download into, of which nothing outlives the block; what a process with
# limits prints goes to the null device; and SQLite writes its own files, whole or not at all, which one module opens.
ALLOWED = {
    ("sources.py", "TemporaryDirectory"), ("sources.py", "extractall"), ("cell.py", "open"), ("store.py", "connect"),
    ("gguf.py", "TemporaryDirectory"),  # empty, so that nothing beside the file is read
    ("rehearsal.py", "TemporaryDirectory"), ("selftest.py", "TemporaryDirectory"),  # of runs that are only tried out
    # Where programs of replies are run, and what they print.
    ("sandbox.py", "TemporaryDirectory"), ("sandbox.py", "TemporaryFile"),
    ("caged.py", "write_text"), ("caged.py", "open"),
}  # fmt: skip
WRITERS = {
    "write_text", "write_bytes", "save_file", "copy2", "copyfile", "copytree", "copy_file", "move", "mkdtemp",
    "mkstemp", "extractall",
    "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "savetxt", "savez", "tofile", "dump", "touch", "mkdir",
    "makedirs", "symlink_to", "rename", "rmtree", "unlink", "rmdir", "fdopen",
}  # fmt: skip
# Of the torch or shutil modules only: `Draft.copy` and `Accelerator.save` are other things.
OF_MODULES = {
    ("sqlite3", "connect"),
    ("torch", "save"),
    ("shutil", "copy"),
    ("np", "save"),
    ("os", "replace"),
    ("os", "remove"),
}


def writes(code: str) -> list[str]:
    """Returns each call in the code that can put a byte or a name on the disk."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        # `open(path, mode)`, `path.open(mode)` and `os.open(path, flags)`.
        modes = [*node.args[0 if isinstance(node.func, ast.Attribute) else 1 :], *(k.value for k in node.keywords)]
        mode = "".join(m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str))
        flags = {a.attr for m in modes for a in ast.walk(m) if isinstance(a, ast.Attribute)}
        opens = name == "open" and (bool(set(mode) & set("wax+")) or bool(flags & {"O_WRONLY", "O_RDWR"}))
        # A library's writer may be named, to be handed to a draft, but not called.
        if opens or name in WRITERS or (owner, name) in OF_MODULES or name == "save_pretrained":
            found.append(name)
    return found


def test_only_one_module_writes() -> None:
    wrong = [
        f"{file.relative_to(LIBRARY)} calls {name}"
        for file in LIBRARY.rglob("*.py")
        if file.name not in ("atomicio.py", "disk.py")
        for name in writes(file.read_text(encoding="utf-8"))
        if (file.name, name) not in ALLOWED
    ]
    # Inside a function that is handed to a draft, which gives it the draft's folder.
    handed = {"saved.py calls save_pretrained", "checkpoints.py calls save_pretrained"}
    assert set(wrong) <= handed
    for name in ("saved.py", "checkpoints.py"):
        code = (LIBRARY / name).read_text(encoding="utf-8")
        assert code.count("save_pretrained(") == code.count("library(lambda folder: ")


def test_only_that_module_calls_the_disk() -> None:
    calling = [file.name for file in LIBRARY.rglob("*.py") if "lora_ft.system.disk" in file.read_text(encoding="utf-8")]
    assert calling == ["atomicio.py"]
    named = [file.name for file in LIBRARY.rglob("*.py") if "atomicio.disk" in file.read_text(encoding="utf-8")]
    assert named == []


@pytest.mark.parametrize(
    "code",
    [
        "open(p, 'w')", "p.open('ab')", "p.open(mode='x')", "open(p, mode='r+b')", "os.open(p, os.O_WRONLY)",
        "p.write_text('a')", "torch.save(a, p)", "save_file(t, p)", "shutil.copy(a, b)", "tempfile.mkdtemp()",
        "model.save_pretrained(p)", "json.dump(a, f)", "sqlite3.connect(p)",
    ],
)  # fmt: skip
def test_a_second_writer_would_be_seen(code: str) -> None:
    assert writes(code)


def test_reading_is_no_writing() -> None:
    assert not writes("open(p); p.open('rb'); os.open(p, os.O_RDONLY | os.O_CREAT); task.save(x); draft.copy(f)")


def test_in_a_training_nothing_is_written_but_through_that_module(tmp_path: Path) -> None:
    # A cache of its own: what is compiled at first use is written here too.
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["XDG_CACHE_HOME"] = str(cache)
    words = [sys.executable, "-W", "ignore", "-m", "tests.audited", str(tmp_path)]
    done = subprocess.run(words, cwd=LIBRARY.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["status"] == 0, done.stderr
    assert told["strange"] == []
    assert told["unseen"] == []
    assert told["ours"] > 50
