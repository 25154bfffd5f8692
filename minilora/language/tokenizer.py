"""From text to token ids and back, as a model's own files say.

=========================  ==========================================================================
the model                  its tokenizer
=========================  ==========================================================================
a Hugging Face folder      ``tokenizer.json`` in it, read by the package ``tokenizers``
a ``.gguf`` file           the byte-level BPE in its metadata, rebuilt with ``tokenizers``
glassllm's ``.npz`` file   the ``.tokenizer.json`` beside it, in a format of its own, by ``glassllm``
=========================  ==========================================================================
"""

from __future__ import annotations

import contextlib
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import FileRefused, check_path, needed, short
from ..files.inputs import open_regular, read_json, read_whole
from .gguf import gguf_tokenizer
from .tokenizerconfig import TOKENIZER, WORDS, complete, read_beside, token_text

AT_ONCE = (1 << 21) + (1 << 10)
"""Letters that are encoded in one call, which takes half a kilobyte of memory for each."""
END_OF_GLASSLLM = 3
"""Its id of <eos>."""
PROBES = 300
"""Tokens to try as a text, where a tokenizer has none for a letter, and letters of each."""
QWEN2_WORDS = rf"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|{WORDS}"
"""The same as `QWEN2`, as llama.cpp has it: where case is ignored, a long s is an s too."""
TEXT, NO_TEXT, USERS = 1, (2, 3), 4
"""GGUF's types of tokens: a text, what is no text, which is an unknown one and control ones, and what users defined.

The latter two are found whole in a text, before it is split into words.
"""


ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|end_of_text|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~["),
        "<\N{FULLWIDTH VERTICAL LINE}end\N{LOWER ONE EIGHTH BLOCK}of\N{LOWER ONE EIGHTH BLOCK}sentence"
        "\N{FULLWIDTH VERTICAL LINE}>",
    )
)
"""Names by which llama.cpp knows tokens that end a text, whatever their type is: its src/llama-vocab.cpp has them."""
SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
"""Those that it always writes, as texts of a user."""
BETWEEN_FILES = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
"""Those by which it knows the ones between files of a program, where no key names them: they end a text too."""


GGUF_SPLITS = ("smollm", "gpt-2", "qwen2")
"""How a .gguf file's tokenizer may split a text into words: its ``tokenizer.ggml.pre``."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, whichever package it comes from.

    A text for which it has no tokens is a `FileRefused`.
    """

    encode: Callable[[str], list[int]]  # the ids of a text, with nothing before or after it
    decode: Callable[[Sequence[int]], str]  # the text, without the tokens that stand for no text
    begin: tuple[int, ...]  # the ids that a text begins with, for models that were trained so
    end: frozenset[int]  # the ids that end a text
    last: tuple[int, ...]  # the one that a text to train on ends with, or none
    tokens: Callable[[str], tuple[list[int], list[tuple[int, int]]]]  # ids, and where each one's letters begin and end
    spell: Callable[[Sequence[int]], str]  # as `decode`, with the tokens that stand for no text, by their names


def load_tokenizer(model: str | Path) -> Tokenizer:
    """Read the tokenizer of a model.

    Parameters
    ----------
    model : path
        A Hugging Face folder, a .gguf file, or glassllm's .npz file.

    Returns
    -------
    Tokenizer
        Ready to use.

    Raises
    ------
    FileRefused
        If there is none, or one that cannot be read.
    ValueError
        If the package that reads it is not installed.
    """
    path = check_path("model", model)
    if path.is_dir():
        return _from_folder(path)
    open_regular(path).close()
    if path.suffix not in (".gguf", ".npz"):
        raise FileRefused(path, "expected a folder with config.json, a .gguf file or a .npz file")
    return _from_gguf(path) if path.suffix == ".gguf" else _from_glassllm(path)


def _from_folder(folder: Path) -> Tokenizer:
    tokenizers = needed("tokenizers", "tokenizer.json")
    path = folder / TOKENIZER
    text = read_whole(path)
    try:
        with _panics_are_errors():
            tokenizer = tokenizers.Tokenizer.from_buffer(text)
        tokenizer.no_truncation()  # transformers resets both with each call
        tokenizer.no_padding()
    except Exception as error:  # the package raises nothing more precise
        raise FileRefused(path, f"not a tokenizer: {error}") from error
    with _panics_are_errors():
        complete(folder, tokenizer, tokenizers.AddedToken)
    last = tokenizer.token_to_id(token_text(read_beside(folder).get("eos_token")) or "")
    for name in ("generation_config.json", "config.json"):  # the first that is there names the end, or none
        if (folder / name).exists():
            end = read_json(folder / name).get("eos_token_id")
            return _of(path, tokenizer, [] if end is None else _end(folder / name, end), last)
    return _of(path, tokenizer, [], last)


