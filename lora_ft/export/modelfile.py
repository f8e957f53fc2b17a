"""A Modelfile for Ollama, whose templates are Go's: written from what a chat template does, and compared with it.

Ollama does not run chat templates of tokenizers. What one puts around the turns of a conversation is found by rendering
made-up ones; a template that does anything else is refused, for a model that is asked in another form than it was
trained in answers worse, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft.data.template import Message, RefusedError, Template
from lora_ft.data.tokens import adds_bos
from lora_ft.errors import UnsupportedModelError
from lora_ft.foreign.strictjson import shown

INSTEAD = "llama.cpp's server runs the template as it is: export --format gguf and start llama-server with --jinja."
# Words that no template holds.
_RULE, _ASKED, _SAID, _AGAIN = "zqrule", "zqasked", "zqsaid", "zqagain"
_SYSTEM: Message = {"role": "system", "content": _RULE}
_USER: Message = {"role": "user", "content": _ASKED}
_ASSISTANT: Message = {"role": "assistant", "content": _SAID}
_USER_AGAIN: Message = {"role": "user", "content": _AGAIN}
# What is rendered both ways; spaces and breaks are what templates strip.
_TRIED: tuple[tuple[Message, ...], ...] = (
    (_SYSTEM, _USER),
    (_SYSTEM, _USER, _ASSISTANT, _USER_AGAIN),
    (_SYSTEM, _USER, _ASSISTANT, _USER_AGAIN, _ASSISTANT, {"role": "user", "content": "Two\n\nlines, {{ braces }}"}),
)


@dataclass(frozen=True)
class Turns:
    """What a template puts around the turns of a conversation that begins with the system's, if it takes any."""

    opening: str
    """Before the first turn."""
    before: dict[str, str]
    """By role."""
    after: dict[str, str]
    prompt: str
    """After the last turn, where the model is to answer."""
    takes_system: bool
    default_system: str | None
    """What the system says where a conversation has no turn of it."""

    @classmethod
    def of(cls, template: Template) -> Turns:
        """Returns what is around each turn. Raises RefusedError where that is not all that the template does."""
        try:
            takes_system = _RULE in template.render([_SYSTEM, _USER], prompt=True)
        except RefusedError:
            takes_system = False
        first = [_SYSTEM] if takes_system else []
        text = template.prompt([*first, _USER, _ASSISTANT, _USER_AGAIN])
        words = [*([_RULE] if takes_system else []), _ASKED, _SAID, _AGAIN]
        parts: list[str] = []
        for word in words:
            part, found, text = text.partition(word)
            if not found:
                raise RefusedError("it leaves out or moves what is said")
            parts.append(part)
        end = template.end_of_turn
        after_user, before_answer = _parted(parts[-2], end)
        after_answer, before_user = _parted(parts[-1], end)
        if not text.startswith(after_user):
            after_user, before_answer = "", parts[-2]
        before, after = {"assistant": before_answer}, {"user": after_user, "assistant": after_answer}
        opening, default = "", None
        joint = parts[1] if takes_system else parts[0]
        if not joint.endswith(before_user):
            before_user, after["assistant"] = parts[-1], ""
        before["user"] = before_user
        if takes_system:
            before["system"], after["system"] = parts[0], joint.removesuffix(before_user)
            start = template.prompt([_USER]).partition(_ASKED)[0]
            default = _default_system(start, before, after)
            unasked = start.removesuffix(before_user)
            if default is None and before["system"].startswith(unasked):
                opening, before["system"] = unasked, before["system"].removeprefix(unasked)
        else:
            opening = joint.removesuffix(before_user)
        return cls(opening, before, after, text.removeprefix(after_user), takes_system, default)

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the text that Ollama makes of a conversation with this template."""
        turns = (self.before[turn["role"]] + turn["content"] + self.after[turn["role"]] for turn in messages)
        return self.opening + "".join(turns) + self.prompt


def of(name: str, tokenizer: Any, weights: str, system: str | None) -> str:
    """Returns the text of the Modelfile.

    Args:
        name: of the model, for messages.
        weights: the GGUF file beside it.
        system: the system turn that the model was trained with, None for the template's own.

    Raises:
        UnsupportedModelError: Ollama's templates cannot do what the tokenizer's does.
    """
    source = tokenizer.chat_template
    if not isinstance(source, str):
        raise UnsupportedModelError(f"{name} has no chat template, and Ollama would have to ask it in some form.")
    try:
        template = Template(tokenizer, source)
        turns = Turns.of(template)
        for tried in _TRIED:
            messages = list(tried[not turns.takes_system :])
            if turns.render(messages) != template.prompt(messages):
                raise RefusedError("it writes a turn differently with what is before or after it")
        asked_with = turns.default_system if system is None else system
        if asked_with and not turns.takes_system:
            raise RefusedError("it takes no system turn")
        if turns.takes_system and asked_with is None and template.prompt([_USER]) != turns.render([_USER]):
            raise RefusedError("it begins otherwise where the system says nothing")
        # As it is written, for a template can make of its parts what none of them is.
        written, said = _in_go(turns, _bos(tokenizer)), asked_with or ""
        if any('"""' in text or text.endswith('"') for text in (written, said)):
            raise RefusedError('it writes """ or ends with a quote, which ends a text of a Modelfile')
        stops = [stop for stop in dict.fromkeys((template.end_of_turn, tokenizer.eos_token)) if stop]
        unfit = [stop for stop in stops if '"' in stop or not stop.isprintable()]
        if unfit:
            raise RefusedError(f"it stops at {shown(unfit[0])}, and a Modelfile has no quotes or line breaks in such")
    except RefusedError as why:
        raise UnsupportedModelError(
            f"{name}: its chat template cannot be written for Ollama: {str(why).rstrip('.')}. {INSTEAD}"
        ) from None
    lines = [f"FROM ./{weights}", f'TEMPLATE """{written}"""']
    lines += [f'SYSTEM """{said}"""'] if said else []
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _default_system(start: str, before: dict[str, str], after: dict[str, str]) -> str | None:
    """Returns what a template has the system say unasked, None for nothing.

    Args:
        start: what it writes before the first turn of a user.
    """
    inner = start.removeprefix(before["system"]).removesuffix(after["system"] + before["user"])
    whole = before["system"] + inner + after["system"] + before["user"]
    return inner if inner and whole == start else None


