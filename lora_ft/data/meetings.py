"""The quickstart's own data: sentences that arrange a meeting, and the JSON they should become.

Rows come from a seeded generator, so nothing is downloaded. The held-out split uses names, titles and
phrasings that training never sees: a model that answers it right has learned the task, not the rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

from lora_ft.data.examples import Chat
from lora_ft.data.vocabulary import KINDS, NAMES, TOPICS, Split

INSTRUCTION = "Answer in JSON: title, date, time (24 h), duration_min, attendees."
FIELDS = ("title", "date", "time", "duration_min", "attendees")
FIRST_DAY = date(2026, 1, 1)
DAYS = 3 * 365

PHRASINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Let's meet for the {title} on {date} at {time} for {duration} with {people}.",
        "Please book the {title} with {people} on {date} at {time}, {duration}.",
        "{people} and I need {duration} for the {title} on {date}, starting at {time}.",
        "Can you set up a {title} for {people}? {date}, {time}, {duration}.",
        "On {date} at {time}, {people} will join the {title} for {duration}.",
        "Schedule {duration} on {date} at {time} for the {title}; invite {people}.",
        "The {title} is on {date}. It starts at {time}, takes {duration}, and {people} should come.",
        "Invite {people} to the {title}: {time} on {date}, {duration}.",
        "I'd like to hold the {title} at {time} on {date}. Block {duration} and add {people}.",
        "Put the {title} in the calendar for {date}, {time}. {people} will be there for {duration}.",
        "Reminder: {title} with {people}, {date} at {time}, expected to last {duration}.",
        "We agreed on {duration} for the {title}. {people}, see you on {date} at {time}.",
        "Could we do the {title} on {date}? {time} works for {people}, and {duration} is enough.",
        "Hi {people}, the {title} will be at {time} on {date} and run for {duration}.",
        "Add a {duration} slot at {time} on {date}: {title} with {people}.",
        "{title} on {date} from {time}, {duration}, attendees {people}.",
        "Set aside {duration} with {people} for the {title}, {date} at {time} please.",
        "At {time} on {date} there is a {title}. Plan {duration} and tell {people}.",
        "New meeting: {title}. When: {date}, {time}. How long: {duration}. Who: {people}.",
        "Would {people} be free on {date} at {time} for the {title}? It should take {duration}.",
        "Reserve {time} to talk through the {title} with {people} on {date}; {duration} will do.",
        "{people} asked for a {title}. Make it {duration}, {date}, {time}.",
        "Get {people} together at {time} on {date} for a {title} of {duration}.",
        "For the {title}, {people} can spare {duration} on {date} at {time}.",
        "The {title}: {date}, {time}, {duration}. Please let {people} know.",
        "{people} would like {duration} for a {title}; is {time} on {date} possible?",
        "We start the {title} on {date} at {time} sharp and need {duration}. Bring {people}.",
        "My {title} with {people} begins {time}, {date}, and is over after {duration}.",
        "From {time} on {date} I am in the {title} with {people} for {duration}.",
        "Does {time} suit {people}? The {title} is on {date}, {duration} at most.",
        "Calendar: {date} {time} {title} ({people}), {duration}.",
        "Heads up, {people}: {title}, {time}, {date}, {duration}.",
        "{duration} should do for the {title}. {date}, {time}, and do not forget {people}.",
        "On {date} keep {duration} free after {time}: {people} want to do the {title}.",
        "I promised {people} a {title} of {duration} on {date}, so {time} it is.",
        "No earlier than {time} on {date}, please: the {title} with {people}, {duration}.",
        "{people} can only do {date}. Let the {title} begin at {time} and end after {duration}.",
        "Who is in? {people}. What? The {title}. When? {time} on {date}, {duration}.",
        "Make room on {date}, {time}: {people} come for a {title} that lasts {duration}.",
        "As agreed, the {title} starts {date}, {time}. It runs {duration} and includes {people}.",
        "Move the {title} to {date}. {people} prefer {time}, and it takes {duration}.",
        "I need {people} for {duration} on {date}; we call it the {title} and start at {time}.",
        "{date}: {title} at {time}. Duration {duration}, participants {people}.",
        "If {people} agree, the {title} will be on {date}, {time}, for {duration}.",
        "Let {people} know that we have {duration} for the {title} from {time} on, {date}.",
        "There will be a {title} with {people} on {date}. {time} works; plan {duration}.",
        "The room is ours for {duration} from {time}, {date}. Tell {people} about the {title}.",
        "Remember the {title}! {people} expect you at {time} on {date} and have {duration}.",
        "How about {time} for the {title}? It is on {date}, {people} attend, {duration} in all.",
        "{people} and the {title}: {duration}, beginning {time}, on {date}.",
        "For {duration} on {date} nobody disturbs {people}: at {time} they have a {title}.",
        "Send {people} an invitation. {title}, {date}, {time}, {duration}.",
        "Postponed: the {title} with {people} is now on {date}, {time}; {duration} as before.",
        "Our guests {people} arrive for the {title} on {date}, around {time}, and stay {duration}.",
        "It takes {duration} to do the {title}. {people} have time on {date}, {time}.",
    ),
    "held_out": (
        "Please arrange the {title} for {date} at {time} with {people}; we need {duration}.",
        "{people} will attend the {title} on {date}, which begins at {time} and lasts {duration}.",
        "I want {people} at the {title} on {date} at {time}, for {duration}.",
        "Plan a {title} with {people}: {duration}, {date}, at {time}.",
        "The {title} takes place at {time} on {date} with {people} and goes on for {duration}.",
        "Could you find room for a {title} on {date}? {people} can make {time}; {duration} please.",
        "Our {title} is set for {time}, {date}. Expect {duration}. Guests: {people}.",
        "Block {duration} from {time} on {date} so that {people} can hold the {title}.",
        "Tell {people} that the {title} was moved to {date} at {time}, still {duration}.",
        "Meeting request: {title}, {date}, {time}, {duration}, with {people}.",
    ),
}

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July",
    "August", "September", "October", "November", "December",
)  # fmt: skip

DURATIONS = {
    15: ("15 minutes", "fifteen minutes", "a quarter of an hour"),
    30: ("30 minutes", "thirty minutes", "half an hour"),
    45: ("45 minutes", "forty-five minutes", "three quarters of an hour"),
    60: ("60 minutes", "one hour", "an hour"),
    90: ("90 minutes", "ninety minutes", "1.5 hours"),
    120: ("120 minutes", "two hours", "2 hours"),
}


def rows(count: int, split: Split, seed: int = 0) -> list[Chat]:
    """Returns `count` different conversations: the instruction, one sentence, the JSON it means."""
    rng = random.Random(f"meetings {split} {seed}")
    seen: set[str] = set()
    made: list[Chat] = []
    while len(made) < count:
        sentence, meeting = _meeting(rng, split)
        if sentence in seen:
            continue
        seen.add(sentence)
        messages = (*prompt(sentence), {"role": "assistant", "content": json.dumps(meeting, separators=(",", ":"))})
        made.append(Chat(where=f"meetings[{split}]:{len(made) + 1}", messages=messages))
    return made


def prompt(sentence: str, shots: Sequence[Chat] = ()) -> tuple[dict[str, Any], ...]:
    """Returns the messages that ask for the JSON of `sentence`, after any solved examples."""
    solved = [message for shot in shots for message in shot.messages if message["role"] != "system"]
    return ({"role": "system", "content": INSTRUCTION}, *solved, {"role": "user", "content": sentence})


def _meeting(rng: random.Random, split: Split) -> tuple[str, dict[str, Any]]:
    day = FIRST_DAY + timedelta(days=rng.randrange(DAYS))
    minutes = 15 * rng.randrange(9 * 4, 18 * 4)
    duration = rng.choice(list(DURATIONS))
    people = rng.sample(NAMES[split], rng.choice((1, 2, 2, 3)))
    title = f"{rng.choice(TOPICS[split])} {rng.choice(KINDS[split])}"
    sentence = rng.choice(PHRASINGS[split]).format(
        title=title,
        date=_spoken_date(rng, day),
        time=_spoken_time(rng, *divmod(minutes, 60)),
        duration=rng.choice(DURATIONS[duration]),
        people=_spoken_list(people),
    )
    meeting = {
        "title": title,
        "date": day.isoformat(),
        "time": f"{minutes // 60:02}:{minutes % 60:02}",
        "duration_min": duration,
        "attendees": people,
    }
    return sentence[0].upper() + sentence[1:] if not sentence.startswith(title) else sentence, meeting


def _spoken_date(rng: random.Random, day: date) -> str:
    month = MONTHS[day.month - 1]
    return rng.choice(
        (
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{month[:3]} {day.day} {day.year}",
            day.isoformat(),
            f"the {_ordinal(day.day)} of {month} {day.year}",
        )
    )


def _spoken_time(rng: random.Random, hour: int, minute: int) -> str:
    half = "am" if hour < 12 else "pm"
    clock = f"{hour % 12 or 12}:{minute:02}" if minute else f"{hour % 12 or 12}"
    spoken = [f"{hour:02}:{minute:02}", f"{clock} {half}", f"{clock}{half}"]
    if (hour, minute) == (12, 0):
        spoken.append("noon")
    return rng.choice(spoken)


def _spoken_list(people: Sequence[str]) -> str:
    return people[0] if len(people) == 1 else f"{', '.join(people[:-1])} and {people[-1]}"


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
