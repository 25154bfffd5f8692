"""``minilora generate``: text from a language model, with an adapter or without."""

from __future__ import annotations

import argparse
from typing import Any

from ..guards.errors import printable
from .options import (
    Defaults,
    add_backend,
    add_model,
    add_quantize,
    backend,
    load_model,
    model_path,
    path,
    warn_beyond_context,
)


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="continue a text with a language model",
        description=(
            "Print the prompt and its continuation, token by token, until N tokens or the text's end. With --chat "
            "PROMPT is a user's message: the model's chat template formats it, and only the answer is printed."
        ),
        epilog="example: minilora generate 'The capital of France is' --model SmolLM2-135M",
        formatter_class=Defaults,
    )
    option = parser.add_argument
    option("prompt", metavar="PROMPT", help="the text to continue, or the message to answer")
    add_model(parser)
    option("--adapter", type=path, metavar="DIR", help="an adapter of this model, in PEFT's layout")
    option("--chat", action="store_true", help="answer PROMPT, by the model's chat template")
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

    from ..adaptation import attach
    from ..checks import check_integer, check_number
    from ..files.adapters import load_adapter
    from ..language.chat import encode_question
    from ..language.chattemplate import load_template
    from ..language.generation import check_top_p, generate
    from ..language.text import check_vocabulary, token_ids
    from ..language.tokenizer import load_tokenizer

    check_integer("tokens", options.tokens, at_least=1)
    check_number("temperature", options.temperature, above=0, or_equal=True)
    check_top_p(options.top_p)
    rng = np.random.default_rng(check_integer("seed", options.seed, at_least=0))
    if not options.prompt:
        raise ValueError("the prompt is empty: give at least one word")
    where, source = backend(options), model_path(options)
    adapters = load_adapter(options.adapter, dtype="float32", backend=where) if options.adapter else {}
    tokenizer = load_tokenizer(source)
    if options.chat:
        with load_template(source) as template:
            asked, end = encode_question(options.prompt, template, tokenizer)
        shown, said = "", []  # the answer is printed alone
    else:
        shown, said, end = options.prompt, token_ids(options.prompt, tokenizer.encode), tokenizer.end
        asked = [*tokenizer.begin, *said]
    model = load_model(options, "float32", where)
    if adapters:
        model = attach(model, adapters)
    check_vocabulary(max(asked, default=0), model.lm_head.out_features)
    warn_beyond_context(model, len(asked) + options.tokens, "prompt and text may have")
    stream = generate(
        model, asked, options.tokens, temperature=options.temperature, top_p=options.top_p, rng=rng, end=end
    )
    print(_shown(shown), end="", flush=True)
    done = len(tokenizer.decode(said))
    for token in stream:
        said.append(token)
        text = tokenizer.decode(said)
        if not text.endswith("\ufffd"):  # the bytes of a letter may come in several tokens
            print(_shown(text[done:]), end="", flush=True)
            done = len(text)
    print()
    return 0


def _shown(text: str) -> str:
    """Return a text whose control characters, but for line breaks, cannot steer the terminal."""
    return "\n".join(printable(line, len(line)) for line in text.split("\n"))
