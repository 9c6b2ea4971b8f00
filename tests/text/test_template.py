"""Templates render as transformers renders them, and none runs away."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from proxytune.errors import PromptFormatError
from proxytune.request import ChatOptions
from proxytune.text import meter, template
from proxytune.text.prompts import check_syntax, render_text
from tests.support import hostile_templates as hostile
from tests.support.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather of a <city> & "more"',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Zürich", "Oslo"]},
                    "days": {"type": ["integer", "null"], "default": 3},
                },
                "required": ["city"],
            },
        },
    }
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "Is 'a < b' true for Zoë? 😀"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nLet me see.",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo", "n": 2.5}}}],
    },
    {"role": "tool", "name": "weather", "content": '{"celsius": 3}'},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image"}]},
]

# Each uses what published chat templates use; none is one of them.
CONSTRUCTS = {
    "roles and turns": """{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' or message['role'] != "system" %}<{{ message.role }}>{{ loop.index0 }}
{% elif loop.first %}first{{ loop.index }}{% else %}other{% endif %}
{% if not loop.last %},{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}""",
    "neighbours": """{% for m in messages -%}
{{ loop.previtem.role if loop.previtem is defined }}|{{ loop.nextitem.role if not loop.last }}|
{{- loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.depth }}{{ loop.cycle('a', 'b') }}
{{- loop.changed(m.role) }}{% else %}none{% endfor %}""",
    "slices": """{% set rest = messages[1:] %}{{ rest|length }}{{ messages[::-1][0].role }}
{{ messages[-1]['role'] }}{{ messages[:2]|map(attribute='role')|join('+') }}{{ 'abc'[1:] }}""",
    "namespaces": """{% set ns = namespace(n=0, found=false, system='', calls=[]) %}
{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m.role == 'system' %}{% set ns.found = true %}
{% set ns.system = ns.system + m.content %}{% continue %}{% endif %}
{% set ns.calls = ns.calls + [m.role] %}{% if ns.n > 3 %}{% break %}{% endif %}{% endfor %}
{{ ns.n }}{{ ns.found }}{{ ns.system }}{{ ns.calls }}{{ ns.missing is defined }}""",
    "methods of text": """{% set c = messages[2].content %}
{{ c.split('</think>')[-1].lstrip('\\n') }}{{ c.split('</think>')[0].rstrip('\\n').split('<think>')[-1] }}
{{ c.startswith('<think>') and not c.endswith('x') }}{{ '</think>' in c }}{{ 'x' not in c }}
{{ ' a '.strip() }}{{ 'aXb'.lower().upper().title().capitalize() }}{{ c.replace('hm', 'so', 1) }}
{{ ', '.join(['a', 'b']) }}{{ 'a b'.split() }}{{ 'a\\nb'.splitlines() }}{{ 'a,b,c'.rsplit(',', 1) }}
{{ c.find('hm') }}{{ c.rfind('e') }}{{ 'banana'.count('an') }}{{ '12'.isdigit() }}{{ ' '.isspace() }}
{{ 'a=b'.partition('=') }}{{ 'prefix'.removeprefix('pre') }}{{ '{} is {n:>4}'.format('a', n=3) }}
{{ 'ß'.upper() }}{{ '%s has %02d' % ('a', 7) }}{{ 'ab' * 3 }}""",
    "methods of dicts and lists": """{% for k, v in messages[2].tool_calls[0].function.arguments.items() %}
{{ k }}={{ v }}{% endfor %}{{ messages[0].get('name', 'none') }}{{ messages[0].get('x') is none }}
{{ messages[0].keys()|list }}{{ messages[0].values()|first }}{{ 'role' in messages[0] }}
{{ [1, 2, 1].index(2) }}{{ [1, 2, 1].count(1) }}{{ dict(a=1, b=2) }}{{ dict([('a', 1)]) }}
{{ messages[2]['tool_calls'][0]['function']['name'] }}{{ {'items': 1}['items'] }}""",
    "filters": """{{ ' a '|trim }}{{ 'a'|upper }}{{ 'A'|lower }}{{ 'ab cd'|title }}{{ 'ab'|capitalize }}
{{ missing|default('d') }}{{ ''|default('d', true) }}{{ none|d('x') }}{{ [3, 1, 2]|sort|join(',') }}
{{ ['b', 'A']|sort(reverse=true) }}{{ [1, 1, 2]|unique|list }}{{ 'abc'|list }}{{ 'abc'|reverse }}
{{ [1, 2]|first }}{{ [1, 2]|last }}{{ [1, 2]|length }}{{ [1, 2]|count }}{{ [1, 2]|max }}{{ 3.7|int }}
{{ '42'|int + 1 }}{{ 'x'|int(7) }}{{ '1.5'|float }}{{ 2.567|round(1) }}{{ -3|abs }}{{ 5|string + 'a' }}
{{ 'a-b'|replace('-', '+') }}{{ 'a\\nb'|indent(2) }}{{ 'a\\nb'|indent(4, first=true) }}{{ '<a>'|e }}
{{ {'b': 1, 'a': 2}|dictsort }}{% for k, v in {'b': 1}|items %}{{ k }}{{ v }}{% endfor %}
{{ ('<b>'|safe) ~ '<i>' }}{{ '%s-%s'|format('a', 'b') }}{{ [1, 2, 3]|reverse|list }}{{ [2, 1]|min }}""",
    "filters over messages": """{{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ messages|rejectattr('role', 'in', ['user', 'tool'])|map(attribute='role')|list }}
{{ messages|selectattr('tool_calls', 'defined')|list|length }}{{ messages|map('length')|list }}
{{ ['a', 'b', '']|select|list }}{{ ['a', 'b']|reject('equalto', 'a')|list }}{{ ['a']|map('upper')|join }}
{{ messages|map(attribute='name', default='-')|join('|') }}""",
    "tests": """{{ missing is defined }}{{ missing is undefined }}{{ none is none }}{{ 'a' is string }}
{{ 1 is number }}{{ 1.5 is float }}{{ 1 is integer }}{{ true is boolean }}{{ true is true }}{{ 0 is false }}
{{ {} is mapping }}{{ [] is sequence }}{{ [] is iterable }}{{ 'a' is not mapping }}{{ 3 is odd }}
{{ 4 is even }}{{ 4 is divisibleby 2 }}{{ 1 is eq 1 }}{{ 1 is in [1, 2] }}{{ none is sameas none }}
{{ 2 is gt 1 }}{{ 1 == 1.0 }}{{ 1 < 2 < 3 }}{{ 'a' < 'b' }}{{ 2 >= 2 }}{{ not (1 and 0) or '' }}""",
    "tools": """{% if tools is not none and tools %}{% for tool in tools %}{{ tool|tojson }}
{{ tool|tojson(indent=4) }}
{{ tool.function|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}
{% endfor %}{% else %}{{ tools is none }}{{ documents is none }}{% endif %}
{{ messages[1].content|tojson }}{{ [1, 2.5, none, true, 'é']|tojson }}""",
    "macros": """{% macro kind(value, depth=0) -%}
{% if value is mapping %}{ {%- for k, v in value|dictsort %}{{ k }}:{{ kind(v, depth + 1) }}{% endfor -%} }
{%- elif value is iterable and value is not string %}[
{%- for v in value %}{{ kind(v, depth=depth) }}{% endfor %}]
{%- else %}{{ value|string }}@{{ depth }}{% endif %}{%- endmacro %}
{{ kind(tools or []) }}{% macro wrap(tag) %}<{{ tag }}>{{ caller(1) }}{{ varargs }}{{ kwargs }}</{{ tag }}>
{% endmacro %}{% call(n) wrap('a') %}{{ n }}{% endcall %}{{ kind.name }}{{ kind.arguments }}""",
    "blocks": """{% set text %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ text|trim }}
{% filter upper %}{{ text }}{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}
{% raw %}{{ raw }}{% endraw %}{# comment #}{%- generation -%} answer {%- endgeneration -%}
{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}""",
    "sums": """{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ 7 / 2 }}{{ 1 - 3 }}{{ -2 }}{{ 2 * 3 + 1 }}
{{ 'a' ~ 1 ~ none ~ true }}{{ [1] + [2] }}{{ (1,) + (2, 3) }}{{ 'x' if tools else 'y' }}{{ 1e3 }}{{ 0x1f }}
{{ range(3)|list }}{{ range(0, 6, 2)|list }}{% for i in range(2) %}{{ i }}{% endfor %}
{{ messages|length % 2 == 0 }}""",
    "parts": """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m.content %}{% if part.type == 'text' %}{{ part['text'] }}
{% elif part.type in ['image', 'x'] %}<image>{% endif %}
{% endfor %}{% endif %}{% endfor %}{{ eos_token }}{{ unk_token }}{{ pad_token }}
{% set date_string = strftime_now('%d %b %Y') %}{{ date_string|length }}{{ enable_thinking is defined }}""",
    "white space": "a\n  {% if true %}\n  b\n  {%- endif %}\n {%+ if true %}c{% endif +%}\n\n{{ 'd' }}\n\n",
    "nothing": "",
}


def _as_transformers(source: str, **variables: Any) -> str:
    conversations = [variables.pop("messages")]
    texts, _ = render_jinja_template(conversations, chat_template=source, **variables)
    return str(texts[0])


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("source", CONSTRUCTS.values(), ids=CONSTRUCTS)
def test_what_chat_templates_use_renders_as_transformers_renders_it(source, tools):
    variables = {
        "messages": MESSAGES,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    assert template.render(source, variables, strict=False) == _as_transformers(source, **variables)


def test_a_tokenizers_own_template_sees_what_transformers_gives_it():
    """Its special tokens by name, no tools and no documents."""
    tokenizer = tiny_tokenizer(
        chat_template="{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ pad_token }}"
        "{{ eos_token }}{{ bos_token is defined }}{{ prompt is defined }}{{ missing }}\n"
    )
    messages = [{"role": "user", "content": "Hi"}]
    for begins in (True, False):
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=begins, tokenize=False)
        assert own == render_text(
            messages,
            prompt_format="chat",
            tokenizer=tokenizer,
            name="m",
            options=ChatOptions(begins),
        )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content | tojson }}",
        "{{ {'é': '<x>'} | tojson(indent=2) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y') }}: {{ messages[-1].content }}",
        "{% if tools is not none %}{% for t in tools %}{% endfor %}{% endif %}{{ pad_token }}",
    ],
)
def test_a_chat_template_in_a_recipe_renders_as_the_tokenizers_own(source):
    tokenizer = tiny_tokenizer(chat_template=source)
    messages = [{"role": "user", "content": "Is 'a < b' true for Zoë?"}]
    both = [
        render_text(messages, prompt_format=prompt_format, tokenizer=tokenizer, name="m")
        for prompt_format in ("chat", source)
    ]
    assert both[0] == both[1] == tokenizer.apply_chat_template(messages, tokenize=False)


def test_of_several_chat_templates_the_default_is_taken():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "usual", "tool_use": "tools"}
    assert render_text("Hi", prompt_format="chat", tokenizer=tokenizer, name="m") == "usual"
    tokenizer.chat_template = {"rag": "documents", "tool_use": "tools"}
    with pytest.raises(PromptFormatError, match=r"several chat templates \(rag, tool_use\)"):
        render_text("Hi", prompt_format="chat", tokenizer=tokenizer, name="m")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """What became of each hostile template, in a process of its own without a thread or a model."""
    command = [sys.executable, "-m", "tests.support.hostile_templates"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=True)
    return {row["name"]: row for row in map(json.loads, run.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*hostile.TIME, *hostile.OTHERS])
def test_a_hostile_template_is_refused_within_its_time_and_memory(outcomes, name):
    outcome = outcomes[name]
    why = hostile.TOO_LONG if name in hostile.TIME else hostile.OTHERS[name][1]
    assert re.search(why, outcome["error"])
    assert re.match(
        "the prompt template of m (is|has|takes|makes|fails|[a-z]+s) ", outcome["error"]
    )
    assert "\nhint: " in outcome["error"]
    assert outcome["seconds"] < 3
    assert outcome["megabytes"] < 200


@pytest.mark.parametrize("prompt_format", ["chat", "recipe"])
def test_a_template_of_a_tokenizer_or_a_recipe_has_two_seconds(prompt_format):
    source = hostile.TIME["nested loops"]
    tokenizer = tiny_tokenizer(chat_template=source)
    start = time.monotonic()
    kind = {"chat": "chat", "recipe": "prompt"}[prompt_format]
    with pytest.raises(
        PromptFormatError, match=f"the {kind} template of m takes more than 2 seconds"
    ):
        render_text(
            "Hi",
            prompt_format="chat" if prompt_format == "chat" else source,
            tokenizer=tokenizer,
            name="m",
        )
    assert 1.9 < time.monotonic() - start < 3


def test_the_time_is_over_although_other_threads_took_the_processor(monkeypatch):
    monkeypatch.setattr(meter, "MAX_SECONDS", 0.5)
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(range(10000))

    others = [threading.Thread(target=compute) for _ in range(4)]
    for other in others:
        other.start()
    try:
        start = time.monotonic()
        with pytest.raises(PromptFormatError, match=r"takes more than 0\.5 seconds"):
            render_text(
                "Hi",
                prompt_format=hostile.TIME["nested loops"],
                tokenizer=tiny_tokenizer(),
                name="m",
            )
        assert time.monotonic() - start < 1.5
    finally:
        done.set()
        for other in others:
            other.join()


def test_a_malformed_chat_template_names_the_line():
    tokenizer = tiny_tokenizer(chat_template="a\n{{ messages | shout }}")
    with pytest.raises(
        PromptFormatError, match="chat template of m is malformed in line 2: No filter"
    ) as e:
        render_text("Hi", prompt_format="chat", tokenizer=tokenizer, name="m")
    assert "tojson" in str(e.value)  # the ones that there are


def test_long_prompts_and_conversations_are_within_the_bounds():
    """A million tokens and a thousand turns, through every step that such templates take."""
    source = (
        "{% set ns = namespace(last=0, turns=[]) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% set ns.turns = ns.turns + [m] %}{% endif %}{% endfor %}"
        "{% for m in messages[1:] %}{% set c = m.content %}{% if '</think>' in c %}"
        "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{{- '<|im_start|>' + m.role + '\\n' + c|trim + '<|im_end|>\\n' -}}{% endfor %}"
    )
    messages = [
        {"role": "user" if index % 2 == 0 else "assistant", "content": "wörter " * 600}
        for index in range(1000)
    ]
    text = render_text(messages, prompt_format=source, tokenizer=tiny_tokenizer(), name="m")
    assert text.count("wörter") == 600 * 999 and text.count("<|im_end|>") == 999


def test_a_template_may_write_a_long_prompt_four_times_and_not_many_times():
    """What it writes is tokenised, which takes seconds for each megabyte."""
    long = "word " * 400_000
    tokenizer = tiny_tokenizer()
    four = render_text(long, prompt_format="{{ prompt }}" * 4, tokenizer=tokenizer, name="m")
    assert four == long * 4
    with pytest.raises(PromptFormatError, match=r"writes more than 15,\d+ kB for this prompt"):
        render_text(long, prompt_format="{{ prompt }}" * 9, tokenizer=tokenizer, name="m")
    with pytest.raises(PromptFormatError, match=r"writes more than 26\d kB for this prompt"):
        render_text("Hi", prompt_format="{{ 'x' * 300000 }}", tokenizer=tokenizer, name="m")


def test_messages_of_one_rendering_cannot_be_seen_by_the_next():
    source = "{% set ns = namespace(x=messages) %}{{ ns.x|length }}"
    texts = [
        render_text(
            [{"role": "user", "content": "Hi"}] * num,
            prompt_format=source,
            tokenizer=tiny_tokenizer(),
            name="m",
        )
        for num in (1, 3, 2)
    ]
    assert texts == ["1", "3", "2"]
    assert check_syntax(source, "m") == "jinja"