def _parted(joint: str, end: str) -> tuple[str, str]:
    """Returns what is between two turns: the end of the first, with the breaks after it, and what opens the second."""
    before, found, rest = joint.partition(end)
    if not found:
        return "", joint
    opens = rest.lstrip("\n")
    return before + found + rest[: len(rest) - len(opens)], opens


def _bos(tokenizer: Any) -> str:
    """Returns the text that llama.cpp puts before every prompt on its own."""
    return tokenizer.bos_token if adds_bos(tokenizer) else ""


def _in_go(turns: Turns, bos: str) -> str:
    """Returns the template in Go's language, without the BOS that is put before it anyway."""
    roles = ["system", "user", "assistant"] if turns.takes_system else ["user", "assistant"]
    opening, before = turns.opening, dict(turns.before)
    if opening:
        opening = opening.removeprefix(bos)
    else:
        before[roles[0]] = before[roles[0]].removeprefix(bos)
    written = _literal(opening) + "{{ range .Messages }}"
    for number, role in enumerate(roles):
        written += ("{{ if" if not number else "{{ else if") + f' eq .Role "{role}" }}}}'
        written += _literal(before[role]) + "{{ .Content }}" + _literal(turns.after[role])
    return written + "{{ end }}{{ end }}" + _literal(turns.prompt)


def _literal(text: str) -> str:
    """Returns a text as Go's templates write it out."""
    return text.replace("{{", '{{ "{{" }}')
