"""``minilora generate``: generate text with a language model, with or without an adapter."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts import printable
from .console import (
    Defaults,
    add_backend,
    add_model,
    add_quantize,
    add_system,
    check_output,
    chosen_backend,
    files,
    given_or_saved,
    loading,
    path,
    say,
    say_interrupted,
)

if TYPE_CHECKING:
    from ..language.chat import Dialogue, Prompt
    from ..language.files.tokens import Tokenizer


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="continue a text with a language model",
        description=(
            "Print the prompt and its continuation, token by token, up to N tokens or the end of the text. With "
            "--chat, PROMPT is a user's message: the model's chat template formats it, and only the answer is printed. "
            "Without PROMPT, --chat answers each line that you type, or of stdin, in one conversation; Ctrl-C ends an "
            "answer. With -o, PROMPT is a .jsonl file of prompts or chats, and the answers are written to a "
            "file; Ctrl-C keeps those that are complete."
        ),
        epilog="example: minilora generate 'The capital of France is' --model smollm2",
        formatter_class=Defaults,
    )
    option = parser.add_argument
    option("prompt", nargs="?", metavar="PROMPT", help="the text to continue, or the message to answer")
    option(
        "-o",
        "--output",
        type=path,
        metavar="FILE",
        help="answer each line of the .jsonl file PROMPT, which has a prompt or messages, and write the line with its "
        'answer, as "generated", to FILE; an answer that ends the messages is left out of the prompt',
    )
    add_model(parser)
    option("--adapter", type=path, metavar="DIR", help="an adapter of this model, in PEFT's layout")
    option(
        "--chat",
        action="store_true",
        help="answer PROMPT as a message in the model's chat template; without PROMPT, answer each line of the input",
    )
    add_system(option, "at the start of a chat")
    option("--tokens", type=int, default=100, metavar="N", help="the largest number of tokens to generate")
    option(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="0 takes the most likely token; 1 samples from the model's probabilities",
    )
    option(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the smallest set of most likely tokens whose probabilities sum to at least P",
    )
    option("--seed", type=int, default=0, metavar="N", help="seed of the sampling")
    add_quantize(parser)
    add_backend(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the text, token by token."""
    import numpy as np

    from ..checks import check_integer
    from ..language.chat import Dialogue, with_system
    from ..language.data import PROMPT_KEYS, not_read, read_prompts
    from ..language.files.tokens import added_text
    from ..language.finetune import warn_beyond_context
    from ..language.generation import check_sampling, generate
    from ..language.source import AdapterSource, ModelSource

    rng = np.random.default_rng(check_integer("seed", options.seed, at_least=0))
    check_sampling(options.tokens, options.temperature, options.top_p)
    if options.prompt is None and not options.chat:
        raise ValueError("there is no prompt: give one, or use --chat, which answers each line of the input")
    if options.system is not None and not options.chat and options.output is None:
        raise ValueError("--system applies to chats: use it with --chat or -o")
    if options.output is not None:
        if options.chat:
            raise ValueError("-o reads prompts and chats from a file, --chat from the keyboard: use only one of them")
        check_output(options.output, files("the file of prompts", Path(options.prompt or "")), "-o")
        if options.output.exists():
            raise ValueError(f"-o {str(options.output)!r} already exists, expected a new file")
    backend, source = chosen_backend(options.backend), ModelSource(options.model)
    adapter = AdapterSource.open(options.adapter, "float32", backend) if options.adapter else None
    tokenizer, system = source.tokenizer, given_or_saved(options.system, adapter)
    records = None if options.output is None else read_prompts(Path(options.prompt), source, system)
    for note in not_read(key for record, _ in records or [] for key in record if key not in PROMPT_KEYS):
        say(f"{note}; each answer is written with them")
    dialogue = Dialogue(source.template, tokenizer, with_system([], system)) if options.chat else None
    asks_chats = options.chat or any("messages" in record for record, _ in records or [])
    if system and options.system is None and asks_chats:
        say(f"using the adapter's system message (--system replaces it): {printable(system, 80)}")
    # A bad PROMPT is refused before the model is loaded, a bad typed line when it is typed.
    given = options.prompt is not None and records is None
    first = _prompt(options.prompt, dialogue, tokenizer) if given else None
    with loading(source.name):
        model = source.load("float32", backend, options.quantize)
        if adapter is not None:
            model = adapter.attached(model, backend, options.quantize)

    def texts(prompt: Prompt) -> Iterator[str]:
        """Yield the continuation of a prompt, piece by piece."""
        warn_beyond_context(model, len(prompt.ids) + options.tokens, "prompt and text may have")
        ids = generate(
            model, prompt.ids, options.tokens, temperature=options.temperature, top_p=options.top_p, rng=rng,
            end=prompt.end,
        )  # fmt: skip
        return added_text(ids, prompt.text_ids, tokenizer.decode)

    if records is not None:
        return write_answers(records, texts, options.output)
    prompts = (_prompt(line, dialogue, tokenizer) for line in _lines()) if first is None else iter([first])
    for prompt in prompts:
        print(_shown(prompt.text), end="", flush=True)
        answer = ""
        try:
            for text in texts(prompt):
                print(_shown(text), end="", flush=True)
                answer += text
        except KeyboardInterrupt:
            if first is not None:
                raise
        print(flush=True)
        if dialogue is not None:
            dialogue.answered(answer)
    return 0


def write_answers(
    records: list[tuple[dict[str, Any], Prompt]], texts: Callable[[Prompt], Iterator[str]], file: Path
) -> int:
    """Write each record with the model's answer to a file, on Ctrl-C those that are complete; return the exit code."""
    from tqdm import tqdm

    from ..files.disk import written_whole

    done, of_all, status = 0, "", 0
    with written_whole(file) as out:
        try:
            for record, prompt in tqdm(records, unit="prompt", disable=None):
                answer = "".join(texts(prompt))
                out.write((json.dumps({**record, "generated": answer}, ensure_ascii=False) + "\n").encode())
                done += 1
        except KeyboardInterrupt:
            if not done:
                raise
            say_interrupted()
            of_all, status = f" of {len(records):,}", 130
    print(f"{done:,}{of_all} answers written to {printable(str(file))}")
    return status


def _prompt(text: str, dialogue: Dialogue | None, tokenizer: Tokenizer) -> Prompt:
    """Return a text to continue, or a message to answer."""
    from ..language.chat import read_prompt

    text.encode()  # fails if the system could not decode an argument
    return read_prompt(text, tokenizer) if dialogue is None else dialogue.ask(text)


def _lines() -> Iterator[str]:
    """Yield the lines of stdin, typed or piped, except blank ones."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _shown(text: str) -> str:
    """Escape the control characters of a text, except line breaks."""
    return "\n".join(printable(line, len(line)) for line in text.split("\n"))
