"""A model's chat template, which renders messages as the text that the model was trained on.

====================  ===================================================================================
the model             its template, in the language of jinja2
====================  ===================================================================================
a folder              ``chat_template.jinja``, with others in ``additional_chat_templates``; else
                      ``chat_template`` in ``tokenizer_config.json``
a ``.gguf`` file      its key ``tokenizer.chat_template``
====================  ===================================================================================

A template is a program that comes with the weights. It runs as in transformers: in jinja2's sandbox, without access to
files or to Python, and with the same functions. Nothing limits its time: an endless loop runs until Ctrl-C. On Linux
its memory is limited: a template of a hundred characters can double a text until the machine has none left.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ...checks import check_path
from ...extras import needed
from ...files.disk import model_format, read_whole
from ...files.modelfolder import FURTHER_TEMPLATES
from ...texts import FileRefused, reading, short
from .gguf import gguf_tokenizer
from .tokens import TOKENIZER_SETTINGS, read_settings, special_tokens, token_text

Message = Mapping[str, Any]
Tools: TypeAlias = Sequence[Any] | None
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_NAMES = {"default", "tool_use"}
"""The templates that are used: "default", and for chats with tools "tool_use", if present."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The keys under which a message may have the model's reasoning."""
SPECIAL_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""The special tokens' names in a .gguf file, with their names in a template."""
TEMPLATE_MEMORY = 1 << 28
"""The most bytes that a template may use while it renders."""
NONCE = str(secrets.randbits(128))  # occurs in no chat, and no filter that changes letters alters it
BEGIN_MARK, END_MARK = f"\ue000{NONCE}\ue001", f"\ue000{NONCE}\ue002"
"""Marks around the text between a template's generation tags."""


class ChatTemplate:
    """The templates in a file, "default" and possibly "tool_use", with the special tokens that they may write."""

    def __init__(self, path: str | Path, templates: Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        self.path, self.templates, self.tokens = path, dict(templates), dict(tokens or {})
        plain, marking = _sandbox("", ""), _sandbox(BEGIN_MARK, END_MARK)
        with reading(path), _limited_memory():  # constant expressions are computed here
            self._plain = {name: plain.from_string(templates[name]) for name in TEMPLATE_NAMES & templates.keys()}
            self._marking = {name: marking.from_string(templates[name]) for name in self._plain}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = None) -> str:
        """Return messages as one text, like transformers' ``apply_chat_template(..., tokenize=False)``."""
        return self._write(self._plain[self._name(tools)], messages, tools, add_generation_prompt)

    def render_with_turns(
        self, messages: Sequence[Message], *, tools: Tools = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the result of `render`, and the spans between ``{% generation %}`` tags."""
        name, text = self._name(tools), self.render(messages, tools=tools)
        if "endgeneration" not in self.templates[name]:
            return text, []
        without, turns = _unmarked(self._write(self._marking[name], messages, tools, False))
        if without != text:
            raise FileRefused(self.path, "its chat template changes the text between its generation tags")
        return text, turns

    def _name(self, tools: Tools) -> str:
        return "tool_use" if tools and "tool_use" in self.templates else "default"

    def _write(self, template: Any, messages: Sequence[Message], tools: Tools, ask: bool) -> str:
        values = {"messages": [_as_transformers(message) for message in messages], "tools": tools, "documents": None}
        try:
            with _limited_memory():
                return str(template.render({**self.tokens, **values, "add_generation_prompt": ask}))
        except MemoryError as error:
            reason = f"its chat template needs more than {TEMPLATE_MEMORY >> 20} MiB of memory to render this"
            raise FileRefused(self.path, reason) from error
        except Exception as error:  # a template may refuse a role, divide by zero, or nest too deeply
            reason = f"{type(error).__name__}: {error}"
            calls = [i for i, message in enumerate(messages, start=1) if message.get("tool_calls")]
            chat = f" chat, whose message {calls[0]} has tool calls" if calls else ""
            raise FileRefused(self.path, f"its chat template cannot render this{chat}: {reason}") from error


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process reserve at most `TEMPLATE_MEMORY` more bytes, on Linux, which enforces such a limit."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = reserved + TEMPLATE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _sandbox(begins: str, ends: str) -> Any:
    """Return a template's environment, which puts the two marks around the text between generation tags."""
    needed("jinja2", "a chat template")
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  as in jinja2

        def parse(self, parser: Any) -> nodes.Node:
            """Parse the block between the tags as a call, as transformers does: names set inside stay local."""
            line = next(parser.stream).lineno
            inside: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], inside).set_lineno(line)

        def marked(self, caller: Any) -> str:
            return f"{begins}{caller()}{ends}"

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # jinja2's own tojson would escape <, > and & for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return made


