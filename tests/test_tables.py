"""The tables of kernels/README.md say what the files say that they come from."""

import torch

from lora_ft.speed import twins
from tests.kernel_ops import tables


def text() -> str:
    return tables.README.read_text(encoding="utf-8")


def test_what_the_compiler_made_and_the_roofline_are_in_the_readme():
    assert tables.put(text(), tables.resources()) == text(), "run `python -m tests.kernel_ops.tables`"
    assert tables.put(text(), tables.roofline()) == text(), "run `python -m tests.kernel_ops.tables`"


def test_a_table_that_is_out_of_date_is_seen():
    stale = text().replace(tables.resources()[2], "| `nf4_dequant` | 1 · 1 · 1 |")
    assert stale != text()
    assert tables.put(stale, tables.resources()) == text()


def test_every_operation_and_its_gradients_have_an_error_in_the_readme():
    names = {one.op for one in twins.check(torch.device("cpu"), torch.float32)}
    for name in names:
        assert f"\n| {name} | " in text()
