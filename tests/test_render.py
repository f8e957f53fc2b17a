"""Rows to ids and labels: what is trained with each family of templates, what is refused, and in which words."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_ft.data import template as template_module
from lora_ft.data.examples import Chat, Pair, Text
from lora_ft.data.render import (
    IGNORE,
    ChatRenderer,
    Rendered,
    coloured,
    marked,
    render_completion,
)
from lora_ft.data.tools import TOOLS_AS_TEXT, is_extended
from lora_ft.errors import MaskError
from tests.stock_templates import (
    CHATML,
    CHATML_TAGGED,
    MISTRAL_LATE_SYSTEM,
    STOCK,
    tokenizer_of,
)

CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def tool(content: str) -> dict:
    return {"role": "tool", "content": content, "tool_call_id": "call00001", "name": "weather"}


def chat(*messages: dict, tools: tuple[dict, ...] = ()) -> Chat:
    return Chat("train.jsonl:17", messages, tools)


def trained(tokenizer, rendered: Rendered) -> list[str]:
    return re.findall("«(.*?)»", marked(tokenizer, rendered), re.DOTALL)


def problem(renderer: ChatRenderer, row: Chat) -> str:
    with pytest.raises(MaskError) as caught:
        renderer.render(row)
    assert str(caught.value).startswith("train.jsonl:17: ")
    return str(caught.value)


# Every stock template, on any conversation

# Marks and control tokens apart, anything goes.
characters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"], exclude_characters="«»<>[]|\ufeff")
inner = st.text(st.one_of(characters, st.sampled_from(" \n\t.aeinos")), min_size=1, max_size=40)
said = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", " ", "\n", "\n\n "]),
    inner.map(str.strip).filter(bool),
    st.sampled_from(["", " ", "\n", " \n"]),
)
exchanges = st.lists(st.tuples(said, said, st.sampled_from([1, 1, 0])), min_size=1, max_size=3)


@pytest.mark.parametrize("name", list(STOCK))
def test_trained_is_each_answer_with_its_end_of_turn_and_nothing_else(name: str) -> None:
    stock, tokenizer = STOCK[name], tokenizer_of(name)
    renderer = ChatRenderer(tokenizer, 100_000)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.one_of(st.none(), said), exchanges)
    def holds(instruction: str | None, talk: list[tuple[str, str, int]]) -> None:
        messages = [system(instruction)] if instruction and stock.system else []
        expected = []
        for place, (ask, answer, weight) in enumerate(talk):
            messages += [user(ask), assistant(answer, weight=weight)]
            last = place == len(talk) - 1
            shown = answer.strip() if stock.trims else answer
            if last and name == "qwen3":
                shown = shown.lstrip("\n")
            if weight:
                expected.append((stock.last_lead if last else stock.lead) + shown + stock.tail + stock.end)
        if not expected:
            assert "no message to train on" in problem(renderer, chat(*messages))
            return
        rendered = renderer.render(chat(*messages))
        assert trained(tokenizer, rendered) == expected
        assert rendered.labels[0] == IGNORE
        assert all(label in (IGNORE, token) for token, label in zip(rendered.input_ids, rendered.labels, strict=True))
        # What generation is given is what training showed, up to where training starts.
        only = renderer.render(chat(*({**message, "weight": 0} for message in messages[:-1]), assistant(talk[-1][1])))
        prompt = renderer.prompt(messages[:-1])
        assert only.input_ids[: len(prompt)] == prompt
        assert only.labels[: len(prompt)] == [IGNORE] * len(prompt)
        assert IGNORE not in only.labels[len(prompt) : len(prompt) + 1]

    holds()


@pytest.mark.parametrize("name", list(STOCK))
def test_ways_in_use(name: str) -> None:
    expected = ("generation tags", "prefixes") if "tagged" in name else ("sentinels", "prefixes")
    assert ChatRenderer(tokenizer_of(name), 512).ways == expected


def test_ids_are_those_of_transformers() -> None:
    for name in STOCK:
        tokenizer = tokenizer_of(name)
        # No word of the answer's start was learned together with a line break.
        messages = [user("What is 2+3?"), assistant("5 is the sum.")]
        rendered = ChatRenderer(tokenizer, 512).render(chat(*messages))
        assert tokenizer.decode(rendered.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        if name != "llama3":  # here the prompt's "\n\n" is one token, as when a model answers
            assert rendered.input_ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_bos_is_the_templates_word() -> None:
    row = chat(user("hi"), assistant("yes"))
    for name, count in (("llama3", 1), ("gemma", 1), ("zephyr", 0), ("chatml", 0)):
        tokenizer = tokenizer_of(name)
        renderer = ChatRenderer(tokenizer, 512)
        for ids in (renderer.render(row).input_ids, renderer.prompt(row.messages[:1])):
            assert (ids.count(tokenizer.bos_token_id) if tokenizer.bos_token else 0) == count
    tokenizer = tokenizer_of("llama2")
    two = chat(user("a"), assistant("b"), user("c"), assistant("d"))
    assert ChatRenderer(tokenizer, 512).render(two).input_ids.count(tokenizer.bos_token_id) == 2


def test_one_token_may_be_both_eos_and_the_bos_of_the_next_exchange() -> None:
    tokenizer = tokenizer_of("llama2")
    tokenizer.bos_token = tokenizer.eos_token
    renderer = ChatRenderer(tokenizer, 512)
    rendered = renderer.render(chat(user("a"), assistant("b"), user("c"), assistant("d")))
    assert trained(tokenizer, rendered) == [" b </s>", " d </s>"]
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(MaskError, match="stands twice, at tokens 0 and 1"):
        ChatRenderer(tokenizer, 512).render(chat(user("a"), assistant("b")))


def test_a_pair_is_one_exchange() -> None:
    renderer = ChatRenderer(tokenizer_of("chatml"), 512)
    assert renderer.render(Pair("a:1", "hi", "yes")) == renderer.render(Chat("a:1", (user("hi"), assistant("yes"))))


def test_a_default_system_message_is_not_trained_and_an_opening_answer_is() -> None:
    tokenizer = tokenizer_of("smollm2")
    rendered = ChatRenderer(tokenizer, 512).render(chat(assistant("Welcome!"), user("hi"), assistant("yes")))
    assert trained(tokenizer, rendered) == ["Welcome!<|im_end|>", "yes<|im_end|>"]


def test_a_conversation_may_end_with_the_user_or_hold_answers_in_a_row() -> None:
    tokenizer = tokenizer_of("chatml")
    renderer = ChatRenderer(tokenizer, 512)
    rendered = renderer.render(chat(user("hi"), assistant("one"), assistant("two"), user("bye")))
    assert trained(tokenizer, rendered) == ["one<|im_end|>", "two<|im_end|>"]


def test_weight_zero_turns_get_no_label() -> None:
    for name in ("chatml", "chatml-tagged", "llama2", "qwen3"):
        tokenizer = tokenizer_of(name)
        row = chat(user("a"), assistant("secret", weight=0), user("b"), assistant("public", weight=1))
        (only,) = trained(tokenizer, ChatRenderer(tokenizer, 512).render(row))
        assert "public" in only
        assert "secret" not in only
    nothing = chat(user("a"), assistant("b", weight=0))
    assert "no message to train on" in problem(ChatRenderer(tokenizer_of("chatml"), 512), nothing)
    assert "no message to train on" in problem(ChatRenderer(tokenizer_of("chatml"), 512), chat(user("a")))


def test_openais_other_forms_of_content() -> None:
    tokenizer = tokenizer_of("chatml")
    renderer = ChatRenderer(tokenizer, 512)
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    rendered = renderer.render(chat(user("a"), assistant(parts), user("b"), assistant(None, refusal="I cannot.")))
    assert trained(tokenizer, rendered) == ["one two<|im_end|>", "I cannot.<|im_end|>"]
    picture = chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, assistant("a cat"))
    assert "messages[0].content has a part of type 'image_url'; only text" in problem(renderer, picture)


def test_developer_becomes_system_unless_the_template_names_it() -> None:
    row = chat({"role": "developer", "content": "Be brief."}, user("hi"), assistant("yes"))
    tokenizer = tokenizer_of("chatml")
    assert "<|im_start|>system\nBe brief." in marked(tokenizer, ChatRenderer(tokenizer, 512).render(row))
    knowing = tokenizer_of("chatml", "{# developer #}" + CHATML)
    assert "<|im_start|>developer\nBe brief." in marked(knowing, ChatRenderer(knowing, 512).render(row))


# What templates do unasked


def test_thinking_is_kept_for_the_last_turn_only_by_name() -> None:
    tokenizer = tokenizer_of("qwen3")
    renderer = ChatRenderer(tokenizer, 512)
    assert renderer.rules == (template_module.REWRITES, template_module.EMPTY_THINKING)
    thinking = "<think>\nHm, {}.\n</think>\n\n{}"
    row = chat(user("a"), assistant(thinking.format("b", "B")), user("c"), assistant(thinking.format("d", "D")))
    assert trained(tokenizer, renderer.render(row)) == ["B<|im_end|>", "<think>\nHm, d.\n</think>\n\nD<|im_end|>"]
    as_field = chat(user("c"), assistant("D", reasoning_content="Hm, d."))
    assert trained(tokenizer, renderer.render(as_field)) == ["<think>\nHm, d.\n</think>\n\nD<|im_end|>"]


def test_an_empty_think_block_is_trained_where_generation_starts_before_it() -> None:
    tokenizer = tokenizer_of("qwen3")
    renderer = ChatRenderer(tokenizer, 512)
    assert trained(tokenizer, renderer.render(chat(user("a"), assistant("B")))) == [
        "<think>\n\n</think>\n\nB<|im_end|>"
    ]
    # The same template asked to put the block into the prompt: generation starts after it, and so does training.
    in_prompt = STOCK["qwen3"].template.replace(
        "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
    )
    tokenizer = tokenizer_of("qwen3", in_prompt)
    renderer = ChatRenderer(tokenizer, 512)
    assert trained(tokenizer, renderer.render(chat(user("a"), assistant("B")))) == ["B<|im_end|>"]
    assert tokenizer.decode(renderer.prompt([user("a")])).endswith("</think>\n\n")


def test_a_think_tag_that_only_the_prompt_opens_is_left_out_of_it() -> None:
    tokenizer = tokenizer_of("deepseek")
    renderer = ChatRenderer(tokenizer, 512)
    assert renderer.rules == (template_module.OPENS_THINKING, template_module.DROPS_THINKING)
    row = chat(user("a"), assistant("<think>\nb\n</think>\n\nB"), user("c"), assistant("D"))
    assert trained(tokenizer, renderer.render(row)) == [
        "\n\nB<｜end▁of▁sentence｜>",
        "D<｜end▁of▁sentence｜>",
    ]
    assert tokenizer.decode(renderer.prompt([user("a")])).endswith("<｜User｜>a<｜Assistant｜>")


def test_thinking_that_the_template_drops_from_the_last_turn_is_refused() -> None:
    row = chat(user("a"), assistant("<think>\nbecause\n</think>\n\nB"))
    assert "messages[1] thinks, but the chat template drops thinking" in problem(
        ChatRenderer(tokenizer_of("deepseek"), 512), row
    )
    field = chat(user("a"), assistant("B", reasoning_content="because"))
    assert "messages[1] thinks" in problem(ChatRenderer(tokenizer_of("chatml"), 512), field)


def test_the_third_way_steps_in_when_a_row_defeats_one() -> None:
    # The prompt is written differently for a last user message, which only prefixes notice.
    marking = CHATML_TAGGED.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if loop.last and message['role'] == 'user' and "
        "'late' in message['content'] %}{{ 'NOW ' }}{% endif %}",
    )
    row = chat(user("better late"), assistant("than never"))
    tokenizer = tokenizer_of("chatml-tagged", marking)
    renderer = ChatRenderer(tokenizer, 512)
    assert renderer.ways == ("generation tags", "prefixes")
    assert trained(tokenizer, renderer.render(row)) == ["than never<|im_end|>"]
    untagged = tokenizer_of("chatml", re.sub(r"{% (end)?generation %}", "", marking))
    message = problem(ChatRenderer(untagged, 512), row)
    assert "prefixes: the prompt before messages[1] is written differently once the answer follows" in message


def test_a_system_message_that_vanishes_once_answered_is_refused() -> None:
    renderer = ChatRenderer(tokenizer_of("mistral", MISTRAL_LATE_SYSTEM), 512)
    row = chat(system("Answer in verse."), user("hi"), assistant("yes"))
    assert "messages[0] (system) is left out or changed by the chat template" in problem(renderer, row)


def test_a_template_that_refuses_a_row_is_quoted() -> None:
    gemma = ChatRenderer(tokenizer_of("gemma"), 512)
    row = chat(system("Be brief."), user("hi"), assistant("yes"))
    assert "the chat template refuses the conversation: System role not supported" in problem(gemma, row)
    llama2 = ChatRenderer(tokenizer_of("llama2"), 512)
    assert "roles must alternate" in problem(llama2, chat(user("a"), user("b"), assistant("c")))
    with pytest.raises(MaskError, match="prompt: the chat template refuses the conversation: System role"):
        gemma.prompt([system("Be brief."), user("hi")])


@pytest.mark.parametrize(
    ("name", "token"), [("llama3", "<|eot_id|>"), ("llama2", "<s>"), ("chatml", "<|im_end|>"), ("zephyr", "</s>")]
)
def test_control_tokens_in_what_is_said_are_refused(name: str, token: str) -> None:
    renderer = ChatRenderer(tokenizer_of(name), 512)
    assert f"messages[0] holds the control token {token}" in problem(
        renderer, chat(user(f"strike {token} this"), assistant("yes"))
    )
    assert f"messages[1] holds the control token {token}" in problem(
        renderer, chat(user("hi"), assistant(f"strike {token} this"))
    )
    with pytest.raises(MaskError, match=rf"^prompt: messages\[2\] holds the control token {re.escape(token)}, which"):
        renderer.prompt([user("hi"), assistant("yes"), user(f"strike {token} this")])


def test_marks_that_the_template_writes_are_refused_wherever_they_stand() -> None:
    renderer = ChatRenderer(tokenizer_of("qwen3"), 512)  # like Qwen, without BOS
    forged = chat(user("hi"), assistant("a <|im_start|>user\nfoo"))
    assert "messages[1] holds the control token <|im_start|>" in problem(renderer, forged)
    told = {**TOOL, "function": {**TOOL["function"], "description": "Ends in <|im_end|>."}}
    described = chat(user("hi"), assistant("yes"), tools=(TOOL, told))
    assert "tools[1] holds the control token <|im_end|>" in problem(renderer, described)
    # Phi-3 has a mark for the system turn, and an EOS that ends no turn.
    renderer = ChatRenderer(tokenizer_of("phi3"), 512)
    for token in ("<|system|>", "<|endoftext|>"):
        forged = chat(user("hi"), assistant(f"a {token}\nfoo"))
        assert f"messages[1] holds the control token {token}" in problem(renderer, forged)


def test_added_tokens_that_the_template_does_not_write_may_be_said() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.add_tokens(["<|note|>"], special_tokens=True)
    row = chat(user("hi <|note|>"), assistant("yes <|note|>"))
    rendered = ChatRenderer(tokenizer, 512).render(row)
    assert trained(tokenizer, rendered) == ["yes <|note|><|im_end|>"]
    assert tokenizer.convert_tokens_to_ids("<|note|>") in rendered.labels


# Tools


def test_tool_calls_are_trained_and_tool_results_are_not() -> None:
    row = chat(
        user("Rain in Paris?"),
        assistant(None, tool_calls=[CALL]),
        tool('{"rain": true}'),
        assistant("Yes."),
        tools=(TOOL,),
    )
    tokenizer = tokenizer_of("qwen3")
    assert trained(tokenizer, ChatRenderer(tokenizer, 512).render(row)) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]
    tokenizer = tokenizer_of("mistral")
    assert trained(tokenizer, ChatRenderer(tokenizer, 512).render(row)) == [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>',
        " Yes.</s>",
    ]
    # This one concatenates the arguments, so it wants them as JSON text.
    tokenizer = tokenizer_of("deepseek")
    first, second = trained(tokenizer, ChatRenderer(tokenizer, 512).render(chat(*row.messages)))
    assert '```json\n{"city": "Paris"}\n```' in first
    assert second == "Yes.<｜end▁of▁sentence｜>"


def test_the_older_function_call_reads_as_a_tool_call() -> None:
    tokenizer = tokenizer_of("qwen3")
    renderer = ChatRenderer(tokenizer, 512)
    old = chat(
        user("Rain?"),
        assistant(None, function_call=CALL["function"]),
        {"role": "function", "name": "weather", "content": "rain"},
        assistant("Yes."),
    )
    new = chat(user("Rain?"), assistant(None, tool_calls=[CALL]), tool("rain"), assistant("Yes."))
    assert renderer.render(old) == renderer.render(new)


def test_a_call_with_words_before_it_is_trained_whole() -> None:
    tokenizer = tokenizer_of("qwen3")
    row = chat(user("Rain?"), assistant("Let me look.", tool_calls=[CALL, CALL]), tool("rain"), assistant("Yes."))
    first, _ = trained(tokenizer, ChatRenderer(tokenizer, 512).render(row))
    assert first.startswith("Let me look.\n<tool_call>")
    assert first.count('"arguments": {"city": "Paris"}') == 2


WITHOUT_TOOLS = ["chatml", "smollm2", "llama3", "llama2", "gemma", "phi3", "zephyr"]
ASKING = (user("Rain in Paris, and in Rome?"), assistant("Let me look.", tool_calls=[CALL, CALL]))
RESULTS = (tool('{"rain": true}'), tool("dry"))


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_a_template_that_knows_no_tools_writes_them_as_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    renderer = ChatRenderer(tokenizer, 1024)
    plain = chat(user("a"), assistant("b"), user("c"), assistant("d"))
    before = renderer.render(plain)
    assert TOOLS_AS_TEXT not in renderer.rules
    row = chat(*ASKING, *RESULTS, assistant("Yes."), tools=(TOOL,))
    rendered = renderer.render(row)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city":"Paris"}}\n</tool_call>'
    first, second = trained(tokenizer, rendered)
    assert first.strip().startswith(f"Let me look.\n{call}\n{call}")
    assert second.strip().startswith("Yes.")
    text = tokenizer.decode(rendered.input_ids)
    assert '"description": "The weather of a city."' in text
    assert '<tool_response>\n{"rain": true}\n</tool_response>\n<tool_response>\ndry\n</tool_response>' in text
    assert TOOLS_AS_TEXT in renderer.rules
    assert renderer.render(plain) == before
    # Generation and training meet in the same ids, and whoever loads the tokenizer renders what training saw.
    asked = renderer.prompt(ASKING[:1], [TOOL])
    assert rendered.input_ids[: len(asked)] == asked
    assert ChatRenderer(tokenizer, 1024).render(row) == rendered
    answered = renderer.prompt([*ASKING, *RESULTS], [TOOL])
    assert text.startswith(tokenizer.decode(answered))
    for arguments in ('{"city":"Paris"}', {"city": "Paris"}):  # as OpenAI's API writes it, and as vLLM parses it
        assert as_served(tokenizer, arguments) == tokenizer.decode(answered)


@pytest.mark.parametrize("empty", ["", "{}", {}, None])
def test_a_call_without_arguments_is_written_as_json(empty: object) -> None:
    tokenizer = tokenizer_of("chatml")
    renderer = ChatRenderer(tokenizer, 1024)
    bare = {**CALL, "function": {"name": "weather", "arguments": empty}}
    row = chat(user("Rain?"), assistant(None, tool_calls=[bare]), tool("dry"), assistant("No."), tools=(TOOL,))
    written = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'
    assert trained(tokenizer, renderer.render(row))[0] == written
    assert as_served(tokenizer, empty).count(written.removesuffix("<|im_end|>")) == 2


def as_served(tokenizer, arguments: object) -> str:
    """What a server sends to the model for ASKING and RESULTS, with the arguments as its client gives them."""
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = [ASKING[0], {**ASKING[1], "tool_calls": [call, call]}, *RESULTS]
    return tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_results_are_written_in_the_order_of_their_calls(name: str) -> None:
    tokenizer = tokenizer_of(name)
    renderer = ChatRenderer(tokenizer, 1024)
    calls = [{**CALL, "id": identity} for identity in ("a", "b", "c")]
    one, two, three = ({**tool(f"result {identity}"), "tool_call_id": identity} for identity in ("a", "b", "c"))

    def text(*results: dict) -> str:
        row = chat(ASKING[0], assistant(None, tool_calls=calls), *results, assistant("Yes."), tools=(TOOL,))
        return tokenizer.decode(renderer.render(row).input_ids)

    assert text(three, one, two) == text(one, two, three)
    assert text(one, two, three).index("result a") < text(one, two, three).index("result c")
    # Without an id for each, they stay as they are given.
    unnamed = {key: value for key, value in one.items() if key != "tool_call_id"}
    assert text(three, unnamed).index("result c") < text(three, unnamed).index("result a")


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_join_the_system_turn_or_the_first_of_the_user(name: str, first: list) -> None:
    tokenizer = tokenizer_of(name)
    if first and not STOCK[name].system:
        pytest.skip("the template refuses a system turn")
    renderer = ChatRenderer(tokenizer, 1024)
    rendered = renderer.render(chat(*first, user("Rain?"), assistant("Yes."), tools=(TOOL,)))
    text = tokenizer.decode(rendered.input_ids)
    assert text.count("<tools>") == 1
    assert text.index("</tools>") < text.index("Yes.")
    if first:
        assert text.index("Be brief.") < text.index("<tools>") < text.index("Rain?")


def test_calls_without_a_list_of_tools_are_written_too() -> None:
    tokenizer = tokenizer_of("smollm2")
    first, _ = trained(tokenizer, ChatRenderer(tokenizer, 1024).render(chat(*ASKING, RESULTS[0], assistant("Yes."))))
    assert first.count("<tool_call>") == 2


def test_tools_that_a_template_with_calls_of_its_own_does_not_list_are_refused() -> None:
    renderer = ChatRenderer(tokenizer_of("deepseek"), 512)
    unseen = chat(user("Rain?"), assistant("Yes."), tools=(TOOL,))
    assert "the row has tools, but the chat template does not write them" in problem(renderer, unseen)
    with pytest.raises(MaskError, match="prompt: the row has tools, but the chat template does not write them"):
        renderer.prompt([user("Rain?")], [TOOL])


def test_a_template_that_lists_tools_but_writes_no_calls_keeps_its_own_list() -> None:
    listing = (
        "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + CHATML
    )
    tokenizer = tokenizer_of("chatml", listing)
    renderer = ChatRenderer(tokenizer, 1024)
    rendered = renderer.render(chat(user("Hello?"), assistant("Hi."), tools=(TOOL,)))
    assert tokenizer.decode(rendered.input_ids).startswith('<|im_start|>system\nTools: [{"type": "function"')
    assert "does not write tool_calls" in problem(renderer, chat(*ASKING, *RESULTS, assistant("Yes."), tools=(TOOL,)))
    assert tokenizer.chat_template == listing


def test_a_template_that_counts_results_keeps_its_own_tools() -> None:
    counting = (
        "{%- set ns = namespace(open=0) %}{%- for message in messages %}"
        "{%- set ns.open = ns.open + (message.tool_calls or []) | length - (message.role == 'tool') | int %}"
        "{%- endfor %}{%- if ns.open %}"
        "{{- raise_exception('Not the same number of function calls and responses') }}{%- endif %}"
    )
    rows = (
        chat(user("Rain?"), assistant(None, tool_calls=[CALL, CALL]), *RESULTS, assistant("Yes."), tools=(TOOL,)),
        chat(user("Rain?"), assistant(None, tool_calls=[CALL]), tool("dry"), assistant("No.", weight=0)),
    )
    for name in ("qwen3", "mistral"):
        source = STOCK[name].template
        strict = tokenizer_of(name, counting + source)
        renderer = ChatRenderer(strict, 1024)
        for row in rows:
            assert renderer.render(row) == ChatRenderer(tokenizer_of(name), 1024).render(row)
        assert strict.chat_template == counting + source
        open_call = problem(renderer, chat(*ASKING, tools=(TOOL,)))
        assert "Not the same number of function calls and responses" in open_call


def test_a_template_that_lets_no_text_through_is_refused_for_tools() -> None:
    closed = "{% if '<tool' in (messages | string) %}{{ raise_exception('no tools') }}{% endif %}"
    renderer = ChatRenderer(tokenizer_of("chatml", closed + CHATML), 512)
    assert "written as text they do not get past it" in problem(renderer, chat(*ASKING, RESULTS[0], assistant("Yes.")))


def test_a_template_that_insists_on_tools_is_taken_at_its_word() -> None:
    strict = "{% if messages[-1]['content'] == 'Rain?' and not tools %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer = tokenizer_of("qwen3", strict + STOCK["qwen3"].template)
    row = chat(user("Rain?"), assistant("Yes."), user("And"), assistant("Rain?"), tools=(TOOL,))
    assert trained(tokenizer, ChatRenderer(tokenizer, 512).render(row))[0] == "Yes.<|im_end|>"


def test_a_tool_result_that_is_left_out_is_refused() -> None:
    source = STOCK["qwen3"].template.replace("<tool_response>\\n' + message.content + '", "<tool_response>\\n' + '")
    assert source != STOCK["qwen3"].template
    row = chat(user("Rain?"), assistant(None, tool_calls=[CALL]), tool("only drizzle"), assistant("Yes."))
    assert "messages[2] (tool) is left out" in problem(ChatRenderer(tokenizer_of("qwen3", source), 512), row)


def test_arguments_that_are_not_json_are_refused() -> None:
    bad = {**CALL, "function": {"name": "weather", "arguments": "{city"}}
    row = chat(user("Rain?"), assistant(None, tool_calls=[bad]))
    assert "messages[1]: the arguments of weather are not JSON" in problem(
        ChatRenderer(tokenizer_of("qwen3"), 512), row
    )


def test_a_second_template_for_tools_is_examined_too() -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = {"default": CHATML, "tool_use": STOCK["qwen3"].template}
    renderer = ChatRenderer(tokenizer, 512)
    assert trained(tokenizer, renderer.render(chat(user("a"), assistant("b")))) == ["b<|im_end|>"]
    (with_tools,) = trained(tokenizer, renderer.render(chat(user("a"), assistant("b"), tools=(TOOL,))))
    assert with_tools == "<think>\n\n</think>\n\nb<|im_end|>"
    tokenizer.chat_template = {"tool_use": STOCK["qwen3"].template}
    with pytest.raises(MaskError, match="no default"):
        ChatRenderer(tokenizer, 512)


def test_only_the_template_in_use_is_taught_tools() -> None:
    tokenizer = tokenizer_of("chatml")
    longer = "{# on #}" + CHATML
    tokenizer.chat_template = {"default": CHATML, "other": longer}
    ChatRenderer(tokenizer, 1024).render(chat(*ASKING, *RESULTS, assistant("Yes.")))
    assert is_extended(tokenizer.chat_template["default"])
    assert tokenizer.chat_template["other"] == longer


# Without a template


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2"])
def test_a_completion_is_trained_with_eos_and_its_prompt_is_not(name: str) -> None:
    tokenizer = tokenizer_of(name)
    rendered = render_completion(tokenizer, Pair("a:1", "What is 2+3? The sum is", " 5."), 512)
    assert trained(tokenizer, rendered) == [" 5." + tokenizer.eos_token]
    assert rendered.input_ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)
    ended = render_completion(tokenizer, Pair("a:1", "What is 2+3? The sum is", " 5." + tokenizer.eos_token), 512)
    assert ended == rendered


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(["chatml", "llama3", "llama2"]), inner, inner)
def test_a_prompt_is_tokenized_as_at_generation(name: str, prompt: str, completion: str) -> None:
    tokenizer = tokenizer_of(name)
    rendered = render_completion(tokenizer, Pair("a:1", prompt, completion), 512)
    alone = tokenizer(prompt)["input_ids"]
    assert rendered.input_ids[: len(alone)] == alone
    assert rendered.labels == [*([IGNORE] * len(alone)), *rendered.input_ids[len(alone) :]]
    assert rendered.labels[-1] == tokenizer.eos_token_id
    start = tokenizer.bos_token or ""
    assert (
        tokenizer.decode(rendered.input_ids).removeprefix(start).lstrip()
        == (prompt + completion + tokenizer.eos_token).lstrip()
    )


def test_plain_text_is_trained_whole() -> None:
    tokenizer = tokenizer_of("llama3")
    rendered = render_completion(tokenizer, Text("a:1", "The sea."), 512)
    assert rendered.labels == [IGNORE, *rendered.input_ids[1:]]
    assert trained(tokenizer, rendered) == ["The sea.<|eot_id|>"]
    tokenizer = tokenizer_of("chatml")
    rendered = render_completion(tokenizer, Text("a:1", "The sea."), 3)
    assert rendered.labels == [IGNORE, *rendered.input_ids[1:]]
    assert len(rendered.labels) == 3
    assert rendered.cut == len(render_completion(tokenizer, Text("a:1", "The sea."), 512).input_ids) - 3


def test_completions_that_cannot_be_trained_are_refused() -> None:
    tokenizer = tokenizer_of("llama3")
    row = Pair("a.jsonl:3", "What is the capital of France?", " Paris.")
    whole = render_completion(tokenizer, row, 512)
    start = next(place for place, label in enumerate(whole.labels) if label != IGNORE)
    assert render_completion(tokenizer, row, start + 1).labels[-1] == whole.labels[start]
    with pytest.raises(MaskError, match=rf"^a.jsonl:3: has {len(whole.labels)} tokens.*--data.max-length {start}"):
        render_completion(tokenizer, row, start)
    with pytest.raises(MaskError, match=r"a.jsonl:3: the BOS token <\|begin_of_text\|> stands twice"):
        render_completion(tokenizer, Text("a.jsonl:3", "<|begin_of_text|>The sea."), 512)
    with pytest.raises(MaskError, match=r"a.jsonl:3: the BOS token .* stands at tokens 0, \d+; exactly one must"):
        render_completion(tokenizer, Text("a.jsonl:3", "The sea.<|begin_of_text|>"), 512)
    tokenizer.eos_token = None
    with pytest.raises(MaskError, match=r"a.jsonl:3: the tokenizer has no EOS token"):
        render_completion(tokenizer, row, 512)


# The view, and the cost


def test_the_coloured_view_is_the_marked_one() -> None:
    tokenizer = tokenizer_of("llama2")
    rendered = ChatRenderer(tokenizer, 512).render(chat(user("a b"), assistant("c d"), user("e"), assistant("f")))
    view = coloured(tokenizer, rendered)
    green = [view.plain[span.start : span.end] for span in view.spans if "green" in str(span.style)]
    assert green == trained(tokenizer, rendered) == [" c d </s>", " f </s>"]
    assert view.plain == re.sub("[«»]", "", marked(tokenizer, rendered))


def test_a_row_takes_a_few_milliseconds() -> None:
    tokenizer = tokenizer_of("qwen3")
    renderer = ChatRenderer(tokenizer, 4096)
    row = chat(user("What is the capital of France? " * 5), assistant("The capital of France is Paris. " * 5))
    took = []
    for _ in range(15):
        start = time.perf_counter()
        renderer.render(row)
        took.append(time.perf_counter() - start)
    # Ordinary is under 1 ms; the bound only catches work that belongs to the template being done for each row.
    assert min(took) < 0.01


def test_the_row_itself_is_left_alone() -> None:
    messages = (user("Rain?"), assistant(None, tool_calls=[CALL], weight=1), tool("rain"), assistant("Yes."))
    before = json.dumps(messages)
    ChatRenderer(tokenizer_of("qwen3"), 512).render(chat(*messages))
    assert json.dumps(messages) == before
