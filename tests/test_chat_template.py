"""A chat template can do nothing but write, and comes to an end; what an honest one writes is unchanged."""

import resource
import time

import pytest
from jinja2.exceptions import SecurityError

from litfreeze.chat_template import MOST_TEXT, ChatTemplate

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
    "{{ 2 ** (2 ** 60) }}",
    "{% for m in messages %}{% for i in range(99999) %}{{ messages | tojson }}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_what_would_not_end_or_fill_the_memory_is_stopped(source):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((SecurityError, RecursionError)):
        ChatTemplate(source).render({"messages": [{"role": "user", "content": "Hi"}] * 20})
    assert time.process_time() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


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


@pytest.mark.parametrize("source", [CHATML, ALTERNATING])
def test_a_long_conversation_is_no_bomb(source):
    turns = [{"role": ("user", "assistant")[i % 2], "content": "A word or two. " * 200} for i in range(1000)]
    written = ChatTemplate(source).render({"messages": turns})
    assert 2_000_000 < len(written) < MOST_TEXT
