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
from importlib import import_module
from pathlib import Path
from typing import Any

from ..checks import check_path
from .errors import AdapterFileError, short
from .tensorfile import open_regular, read_json, read_text

MAX_TOKENIZER, MAX_CONFIG = 1 << 28, 1 << 24
"""Bytes of tokenizer.json and of a configuration that we agree to parse."""
END_OF_GLASSLLM = 3
"""Its id of <eos>."""
CONTROL = 3
"""GGUF's type of a token that stands for no text, such as the end of a turn."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, whichever package it comes from.

    Attributes
    ----------
    encode : callable
        ``encode(text) -> list of int``. Nothing is put before or after the text.
    decode : callable
        ``decode(ids) -> str``, without the tokens that stand for no text.
    begin : tuple of int
        The ids that a text begins with, for models that were trained so.
    end : frozenset of int
        The ids that end a text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    begin: tuple[int, ...]
    end: frozenset[int]


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
    AdapterFileError
        If there is none, or one that cannot be read.
    ValueError
        If the package that reads it is not installed.
    """
    path = check_path("model", model)
    if path.is_dir():
        return _from_folder(path)
    open_regular(path).close()
    if path.suffix not in (".gguf", ".npz"):
        raise AdapterFileError(path, "expected a folder with config.json, a .gguf file or a .npz file")
    return _from_gguf(path) if path.suffix == ".gguf" else _from_glassllm(path)


def needed(package: str, why: str) -> Any:
    """Import a package that only some models need, or say how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"{why} needs {package} ({error}): pip install 'minilora[models]'") from error


def _from_folder(folder: Path) -> Tokenizer:
    tokenizers = needed("tokenizers", "tokenizer.json")
    path = folder / "tokenizer.json"
    text = read_text(path, MAX_TOKENIZER)
    try:
        found = tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the package raises nothing more precise
        raise AdapterFileError(path, f"not a tokenizer: {error}") from error
    for name in ("generation_config.json", "config.json"):  # the first that names an end
        if (folder / name).exists():
            end = read_json(folder / name, MAX_CONFIG).get("eos_token_id")
            if end is not None:
                return _of(found, end if isinstance(end, list) else [end])
    return _of(found, [])


def _of(found: Any, end: Sequence[int]) -> Tokenizer:
    """Return a tokenizer of the package `tokenizers` as ours."""
    return Tokenizer(
        encode=lambda text: list(found.encode(text, add_special_tokens=False).ids),
        decode=lambda ids: str(found.decode(list(ids))),
        begin=tuple(found.encode("").ids),
        end=frozenset(end),
    )


def _from_gguf(path: Path) -> Tokenizer:
    gguf, tokenizers = needed("gguf", "a .gguf file"), needed("tokenizers", "its tokenizer")
    try:
        reader = gguf.GGUFReader(path)
        known = {
            name: field.contents()
            for name in ("model", "pre", "tokens", "merges", "token_type", "eos_token_id")
            if (field := reader.get_field(f"tokenizer.ggml.{name}")) is not None
        }
    except Exception as error:  # the package checks little, so that a damaged file can fail anywhere
        raise AdapterFileError(path, f"not a GGUF file: {error}") from error
    kind = known.get("model"), known.get("pre")
    if kind not in (("gpt2", "smollm"), ("gpt2", "gpt-2")):
        raise AdapterFileError(
            path,
            f"its tokenizer is {short(kind)}, expected a byte-level BPE ('gpt2') that splits text as 'smollm' or "
            "'gpt-2' do: take the model's Hugging Face folder",
        )
    if missing := [name for name in ("tokens", "merges", "token_type") if name not in known]:
        raise AdapterFileError(path, f"its tokenizer has no {' and no '.join(missing)}")
    merges = [tuple(merge.split(" ")) for merge in known["merges"]]
    try:
        found = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(known["tokens"])}, merges))
    except Exception as error:
        raise AdapterFileError(path, f"its tokenizer is damaged: {error}") from error
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, words]) if kind[1] == "smollm" else words
    found.decoder = tokenizers.decoders.ByteLevel()
    control = [t for t, kind in zip(known["tokens"], known["token_type"], strict=True) if kind == CONTROL]
    found.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
    return _of(found, [int(known["eos_token_id"])] if "eos_token_id" in known else [])


def _from_glassllm(path: Path) -> Tokenizer:
    glassllm = needed("glassllm", "an .npz file")
    try:
        found = glassllm.Tokenizer.load(path.with_suffix(".tokenizer.json"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(path.with_suffix(".tokenizer.json"), f"not glassllm's tokenizer: {error}") from error
    return Tokenizer(found.encode, lambda ids: str(found.decode(list(ids))), (), frozenset({END_OF_GLASSLLM}))
