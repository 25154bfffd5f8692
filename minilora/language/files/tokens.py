"""Tokenizers, read from a model's own files.

=========================  ==========================================================================
the model                  its tokenizer
=========================  ==========================================================================
a Hugging Face folder      ``tokenizer.json`` in it, read by the package ``tokenizers``
a ``.gguf`` file           the byte-level BPE in its metadata, rebuilt with ``tokenizers``
glassllm's ``.npz`` file   the ``.tokenizer.json`` next to it, in its own format, read by ``glassllm``
=========================  ==========================================================================
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ...checks import check_path
from ...extras import needed
from ...files.disk import RegularFile, model_format, parse_json, read_json, read_whole
from ...files.tensors import MODEL_CONFIG
from ...texts import FileRefused, named, reading, short
from .gguf import gguf_tokenizer

TOKENIZER_FILE = "tokenizer.json"
MAX_GROWTH = 64
"""How many times as long a tokenizer may make a text; most replace single characters."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer from any of the packages. Encoding a text that it cannot represent raises `FileRefused`."""

    encode: Callable[[str], list[int]]  # the ids of a text, without begin or end tokens
    decode: Callable[[Sequence[int]], str]  # the text, without control tokens
    begin: tuple[int, ...]  # the ids that each text begins with, if the model was trained with them
    end: frozenset[int]  # the ids that end a text
    last: tuple[int, ...]  # the id that ends a training text, or None
    tokens: Callable[[str], tuple[list[int], list[tuple[int, int]]]]  # the ids, with the span of each in the text
    spell: Callable[[Sequence[int]], str]  # like `decode`, with control tokens by name


def load_tokenizer(model: str | Path) -> Tokenizer:
    """Load the tokenizer of a model from a Hugging Face folder, a .gguf file, or glassllm's .npz file.

    A tokenizer that is missing or unreadable is a FileRefused, a missing package a ValueError.
    """
    path = check_path("model", model)
    return {"folder": _from_folder, ".gguf": _from_gguf, ".npz": _from_glassllm}[model_format(path)](path)


def added_text(ids: Iterable[int], before: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Yield the text that each id adds; a character appears when all of its bytes are there."""
    all_ids = list(before)
    done = len(decode(all_ids))
    for token in ids:
        all_ids.append(token)
        text = decode(all_ids)
        if not text.endswith("\ufffd"):
            yield text[done:]
            done = len(text)


# --- a folder -------------------------------------------------------------------------------------------------------
#
# transformers treats any token that tokenizer_config.json names as special, even if tokenizer.json does not. So do we.
# Since version 5, some of its classes use only the vocabulary of tokenizer.json, and split text in their own way. The
# file describes how the model was trained, and other programs follow it, so we follow the file.

TOKENIZER_SETTINGS, OLD_SETTINGS, OLD_ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NO_TOKEN = (1 << 32) - 1
"""An id that no tokenizer has: the largest that the package can represent."""
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END = "<|endoftext|>"
TOKENS_OF_CLASS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": {"bos_token": END, "eos_token": END, "unk_token": END},
    "Qwen2Tokenizer": {"eos_token": END, "unk_token": END, "pad_token": END},
    "LlamaTokenizer": LLAMA,
    "CodeLlamaTokenizer": LLAMA,
}
"""The default special tokens of transformers' classes for the supported models."""


Id = Annotated[int, msgspec.Meta(ge=0)]


class Ends(msgspec.Struct):
    """The end-of-text ids in config.json or generation_config.json."""

    eos_token_id: Id | list[Id] | None = None


def _from_folder(folder: Path) -> Tokenizer:
    tokenizers, path, settings = needed("tokenizers", TOKENIZER_FILE), folder / TOKENIZER_FILE, read_settings(folder)
    with _errors_of(path):
        content = read_whole(path)
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        _check_growth(path, parse_json(path, content, Rewriting))
        tokenizer.no_truncation()  # transformers resets both at each call
        tokenizer.no_padding()
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise FileRefused(path, f"dropout is {dropout:g}, supported: null (else a text gets different ids each time)")
    if settings.get("split_special_tokens"):
        raise FileRefused(
            folder / TOKENIZER_SETTINGS,
            "split_special_tokens is True, supported: False (else special tokens are split up)",
        )
    _check_added(folder, settings, tokenizer)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for _, token in special_tokens(folder, settings):
        text, said = token_text(token), token if isinstance(token, dict) else {}
        if text and text not in known:
            flags = {n: said[n] for n in ("lstrip", "rstrip", "single_word", "normalized") if type(said.get(n)) is bool}
            tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, **flags)])
    last = tokenizer.token_to_id(token_text(settings.get("eos_token")) or "")
    for name in ("generation_config.json", MODEL_CONFIG):  # the first file that exists decides
        if (folder / name).exists():
            end = read_json(folder / name, Ends).eos_token_id
            return _of(path, tokenizer, [end] if isinstance(end, int) else end or [], last)
    return _of(path, tokenizer, [], last)


