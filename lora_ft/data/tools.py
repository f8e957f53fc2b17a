"""Chat templates that know no tools, taught to write them as text.

Many small instruct models have a template that drops tools and fails on a call. A few lines of Jinja put before such a
template turn tools, calls and results into ordinary messages, in the form that Hermes and Qwen 2.5 made common and
servers parse. As the lines are part of the template, they are saved with the adapter, and whoever serves it renders
what training saw. Conversations without tools are rendered as before.

Arguments are compact JSON, as OpenAI's API writes the string that a client sends back: whether a server passes it on or
parses it first, the text is the same.
"""

from __future__ import annotations

TOOLS_AS_TEXT = (
    "knows no tools, so it was extended: tools are listed in the first turn, calls are written as JSON in <tool_call> "
    "tags and results in <tool_response> tags of a user turn; the adapter keeps this template"
)
AS_SYSTEM, AS_USER = "system", "user"

_PRELUDE = """\
{%- set plain = namespace(messages=[], results='', tools='') %}
{%- if tools %}
    {%- set plain.tools = 'Functions that may be called, as JSON, one a line:\\n<tools>\\n' %}
    {%- for tool in tools %}
        {%- set plain.tools = plain.tools + (tool | tojson) + '\\n' %}
    {%- endfor %}
    {%- set plain.tools = plain.tools + '</tools>\\nCall one by answering:\\n<tool_call>\\n'
        + '{"name": NAME, "arguments": OBJECT}\\n</tool_call>' %}
    {%- if messages[0]['role'] == 'system' and not messages[0]['content'] %}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {%- if ROLE == 'system' and messages[0]['role'] != 'system' %}
        {%- set plain.messages = [{'role': 'system', 'content': plain.tools}] %}
        {%- set plain.tools = '' %}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {%- set plain.results = plain.results + ('\\n' if plain.results else '')
            + '<tool_response>\\n' + message['content'] + '\\n</tool_response>' %}
        {%- if loop.last or loop.nextitem['role'] != 'tool' %}
            {%- set plain.messages = plain.messages + [{'role': 'user', 'content': plain.results}] %}
            {%- set plain.results = '' %}
        {%- endif %}
    {%- elif message['tool_calls'] %}
        {%- set calls = namespace(text=message['content'] or '') %}
        {%- for call in message['tool_calls'] %}
            {%- set given = call['function']['arguments'] or {} %}
            {%- set calls.text = calls.text + ('\\n' if calls.text else '')
                + '<tool_call>\\n{"name": ' + (call['function']['name'] | tojson) + ', "arguments": '
                + (given if given is string else (given | tojson(separators=(',', ':')))) + '}\\n</tool_call>' %}
        {%- endfor %}
        {%- set plain.messages = plain.messages + [{'role': 'assistant', 'content': calls.text}] %}
    {%- elif plain.tools and message['role'] == ROLE %}
        {%- set plain.messages = plain.messages
            + [{'role': ROLE, 'content': message['content'] + '\\n\\n' + plain.tools}] %}
        {%- set plain.tools = '' %}
    {%- else %}
        {%- set plain.messages = plain.messages + [message] %}
    {%- endif %}
{%- endfor %}
{%- set messages = plain.messages %}
{%- set tools = none %}
"""


def extended(source: str, role: str) -> str:
    """Returns the template `source` with tools, calls and results as text.

    Args:
        role: the turn that lists the tools, `AS_SYSTEM` or, for templates without a system turn, `AS_USER`.
    """
    return _PRELUDE.replace("ROLE", repr(role)) + source


def is_extended(source: str) -> bool:
    """Returns whether `source` is a template that `extended` made."""
    return any(source.startswith(extended("", role)) for role in (AS_SYSTEM, AS_USER))
