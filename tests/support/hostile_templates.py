"""Prompt templates that would take minutes, fill the memory or look into Python, and what refuses each.

Run as a module it renders every one in a child process of its own and prints, for each, the seconds, the
megabytes and the error as JSON. The process has no threads and has loaded no model, so that forking it is
safe and memory is what a template took.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from typing import Any

TOO_LONG = "takes more than [0-9.]+ seconds"
TOO_LARGE = "makes a text or list of more than 16 MB"
WRITTEN = "writes more than [0-9]+ kB for this prompt"
TOO_MUCH = "makes more than 128 MB of values in all"
TOO_DEEP = "nests lists deeper than 100 levels"
DIGITS = "an integer of thousands of digits"
BACKWARDS = "searches backwards for a long text in a long text"
WIDE = "formats a field wider than 9999 characters"
UNSAFE = "is unsafe"
ITSELF = "it calls itself too often"
NESTED = "it is nested too deeply"
NO_FILTER = "No filter named"
NOT_FOR_PROMPTS = "is not for prompt templates"
TOKENS = "has more than 10,000 Jinja tokens"
CHARACTERS = "is longer than 262,144 characters"

_COUNT = "{% for i in range(99999) %}"
_FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}"
_END = "{% endfor %}"
_END_FOREVER = "{% endfor %}{% endfor %}"
_LONG = "{% set a = 'x' * 16000000 %}{% set b = 'x' * 16000000 %}"


def _grown(start: str, step: str, end: str = "") -> str:
    """Return a template that applies a step to `ns.x` sixty times."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}"
        f"{{% set ns.x = {step} %}}{{% endfor %}}{end}"
    )


def _piled(what: str) -> str:
    """Return a template that keeps as many values as it can, each from the one before."""
    return (
        "{% set text = 'x' * 1000000 ~ ',' ~ 'y' * 1000000 %}{% set ns = namespace() %}"
        f"{_FOREVER}{{% macro f() %}}{{% endmacro %}}"
        f"{{% set ns.x = namespace(x=ns.x, y={what}) %}}{_END_FOREVER}"
    )


TIME = {
    "nested loops": f"{_FOREVER}{_END_FOREVER}{{{{ prompt }}}}",
    "loops whose condition is never true": f"{_COUNT}{{% for j in range(99999) if false %}}{_END}{_END}",
    "a loop over the characters of a long text": "{% for c in 'x' * 16000000 %}{{ '' }}{% endfor %}"
    * 3,
    "conditions on the characters of a long text": "{% set s = 'x' * 16000000 %}"
    + "{% for c in s if false %}{% endfor %}" * 50,
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "comparing long texts": f"{_LONG}{_COUNT}{{% if a == b %}}{{% endif %}}{_END}",
    "comparing long texts without a loop": _LONG + "{% if a == b %}{% endif %}" * 900,
    "ordering long texts": f"{_LONG}{_COUNT}{{% if a < b %}}{{% endif %}}{_END}",
    "a test on long texts": f"{_LONG}{_COUNT}{{% if a is eq b %}}{{% endif %}}{_END}",
    "comparing long lists": "{% set a = ['x' * 1000000] * 15 %}{% set b = ['x' * 1000000] * 15 %}"
    f"{_COUNT}{{% if a != b %}}{{% endif %}}{_END}",
    "searching a long text": "{% set a = 'a' * 8000000 %}{% set b = 'a' * 4000000 ~ 'b' %}"
    f"{_COUNT}{{% if b in a %}}{{% endif %}}{_END}",
    "searching a list": "{% set a = ['x' * 15000] * 1000 %}{% set b = 'x' * 14999 ~ 'y' %}"
    f"{_COUNT}{{% if b in a %}}{{% endif %}}{_END}",
    "a method that searches": "{% set a = 'a' * 8000000 %}{% set b = 'a' * 4000000 ~ 'b' %}"
    f"{_COUNT}{{% if a.count(b) %}}{{% endif %}}{_END}",
    "a filter that searches": "{{ range(99999)|select('in', range(99999)|list)|list|length }}",
    "keys that take long to hash": _grown("1", "(ns.x, ns.x) if i < 16 else ns.x")
    + f"{_COUNT}{{% set y = {{'a': 1}}[ns.x] %}}{_END}",
    "the same key asked of a method": _grown("1", "(ns.x, ns.x) if i < 16 else ns.x")
    + f"{_COUNT}{{% set y = {{}}.get(ns.x) %}}{_END}",
    "loops over what filters yield": f"{_COUNT}{{% for j in range(99999)|select if false %}}{_END}{_END}",
    "lengths of loops over what filters yield": "{% for a in range(99999)|map('string') %}"
    "{% for b in range(99999)|map('string') %}{% if loop.length %}{% endif %}{% endfor %}{% endfor %}",
    "sorting": f"{{% set a = range(99999)|list %}}{_COUNT}{{% set b = a|sort %}}{_END}",
    "reversing": f"{{% set a = range(99999)|list %}}{_COUNT}{{% set b = a|reverse|list|length %}}{_END}",
    "arguments without end": "{% macro f() %}{{ varargs|length }}{% endmacro %}"
    f"{_COUNT}{{{{ f(*range(99999)) }}}}{_END}",
    "what changed in a loop": "{% set a = ['x' * 8000000] %}{% set b = ['x' * 8000000] %}"
    f"{_COUNT}{{{{ loop.changed(a) }}}}{{{{ loop.changed(b) }}}}{_END}",
    "a loop that cycles": f"{_FOREVER}{{% if loop.cycle(1, 2) %}}{{% endif %}}{_END_FOREVER}",
    "long paths of fields": f"{_COUNT}{{{{ ('{{0' ~ '[0]' * 50000 ~ '}}').format('x') }}}}{_END}",
    "names in many branches": "".join(f"{{% set v{i} = 1 %}}" for i in range(400))
    + "{% if messages %}{% set x = 1 %}{% endif %}" * 400
    + f"{_FOREVER}{_END_FOREVER}",
}
"""Each is stopped by the clock alone, so most get less time here than templates have."""
SHORT_S = 0.3
NUM_FULL_TIME = 2
"""So many of the first get all the time."""