def _end(path: Path, end: Any) -> list[int]:
    """Return the ids that end a text; refuse what is no id: it would end none, or, as true, another one."""
    ids = end if isinstance(end, list) else [end]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise FileRefused(path, f"eos_token_id is {short(end)}, expected a token's id or a list of them")
    return ids


def _of(path: Path, tokenizer: Any, end: Sequence[int], last: int | None = None) -> Tokenizer:
    """Return a tokenizer of the package `tokenizers` as ours; a text to train on ends with `last`, or the first end."""
    closing = end[:1] if last is None else [last]

    def encoded(text: str) -> Any:
        if len(text) > AT_ONCE:
            raise FileRefused(path, f"to encode {len(text):,} letters at once, expected at most {AT_ONCE:,}: cut them")
        try:
            with _panics_are_errors():
                return tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # such as an unknown letter, where the file names no token for those
            raise FileRefused(path, f"the tokenizer cannot encode {short(text)}: {error}") from error

    return Tokenizer(
        encode=lambda text: list(encoded(text).ids),
        decode=lambda ids: str(tokenizer.decode(list(ids))),
        begin=tuple(_before_a_text(tokenizer)),
        end=frozenset(end),
        last=tuple(closing),
        tokens=lambda text: _with_places(encoded(text)),
        spell=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)),
    )


def _with_places(encoded: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of an encoded text, and where the letters of each begin and are over."""
    return list(encoded.ids), list(encoded.offsets)


@contextlib.contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Turn a panic of the package's Rust code into an error: it is a BaseException, as Ctrl-C is."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ValueError(str(error)) from error
        raise


def _before_a_text(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts before a text; some put others after it."""
    known = ((tokenizer.id_to_token(i) or "")[:PROBES] for i in range(PROBES))
    for probe in ("a", *known):  # one that it has a token for
        with contextlib.suppress(Exception), _panics_are_errors():
            encoded = tokenizer.encode(probe)
            of_the_text = [number is not None for number in encoded.sequence_ids]
            if True in of_the_text:
                return list(encoded.ids[: of_the_text.index(True)])
    return []


def _from_gguf(path: Path) -> Tokenizer:
    tokenizers, fields = needed("tokenizers", "its tokenizer"), gguf_tokenizer(path)
    known = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    kind = known.get("model"), known.get("pre")
    if kind[0] != "gpt2" or kind[1] not in GGUF_SPLITS:
        raise FileRefused(
            path,
            f"its tokenizer is {short(kind)}, expected a byte-level BPE ('gpt2') that splits text as 'smollm', "
            "'gpt-2' or 'qwen2' do: take the model's Hugging Face folder",
        )
    if missing := [name for name in ("tokens", "merges", "token_type") if name not in known]:
        raise FileRefused(path, f"its tokenizer has no {' and no '.join(missing)}")
    try:
        merges = [tuple(merge.split(" ")) for merge in dict.fromkeys(known["merges"])]  # the first of two counts
        kinds = dict(zip(known["tokens"], known["token_type"], strict=True))
        if len(kinds) < len(known["tokens"]):
            raise ValueError("a token stands twice")
        named, within = _named_ends(known)
        kinds |= dict.fromkeys((known["tokens"][i] for i in named), NO_TEXT[1])
        kinds |= dict.fromkeys(kinds.keys() & SHOWN, USERS) | within
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(known["tokens"])}, merges))
    except Exception as error:
        raise FileRefused(path, f"its tokenizer is damaged: {error}") from error
    tokenizer.pre_tokenizer = _splits_as(str(kind[1]), tokenizers)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for special, types in ((True, NO_TEXT), (False, (USERS,))):
        whole = [
            tokenizers.AddedToken(t, special=special, normalized=False) for t, kind in kinds.items() if kind in types
        ]
        tokenizer.add_special_tokens(whole) if special else tokenizer.add_tokens(whole)
    keys = ("eos_token_id", "eot_token_id", "eom_token_id", *BETWEEN_FILES)
    no_ends = {known["tokens"].index(name) for name in within}
    ends = [*_end(path, [known[name] for name in keys if name in known]), *named]
    ours = _of(path, tokenizer, [number for number in ends if number not in no_ends])
    begin = (_begin(path, known),) if known.get("add_bos_token") else ()
    texts = {i: t for i, (t, kind) in enumerate(kinds.items()) if kind == USERS}
    return replace(
        ours,
        begin=begin,
        decode=lambda ids: _decoded(ids, ours.decode, texts),
        spell=lambda ids: _decoded(ids, ours.spell, texts),
    )


