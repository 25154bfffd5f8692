"""What stands beside tokenizer.json: special tokens, and classes of transformers that build a tokenizer of their own.

transformers makes each token that tokenizer_config.json names a special one, also where tokenizer.json does not; so do
we. Some of its classes take the vocabulary of tokenizer.json alone, and split texts in their own way, from version 5
on. What the file says is what the model was trained with, and what other programs do, so that the file is followed, and
a warning says that transformers' ids may be others.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checks import FileRefused, printable, short
from ..files.inputs import read_json, read_whole
from ..files.tensors import MODEL_CONFIG

TOKENIZER = "tokenizer.json"
BESIDE, LEGACY, LEGACY_ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Of a Qwen2's text: letters with what stands before them, digits, marks, spaces. Its endings stand before these."""
QWEN2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORDS}"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}

MOST_GROWTH, MOST_AROUND = 16, 100
"""Letters that a tokenizer may make of one, and tokens that it may put around a text: in use are 2 of each."""


def _sequence(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _split(pattern: Mapping[str, str], behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END = "<|endoftext|>"
OWN: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
    "GPT2Tokenizer": (None, BYTES, {"bos_token": END, "eos_token": END, "unk_token": END}),
    "Qwen2Tokenizer": (
        {"type": "NFC"},
        _sequence(_split({"Regex": QWEN2}, "Isolated"), BYTES | {"use_regex": False}),
        {"eos_token": END, "unk_token": END, "pad_token": END},
    ),
    "LlamaTokenizer": (None, METASPACE, LLAMA_TOKENS),
    "CodeLlamaTokenizer": (None, METASPACE, LLAMA_TOKENS),
    "GemmaTokenizer": (
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        _split({"String": " "}, "MergedWithPrevious"),
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    ),
    "CohereTokenizer": (
        {"type": "NFC"},
        _sequence({"type": "Digits", "individual_digits": True}, BYTES),
        {
            **{"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"},
            **{"sep_token": "<SEP>", "pad_token": "<PAD>", "cls_token": "<CLS>", "mask_token": "<MASK_TOKEN>"},
        },
    ),
}
"""Of transformers' classes that split a text in their own way: the normalizer, the pre_tokenizer, and the tokens."""

ALSO_OWN = {
    *("CodeGenTokenizer", "GPTNeoXTokenizer", "GPTNeoXJapaneseTokenizer", "BlenderbotTokenizer", "CLIPTokenizer"),
    *("DebertaTokenizer", "RobertaTokenizer", "LukeTokenizer", "WhisperTokenizer", "HerbertTokenizer"),
    *("OpenAIGPTTokenizer", "Qwen3_5Tokenizer", "T5Tokenizer", "XLMRobertaTokenizer", "XGLMTokenizer"),
    *("BertTokenizer", "AlbertTokenizer", "MBartTokenizer", "NllbTokenizer", "PegasusTokenizer", "XLNetTokenizer"),
}
"""Others that do so, of which we do not hold the way against the file."""


def read_beside(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says, with the special tokens of files of before, and those of the class."""
    config = read_json(folder / BESIDE) if (folder / BESIDE).exists() else {}
    if "added_tokens_decoder" not in config and (folder / LEGACY).exists():
        config |= read_json(folder / LEGACY)
    return (OWN[name][2] if (name := class_of(folder, config)) in OWN else {}) | config


def class_of(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the class that transformers loads, "" for the one that does as tokenizer.json says."""
    model = read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).exists() else {}
    kind = str(model.get("model_type"))
    name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "qwen2" or (kind.startswith(("qwen2_", "qwen3")) and not name):
        return "Qwen2Tokenizer"
    if kind in ("mistral", "mixtral") or (name == "LlamaTokenizer" and _has_bytes(folder / TOKENIZER)):
        return ""
    return name


def _has_bytes(path: Path) -> bool:
    """Return whether a tokenizer splits letters into bytes: then transformers' class of Llama does as it says."""
    return path.exists() and b'"ByteLevel"' in read_whole(path)


def special_tokens(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name of each special token that a configuration has, and the token: a text, or an object with one."""
    for name in (*NAMED, *(n for n in config if n.endswith("_token") and n not in NAMED)):
        if token_text(config.get(name)) is not None:
            yield name, config[name]
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for name, token in more.items() if isinstance(more, dict) else (("", token) for token in more):
        if token_text(token) is None:
            raise FileRefused(path, f"a special token is {short(token)}, expected a text")
        yield name, token


def token_text(token: Any) -> str | None:
    """Return the text of a token as tokenizer_config.json writes one: a text, or an object that has it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def complete(folder: Path, tokenizer: Any, added_token: Any) -> None:
    """Give a tokenizer the special tokens beside it; refuse or warn of what transformers reads otherwise.

    Parameters
    ----------
    folder : Path
        The model's.
    tokenizer : tokenizers.Tokenizer
        What tokenizer.json says.
    added_token : type
        ``tokenizers.AddedToken``.
    """
    path, config = folder / BESIDE, read_beside(folder)
    _check_growth(folder / "tokenizer.json", tokenizer)
    _check_added(folder, config, tokenizer)
    if config.get("split_special_tokens"):
        raise FileRefused(path, "split_special_tokens is True, supported: False: special tokens would be letters")
    if getattr(tokenizer.model, "dropout", None):
        raise FileRefused(
            folder / "tokenizer.json",
            f"dropout is {tokenizer.model.dropout:g}, supported: null: a text has other ids each time",
        )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for _, token in special_tokens(path, config):
        text, flags = token_text(token), token if isinstance(token, dict) else {}
        if text and text not in known:
            names = ("lstrip", "rstrip", "single_word", "normalized")
            more = {name: flags[name] for name in names if isinstance(flags.get(name), bool)}
            tokenizer.add_special_tokens([added_token(text, special=True, **more)])
    _warn_of_a_class(path, class_of(folder, config), config, tokenizer)


def _check_growth(path: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that makes much of a short text: it would fill the memory before anything is counted."""
    for name in ("normalizer", "decoder"):
        growth = 1

        def grow(part: dict[str, Any]) -> dict[str, Any]:
            nonlocal growth
            growth *= max(1, *(len(part[key]) for key in ("content", "prepend") if isinstance(part.get(key), str)), 1)
            return part

        if (part := getattr(tokenizer, name)) is not None:
            json.loads(part.__getstate__(), object_hook=grow)
        if growth > MOST_GROWTH:
            raise FileRefused(path, f"its {name} makes {growth:,} letters of one, expected at most {MOST_GROWTH}")
    processor = tokenizer.post_processor
    state = json.loads(processor.__getstate__()) if processor is not None else {}
    parts = state.get("processors") or [state]
    count = 0
    for part in parts:
        tokens = part.get("special_tokens") if isinstance(part.get("special_tokens"), dict) else {}
        names = [piece["SpecialToken"]["id"] for piece in part.get("single") or [] if "SpecialToken" in piece]
        count += sum(len(tokens.get(name, {}).get("ids", ())) for name in names)
    if count > MOST_AROUND:
        raise FileRefused(path, f"it puts {count:,} tokens around a text, expected at most {MOST_AROUND}")


def _warn_of_a_class(path: Path, name: str, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Say where transformers splits a text otherwise than tokenizer.json says."""
    if name not in OWN and name not in ALSO_OWN:
        return
    model, pipeline = tokenizer.model, [_state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)]
    normalizer, splitter, _ = OWN.get(name, (None, None, None))
    prefix = config.get("add_prefix_space")
    text = json.dumps([normalizer, splitter], sort_keys=True)
    if prefix and name in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        text = text.replace('"add_prefix_space": false', '"add_prefix_space": true')
    if name.endswith("LlamaTokenizer") and (prefix is False or config.get("legacy")):
        text = text.replace('"first"', '"never"' if prefix is False else '"always"')
    as_file = type(model).__name__ == "BPE" and not model.ignore_merges and name in OWN
    if not as_file or json.dumps(pipeline, sort_keys=True) != text:
        warnings.warn(
            printable(
                f"{path}: transformers 5 builds its {name} anew, not as tokenizer.json says, which is followed here: "
                "ids may differ from its own"
            ),
            stacklevel=2,
        )


def _state(part: Any) -> Any:
    """Return a part of a tokenizer as the file has it, but for what changes no id."""
    if part is None:
        return None

    def plain(value: dict[str, Any]) -> dict[str, Any]:
        return {name: entry for name, entry in value.items() if name != "trim_offsets"}

    return json.loads(part.__getstate__(), object_hook=plain)


def _check_added(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse files that add tokens which tokenizer.json has not: transformers adds them."""
    path, tokens = folder / BESIDE, config.get("added_tokens_decoder") or {}
    if not isinstance(tokens, dict) or not all(isinstance(token, dict) for token in tokens.values()):
        raise FileRefused(path, f"added_tokens_decoder is {short(tokens)}, expected an object of tokens by their ids")
    pairs = [(number, token.get("content")) for number, token in tokens.items()]
    if "added_tokens_decoder" not in config and (folder / LEGACY_ADDED).exists():
        path = folder / LEGACY_ADDED
        pairs = [(str(number), text) for text, number in read_json(path).items()]
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    for number, text in pairs:
        if not number.isdecimal() or added.get(int(number)) != text:
            raise FileRefused(path, f"it adds {short(text)} as token {short(number)}: tokenizer.json does not")