OTHERS = {
    # Numbers
    "a power": ("{{ 10 ** (10 ** 10) }}", DIGITS),
    "powers multiplied": ("{{ 2 ** 16000 * 2 ** 16000 * 2 ** 16000 }}", DIGITS),
    "squares": (_grown("3", "ns.x * ns.x"), DIGITS),
    "rounding": ("{{ 1|round(10**9, 'ceil') }}", "rounds to more than 300 digits"),
    "rounding text": ("{{ 'a'|round(8, 'ceil') }}", "cannot round 'str'"),
    "a number read from text": ("{{ ('f' * 16000000)|int(0, 16) }}", "reads a number of more than"),
    "a fraction read from text": ("{{ ('9' * 16000000)|float }}", "reads a number of more than"),
    "a range": ("{{ range(10**10)|list }}", "Range too big"),
    # Widths
    "a width": ("{{ prompt }}{{ '%0999999999d' % 1 }}", TOO_LARGE),
    "a precision": ("{{ '%.999999999f' % 1.5 }}", TOO_LARGE),
    "a width among the values": ("{{ '%*d' % (999999999, 1) }}", TOO_LARGE),
    "a width behind a key in brackets": ("{{ '%(a(b))999999999d' % {'a(b)': 1} }}", TOO_LARGE),
    "a value for many fields": ("{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}", TOO_LARGE),
    "a width for a filter": ("{{ '%999999999d'|format(1) }}", TOO_LARGE),
    "a width in a test": ("{{ '%999999999d' is odd }}", "neither even nor odd"),
    "a width in another test": ("{{ '%999999999d' is divisibleby 3 }}", "neither even nor odd"),
    "a width for a method": ("{{ '{:>999999999}'.format('a') }}", WIDE),
    "a width from a field": ("{{ '{:>{}}'.format('a', 999999999) }}", WIDE),
    "a precision for a method": ("{{ '{:.999999999f}'.format(1.5) }}", WIDE),
    "many fields": ("{{ ('{0}' * 50000).format('x' * 100000) }}", TOO_LARGE),
    "a long text of fields": ("{{ ('{{' * 8000000).format() }}", TOO_LARGE),
    "a date": ("{{ strftime_now('%c' * 100000) }}", "formats a date by more than"),
    # Texts and lists
    "repeated text": ("{{ 'a' * 10**10 }}", TOO_LARGE),
    "a repeated list": ("{{ [1] * 10**10 }}", TOO_LARGE),
    "references to a long text": ("{% set s = 'x' * 9000000 %}{{ [s, s] }}", TOO_LARGE),
    "doubled by +": (_grown("'ab'", "ns.x + ns.x"), TOO_LARGE),
    "doubled by ~": (_grown("'ab'", "ns.x ~ ns.x"), TOO_LARGE),
    "a doubled list": (_grown("[1]", "ns.x + ns.x"), TOO_LARGE),
    "a list in itself": (_grown("[1]", "[ns.x, ns.x]", "{{ ns.x }}"), TOO_LARGE),
    "a dict in itself": (_grown("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x|tojson }}"), TOO_LARGE),
    "a tuple in itself as a key": (_grown("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"), TOO_LARGE),
    "a tuple as a key": ("{{ {(1, 2): 3} }}", "a key of a dict"),
    "keys with one hash": (
        "{% set ns = namespace(x=[]) %}{% for i in range(99) %}"
        "{% set ns.x = ns.x + [(i * (2**61 - 1), i)] %}{% endfor %}{{ dict(ns.x) }}",
        "a key of a dict",
    ),
    "a deep list": (
        f"{{% set ns = namespace(x=[]) %}}{_COUNT}{{% set ns.x = [ns.x] %}}{_END}",
        TOO_DEEP,
    ),
    "views of a dict": ("{% set d = {'a': 'x' * 1000000} %}{{ [d.items()] * 1000 }}", TOO_LARGE),
    "a set": ("{{ messages[0].keys() - [] }}", "makes a set"),
    "splitting": ("{{ ('ab ' * 5000000).split()|length }}", TOO_LARGE),
    "splitting at commas": ("{{ ('a,' * 8000000).split(',')|length }}", TOO_LARGE),
    "splitting lines": ("{{ ('ab\n' * 5000000).splitlines()|length }}", TOO_LARGE),
    "characters": ("{{ ('a' * 16000000)|list|length }}", TOO_LARGE),
    "sorted characters": ("{{ ('ab' * 8000000)|sort|length }}", TOO_LARGE),
    "rejected characters": ("{{ ('ab' * 8000000)|reject('string')|list }}", TOO_LARGE),
    "replacing": ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", TOO_LARGE),
    "replacing nothing": ("{{ ('a' * 100000).replace('', 'b' * 100000) }}", TOO_LARGE),
    "a filter that replaces": ("{{ ('a' * 100000)|replace('a', 'b' * 100000) }}", TOO_LARGE),
    "joining": ("{{ ('b' * 100000).join('a' * 100000) }}", TOO_LARGE),
    "a filter that joins": ("{{ ('a' * 100000)|join('b' * 100000) }}", TOO_LARGE),
    "indenting": ("{{ 'a\nb'|indent(10**10) }}", TOO_LARGE),
    "indenting lines": ("{{ ('a\n' * 100000)|indent(100000) }}", TOO_LARGE),
    "JSON with indents": ("{{ [1]|tojson(indent=10**10) }}", TOO_LARGE),
    "a number as JSON with indents": ("{{ 1.5|tojson(indent=10**10) }}", TOO_LARGE),
    "JSON with a text between": (
        "{{ range(1000)|list|tojson(separators=('x' * 1000000, 'y')) }}",
        TOO_LARGE,
    ),
    "control characters as JSON": ("{{ ('\x01' * 16000000)|tojson }}", TOO_LARGE),
    "capitals": ("{{ ('x' * 15000000 ~ 'é').upper() }}", TOO_LARGE),
    "titles": ("{{ ('a ' * 7000000)|title }}", TOO_LARGE),
    "HTML": ("{{ ('\"' * 10000000)|e }}", TOO_LARGE),
    "HTML added": ("{{ ('a'|safe) + '\"' * 10000000 }}", TOO_LARGE),
    "HTML put together": ("{{ ('a'|safe) ~ '\"' * 10000000 }}", TOO_LARGE),
    "HTML joined": ("{{ (','|safe).join(['\"' * 1000000] * 10) }}", TOO_LARGE),
    "HTML formatted": ("{{ ('{}'|safe).format('\"' * 10000000) }}", TOO_LARGE),
    "HTML formatted by %": ("{{ ('%s'|safe) % ('\"' * 10000000) }}", TOO_LARGE),
    "HTML replaced": ("{{ (('a' * 10000)|safe).replace('a', '\"' * 1000) }}", TOO_LARGE),
    "stripping": ("{{ ('a' * 8000000).strip('b' * 4000000 ~ 'a') }}", "strips more than"),
    "trimming": ("{{ ('a' * 8000000)|trim('b' * 4000000 ~ 'a') }}", "strips more than"),
    "rfind": ("{{ ('a' * 8000000).rfind('ab' ~ 'a' * 4000000) }}", BACKWARDS),
    "rindex": ("{{ ('a' * 8000000).rindex('ab' ~ 'a' * 4000000) }}", BACKWARDS),
    "rpartition": ("{{ ('a' * 8000000).rpartition('ab' ~ 'a' * 4000000) }}", BACKWARDS),
    "rsplit": ("{{ ('a' * 8000000).rsplit('ab' ~ 'a' * 4000000) }}", BACKWARDS),
    "a long path": ("{{ messages|sort(attribute='role,' * 500000) }}", "looks up an attribute"),
    "a long path, unnamed": (
        "{{ messages|sort(false, false, 'role,' * 500000) }}",
        "looks up an attribute",
    ),
    # Output and memory
    "output": (f"{_COUNT}{{{{ 'x' * 1000 }}}}{_END}", WRITTEN),
    "a long text": ("{{ 'ab1!' * 4000000 }}", WRITTEN),
    "the prompt again and again": (f"{_COUNT}{{{{ messages }}}}{_END}", WRITTEN),
    "a list written often": (
        f"{{% set l = range(99999)|list %}}{_COUNT}{{{{ l }}}}{_END}",
        WRITTEN,
    ),
    "output of a macro": (
        "{% macro f() %}" + _COUNT + "{{ 'x' * 1000 }}" + _END + "{% endmacro %}{{ f()|length }}",
        TOO_LARGE,
    ),
    "output of a caller": (
        "{% macro f() %}{{ caller() }}{% endmacro %}"
        + f"{{% call f() %}}{_COUNT}{{{{ 'x' * 1000 }}}}{_END}{{% endcall %}}",
        TOO_LARGE,
    ),
    "output of a filter": (
        "{% filter upper %}" + _COUNT + "{{ 'x' * 1000 }}" + _END + "{% endfilter %}",
        TOO_LARGE,
    ),
    "an answer": (
        "{% generation %}" + _COUNT + "{{ 'x' * 1000 }}" + _END + "{% endgeneration %}",
        TOO_LARGE,
    ),
    "a block that is kept": (
        "{% set x %}" + _COUNT + "{{ 'x' * 100000 }}" + _END + "{% endset %}",
        TOO_MUCH,
    ),
    "lists that are kept": (
        f"{{% set ns = namespace(x=[]) %}}{_COUNT}{{% set ns.x = ns.x + [[i]] %}}{_END}",
        TOO_MUCH,
    ),
    "slices that are kept": (_piled("text[1:]"), TOO_MUCH),
    "parts that are kept": (_piled("text.split(',')"), TOO_MUCH),
    "a text cut in three, kept": (_piled("text.partition(',')"), TOO_MUCH),
    # Calls
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ITSELF),
    "a caller that calls itself": (
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}",
        ITSELF,
    ),
    "a loop that calls itself": (
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        ITSELF,
    ),
    # What is not there
    **{
        name: ("{{ prompt|" + name + " }}", NO_FILTER)
        for name in ("attr", "batch(2)", "center(10**10)", "pprint", "random", "urlize", "wordwrap")
    },
    **{
        name: ("{{ prompt." + name + " }}", UNSAFE)
        for name in (
            "encode",
            "expandtabs",
            "format_map",
            "ljust",
            "translate",
            "zfill",
            "__class__",
        )
    },
    "lipsum": ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
    "a list that would change": ("{{ messages.append(1) }}", UNSAFE),
    "an attribute in a format": ("{{ '{0.__class__}'.format(prompt) }}", UNSAFE),
    "an item in a format": ("{{ '{0[__class__]}'.format(prompt) }}", UNSAFE),
    "an attribute as an item": ("{{ prompt['__class__'] }}", UNSAFE),
    "a function's globals": ("{{ raise_exception.__globals__ }}", UNSAFE),
    "a macro's function": ("{% macro f() %}{% endmacro %}{{ f._func }}", UNSAFE),
    "the context": ("{{ self._TemplateReference__context }}", UNSAFE),
    "a hidden attribute of a namespace": ("{{ namespace(_x=1) }}", "begins with an underscore"),
    "a function of a filter": ("{{ messages|map(attribute='__class__')|join }}", UNSAFE),
    "an error that is not there": ("{{ raise_exception(promt) }}", "'promt' is undefined"),
    "an error without end": ("{{ raise_exception('x' * 9000000) }}", r"xxx\.\.\."),
    "a name without end": ("{{ prompt['x' * 9000000] }}", "has no attribute 'xxx"),
    **{
        tag.split()[0]: ("{% " + tag + " %}", NOT_FOR_PROMPTS)
        for tag in ("include 'x'", "import 'x' as y", "from 'x' import y", "extends 'x'")
    },
    "block": ("{% block x %}{% endblock %}", NOT_FOR_PROMPTS),
    "autoescape": ("{% autoescape true %}{% endautoescape %}", NOT_FOR_PROMPTS),
    # The template's own length
    "a long template": ("{{ prompt }}" + "x" * 2**20, CHARACTERS),
    "a template of digits": ("{{ " + "1" * 900000 + " }}", CHARACTERS),
    "digits": ("{{ " + "1" * 260000 + " }}", "is malformed"),
    "hexadecimal digits": ("{{ 0x" + "f" * 260000 + " }}", DIGITS),
    "underscores": ("{{ " + "1_" * 130000 + " }}", "is malformed"),
    "tokens": ("{{ prompt }}" * 20000, TOKENS),
    "empty tags": ("{% if prompt %}{% endif %}" * 9000, TOKENS),
    "additions": ("{{ 1" + " + 1" * 9000 + " }}", TOKENS),
    "a deep addition": ("{{ 1" + " + 1" * 4000 + " }}", NESTED),
    "filters on filters": ("{{ prompt" + "|trim" * 4000 + " }}", NESTED),
    "brackets": ("{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}", NESTED),
    "lists in lists": ("{{ " + "[" * 4000 + "]" * 4000 + " }}", NESTED),
    "loops in loops": ("{% for a in messages %}" * 1500 + _END * 1500, NESTED),
    "opened tags": ("{%" * 100000, "is malformed"),
    "opened expressions": ("{{" * 100000, NESTED),
    "an open text": ("{{ '" + "\\a" * 100000, "is malformed"),
    "an open comment": ("{{ prompt }}{#" + " " * 200000, "is malformed"),
}


