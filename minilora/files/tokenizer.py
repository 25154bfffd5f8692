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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_path
from .errors import FileRefused, needed, short
from .llamafolder import MAX_MODEL_CONFIG
from .llamagguf import read_gguf
from .tensorfile import open_regular, read_json, read_whole

MAX_TOKENIZER = 1 << 26
"""Bytes of tokenizer.json that we agree to parse."""
END_OF_GLASSLLM = 3
"""Its id of <eos>."""
CONTROL = 3
"""GGUF's type of a token that stands for no text, such as the end of a turn."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, whichever package it comes from.

    A text for which it has no tokens is a `FileRefused`.
    """

    encode: Callable[[str], list[int]]  # the ids of a text, with nothing before or after it
    decode: Callable[[Sequence[int]], str]  # the text, without the tokens that stand for no text
    begin: tuple[int, ...]  # the ids that a text begins with, for models that were trained so
    end: frozenset[int]  # the ids that end a text


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
    path = folder / "tokenizer.json"
    text = read_whole(path, MAX_TOKENIZER)
    try:
        found = tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the package raises nothing more precise
        raise FileRefused(path, f"not a tokenizer: {error}") from error
    for name in ("generation_config.json", "config.json"):  # the first that names an end
        if (folder / name).exists():
            end = read_json(folder / name, MAX_MODEL_CONFIG).get("eos_token_id")
            if end is not None:
                return _of(path, found, _end(folder / name, end))
    return _of(path, found, [])


def _end(path: Path, end: Any) -> list[int]:
    """Return the ids that end a text; refuse what is no id: it would end none, or, as true, another one."""
    ids = end if isinstance(end, list) else [end]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise FileRefused(path, f"eos_token_id is {short(end)}, expected a token's id or a list of them")
    return ids


def _of(path: Path, found: Any, end: Sequence[int]) -> Tokenizer:
    """Return a tokenizer of the package `tokenizers` as ours."""

    def ids(text: str, special: bool) -> list[int]:
        try:
            return list(found.encode(text, add_special_tokens=special).ids)
        except Exception as error:  # such as an unknown letter, where the file names no token for those
            raise FileRefused(path, f"the tokenizer cannot encode {short(text)}: {error}") from error

    return Tokenizer(
        encode=lambda text: ids(text, False),
        decode=lambda ids: str(found.decode(list(ids))),
        begin=tuple(ids("", True)),
        end=frozenset(end),
    )


def _from_gguf(path: Path) -> Tokenizer:
    tokenizers, (_, fields) = needed("tokenizers", "its tokenizer"), read_gguf(path, tokenizer=True)
    known = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    kind = known.get("model"), known.get("pre")
    if kind not in (("gpt2", "smollm"), ("gpt2", "gpt-2")):
        raise FileRefused(
            path,
            f"its tokenizer is {short(kind)}, expected a byte-level BPE ('gpt2') that splits text as 'smollm' or "
            "'gpt-2' do: take the model's Hugging Face folder",
        )
    if missing := [name for name in ("tokens", "merges", "token_type") if name not in known]:
        raise FileRefused(path, f"its tokenizer has no {' and no '.join(missing)}")
    try:
        merges = [tuple(merge.split(" ")) for merge in known["merges"]]
        control = [t for t, kind in zip(known["tokens"], known["token_type"], strict=True) if kind == CONTROL]
        found = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(known["tokens"])}, merges))
    except Exception as error:
        raise FileRefused(path, f"its tokenizer is damaged: {error}") from error
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, words]) if kind[1] == "smollm" else words
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
    return _of(path, found, _end(path, known.get("eos_token_id", [])))


def _from_glassllm(path: Path) -> Tokenizer:
    glassllm, beside = needed("glassllm", "an .npz file"), path.with_suffix(".tokenizer.json")
    read_json(beside, MAX_TOKENIZER)  # which checks more than the package does
    try:
        found = glassllm.Tokenizer.load(beside)
    except Exception as error:
        raise FileRefused(beside, f"not glassllm's tokenizer: {error}") from error
    return Tokenizer(found.encode, lambda ids: str(found.decode(list(ids))), (), frozenset({END_OF_GLASSLLM}))