def _named_ends(known: Mapping[str, Any]) -> tuple[list[int], dict[str, int]]:
    """Return the tokens that end a text by their names, and the types of those that only seem to.

    llama.cpp takes an end whole, whichever type it has.
    """
    ids = {token: number for number, token in enumerate(known["tokens"])}
    ends, within = ENDS & ids.keys(), {}
    if {"<|call|>", "<|calls|>"} & ends and {"<|return|>", "<|flush|>"} & ends and "<|end|>" in ends:
        within["<|end|>"] = USERS  # it ends a part of a turn
    if {"<|tool_response>", "</s>"} <= ends:
        within["</s>"] = TEXT
    ends -= within.keys()
    for key, names in BETWEEN_FILES.items():
        ends |= {name for name in names if key not in known and name in ids}
    return sorted(ids[name] for name in ends), within


def _splits_as(pre: str, tokenizers: Any) -> Any:
    """Return what splits a text into words, within which tokens are merged."""
    made = tokenizers.pre_tokenizers
    words = made.ByteLevel(add_prefix_space=False)  # as GPT-2 does
    if pre == "smollm":
        return made.Sequence([made.Digits(individual_digits=True), words])
    if pre == "qwen2":
        letters = made.ByteLevel(add_prefix_space=False, use_regex=False)
        return made.Sequence([made.Split(tokenizers.Regex(QWEN2_WORDS), "isolated"), letters])
    return words


def _begin(path: Path, known: Mapping[str, Any]) -> int:
    """Return the token that texts begin with."""
    begin = known.get("bos_token_id")
    if type(begin) is not int or not 0 <= begin < len(known["tokens"]):
        raise FileRefused(path, f"add_bos_token is True and bos_token_id is {short(begin)}, expected a token's id")
    return begin


def _decoded(ids: Sequence[int], decode: Callable[[Sequence[int]], str], texts: Mapping[int, str]) -> str:
    """Return the text of ids, some of which stand for a text as it is: `ByteLevel` would take its letters for bytes."""
    parts = [(own, [*run]) for own, run in itertools.groupby(map(int, ids), texts.get)]
    return "".join(decode(run) if own is None else own * len(run) for own, run in parts)


def _composed(text: str) -> list[tuple[int, int]]:
    """Return for each letter of a text's composed form (NFC) where what it is composed of begins and is over."""
    if unicodedata.is_normalized("NFC", text):
        return [(place, place + 1) for place in range(len(text))]
    parts: list[str] = []
    for letter in text:
        if parts and _joins(parts[-1], letter):
            parts[-1] += letter
        else:
            parts.append(letter)
    spans: list[tuple[int, int]] = []
    for part, stop in zip(parts, itertools.accumulate(map(len, parts)), strict=True):
        spans += [(stop - len(part), stop)] * len(unicodedata.normalize("NFC", part))
    return spans


def _joins(before: str, letter: str) -> bool:
    """Return whether a letter may become one with those before it: an accent, or a letter that is composed of them."""
    normal = unicodedata.normalize
    if unicodedata.combining(normal("NFD", letter)[0]):
        return True
    return normal("NFC", before + letter) != normal("NFC", before) + normal("NFC", letter)


def _from_glassllm(path: Path) -> Tokenizer:
    glassllm, file = needed("glassllm", "an .npz file"), path.with_suffix(".tokenizer.json")
    read_json(file)  # which checks more than the package does
    try:
        tokenizer = glassllm.Tokenizer.load(file)
    except Exception as error:
        raise FileRefused(file, f"not glassllm's tokenizer: {error}") from error

    def tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the places in the text, of which the package encodes the composed form (NFC)."""
        ids = tokenizer.encode(text)
        widths = [1 if i == tokenizer.unk_id else len(tokenizer.vocab[i]) for i in ids]
        stops, letters = itertools.accumulate(widths), _composed(text)
        return ids, [(letters[s - w][0], letters[s - 1][1]) for s, w in zip(stops, widths, strict=True)]

    return Tokenizer(
        encode=tokenizer.encode,
        decode=lambda ids: str(tokenizer.decode(list(ids))),
        begin=(),
        end=frozenset({END_OF_GLASSLLM}),
        last=(END_OF_GLASSLLM,),
        tokens=tokens,
        spell=lambda ids: "".join(tokenizer.tokens(list(ids))).replace(glassllm.tokenizer.SPACE, " "),
    )