class Rewriting(msgspec.Struct):
    """The parts of tokenizer.json that may change a text."""

    normalizer: Any = None
    decoder: Any = None


def _check_growth(path: Path, parts: Rewriting) -> None:
    """Require parts that make a text at most `MAX_GROWTH` times as long, since the package limits no memory."""

    def growth(step: Any) -> int:
        if not isinstance(step, dict):
            return 1
        own = len(str(step.get("content", ""))) if step.get("type") == "Replace" else 1
        return max(1, own) * math.prod(map(growth, step.get("normalizers") or step.get("decoders") or ()))

    for name in ("normalizer", "decoder"):
        if (times := growth(getattr(parts, name))) > MAX_GROWTH:
            raise FileRefused(path, f"its {name} can make a text {times:,} times longer, supported: {MAX_GROWTH} times")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, with the special tokens of older files and of the tokenizer's class."""
    settings = read_json(folder / TOKENIZER_SETTINGS) if (folder / TOKENIZER_SETTINGS).exists() else {}
    if "added_tokens_decoder" not in settings and (folder / OLD_SETTINGS).exists():
        settings |= read_json(folder / OLD_SETTINGS)
    return TOKENS_OF_CLASS.get(_class_of(folder, settings), {}) | settings


def _class_of(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return the class that transformers loads, or "" for one that follows tokenizer.json."""
    model = read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).exists() else {}
    kind = str(model.get("model_type"))
    name = str(settings.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "qwen2" or (kind.startswith(("qwen2_", "qwen3")) and not name):
        return "Qwen2Tokenizer"
    if kind in ("mistral", "mixtral"):
        return ""
    if (
        name == "LlamaTokenizer"
        and (folder / TOKENIZER_FILE).exists()
        and b'"ByteLevel"' in read_whole(folder / TOKENIZER_FILE)
    ):
        return ""
    return name


def special_tokens(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each special token in the settings; a value is a string, or an object with one."""
    for name in (*SPECIAL_TOKENS, *(n for n in settings if n.endswith("_token") and n not in SPECIAL_TOKENS)):
        if token_text(settings.get(name)) is not None:
            yield name, settings[name]
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    for name, token in more.items() if isinstance(more, dict) else (("", token) for token in more):
        if token_text(token) is None:
            raise FileRefused(folder / TOKENIZER_SETTINGS, f"a special token is {short(token)}, expected a string")
        yield name, token


def token_text(token: Any) -> str | None:
    """Return the text of a token in tokenizer_config.json, which is a string or an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _check_added(folder: Path, settings: Mapping[str, Any], tokenizer: Any) -> None:
    """Require that tokenizer.json has the tokens that the other files add, since transformers adds them."""
    path, tokens = folder / TOKENIZER_SETTINGS, settings.get("added_tokens_decoder") or {}
    with reading(path):
        pairs = [(number, token.get("content")) for number, token in tokens.items()]
    if "added_tokens_decoder" not in settings and (folder / OLD_ADDED).exists():
        path = folder / OLD_ADDED
        pairs = [(str(number), text) for text, number in read_json(path).items()]
    added = {str(number): token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    for number, text in pairs:
        if added.get(number) != text or text is None:
            raise FileRefused(path, f"it adds {short(text)} as token {short(number)}, but tokenizer.json does not")


def _of(path: Path, tokenizer: Any, end: Sequence[int], last: int | None = None) -> Tokenizer:
    """Wrap a tokenizer of the package `tokenizers`; a training text ends with `last`, or else the first end id."""
    closing = end[:1] if last is None else [last]
    with _errors_of(path):
        begin = tuple(_before_a_text(tokenizer))

    def tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        with _errors_of(path):  # such as an unknown character, if there is no unknown token
            encoded = tokenizer.encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    return Tokenizer(
        encode=lambda text: tokens(text)[0],
        decode=lambda ids: str(tokenizer.decode(list(ids))),
        begin=begin,
        end=frozenset(end),
        last=tuple(closing),
        tokens=tokens,
        spell=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)),
    )


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn errors of the package `tokenizers` into `FileRefused`, including panics, which are BaseExceptions."""
    try:
        with reading(path), _silenced():
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise FileRefused(path, str(error)) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard what the body writes to the process's stderr: a panic prints its own lines before it is raised."""
    if sys.stderr is None:  # the process has none, and another file may have its number
        yield
        return
    shown = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def _before_a_text(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts before a text; some also put ids after it."""
    blank = tokenizer.encode("", add_special_tokens=False)
    blank.pad(len(blank.ids) + 1, direction="left", pad_id=NO_TOKEN)  # the position of the text
    around: list[int] = tokenizer.post_process(blank).ids
    return around[: around.index(NO_TOKEN)]


# --- a .gguf file ----------------------------------------------------------------------------------------------------

GGUF_SPLITS = ("smollm", "gpt-2", "qwen2")
"""The supported ways to split a text into words: ``tokenizer.ggml.pre`` of a .gguf file."""
QWEN2_WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""English endings, letters with the preceding character, digits, punctuation and spaces, as in llama.cpp."""
NORMAL, CONTROL, USER_DEFINED = 1, (2, 3), 4
"""GGUF's token types: normal, control (including unknown), and user-defined.

The latter two are matched whole in a text, before it is split into words.
"""
END_TOKENS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|end_of_text|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~["),
        "<\N{FULLWIDTH VERTICAL LINE}end\N{LOWER ONE EIGHTH BLOCK}of\N{LOWER ONE EIGHTH BLOCK}sentence"
        "\N{FULLWIDTH VERTICAL LINE}>",
    )
)
"""Names of tokens that llama.cpp treats as ends of text whatever their type, from its src/llama-vocab.cpp."""
PRINTED_CONTROL = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
"""Control tokens that llama.cpp prints as user-defined text."""
FILE_SEPARATORS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
"""Names of tokens that separate source files, for when the metadata lacks the key; they also end a text."""
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id", *FILE_SEPARATORS)


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer in a .gguf file's metadata."""

    rebuilt: Any  # a tokenizer of the package `tokenizers`
    begin: list[int]  # the ids that a text begins with
    end: list[int]  # the ids that end a text
    shown: dict[int, str]  # user-defined tokens, which are always printed


def read_gguf_tokenizer(path: Path) -> GGUFTokenizer:
    """Return the tokenizer of a .gguf file; any kind but a byte-level BPE is a FileRefused."""
    tokenizers, fields = needed("tokenizers", "its tokenizer"), gguf_tokenizer(path)
    known = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    kind = known.get("model"), known.get("pre")
    if kind not in {("gpt2", splits) for splits in GGUF_SPLITS}:
        raise FileRefused(
            path,
            f"its tokenizer is {short(kind)}, expected a byte-level BPE ('gpt2') that splits text as 'smollm', "
            "'gpt-2' or 'qwen2' do: use the model's Hugging Face folder",
        )
    with _errors_of(path):
        words: list[str] = known["tokens"]
        ids = {word: number for number, word in enumerate(words)}
        merges = [tuple(merge.split(" ")) for merge in dict.fromkeys(known["merges"])]  # the first rank counts
        types = dict(zip(words, known["token_type"], strict=True))
        if len(types) < len(words):
            raise ValueError("its tokenizer is damaged: a token occurs twice")
        with named("bos_token_id"):
            begin = msgspec.convert([known.get("bos_token_id")] if known.get("add_bos_token") else [], list[Id])
        with named("the ids that end a text"):
            ends = msgspec.convert([known[key] for key in END_KEYS if key in known], list[Id])
        by_name, corrected = _named_ends(ids, known)
        types |= dict.fromkeys((words[i] for i in by_name), CONTROL[1])
        types |= dict.fromkeys(types.keys() & PRINTED_CONTROL, USER_DEFINED) | corrected
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(str(kind[1]), tokenizers)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [word for word in words if types[word] in CONTROL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(word, special=True, normalized=False) for word in control])
    user_defined = [word for word in words if types[word] == USER_DEFINED]
    tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in user_defined])
    end = [i for i in [*ends, *by_name] if i not in {ids[word] for word in corrected}]
    return GGUFTokenizer(tokenizer, begin, end, {ids[word]: word for word in user_defined})


