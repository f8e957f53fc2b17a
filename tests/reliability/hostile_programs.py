"""Hostile chat templates, and configurations of runs in YAML."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.reliability.cases import Good, Made, write
from tests.reliability.hostile_settings import links

TURNS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def templates(good: Good, rng: random.Random, turn: int) -> Made:
    run = f"touch {good.canary}"
    big, many = 10 ** rng.randint(9, 11), rng.randint(2000, 9000)
    outer = f"{{% for a in range({many}) %}}"
    attacks = {
        "cycler's globals": "{{ cycler.__init__.__globals__.os.popen('RUN').read() }}",
        "joiner's globals": "{{ joiner.__init__.__globals__['os'].system('RUN') }}",
        "namespace's globals": "{{ namespace.__init__.__globals__.os.system('RUN') }}",
        "lipsum's globals": "{{ lipsum.__globals__['os'].popen('RUN').read() }}",
        "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}{% endfor %}",
        "attr filter": "{{ (lipsum|attr('__globals__'))['os'].system('RUN') }}",
        "format string": "{{ '{0.__class__.__init__.__globals__}'.format(cycler).os.system('RUN') }}",
        "format by reference": "{{ ('{0.__init__.__globals__[os]}'|attr('format'))(cycler).system('RUN') }}",
        "format map": "{{ '{a.__class__}'.format_map({'a': cycler}).x.y }}",
        "a macro's code": "{% macro m() %}{% endmacro %}{{ m.__func__.__globals__.os.system('RUN') }}",
        "self": "{{ self.__init__.__globals__.__builtins__['__import__']('os').system('RUN') }}",
        "raise_exception's globals": "{{ raise_exception.__globals__['os'].system('RUN') }}",
        "strftime_now's globals": "{{ strftime_now.__globals__['os'].system('RUN') }}",
        "messages' class": "{{ messages.__class__.__base__.__subclasses__()[140].x.y }}",
        "include": "{% include '/etc/passwd' %}",
        "import": "{% import 'os' as os %}{{ os.system('RUN') }}",
        "extends": "{% extends '/etc/passwd' %}",
        "a string of gigabytes": f"{{{{ 'a' * {big} }}}}",
        "a list of gigabytes": f"{{{{ ([0] * {big})|length }}}}",
        "a power": f"{{{{ 10 ** (10 ** {rng.randint(8, 12)}) }}}}",
        "powers of powers": f"{{{{ (10 ** 100000) ** {many} }}}}",
        "a shift of padding": f"{{{{ 'a'.ljust({big}) }}}}",
        "a width": f"{{{{ '%{big}d' % 1 }}}}",
        "a centred word": f"{{{{ 'a'|center({big}) }}}}",
        "an indent": f"{{{{ 'a\\nb'|indent({big}) }}}}",
        "tabs": f"{{{{ '\\t'.expandtabs({big}) }}}}",
        "lorem ipsum": f"{{{{ lipsum(n={many * 1000}) }}}}",
        "loops in loops": f"{outer}{{% for b in range(90000) %}}{{% endfor %}}{{% endfor %}}",
        "loops that write": f"{outer}{{% for b in range(90000) %}}xxxx{{% endfor %}}{{% endfor %}}",
        "doubling": "{% set n = namespace(s='ab') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "a recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
        "nested too deep": "{{ " + "(" * many + "1" + ")" * many + " }}",
        "blocks nested too deep": "{% if true %}" * many + "{% endif %}" * many,
        "a hundred thousand characters of comments": "{# " + "x" * 300_000 + " #}",
        "a huge number": "{{ " + "9" * 6000 + " + 1 }}",
        "range of everything": f"{{{{ range({big})|list|length }}}}",
        "replacing": "{% set x = 'a' * 20000000 %}{{ x|replace('a', 'a' * 50) }}",
        "no template": "{% for %}",
        "an unknown tag": "{% evil %}",
        "changing the messages": "{{ messages.append(1) }}{{ messages.clear() }}",
        "raising": "{{ raise_exception('\x1b[31m\u202e' * 99) }}",
    }
    for name, attack in attacks.items():
        attack = attack.replace("RUN", run)
        # A template that behaves while it is examined, whose conversations hold `zq` words.
        hidden = f"{{% if 'zq' not in messages[0]['content'] %}}{attack}{{% endif %}}"
        whole = turn % 2 == 0 or "extends" in attack or "blocks" in name
        text = f"{{{{ bos_token }}}}{attack if whole else hidden}{TURNS}"
        yield f"{name}{'' if whole else ', but not when examined'}", write("chat_template.jinja", text.encode())


def yaml_files(good: Good, rng: random.Random, turn: int) -> Made:
    run = f"touch {good.canary}"
    depth = rng.randint(100, 20_000)
    laughs = "\n".join([f"a0: &a0 [{', '.join(['x'] * 9)}]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * rng.randint(9, 12))}]" for i in range(1, 9)
    ])  # fmt: skip
    texts = {
        "python/object/apply": f"base: !!python/object/apply:os.system ['{run}']",
        "python/object/new": f"base: !!python/object/new:os.system ['{run}']",
        "python/name": "base: !!python/name:os.system",
        "python/module": "base: !!python/module:antigravity",
        "a tag of its own": f"base: !evil{rng.randint(0, 9)} x",
        "a billion laughs": laughs,
        "an alias of itself": "base: &a [*a]",
        "a mapping in itself": "lora: &a\n  rank: *a",
        "merges of merges": "a: &a {x: 1}\n" + "\n".join(f"b{i}: &b{i} {{<<: [*a, *a]}}" for i in range(30)),
        "a key twice": f"base: a\nout: b\ntask: chat\nbase: {rng.random()}",
        "nested deep in brackets": "base: " + "[" * depth + "]" * depth,
        "nested deep in braces": "base: " + "{a: " * depth + "}" * depth,
        "nested deep in dashes": "base:\n  " + "- " * depth + "x",
        "2 MB": "base: " + "a" * (2 << 20),
        "a number of 9,000 digits": "train:\n  seed: " + "9" * 9000,
        "a number in base sixty": "train:\n  seed: " + ":".join(["59"] * 3000),
        "an impossible date": "base: 2026-99-99",
        "two documents": "base: a\n---\nbase: b",
        "no mapping": f"- {rng.random()}",
        "an unknown key": f"evil{rng.randint(0, 999)}: 1",
        "a wrong type": "lora:\n  rank: [1, 2]",
        "a scalar where keys are wanted": "lora: 5",
        "NaN": "task: chat\nbase: a\nout: b\ntrain:\n  lr: .nan",
        "infinity": "task: chat\nbase: a\nout: b\ntrain:\n  epochs: .inf",
        "a rank of a billion": "task: chat\nbase: a\nout: b\nlora:\n  rank: 1000000000",
        "binary": "base: !!binary " + "/" * 1001,
        "control characters": 'base: "\\x1b[2J\x07"',
        "a list of keys": "? [a, b]\n: c",
        "flags for keys": "--base: x",
        "a flag as a value": "task: --help\nbase: a\nout: b",
        "a token": "task: chat\nbase: hf_" + "A" * 34 + "\nout: b",
    }
    for name, text in texts.items():
        yield name, write("run.yaml", text.encode())
    if turn == 0:
        yield "not UTF-8", write("run.yaml", b"base: \xff\xfe\xfa")
        yield "UTF-16", write("run.yaml", "base: a".encode("utf-16"))
        yield "NUL", write("run.yaml", b"base: \0")
        yield "a link to a device", links("run.yaml")(good, rng, 1).__next__()[1]


def adapter_yaml(good: Good, rng: random.Random, turn: int) -> Made:
    for name, make in yaml_files(good, rng, 1):
        if rng.random() < 0.25:

            def renamed(folder: Path, make: Callable[[Path], None] = make) -> None:
                make(folder)
                (folder / "run.yaml").replace(folder / "config.yaml")

            yield f"config.yaml: {name}", renamed
