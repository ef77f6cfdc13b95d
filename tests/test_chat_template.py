"""A chat template can do nothing but write, and comes to an end; what an honest one writes is unchanged."""

import resource
import time
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError

from litfreeze import chat_template
from litfreeze.chat_template import MOST_TEXT, ChatTemplate

STATM = Path("/proc/self/statm")

DOUBLING = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = MORE %}{% endfor %}"
BOMBS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    DOUBLING.replace("START", "'x'").replace("MORE", "n.x ~ n.x"),
    DOUBLING.replace("START", "'x'").replace("MORE", "n.x + n.x"),
    DOUBLING.replace("START", "'x'").replace("MORE", "n.x * 2"),
    DOUBLING.replace("START", "[1]").replace("MORE", "n.x + n.x"),
    DOUBLING.replace("START", "'x'").replace("MORE", "'%s%s' % (n.x, n.x)"),
    DOUBLING.replace("START", "'x'").replace("MORE", "'{0}{0}'.format(n.x)"),
    DOUBLING.replace("START", "'x'").replace("MORE", "[n.x, n.x] | join"),
    DOUBLING.replace("START", "'x'").replace("MORE", "n.x | replace('x', 'xx')"),
    DOUBLING.replace("START", "'x'").replace("MORE", "n.x.replace('x', 'xx')"),
    "{{ 'x' | center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 999999999) }}",
    "{{ range(99999) | join('x' * 99999) }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ [[]] * 10**8 }}",
    "{{ ('x' * 99999).join(range(50000) | map('string')) | length }}",
    "{{ '{:>{}}'.format('x', '999999999') | length }}",
    "{{ 2 | round(9999999, 'ceil') }}",
    "{{ strftime_now('%Y' * 10**6) }}",
    "{% set x = 'x' * 3000000 %}{% for i in range(99999) %}{{ x.count('xy') }}{{ x is lower }}{% endfor %}",
    "{% set d = dict.fromkeys(range(99999), 'x' * 999) %}{{ ('x' * 9999).join(d.values()) }}",
    "{{ 2 ** (2 ** 60) }}",
    "{% for m in messages %}{% for i in range(99999) %}{{ messages | tojson }}{% endfor %}{% endfor %}",
]


@pytest.mark.skipif(not STATM.exists(), reason="memory is limited as Linux does it")
@pytest.mark.parametrize("source", BOMBS)
def test_what_would_not_end_or_fill_the_memory_is_stopped(source, monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 1)
    used = int(STATM.read_text().split()[0]) * resource.getpagesize()
    limits, began = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, limits[1]))
    try:
        with pytest.raises((SecurityError, RecursionError)):
            ChatTemplate(source).render({"messages": [{"role": "user", "content": "Hi"}] * 20})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - began < 10


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
' }}{% endfor %}"""
ALTERNATING = """{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') | trim %}
    {{- '[INST] ' ~ content ~ ' [/INST]' if message.role == 'user' else content | replace('a', 'b') }}
{%- endfor %}
{{- messages | map(attribute='role') | unique | join(', ') }}{{ messages[0] | tojson(indent=4) }}"""


LOOKING_BACK = """{% for m in messages %}{% if loop.first %}{{ messages | selectattr('role', 'equalto', 'user') | list
| length }}{% endif %}{{ m.content }}{% set seen = messages | map(attribute='role') %}
{{- seen | first }}{{ seen | first }}
{% endfor %}{{ '{"a": {"b": "%s"}}' % 'x' }}{{ '{"a": {"b": "%s"}}' | format('y') }}{{ '{{{}}}'.format('z') }}"""


@pytest.mark.parametrize("source", [CHATML, ALTERNATING, LOOKING_BACK])
def test_a_long_conversation_is_no_bomb(source):
    turns = [{"role": ("user", "assistant")[i % 2], "content": "A word or two. " * 200} for i in range(1000)]
    written = ChatTemplate(source).render({"messages": turns})
    assert 2_000_000 < len(written) < MOST_TEXT
    if source == LOOKING_BACK:
        assert written.startswith("500A word") and "userassistant\n" in written
        assert written.endswith("""{"a": {"b": "x"}}{"a": {"b": "y"}}{z}""")