def _from_gguf(path: Path) -> Tokenizer:
    read = read_gguf_tokenizer(path)
    ours = _of(path, read.rebuilt, read.end)
    return replace(
        ours,
        begin=tuple(read.begin),
        decode=lambda ids: _decoded(ids, ours.decode, read.shown),
        spell=lambda ids: _decoded(ids, ours.spell, read.shown),
    )


def _named_ends(ids: Mapping[str, int], known: Mapping[str, Any]) -> tuple[list[int], dict[str, int]]:
    """Apply llama.cpp's rules on names: return the end tokens, and the types of tokens that only look like ends."""
    ends, corrected = END_TOKENS & ids.keys(), {}
    if {"<|call|>", "<|calls|>"} & ends and {"<|return|>", "<|flush|>"} & ends and "<|end|>" in ends:
        corrected["<|end|>"] = USER_DEFINED  # it ends only a part of a turn
    if {"<|tool_response>", "</s>"} <= ends:
        corrected["</s>"] = NORMAL
    ends -= corrected.keys()
    for key, names in FILE_SEPARATORS.items():
        ends |= {name for name in names if key not in known and name in ids}
    return sorted(ids[name] for name in ends), corrected


def _pre_tokenizer(pre: str, tokenizers: Any) -> Any:
    """Return the pre-tokenizer, which splits a text into words; BPE merges only within words."""
    made = tokenizers.pre_tokenizers
    words = made.ByteLevel(add_prefix_space=False)  # as in GPT-2
    if pre == "smollm":
        return made.Sequence([made.Digits(individual_digits=True), words])
    if pre == "qwen2":
        letters = made.ByteLevel(add_prefix_space=False, use_regex=False)
        return made.Sequence([made.Split(tokenizers.Regex(QWEN2_WORDS), "isolated"), letters])
    return words


