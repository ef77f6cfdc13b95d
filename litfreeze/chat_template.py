"""A checkpoint's chat template: a program of someone else's, run so that it can do nothing but write, and comes to an
end.

jinja2's sandbox keeps it from Python's internals. It would let it loop for hours and fill the memory, so here a clock
is looked at in every turn of a loop and in every call, and what would make a long text of short ones is refused."""

import ast
import json
import math
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType, CodeType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context, LoopContext

MOST_SECONDS = 3  # for one conversation; a template for people takes less than a millisecond
MOST_TEXT = 10_000_000  # characters that are written, or that one operation makes
MOST_FORM = 1000  # characters of a date's form
MOST_DIGITS = 64  # that a number is rounded to, and the largest exponent
# Filters and methods that can make far more than they are given, of a width or of two texts
GROWING = frozenset({
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "round",
    "slice", "sum", "to_bytes", "tojson", "translate", "zfill", "%",
})  # fmt: skip
SHALLOW = frozenset({"count", "d", "default", "first", "last", "length"})  # filters that look at no item


class ChatTemplate:
    """The jinja source `source`, ready to render. Raises whatever jinja2 does for one that is none."""

    def __init__(self, source: str) -> None:
        self._sandbox = _Sandbox()
        self._template = self._sandbox.from_string(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """What it writes. Raises whatever a program can, and SecurityError for what is unsafe or has no end."""
        self._sandbox.until = time.monotonic() + MOST_SECONDS
        return self._sandbox.concat(self._template.generate(**variables))


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox (no access to Python's internals, bounded `range`), which ends `until` some moment."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.until = math.inf
        extensions = [_GenerationBlock, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._finished)
        self.filters["tojson"] = _to_json
        self.filters = {name: self._watched(name, function) for name, function in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _now,
        }
        for names, name in ((self.globals, "lipsum"), (self.filters, "urlize"), (self.filters, "wordwrap")):
            del names[name]  # no use for a prompt, and no bound

    def step(self) -> None:
        """Ends what would not."""
        if time.monotonic() > self.until:
            raise SecurityError(f"it takes more than {MOST_SECONDS} seconds")

    def size(self, value: Any) -> int:
        """Characters and items in `value`, and in what it holds."""
        found, inside = 0, [value]
        for one in inside:  # which grows meanwhile
            self.step()
            if isinstance(one, (str, bytes, range, list, tuple, dict)):
                found += len(one)
            if found > MOST_TEXT:
                raise SecurityError(f"it looks at more than {MOST_TEXT:,} characters")
            if isinstance(one, dict):
                inside += one.values()
            elif isinstance(one, list | tuple):
                inside += one
        return found

    def done(self, name: str, values: Sequence[Any], do: Callable[[], Any]) -> Any:
        """What `do` gives: the filter, method or operator `name`, done to `values`."""
        sizes = [self.size(value) for value in values]
        if name in GROWING:
            if name == "replace":
                del sizes[1]  # of what is replaced
            if name == "sum" and isinstance(values[0], Sized):  # of lists: each step copies what there is
                sizes.append(len(values[0]))
            sizes += [abs(value) for value in values[1:] if isinstance(value, int)]
            if name == "round" and sizes[-1] > MOST_DIGITS:
                raise SecurityError("rounded to that many digits")
            if name in ("format", "format_map", "%") and isinstance(values[0], str):
                sizes += map(int, re.findall("[0-9]+", values[0]))  # '%9999d', '{:>9999}'
                if name != "%" and re.search("{[^{}]*{", re.sub("{{|}}", "", values[0])):  # '{:>{}}'
                    raise SecurityError("a width that is not in the text")
            if math.prod(sorted(sizes)[-2:]) > 10 * MOST_TEXT or max(sizes) > MOST_TEXT:
                raise SecurityError(f"{name} would make a text that long")
        return self.kept(do())

    def kept(self, made: Any) -> Any:
        """What an operation has made, if it is no more than it may be."""
        if isinstance(made, str | bytes | list | tuple) and len(made) > MOST_TEXT:
            raise SecurityError(f"it makes more than {MOST_TEXT:,} characters")
        return made

    # What jinja2 calls

    def concat(self, parts: Iterable[str]) -> str:
        """The pieces that a template, a macro or a block writes, together."""
        found, length = [], 0
        for part in parts:
            length += len(part)
            if length > MOST_TEXT:
                raise SecurityError(f"it writes more than {MOST_TEXT:,} characters")
            found.append(part)
        return self.kept("".join(found))

    def joined(self, parts: Sequence[Any]) -> str:
        """a ~ b ~ c"""
        self.size(parts)
        return self.kept("".join(map(str, parts)))

    def _finished(self, value: Any) -> Any:
        """What stands in {{ }}, before it becomes text."""
        if not isinstance(value, str):
            self.size(value)
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """function(…)"""

        def do() -> Any:
            return super(_Sandbox, self).call(context, function, *args, **kwargs)

        self.step()
        args = tuple(map(_at_once, args))
        name = getattr(function, "__name__", "")
        if isinstance(function, BuiltinMethodType) or name.startswith("format"):
            own = getattr(function, "text", None) or getattr(function, "__self__", None)
            return self.done(name, [own, *args, *kwargs.values()], do) if name in GROWING else self.kept(do())
        return do()

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """'…'.format, of which jinja2 makes a function that does not tell the text."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            wrapped.text = value.__self__
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """left * right"""

        def do() -> Any:
            return super(_Sandbox, self).call_binop(context, operator, left, right)

        self.step()
        if operator in ("*", "**"):
            numbers = [value for value in (left, right) if isinstance(value, int | float)]
            if any(abs(value) > MOST_TEXT for value in numbers):
                raise SecurityError(f"{operator} with a number that large")
            if operator == "**" and isinstance(right, int | float) and abs(right) > MOST_DIGITS:
                raise SecurityError("a power that large")
            if len(numbers) == 1 and (self.size(left) + self.size(right)) * max(1, abs(numbers[0])) > MOST_TEXT:
                raise SecurityError("a text repeated that often")
        if operator == "%" and isinstance(left, str):
            return self.done("%", [left, *right] if isinstance(right, tuple) else [left, right], do)
        return self.kept(do())

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter, which looks at what it is given first. What comes one by one is made a list for that."""

        name = "%" if name == "format" else name  # which is what the filter does; str.format is a method
        skipped = int(hasattr(function, "jinja_pass_arg"))  # a context or environment stands first

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.step()
            if name in SHALLOW:
                return function(*args, **kwargs)
            args = tuple(map(_at_once, args))
            return self.done(name, [*args, *kwargs.values()][skipped:], lambda: function(*args, **kwargs))

        return watched

    def _compile(self, source: str, filename: str) -> CodeType:
        """The Python that jinja2 made of a template, to code."""
        tree = _Bounded().visit(ast.parse(source, filename))
        return compile(ast.fix_missing_locations(tree), filename, "exec")


class _Bounded(ast.NodeTransformer):
    """Has the sandbox look at the clock in the turns of loops, and join texts."""

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        node.body[:0] = ast.parse("environment.step()").body
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse("environment.joined", mode="eval").body if node.id == "str_join" else node


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, with which some templates mark the assistant's text: passed through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _at_once(value: Any) -> Any:
    """A list of what comes one by one, so that it can be looked at before it is used."""
    one_by_one = isinstance(value, Iterator | KeysView | ValuesView | ItemsView) and not isinstance(value, LoopContext)
    return list(value) if one_by_one else value


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    if len(form) > MOST_FORM:
        raise SecurityError("a date of that many parts")
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own filter escapes <, > and & for HTML, which a chat template does not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
