"""``minilora generate``: text from a language model, with an adapter or without."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .console import Defaults, add_backend, add_model, add_quantize, chosen_backend, path, printable

if TYPE_CHECKING:
    from ..language.chat import Dialogue, Prompt
    from ..language.tokens import Tokenizer


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="continue a text with a language model",
        description=(
            "Print the prompt and its continuation, token by token, until N tokens or the text's end. With --chat "
            "PROMPT is a user's message: the model's chat template formats it, and only the answer is printed. Without "
            "PROMPT, --chat answers each line that you type, or of stdin, and the model reads all that was said before."
        ),
        epilog="example: minilora generate 'The capital of France is' --model SmolLM2-135M",
        formatter_class=Defaults,
    )
    option = parser.add_argument
    option("prompt", nargs="?", metavar="PROMPT", help="the text to continue, or the message to answer")
    add_model(parser)
    option("--adapter", type=path, metavar="DIR", help="an adapter of this model, in PEFT's layout")
    option(
        "--chat",
        action="store_true",
        help="answer PROMPT, by the model's chat template; or one line after the other, until the input ends",
    )
    option("--system", metavar="TEXT", help="with --chat: the system message that stands first, such as a trained one")
    option("--tokens", type=int, default=100, metavar="N", help="the largest number of tokens to generate")
    option(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="0 takes the likeliest token; 1 draws by the model's probabilities",
    )
    option(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the fewest likeliest tokens whose probabilities sum to P",
    )
    option("--seed", type=int, default=0, metavar="N", help="seed of the draws")
    add_quantize(parser)
    add_backend(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the text, token by token."""
    import numpy as np

    from ..checks import check_integer
    from ..files.adapters import load_adapter
    from ..language.chat import Dialogue
    from ..language.chattemplate import load_template
    from ..language.finetune import load_model, model_path, warn_beyond_context, with_adapters
    from ..language.generation import check_settings, generate
    from ..language.tokens import added_text, load_tokenizer

    rng = np.random.default_rng(check_integer("seed", options.seed, at_least=0))
    check_settings(options.tokens, options.temperature, options.top_p)
    if options.prompt is None and not options.chat:
        raise ValueError("there is no prompt: give one, or take --chat, which answers each line of the input")
    if options.prompt == "":
        raise ValueError("the prompt is empty: give at least one word")
    if options.system is not None and not options.chat:
        raise ValueError("--system is a message of a chat: it goes with --chat")
    backend, source = chosen_backend(options.backend), model_path(options.model)
    adapters = load_adapter(options.adapter, dtype="float32", backend=backend) if options.adapter else {}
    tokenizer = load_tokenizer(source)
    dialogue = Dialogue(load_template(source), tokenizer, options.system) if options.chat else None
    # A prompt that cannot be read is refused before the model is; one that is typed later, when it is.
    first = None if options.prompt is None else _prompt(options.prompt, dialogue, tokenizer)
    model = load_model(options.model, "float32", backend, options.quantize)
    if adapters:
        model = with_adapters(model, adapters, options.adapter, backend, options.quantize)
    prompts = (_prompt(line, dialogue, tokenizer) for line in _lines()) if first is None else iter([first])
    for prompt in prompts:
        warn_beyond_context(model, len(prompt.ids) + options.tokens, "prompt and text may have")
        ids = generate(
            model, prompt.ids, options.tokens, temperature=options.temperature, top_p=options.top_p, rng=rng,
            end=prompt.end,
        )  # fmt: skip
        print(_shown(prompt.text), end="", flush=True)
        answer = ""
        for text in added_text(ids, prompt.text_ids, tokenizer.decode):
            print(_shown(text), end="", flush=True)
            answer += text
        print(flush=True)
        if dialogue is not None:
            dialogue.answered(answer)
    return 0


def _prompt(text: str, dialogue: Dialogue | None, tokenizer: Tokenizer) -> Prompt:
    """Return a text to continue, or a message to answer."""
    from ..language.chat import read_prompt

    text.encode()  # an error where the system could not decode it
    return read_prompt(text, tokenizer) if dialogue is None else dialogue.ask(text)


def _lines() -> Iterator[str]:
    """Yield the lines that are typed, or stand in stdin, but for blank ones."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _shown(text: str) -> str:
    """Return a text whose control characters, but for line breaks, cannot steer the terminal."""
    return "\n".join(printable(line, len(line)) for line in text.split("\n"))