def _unmarked(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without the marks, and the spans between them."""
    text, turns, begun = "", [], 0
    for part in re.split(f"({BEGIN_MARK}|{END_MARK})", marked):
        if part == BEGIN_MARK:
            begun = len(text)
        elif part == END_MARK:
            turns.append((begun, len(text)))
        else:
            text += part
    return text, [(start, stop) for start, stop in turns if start < stop]


def _as_transformers(message: Message) -> dict[str, Any]:
    """Return a message as transformers passes it to a template: without nulls, with reasoning under all its keys."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[name] for name in REASONING_KEYS if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


# --- the template of a model ----------------------------------------------------------------------------------------


def load_template(model: str | Path) -> ChatTemplate:
    """Read the chat template of a model: a Hugging Face folder, or a .gguf file."""
    path = check_path("model", model)
    if (kind := model_format(path)) == ".npz":
        other = "a chat model, such as --model smollm2, or rows of prompt and completion"
        raise FileRefused(path, f"there is no chat template for messages: take {other}")
    return _from_folder(path) if kind == "folder" else _from_gguf(path)


def _from_folder(folder: Path) -> ChatTemplate:
    settings = read_settings(folder)
    tokens = {name: text for name, value in special_tokens(folder, settings) if (text := token_text(value))}
    if (folder / TEMPLATE_FILE).exists():
        more = sorted((folder / FURTHER_TEMPLATES).glob("*.jinja"))
        templates = {"default": _text(folder / TEMPLATE_FILE)} | {path.stem: _text(path) for path in more}
        return ChatTemplate(folder / TEMPLATE_FILE, templates, tokens)
    if settings.get("chat_template") is None:
        raise FileRefused(folder, f"there is no chat template in {TOKENIZER_SETTINGS}, nor a file {TEMPLATE_FILE}")
    file = folder / TOKENIZER_SETTINGS
    return ChatTemplate(file, _by_name(file, settings["chat_template"]), tokens)


def _text(path: Path) -> str:
    with reading(path):
        return read_whole(path).decode("utf-8")


def _by_name(path: Path, value: Any) -> dict[str, str]:
    """Return templates by name; a file has a single one, or a list of named ones."""
    with reading(path):
        named = {entry["name"]: entry["template"] for entry in value} if isinstance(value, list) else {"default": value}
    if not isinstance(named.get("default"), str):
        raise FileRefused(path, f"chat_template is {short(value)}, expected a string or a list with a 'default'")
    return named


def _from_gguf(path: Path) -> ChatTemplate:
    fields = gguf_tokenizer(path)
    key, words = "tokenizer.chat_template", fields.get("tokenizer.ggml.tokens") or []
    numbers = {f"{name}_token": fields.get(f"tokenizer.ggml.{word}_token_id") for word, name in SPECIAL_NAMES.items()}
    tokens = {name: words[i] for name, i in numbers.items() if type(i) is int and 0 <= i < len(words)}
    named = {name.removeprefix(f"{key}."): value for name, value in fields.items() if name.startswith(f"{key}.")}
    with reading(path):
        return ChatTemplate(path, {**named, "default": fields[key]}, tokens)