def _decoded(ids: Sequence[int], decode: Callable[[Sequence[int]], str], texts: Mapping[int, str]) -> str:
    """Decode ids; those in `texts` stand for literal text, which `ByteLevel` would decode as bytes."""
    parts = [(own, [*run]) for own, run in itertools.groupby(map(int, ids), texts.get)]
    return "".join(decode(run) if own is None else own * len(run) for own, run in parts)


# --- glassllm's file -------------------------------------------------------------------------------------------------

END_OF_GLASSLLM = 3
"""glassllm's id of <eos>."""


def _composed(text: str) -> list[tuple[int, int]]:
    """Return, for each character of a text's composed form (NFC), its span in the text."""
    if unicodedata.is_normalized("NFC", text):
        return [(place, place + 1) for place in range(len(text))]
    tokenizers = needed("tokenizers", "a text with combining accents")
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    letters.normalizer = tokenizers.normalizers.NFC()
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    starts = [start for start, _ in letters.encode(text).offsets]
    return [(start, max(start + 1, stop)) for start, stop in itertools.pairwise([*starts, len(text)])]


def _from_glassllm(path: Path) -> Tokenizer:
    glassllm, file = needed("glassllm", "an .npz file"), path.with_suffix(".tokenizer.json")
    RegularFile(file).close()
    with reading(file):
        tokenizer = glassllm.Tokenizer.load(file)

    def tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens' spans in the original text; the package encodes its composed form (NFC)."""
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
