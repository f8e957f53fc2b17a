"""The quickstart's rows: seeded, varied, answerable, and held out for real."""

import json
import math
import re
from datetime import date

from lora_ft.data import meetings
from lora_ft.data.examples import Chat
from lora_ft.data.meetings import PHRASINGS
from lora_ft.data.vocabulary import KINDS, NAMES, TOPICS


def parts(row: Chat) -> tuple[str, dict]:
    return row.messages[1]["content"], json.loads(row.messages[2]["content"])


def test_rows_follow_the_seed_alone():
    assert meetings.rows(50, "train", seed=3) == meetings.rows(50, "train", seed=3)
    assert meetings.rows(50, "train", seed=3) != meetings.rows(50, "train", seed=4)


def test_rows_never_repeat_and_are_far_fewer_than_could_be_made():
    sentences = [parts(row)[0] for row in meetings.rows(3000, "train")]
    assert len(set(sentences)) == 3000
    choices = [len(of["train"]) for of in (PHRASINGS, TOPICS, KINDS, NAMES, NAMES)]
    assert math.prod(choices) * meetings.DAYS > 10**14


def test_held_out_names_titles_and_phrasings_are_never_trained_on():
    for of in (PHRASINGS, TOPICS, KINDS, NAMES):
        assert not set(of["train"]) & set(of["held_out"])
        assert all(len(set(words)) == len(words) for words in of.values())
    assert not {*TOPICS["train"], *KINDS["train"]} & {*TOPICS["held_out"], *KINDS["held_out"]}
    seen = " ".join(parts(row)[0] for row in meetings.rows(2000, "train"))
    for row in meetings.rows(200, "held_out"):
        _, meeting = parts(row)
        assert meeting["title"] not in seen
        assert not any(re.search(rf"\b{name}\b", seen) for name in meeting["attendees"])


def test_every_answer_is_in_its_sentence():
    for split in ("train", "held_out"):
        for row in meetings.rows(300, split):
            sentence, meeting = parts(row)
            assert tuple(meeting) == meetings.FIELDS
            assert meeting["title"] in sentence
            assert all(name in sentence for name in meeting["attendees"])
            day = date.fromisoformat(meeting["date"])
            assert str(day.year) in sentence
            assert str(day.day) in sentence
            assert any(spoken in sentence.lower() for spoken in meetings.DURATIONS[meeting["duration_min"]])
            hour, minute = map(int, meeting["time"].split(":"))
            clock = f"{hour % 12 or 12}:{minute:02}" if minute else str(hour % 12 or 12)
            assert meeting["time"] in sentence or "noon" in sentence or re.search(rf"\b{clock} ?[ap]m", sentence)
            assert ("pm" in sentence) <= (hour >= 12)


def test_every_way_to_say_a_thing_is_used():
    said = " ".join(parts(row)[0] for row in meetings.rows(2000, "train"))
    assert all(spoken in said for ways in meetings.DURATIONS.values() for spoken in ways)
    assert all(month in said and f"{month[:3]} " in said for month in meetings.MONTHS)
    assert all(ending in said for ending in ("1st of", "2nd of", "3rd of", "11th of", "noon"))


def test_solved_examples_go_between_instruction_and_question():
    shots = meetings.rows(3, "train", seed=1)
    messages = meetings.prompt("When?", shots)
    assert [m["role"] for m in messages] == ["system", *("user", "assistant") * 3, "user"]
    assert messages[-1]["content"] == "When?"