def _render(name: str, template: str) -> dict[str, Any]:
    from proxytune.errors import PromptFormatError
    from proxytune.text.prompts import render_text

    class Tokenizer:
        bos_token = eos_token = chat_template = None

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        text = render_text("Hi", prompt_format=template, tokenizer=Tokenizer(), name="m")  # type: ignore[arg-type]
        error = f"rendered {text[:40]!r}"
    except PromptFormatError as refused:
        error = str(refused)
    except BaseException as fault:
        error = f"{type(fault).__name__}: {fault}"
    seconds = time.monotonic() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return {"name": name, "seconds": seconds, "megabytes": more, "error": error[:3000]}


def main() -> None:
    """Print a line of JSON for each template."""
    # Before the children, which then start at once.
    import proxytune.text.prompts  # noqa: F401
    from proxytune.text import meter

    templates = TIME | {name: template for name, (template, _) in OTHERS.items()}
    short = set(list(TIME)[NUM_FULL_TIME:])
    for name, template in templates.items():
        child = os.fork()
        if not child:
            # What a template got past all checks must not take the machine with it.
            signal.alarm(30)
            resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
            if name in short:
                meter.MAX_SECONDS = SHORT_S
            print(json.dumps(_render(name, template)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"name": name, "error": f"killed: {status}"}), flush=True)


if __name__ == "__main__":
    main()
