"""What `tool_choice` says: which tools an answer may call, and whether it must."""

from typing import Any

import pytest

from lora_ft.serve import answers
from lora_ft.serve.asked import ChatRequest
from lora_ft.serve.refusals import RequestError

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "abc"]


def chosen(choice: Any, tools: Any = TOOLS) -> tuple[list[str], str]:
    """Returns the names of the tools that are offered, and how one is to be called."""
    request = ChatRequest(model="m", messages=[{"role": "user", "content": "x"}], tools=tools, tool_choice=choice)
    found, how = answers._tools(request)
    return [tool["function"]["name"] for tool in found], how


def allowed(*names: Any, mode: Any = "auto") -> dict[str, Any]:
    named = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


def test_an_answer_may_be_held_to_some_of_the_tools():
    assert chosen(allowed("c", "a")) == (["c", "a"], "auto")
    assert chosen(allowed("b", "b", mode="required")) == (["b"], "required")
    assert chosen({"type": "function", "function": {"name": "b"}}) == (["a", "b", "c"], "b")


@pytest.mark.parametrize(
    "choice",
    [
        allowed("d"), allowed(), allowed("a", mode="none"), allowed("a", mode=[]), allowed([]),
        {"type": "allowed_tools"}, {"type": "allowed_tools", "allowed_tools": 1},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": 5}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [1, {"function": 2}]}},
    ],
)  # fmt: skip
def test_what_allows_no_tool_that_is_there_is_refused(choice):
    with pytest.raises(RequestError) as caught:
        chosen(choice)
    assert caught.value.status == 400
    assert str(caught.value.param).startswith("tool_choice.allowed_tools")
