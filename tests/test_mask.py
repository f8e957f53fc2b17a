"""The three ways of finding the trained text, and the contract: each promise is broken on purpose once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import processors

from lora_ft.data import mask, render
from lora_ft.data.examples import Chat
from lora_ft.data.mask import IGNORE, NoWayError, Rendered, Talk, prefix_spans, sentinel_spans, tag_spans
from lora_ft.data.render import ChatRenderer, marked
from lora_ft.data.template import BOS_REPEATED, NO_BOS, PROBE, RefusedError, Template
from lora_ft.data.tokens import Tokens, adds_bos, continued
from lora_ft.errors import MaskError
from tests.stock_templates import CHATML, CHATML_TAGGED, LLAMA3, STOCK, tokenizer_of


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


ASK = Chat("train.jsonl:17", (user("What is 2+3?"), assistant("The sum is 5.")))


def talk_of(tokenizer, messages, trained) -> Talk:
    template = Template(tokenizer, tokenizer.chat_template)
    return Talk(template, messages, (), template.render(messages), trained)


# One rule for tokens


def test_a_token_belongs_where_its_first_character_that_is_no_space_lies() -> None:
    tokens = Tokens(ids=[1, 2, 3], anchors=[0, 4, 9])
    assert tokens.within([(4, 9)]) == [False, True, False]
    assert tokens.owners([(9, 12), (0, 3)]) == [1, -1, 0]
    assert tokens.within([(4, 4)]) == [False, False, False]


@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_spaces_before_a_word_belong_to_the_word_and_lone_ones_to_where_they_start(name: str) -> None:
    text = "It is    so"
    tokens = Tokens.of(tokenizer_of(name), text)
    # The border is at " so", whose token may have taken one space or all four.
    assert tokens.within([(text.index("so"), len(text))])[-1]
    inside = tokens.within([(0, 2), (len("It is"), len(text))])
    assert [inside[0], inside[-1]] == [True, True]
    lone = [anchor for anchor in tokens.anchors if text[anchor].isspace()]
    assert all(len("It is") <= anchor < text.index("so") for anchor in lone)
    assert tokens.anchors == sorted(tokens.anchors)


def test_bytes_of_one_character_stay_together() -> None:
    text = "a😀b"
    tokens = Tokens.of(tokenizer_of("chatml"), text)
    assert tokens.within([(1, 2)]).count(True) == 4
    assert tokens.anchors == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(("name", "border"), [("chatml", 12), ("gemma", 14)])
def test_no_token_reaches_across_a_border(name: str, border: int) -> None:
    tokenizer = tokenizer_of(name)
    # The first learned "\n\n" as one token, the second "\ns".
    text = "of the sea.\n\n\nsalt"
    assert Tokens.of(tokenizer, text, [border]) != Tokens.of(tokenizer, text)
    cut = Tokens.of(tokenizer, text, [border])
    assert (
        cut.ids[: cut.within([(border, len(text))]).index(True)]
        == tokenizer(text[:border], add_special_tokens=False)["input_ids"]
    )
    assert tokenizer.decode(cut.ids) == text
    assert cut.anchors == sorted(cut.anchors)
    # A cut between words changes nothing.
    assert Tokens.of(tokenizer, text, [2]) == Tokens.of(tokenizer, text, [0, len(text)])


@pytest.mark.parametrize("after", ["The end.", "\n\nThe end.", " The end."])
def test_the_tokens_before_a_border_do_not_depend_on_what_follows(after: str) -> None:
    # GPT-2's rule joins line breaks at the end of a text, but parts the last from them when a word follows.
    tokenizer, prompt = tokenizer_of("chatml"), "of the sea.\n\n"
    alone = Tokens.of(tokenizer, prompt)
    assert Tokens.of(tokenizer, prompt + "The end.").ids[: len(alone.ids)] != alone.ids
    cut = Tokens.of(tokenizer, prompt + after, [len(prompt)])
    assert cut.ids[: len(alone.ids)] == alone.ids
    assert cut.within([(0, len(prompt))]) == [True] * len(alone.ids) + [False] * (len(cut.ids) - len(alone.ids))
    assert tokenizer.decode(cut.ids) == prompt + after


@pytest.mark.parametrize("name", ["chatml", "gemma"])
@pytest.mark.parametrize("text", ["The sea.", " The sea.", "\nsalt", "xyz", ".", ""])
def test_a_continuation_decodes_to_itself(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    ids, spans = continued(tokenizer, text)
    before = tokenizer("It is", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*before, *ids]) == "It is" + text
    assert [start for start, _ in spans][:1] == [0][: len(text)]


# The ways agree where they should, each by its own evidence


@pytest.mark.parametrize("name", list(STOCK))
def test_sentinels_and_prefixes_find_the_same_characters(name: str) -> None:
    talk = talk_of(tokenizer_of(name), PROBE, (1, 3))
    found = sentinel_spans(talk)
    assert found == prefix_spans(talk)
    stock = STOCK[name]
    texts = [talk.text[start:end] for start, end in found]
    assert texts == [
        stock.lead + "zqanswer" + stock.tail + stock.end,
        stock.last_lead + "zqansweragain" + stock.tail + stock.end,
    ]


def test_tags_find_the_same_characters_and_leave_out_untrained_turns() -> None:
    talk = talk_of(tokenizer_of("chatml-tagged"), PROBE, (3,))
    assert tag_spans(talk) == sentinel_spans(talk) == prefix_spans(talk)
    assert [talk.text[start:end] for start, end in tag_spans(talk)] == ["zqansweragain<|im_end|>"]


def test_tags_in_several_blocks_are_counted_by_turn() -> None:
    two_blocks = CHATML_TAGGED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}",
    )
    talk = talk_of(tokenizer_of("chatml-tagged", two_blocks), PROBE, (3,))
    assert [talk.text[start:end] for start, end in tag_spans(talk)] == ["zqansweragain", "<|im_end|>"]
    renderer = ChatRenderer(tokenizer_of("chatml-tagged", two_blocks), 512)
    row = Chat("a:1", (user("hi"), assistant("no", weight=0), user("and"), assistant("yes")))
    assert marked(tokenizer_of("chatml-tagged"), renderer.render(row)).count("«") == 1


def test_a_line_break_inside_the_tags_after_the_end_of_turn_is_not_trained() -> None:
    tokenizer = tokenizer_of(
        "chatml-tagged",
        CHATML_TAGGED.replace(
            "{{ message['content'] + '<|im_end|>' }}{% endgen", "{{ message['content'] + '<|im_end|>\n' }}{% endgen"
        ),
    )
    shown = marked(tokenizer, ChatRenderer(tokenizer, 512).render(ASK))
    assert shown.endswith("assistant\n«The sum is 5.<|im_end|>»\n\n")


def test_sentinels_survive_trimming_and_thinking() -> None:
    talk = talk_of(tokenizer_of("llama3"), (user(" hi "), assistant(" \n yes \n")), (1,))
    assert [talk.text[start:end] for start, end in sentinel_spans(talk)] == ["yes<|eot_id|>"]
    thinking = "<think>\nSum.\n</think>\n\nFive."
    talk = talk_of(tokenizer_of("qwen3"), (user("hi"), assistant(thinking)), (1,))
    assert [talk.text[start:end] for start, end in sentinel_spans(talk)] == [thinking + "<|im_end|>"]
    assert prefix_spans(talk) == sentinel_spans(talk)


def test_text_like_the_sentinels_does_no_harm() -> None:
    renderer = ChatRenderer(tokenizer_of("chatml"), 512)
    row = Chat("a:1", (user("zqmark1S zqmarkq"), assistant("zqmark1E zqanswer zqask")))
    assert "«zqmark1E zqanswer zqask<|im_end|>»" in marked(tokenizer_of("chatml"), renderer.render(row))


# Template faults, refused when the template is examined


def refusal_of(tokenizer) -> str:
    with pytest.raises(MaskError) as caught:
        ChatRenderer(tokenizer, 512)
    return str(caught.value)


def test_a_template_that_trains_nothing_is_refused() -> None:
    empty_tags = CHATML + "{% generation %}{% endgeneration %}"
    assert "trains nothing: its generation tags hold no text" in refusal_of(tokenizer_of("chatml", empty_tags))
    silent = CHATML.replace("message['content']", "(message['content'] if message['role'] == 'user' else '')")
    assert "trains nothing: it leaves out what the assistant says" in refusal_of(tokenizer_of("chatml", silent))


def test_a_template_that_trains_everything_is_refused() -> None:
    everything = "{% generation %}" + CHATML + "{% endgeneration %}"
    assert "trains everything: its generation tags hold the user's turns" in refusal_of(
        tokenizer_of("chatml", everything)
    )
    deaf = CHATML.replace("message['content']", "(message['content'] if message['role'] == 'assistant' else '')")
    assert "trains everything: it leaves out what the user says" in refusal_of(tokenizer_of("chatml", deaf))


def test_a_turn_that_does_not_end_in_one_token_is_refused() -> None:
    message = refusal_of(tokenizer_of("llama3", CHATML))
    assert "ends an assistant turn with '<|im_end|>', which is not one token" in message
    assert "ends an assistant turn with nothing" in refusal_of(
        tokenizer_of("chatml", CHATML.replace("message['content'] + '<|im_end|>'", "message['content']"))
    )


@pytest.mark.parametrize("name", ["chatml", "chatml-tagged", "qwen3"])
def test_a_turn_that_ends_in_two_tokens_is_refused(name: str) -> None:
    tokenizer = tokenizer_of(name, STOCK[name].template.replace("<|im_end|>", "<sep><|im_end|>"))
    ChatRenderer(tokenizer, 512)  # <sep> is text as yet
    tokenizer.add_tokens(["<sep>"], special_tokens=True)
    assert "ends an assistant turn with <sep> and then <|im_end|>" in refusal_of(tokenizer)


def test_what_opens_the_next_turn_is_no_second_end() -> None:
    # The first templates of Llama 3 wrote the generation prompt whether asked to or not.
    for name, source in (("llama3", LLAMA3), ("chatml", CHATML)):
        unasked = source.replace("if add_generation_prompt", "if true")
        tokenizer = tokenizer_of(name, unasked)
        assert marked(tokenizer, ChatRenderer(tokenizer, 512).render(ASK)).count("«") == 1


def test_a_turn_whose_end_would_be_sought_in_the_next_is_refused() -> None:
    # Calls have no end of their own here, so the first that follows them is that of the result.
    endless = STOCK["qwen3"].template.replace(
        "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == 'tool'",
        "{{- '\\n' if message.tool_calls else '<|im_end|>\\n' }}\n    {%- elif message.role == 'tool'",
    )
    assert endless != STOCK["qwen3"].template
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    result = {"role": "tool", "content": "rain", "tool_call_id": "call00001"}
    messages = (user("Rain?"), assistant("", tool_calls=[call]), result, assistant("Yes."))
    tokenizer = tokenizer_of("qwen3", endless)
    with pytest.raises(NoWayError, match=r"messages\[1\] is written differently"):
        prefix_spans(talk_of(tokenizer, messages, (1,)))
    with pytest.raises(MaskError, match="cannot be found in two independent ways"):
        ChatRenderer(tokenizer, 512).render(Chat("a:1", messages))


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = None
    assert "has no chat template" in refusal_of(tokenizer)
    assert "task complete" in refusal_of(tokenizer)


def test_a_template_that_raises_on_a_plain_conversation_is_refused_in_its_own_words() -> None:
    assert "refuses the conversation: not today" in refusal_of(
        tokenizer_of("chatml", "{{ raise_exception('not today') }}")
    )


def test_one_way_alone_is_not_enough() -> None:
    # The answer's wording depends on the number of messages: no prefix agrees, and there are no tags.
    shifting = CHATML.replace("message['role'] + '\n'", "message['role'] + (messages | length | string) + '\n'")
    message = refusal_of(tokenizer_of("chatml", shifting))
    assert "cannot be found in two independent ways (" in message
    assert "prefixes: the prompt before messages[1] is written differently" in message


def test_a_turn_that_changes_once_more_follows_has_no_prefix() -> None:
    # Thinking before a tool call stays while the answer is awaited, and goes once the user asks again.
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    thinking = assistant("<think>\nLook.\n</think>\n\n", tool_calls=[call])
    result = {"role": "tool", "content": "rain", "tool_call_id": "call00001"}
    messages = (user("Rain?"), thinking, result, assistant("Yes."), user("Sure?"), assistant("Yes."))
    tokenizer = tokenizer_of("qwen3")
    with pytest.raises(NoWayError, match=r"messages\[1\] is written differently once more messages follow"):
        prefix_spans(talk_of(tokenizer, messages, (1,)))
    with pytest.raises(NoWayError, match=r"the prompt before messages\[3\] is written differently"):
        prefix_spans(talk_of(tokenizer, messages, (3,)))
    with pytest.raises(MaskError, match=r"^a:1: the trained text cannot be found in two independent ways .*weight 0"):
        ChatRenderer(tokenizer, 512).render(Chat("a:1", messages))
    row = Chat("a:1", (*messages[:1], {**thinking, "weight": 0}, result, assistant("Yes.", weight=0), *messages[4:]))
    assert marked(tokenizer, ChatRenderer(tokenizer, 512).render(row)).count("«") == 1


def test_sentinels_are_not_believed_where_they_change_the_text() -> None:
    measured = CHATML.replace(
        "message['role'] + '\n'",
        "message['role'] + (' long' if message['content'] | length > 6 "
        "and message['role'] == 'assistant' else '') + '\n'",
    )
    with pytest.raises(NoWayError, match="other text when a turn's words change"):
        sentinel_spans(talk_of(tokenizer_of("chatml", measured), (user("hi"), assistant("yes")), (1,)))
    twice = CHATML.replace("+ '<|im_end|>'", "+ message['content'] + '<|im_end|>'")
    with pytest.raises(NoWayError, match=r"writes messages\[1\] twice"):
        sentinel_spans(talk_of(tokenizer_of("chatml", twice), (user("hi"), assistant("yes")), (1,)))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("phi3", "<|assistant|>\n"),
        ("chatml", "<|im_start|>assistant\n"),
        ("llama2", " [/INST]"),
        ("mistral", "[/INST]"),
    ],
)
def test_the_header_is_whole_tokens(name: str, header: str) -> None:
    tokenizer = tokenizer_of(name)
    assert Template(tokenizer, tokenizer.chat_template).header == header


# Ways that disagree


def disagreement(template: str) -> str:
    renderer = ChatRenderer(tokenizer_of("chatml-tagged", template), 512)
    assert renderer.ways == ("generation tags", "prefixes")
    with pytest.raises(MaskError) as caught:
        renderer.render(ASK)
    assert str(caught.value).startswith("train.jsonl:17: two ways of finding the trained text disagree first at token")
    return str(caught.value)


def test_tags_without_the_end_of_turn_are_refused() -> None:
    message = disagreement(
        CHATML_TAGGED.replace(
            "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
            "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
        )
    )
    assert "'<|im_end|>': prefixes would train it, generation tags would not" in message
    assert "«The sum is 5.»<|im_end|>" in message
    assert "«The sum is 5.<|im_end|>»" in message


def test_tags_that_hold_the_role_header_are_refused() -> None:
    message = disagreement(
        "{% for message in messages %}{% set turn = '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' %}{% if message['role'] == 'assistant' %}{% generation %}{{ turn }}{% endgeneration %}"
        "{% else %}{{ turn }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert "'<|im_start|>': generation tags would train it, prefixes would not" in message
    assert "«<|im_start|>assistant" in message


# The contract


def test_a_doubled_bos_is_refused_for_rows_and_prompts() -> None:
    tokenizer = tokenizer_of("llama3", "{{ bos_token }}" + LLAMA3)
    renderer = ChatRenderer(tokenizer, 512)
    with pytest.raises(MaskError, match=r"train.jsonl:17: the BOS token <\|begin_of_text\|> stands twice, at tokens 0"):
        renderer.render(ASK)
    with pytest.raises(MaskError, match=r"prompt: the BOS token .* stands twice"):
        renderer.prompt(ASK.messages[:1])


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "llama2", "deepseek"])
def test_a_template_that_forgets_the_bos_is_refused(name: str) -> None:
    tokenizer = tokenizer_of(name, STOCK[name].template.replace("bos_token", "''"))
    message = refusal_of(tokenizer)
    assert f"does not start with the BOS token {STOCK[name].bos}, though the tokenizer puts it before every" in message


def test_a_template_that_writes_bos_elsewhere_is_refused() -> None:
    late = LLAMA3.replace("{{ bos_token }}", "Answer: {{ bos_token }}")
    assert "does not start with the BOS token" in refusal_of(tokenizer_of("llama3", late))
    again = tokenizer_of("llama3", "{{ bos_token }} {{ bos_token }}" + LLAMA3.replace("{{ bos_token }}", ""))
    with pytest.raises(MaskError, match=r"BOS token <\|begin_of_text\|> stands at tokens 0, 2; exactly one must"):
        ChatRenderer(again, 512).render(ASK)


def test_a_row_that_loses_its_bos_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = ChatRenderer(tokenizer_of("llama3"), 512)
    honest = Tokens.of.__func__

    def careless(cls, tokenizer, text, borders=()):
        tokens = honest(cls, tokenizer, text, borders)
        return cls(tokens.ids[1:], tokens.anchors[1:])

    monkeypatch.setattr(Tokens, "of", classmethod(careless))
    with pytest.raises(MaskError, match="stands nowhere; exactly one must, at the start"):
        renderer.render(ASK)
    with pytest.raises(MaskError, match=r"prompt: the BOS token .* stands nowhere"):
        renderer.prompt(ASK.messages[:1])


def test_other_numbers_of_bos_have_a_name() -> None:
    for name in ("llama2", "smollm2"):
        assert ChatRenderer(tokenizer_of(name), 512).rules == (BOS_REPEATED,)
    assert ChatRenderer(tokenizer_of("zephyr"), 512).rules == (NO_BOS,)
    # ChatML's marks on a vocabulary whose BOS is another token, as in OpenHermes' Mistral.
    tokenizer = tokenizer_of("chatml")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert not adds_bos(tokenizer)
    assert ChatRenderer(tokenizer, 512).rules == ()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert adds_bos(tokenizer)
    assert ChatRenderer(tokenizer, 512).rules == (NO_BOS,)


def test_an_eos_that_the_tokenizer_adds_is_no_bos() -> None:
    tokenizer = tokenizer_of("chatml")
    end = tokenizer.eos_token
    tokenizer.bos_token = end
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert not adds_bos(tokenizer)
    assert ChatRenderer(tokenizer, 512).render(ASK).input_ids.count(tokenizer.eos_token_id) == 2


def test_a_tokenizer_that_adds_bos_by_default_does_not_double_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("llama3")
    bos = tokenizer.bos_token_id
    assert tokenizer(LLAMA3[:20])["input_ids"][0] == bos
    renderer = ChatRenderer(tokenizer, 512)
    assert renderer.render(ASK).input_ids.count(bos) == 1
    assert renderer.prompt(ASK.messages[:1]).count(bos) == 1

    honest = Tokens.of.__func__

    def careless(cls, tokenizer, text, borders=()):
        tokens = honest(cls, tokenizer, text, borders)
        return cls([bos, *tokens.ids], [0, *tokens.anchors])

    monkeypatch.setattr(Tokens, "of", classmethod(careless))
    with pytest.raises(MaskError, match="stands twice"):
        renderer.render(ASK)


def test_the_end_of_turn_is_trained_when_pad_is_eos() -> None:
    tokenizer = tokenizer_of("chatml", pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = ChatRenderer(tokenizer, 512).render(ASK)
    assert row.labels.count(tokenizer.eos_token_id) == 1


def test_a_mask_made_from_pad_ids_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("chatml", pad="<|im_end|>")

    def masked_by_id(tokens, spans, max_length):
        labels = mask.labels_of(tokens, spans, max_length)
        return [IGNORE if label == tokenizer.pad_token_id else label for label in labels]

    monkeypatch.setattr(render, "labels_of", masked_by_id)
    with pytest.raises(MaskError) as caught:
        ChatRenderer(tokenizer, 512).render(ASK)
    problem, _, shown = str(caught.value).partition("\n")
    assert problem.startswith("train.jsonl:17: the end of turn <|im_end|> (the pad token too) after messages[1] is not")
    assert "«The sum is 5.»<|im_end|>" in shown


@pytest.mark.parametrize(
    ("mutation", "problem"),
    [
        (lambda labels, ids: [IGNORE, *ids[1:]], "is trained though it is not in a trained assistant turn"),
        (lambda labels, ids: ids, "the first token is trained"),
        (lambda labels, ids: [IGNORE] * len(ids), "is not trained, so the model would never learn to stop"),
        (lambda labels, ids: [*labels[1:], IGNORE], "is not trained, so the model would never learn to stop"),
        (lambda labels, ids: labels[:-1], "labels for"),
        (
            lambda labels, ids: [IGNORE if label == first(labels) else label for label in labels],
            "is in a trained assistant turn but not trained",
        ),
    ],
)
def test_labels_that_are_not_the_derived_ones_are_caught(monkeypatch: pytest.MonkeyPatch, mutation, problem) -> None:
    monkeypatch.setattr(
        render, "labels_of", lambda tokens, spans, n: mutation(mask.labels_of(tokens, spans, n), tokens.ids)
    )
    with pytest.raises(MaskError, match=problem):
        ChatRenderer(tokenizer_of("chatml"), 512).render(ASK)


def first(labels: list[int]) -> int:
    return next(label for label in labels if label != IGNORE)


def test_truncation_keeps_what_is_left_and_refuses_when_nothing_is() -> None:
    tokenizer = tokenizer_of("chatml")
    whole = ChatRenderer(tokenizer, 512).render(ASK)
    start = next(place for place, label in enumerate(whole.labels) if label != IGNORE)
    kept = ChatRenderer(tokenizer, start + 1).render(ASK)
    lost = len(whole.input_ids) - (start + 1)
    assert kept == Rendered(ASK.where, whole.input_ids[: start + 1], whole.labels[: start + 1], cut=lost)
    assert whole.cut == 0
    with pytest.raises(MaskError) as caught:
        ChatRenderer(tokenizer, start).render(ASK)
    assert str(caught.value).startswith(
        f"train.jsonl:17: has {len(whole.input_ids)} tokens, and those to train start at number {start + 1}, "
        f"past --data.max-length {start}: nothing would be trained"
    )


def test_a_row_with_nothing_but_trained_text_is_refused() -> None:
    ids = [5, 6, 7]
    template = SimpleNamespace(end_id=7, bos_count=None)
    problem = mask.breach(Tokens(ids, [0, 1, 2]), [IGNORE, 6, 7], {0: (0, 3)}, template, tokenizer_of("chatml"), 8)
    assert problem is not None
    assert "every token is trained" in problem


def test_a_template_examined_alone_gives_its_reason_without_a_place() -> None:
    with pytest.raises(RefusedError, match="trains nothing"):
        Template(tokenizer_of("chatml"), CHATML + "{% generation %}{% endgeneration %}")
