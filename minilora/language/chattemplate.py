"""A model's chat template: it writes messages as the one text that the model was trained to read.

====================  ===================================================================================
the model             its template, in the language of jinja2
====================  ===================================================================================
a folder              ``chat_template.jinja``, with others in ``additional_chat_templates``; else
                      ``chat_template`` in ``tokenizer_config.json``
a ``.gguf`` file      its key ``tokenizer.chat_template``
====================  ===================================================================================

A template is a program that came with the weights. It runs in jinja2's sandbox, where it reaches no file and nothing of
Python's; and in a process of its own, which is ended as soon as it has computed too long or filled too much, see
`minilora.guards.boundedprocess`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import guards
from ..checks import FileRefused, check_path, needed, short
from ..files.inputs import open_regular, read_whole
from ..files.modelfolder import FURTHER_TEMPLATES
from ..guards.boundedprocess import BoundedProcess, BoundsExceeded
from .gguf import gguf_tokenizer
from .tokenizerconfig import BESIDE, read_beside, special_tokens, token_text

MOST_TEMPLATE = 1 << 20
"""Bytes of a template that we agree to parse: those in use have some thousand."""
SECONDS, SECONDS_EACH = 10.0, 0.05
"""Time that the process may compute in all, and for each conversation more; one takes a thousandth of a second."""
MOST_MEMORY = 1 << 29
"""Bytes that the process may fill; with a template in use it fills 40 MB."""
FILE, FURTHER = "chat_template.jinja", FURTHER_TEMPLATES
ANSWERS = Path(guards.__file__).with_name("templateanswers.py")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which people write what the model thought."""
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""Names of special tokens in a .gguf file, and in a template."""


class ChatTemplate:
    """A chat template, and the process that renders it, which begins with the first conversation.

    Use it in a ``with`` statement, or `close` it, so that the process ends.

    Parameters
    ----------
    path : path
        The file it comes from, for messages.
    templates : mapping of str to str
        What jinja2 reads, by name: "default", and maybe "tool_use" for conversations with tools.
    tokens : mapping of str to str, optional
        Special tokens that a template may write, such as ``{"bos_token": "<s>"}``.
    """

    def __init__(self, path: Path, templates: Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        self.path, self.templates, self.tokens = path, dict(templates), dict(tokens or {})
        self.process = BoundedProcess(ANSWERS, seconds=SECONDS, memory=MOST_MEMORY)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Return messages as one text, as transformers' ``apply_chat_template(..., tokenize=False)`` does.

        Parameters
        ----------
        messages : sequence of mappings
            Each with "role" and "content", such as ``{"role": "user", "content": "Hi"}``.
        add_generation_prompt : bool
            Whether the text goes on with what begins an answer of the model's.
        tools : sequence, optional
            What the template is told of tools that the model may call.

        Raises
        ------
        FileRefused
            If the template is none, refuses the messages, computes too long or fills too much.
        ValueError
            If jinja2 is not installed.
        """
        return self.render_with_turns(messages, add_generation_prompt=add_generation_prompt, tools=tools)[0]

    def render_with_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return what `render` does, and where a template says that the model speaks.

        It says so with ``{% generation %}`` ... ``{% endgeneration %}`` around it. Of one without these, the list is
        empty.
        """
        if not self.process.runs:
            needed("jinja2", "a chat template")
            self.process.seconds = SECONDS
            self._ask({"templates": self.templates})
        self.process.seconds += SECONDS_EACH
        values = {"messages": [_as_transformers(message) for message in messages], "tools": tools, "documents": None}
        answer = self._ask({**self.tokens, **values, "add_generation_prompt": add_generation_prompt})
        return answer["text"], [(start, stop) for start, stop in answer.get("spans", ())]

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question, or refuse the template."""
        try:
            answer: dict[str, Any] = self.process.ask(question)
        except BoundsExceeded as error:
            raise FileRefused(self.path, f"its chat template cannot be used: {error}") from None
        if "error" in answer:
            raise FileRefused(self.path, f"its chat template cannot write this: {answer['error']}")
        return answer


def _as_transformers(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as transformers gives it to a template: without what is null, thoughts under all their names."""
    says = {key: value for key, value in message.items() if value is not None}
    thoughts = next((says[name] for name in THOUGHTS if name in says), None)
    return says if thoughts is None else {"thinking": thoughts, **says, "reasoning_content": thoughts}


def load_template(model: str | Path) -> ChatTemplate:
    """Read the chat template of a model.

    Parameters
    ----------
    model : path
        A Hugging Face folder or a .gguf file.

    Raises
    ------
    FileRefused
        If there is none, or one that cannot be read.
    ValueError
        If the package that reads the file is not installed.
    """
    path = check_path("model", model)
    if path.is_dir():
        return _from_folder(path)
    open_regular(path).close()
    if path.suffix != ".gguf":
        raise FileRefused(path, "there is no chat template, which a folder or a .gguf file can have")
    return _from_gguf(path)


def _from_folder(folder: Path) -> ChatTemplate:
    config = read_beside(folder)
    tokens = {name: text for name, value in special_tokens(folder / BESIDE, config) if (text := token_text(value))}
    tokens.pop("", None)  # those that have no name
    if (folder / FILE).exists():
        more = (folder / FURTHER).glob("*.jinja")
        templates = {"default": _text(folder / FILE)} | {path.stem: _text(path) for path in sorted(more)}
        return ChatTemplate(folder / FILE, templates, tokens)
    if config.get("chat_template") is None:
        raise FileRefused(folder, f"there is no chat template in {BESIDE}, nor a file {FILE}")
    return ChatTemplate(folder / BESIDE, _named(folder / BESIDE, config["chat_template"]), tokens)


def _text(path: Path) -> str:
    try:
        return read_whole(path, MOST_TEMPLATE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileRefused(path, f"not a text in UTF-8: {error}") from error


def _named(path: Path, templates: Any) -> dict[str, str]:
    """Return templates by name: a file has one, or a list of some that have names."""
    if isinstance(templates, str):
        return {"default": templates}
    if not isinstance(templates, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in templates
    ):
        raise FileRefused(
            path, f"chat_template is {short(templates)}, expected a text, or a list of names and templates"
        )
    by_name = {entry["name"]: entry["template"] for entry in templates}
    if "default" not in by_name:
        raise FileRefused(path, f"its chat templates are named {short(sorted(by_name))}, expected one named 'default'")
    return by_name


def _from_gguf(path: Path) -> ChatTemplate:
    fields = gguf_tokenizer(path)
    template, words = fields.get("tokenizer.chat_template"), fields.get("tokenizer.ggml.tokens") or []
    if not isinstance(template, str):
        raise FileRefused(path, "there is no chat template under tokenizer.chat_template")
    numbers = {f"{name}_token": fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL.items()}
    tokens = {n: words[i] for n, i in numbers.items() if type(i) is int and 0 <= i < len(words)}
    named = {
        key.removeprefix("tokenizer.chat_template."): value
        for key, value in fields.items()
        if key.startswith("tokenizer.chat_template.") and isinstance(value, str)
    }
    return ChatTemplate(path, {**named, "default": template}, tokens)
