"""``minilora generate``: text from a language model, with an adapter or without."""

from __future__ import annotations

import argparse
from typing import Any

from ..files.errors import printable
from .options import Defaults, add_backend, add_model, add_quantize, backend, load_model, model_path, path


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="let a language model go on from a text",
        description="Print the prompt and what the model says next, as it is chosen, until N tokens or the text's end.",
        epilog="example: minilora generate 'The capital of France is' --model SmolLM2-135M",
        formatter_class=Defaults,
    )
    option = parser.add_argument
    option("prompt", metavar="PROMPT", help="the text to go on from")
    add_model(parser)
    option("--adapter", type=path, metavar="DIR", help="an adapter of this model, in PEFT's layout")
    option("--tokens", type=int, default=100, metavar="N", help="the most to say")
    option("--temperature", type=float, default=0.7, metavar="T", help="0 takes the likeliest token, 1 draws from all")
    option("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    add_quantize(parser)
    add_backend(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the text, token by token."""
    import numpy as np

    from ..adaptation import attach
    from ..checks import check_integer, check_number
    from ..files.adapters import load_adapter
    from ..files.tokenizer import load_tokenizer
    from ..models.generate import generate
    from ..text import token_ids

    check_integer("tokens", options.tokens, at_least=1)
    check_number("temperature", options.temperature, above=0, or_equal=True)
    rng = np.random.default_rng(check_integer("seed", options.seed, at_least=0))
    if not options.prompt:
        raise ValueError("the prompt is empty: give at least one word")
    where, source = backend(options), model_path(options)
    adapters = load_adapter(options.adapter, dtype="float32", backend=where) if options.adapter else {}
    tokenizer, model = load_tokenizer(source), load_model(options, "float32", where)
    if adapters:
        model = attach(model, adapters)
    ids = token_ids(options.prompt, tokenizer.encode, model.lm_head.out_features)
    stream = generate(
        model, [*tokenizer.begin, *ids], options.tokens, temperature=options.temperature, rng=rng, end=tokenizer.end
    )
    print(_shown(options.prompt), end="", flush=True)
    said, done = list(ids), len(tokenizer.decode(ids))
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
