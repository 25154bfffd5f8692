"""Chat templates rendered by jinja2, in the process of a `minilora.guards.boundedprocess`, which bounds them.

The sandbox of jinja2 keeps a template from files and from Python's insides; time and memory it does not bound. A
template finds here what transformers gives it. This file imports nothing of the package.
"""

from __future__ import annotations

import json
import re
import secrets
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

NONCE = str(secrets.randbits(128))  # which no conversation holds, and which no filter for letters changes
BEGINS, ENDS = f"\ue000{NONCE}\ue001", f"\ue000{NONCE}\ue002"
MARKING = [True]
"""Whether marks are written: a template with tags runs once more without, to see that they change nothing."""
MOST_LETTERS = 1 << 21
"""Letters that a conversation may become: to encode them takes half a kilobyte of memory each."""


class Generation(Extension):
    """``{% generation %}`` ... ``{% endgeneration %}`` stands around what the model says: it is written with marks."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 wants it

    def parse(self, parser: Any) -> nodes.Node:
        """Return a call with what stands between the two tags, as transformers does: names that are set stay inside."""
        line = next(parser.stream).lineno
        inside: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], inside).set_lineno(line)

    def marked(self, caller: Any) -> str:
        """Return what stands between the tags, between marks where these are wanted."""
        return f"{BEGINS}{caller()}{ENDS}" if MARKING[0] else str(caller())


def unmarked(text: str) -> tuple[str, list[list[int]]]:
    """Return a text without the marks, and from which letter to which the model speaks."""
    parts, spans, done, begun = [], [], 0, None
    for part in re.split(f"({BEGINS}|{ENDS})", text):
        if part == BEGINS:
            begun = done
        elif part == ENDS and begun is not None:
            spans.append([begun, done])
            begun = None
        elif part not in (BEGINS, ENDS):
            parts.append(part)
            done += len(part)
    return "".join(parts), [span for span in spans if span[0] < span[1]]


class Names(Namespace):
    """``namespace()``, without names that lead into Python."""

    def __init__(*args: Any, **names: Any) -> None:
        self, values = args[0], dict(*args[1:], **names)
        for name in values:
            Names.check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        Names.check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name: Any) -> None:
        """Refuse a name with an underscore before it."""
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no place for {name!r}")


def raise_exception(message: str) -> NoReturn:
    """Refuse a conversation, as a template does: ``raise_exception("expected a user's turn")``."""
    raise TemplateError(message)


def strftime_now(pattern: str) -> str:
    """Return the time, as a pattern of strftime says."""
    return datetime.now().strftime(pattern)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return a value as JSON. jinja2's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """Return what a template runs in: it cannot change what it is given, nor reach Python's insides."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Names,
        "dict": lambda *args, **names: dict(*args, **names),  # the class itself has methods that make more of them
    }
    return made


TEMPLATES: dict[str, Any] = {}
SOURCES: dict[str, str] = {}
"""The model's templates, by name."""
TAGGED = re.compile(r"\bendgeneration\b")


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Take templates, the first question, or return a conversation as a text; or why it is none."""
    try:
        if "templates" in question:
            made = environment()
            SOURCES.update(question["templates"])
            TEMPLATES.update({name: made.from_string(source) for name, source in question["templates"].items()})
            return {}
    except Exception as error:
        return {"error": f"it is no template: {error}"[:1000]}
    return rendered(question)


def rendered(values: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation as a text, and where the model speaks, as far as the template says; or why it is none."""
    name = "tool_use" if values.get("tools") and "tool_use" in TEMPLATES else "default"
    try:
        MARKING[0] = True
        text, spans = unmarked(TEMPLATES[name].render(**values))
        MARKING[0] = False
        if TAGGED.search(SOURCES[name]) and text != TEMPLATES[name].render(**values):
            return {"error": "it changes what stands between its tags {% generation %} and {% endgeneration %}"}
        if len(text) > MOST_LETTERS:
            return {"error": f"it writes {len(text):,} letters, expected at most {MOST_LETTERS:,}"}
        return {"text": text, "spans": spans} if spans else {"text": text}
    except TemplateError as error:
        return {"error": f"it says: {error}"[:1000]}
    except Exception as error:  # whatever a template does: divide by zero, nest too deeply, need more memory
        return {"error": f"it fails with {type(error).__name__}: {error}"[:1000]}
