"""A reader of golden adapters that shares no line with ours: NumPy, and docs/library/golden-adapters.md.

`answer` takes the name of a bug to make; the tests plant each.
"""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np

from . import foreign_mixtures

TYPES = {"F64": "<f8", "F32": "<f4", "U8": "u1", "I64": "<i8", "BF16": "<u2", "F16": "<f2"}
PREFIX = "base_model.model."
STARTS = (True, False, None, "gaussian")


class Refused(Exception):
    pass


def tensors_of(path, bug=None):
    raw = Path(path).read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = (begin + offset for offset in entry["data_offsets"])
        array = np.frombuffer(raw[start:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = array.view("<f2") if bug == "bits as float16" else (array.astype("u4") << 16).view("f4")
        found[name] = array
    return found


def dequantised(W, name, bug):
    state = json.loads(bytes(W[f"{name}.quant_state.bitsandbytes__nf4"]))
    absmax = W[f"{name}.absmax"]
    if f"{name}.nested_absmax" in W:
        scales = np.repeat(W[f"{name}.nested_absmax"], state["nested_blocksize"])[: len(absmax)]
        absmax = W[f"{name}.nested_quant_map"][absmax] * scales
        absmax = absmax + (0 if bug == "offset" else state["nested_offset"])
    codes = W[name].ravel()
    pairs = [codes & 15, codes >> 4] if bug == "nibbles" else [codes >> 4, codes & 15]
    values = W[f"{name}.quant_map"][np.stack(pairs, axis=1).ravel()]
    return (values * np.repeat(absmax, state["blocksize"])).reshape(state["shape"]).astype(np.float64)


def base_of(folder, bug):
    config, W = read_base(folder, bug if bug in ("offset", "nibbles") else None)
    return config, dict(W)


@cache
def read_base(folder, bug):
    config, raw = json.loads((folder / "config.json").read_text()), tensors_of(folder / "model.safetensors")
    W = {}
    for name, array in raw.items():
        if name.endswith(("weight", "bias")):
            W[name] = dequantised(raw, name, bug) if array.dtype == np.uint8 else array.astype(np.float64)
    W.setdefault("lm_head.weight", W["model.embed_tokens.weight"])
    return config, W


def matches(key, path, bug):
    if bug == "pattern anywhere":
        return re.match(rf"(.*\.)?({key})", path)  # without the $
    if bug in ("pattern as text", "pattern as an end"):
        return f".{path}".endswith(f".{key}") if bug == "pattern as text" else path.endswith(key)
    return re.match(rf"(.*\.)?({key})$", path)


def number(config, key, pattern, path, bug):
    found = [v for k, v in (config.get(pattern) or {}).items() if matches(k, path, bug)]
    if not found or bug == f"no {pattern}":
        return config[key]
    return found[-1 if bug == "last pattern" else 0]


def add_adapter(W, folder, weight, bug):
    config = json.loads((folder / "adapter_config.json").read_text())
    found = tensors_of(folder / "adapter_model.safetensors", bug)
    config.setdefault("lora_alpha", 8)
    if not found:
        raise Refused("no tensors")
    if config["r"] <= 0 or (config["init_lora_weights"] not in STARTS and bug != "any start"):
        raise Refused("configuration")
    modules = {}
    for name, array in found.items():
        if not name.startswith(PREFIX):
            raise Refused(name)
        name = name.removeprefix(PREFIX)
        path = name.rpartition(".")[0]
        if any(re.fullmatch(rf"(.*\.)?{module}", path) for module in config["modules_to_save"] or ()):
            if bug != "no modules to save":
                W[name] = array.astype(np.float64)
            continue
        if name.endswith("token_adapter.trainable_tokens_delta"):
            which = config["trainable_token_indices"]
            name = name.replace("token_adapter.trainable_tokens_delta", "weight")
            if bug != "no trained tokens":
                W[name] = W[name].copy()
                W[name][which] = array + (W[name][which] if bug == "trained tokens added" else 0)
            continue
        path, part = re.fullmatch(r"(.*?)\.((?:lora_|base_layer).*)", name).groups()
        modules.setdefault(path, {})[part] = array.astype(np.float64)
    weight = weight / 2 if bug == "averaged" and weight != 1 else weight  # of two adapters
    for path, parts in modules.items():
        embedding = "lora_embedding_A" in parts
        A, B = (parts.get(f"lora_embedding_{x}" if embedding else f"lora_{x}.weight") for x in "AB")
        name, r = f"{path}.weight", number(config, "r", "rank_pattern", path, None)
        if A is None or B is None or A.shape != (r, A.shape[1]) or B.shape[1:] != (r,):
            raise Refused(path)
        if name not in W:
            raise Refused(name)
        old = W[name].T if embedding else W[name]
        if old.shape != (len(B), A.shape[1]):
            raise Refused(path)
        if bug == "nothing" or (embedding and bug == "no embedding"):
            continue
        r = number(config, "r", "rank_pattern", path, bug)
        s = number(config, "lora_alpha", "alpha_pattern", path, bug)
        s = int(s) if bug == "whole alpha" else s
        if bug != "alpha for alpha / r":
            s /= r**0.5 if config["use_rslora"] and bug != "no root" else r
        B = B.reshape(B.shape[::-1]).T if bug == "factor read the other way" else B
        A, B = (A[::-1], B) if bug == "other ranks" else (A, B)
        A = A.T.reshape(A.shape) if bug == "A turned and reshaped" else A
        if bug == "both factors read the other way":
            A, B = A.reshape(A.shape[::-1]).T, B.reshape(B.shape[::-1]).T
        if bug == "rows permuted" and path.endswith(("q_proj", "k_proj")):
            B = B.reshape(-1, 2, 32, r).swapaxes(1, 2).reshape(B.shape)
        if bug == "other heads" and path.endswith(("k_proj", "v_proj")):
            B = np.concatenate([B[-64:], B[:-64]])
        delta = s * (1 if bug == "no weights" else weight) * (2 if bug == "twice" else 1) * B @ A
        delta = (delta.T.reshape(delta.shape)) if bug == "swapped" else delta
        delta = delta.reshape(delta.shape[::-1]).T if embedding and bug == "embedding reshaped" else delta
        new = old + delta
        if config["use_dora"] and bug != "no magnitude":
            length = old if bug == "norm of W" else new
            if bug == "magnitude of the inputs" and new.shape[0] == new.shape[1]:
                new = parts["lora_magnitude_vector"] * new / np.linalg.norm(new, axis=0)
            else:
                new = parts["lora_magnitude_vector"][:, None] * new / np.linalg.norm(length, axis=1)[:, None]
        W[name] = new.T if embedding else new
        if "lora_B.bias" in parts and bug != "no bias":
            W[f"{path}.bias"] = s * parts["lora_B.bias"]
        if config["bias"] == "lora_only" and bug != "no trained bias":
            W[f"{path}.bias"] = parts["base_layer.bias"]


def logits(config, W, ids, bug=None, cache=None, mixture=None):
    """Return logits (T, V); `cache` has, for each block, keys and values of the first tokens, or gets all but one.

    `mixture(path, h)` is what stands in the place of the MLP, if something does.
    """
    D, H, K = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    angle = np.arange(len(ids))[:, None] * theta ** (-np.arange(0, D, 2) / D)
    turn = np.exp(1j * angle)[:, None]

    def linear(path, x):
        return x @ W[f"{path}.weight"].T + W.get(f"{path}.bias", 0)

    def norm(path, x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * W[f"{path}.weight"]

    def turned(x):  # (T, heads, D), as complex numbers
        if bug == "neighbours":
            z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
            return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
        z = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    x = W["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at, mlp, T = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp", len(ids)
        h = norm(f"model.layers.{i}.input_layernorm", x)
        q = turned(linear(f"{at}.q_proj", h).reshape(T, H, D))
        k = turned(linear(f"{at}.k_proj", h).reshape(T, K, D)).repeat(H // K, axis=1)
        v = linear(f"{at}.v_proj", h).reshape(T, K, D).repeat(H // K, axis=1)
        if cache is not None:
            old = cache.setdefault(i, (k[:-1], v[:-1]))
            k, v = (np.concatenate([before, now[len(before) :]]) for before, now in zip(old, (k, v), strict=True))
        root = (config["hidden_size"] / H if bug == "hidden size" else D) ** 0.5
        S = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / root + np.triu(np.full((T, T), -np.inf), 1)
        P = np.exp(S - S.max(-1, keepdims=True))
        o = (P / P.sum(-1, keepdims=True) @ v.swapaxes(0, 1)).swapaxes(0, 1)
        x = x + linear(f"{at}.o_proj", o.reshape(T, H * D))
        h = norm(f"model.layers.{i}.post_attention_layernorm", x)
        if mixture:
            x = x + mixture(mlp, h)
            continue
        gate = linear(f"{mlp}.gate_proj", h)
        x = x + linear(f"{mlp}.down_proj", gate / (1 + np.exp(-gate)) * linear(f"{mlp}.up_proj", h))
    return linear("lm_head", norm("model.norm", x))


def answer(golden, index, case, bug=None):
    """Return the logits (prompts, T, V) of a case, None where its adapter is refused."""
    if index["bases"][case.get("base", index["base"])].get("experts"):
        return foreign_mixtures.answer(golden, case, bug)
    config, W = base_of(golden / case.get("base", index["base"]), bug)
    given = case["adapter"] if isinstance(case["adapter"], list) else [[case["adapter"], 1.0]]
    before = next((other for other in index["cases"] if other["id"] == case.get("after")), None)
    if before and bug in ("left on", "not taken up"):
        given = [[before["adapter"], 1.0], *(given if bug == "left on" else [])]
    embedding = W["model.embed_tokens.weight"]
    try:
        for folder, weight in given:
            add_adapter(W, golden / folder, weight, bug)
    except Refused:
        return None
    if bug == "tied head" and config["tie_word_embeddings"] and W["model.embed_tokens.weight"] is not embedding:
        W["lm_head.weight"] = W["model.embed_tokens.weight"]
    caches = [{} if bug == "cache" else None for _ in case["prompts"]]
    if before and bug == "cache":
        _, old = base_of(golden / case.get("base", index["base"]), bug)
        add_adapter(old, golden / before["adapter"], 1.0, bug)
        for prompt, cache in zip(case["prompts"], caches, strict=True):
            logits(config, old, np.array(prompt), bug, cache)
    pairs = zip(case["prompts"], caches, strict=True)
    return np.stack([logits(config, W, np.array(prompt), bug, cache) for prompt, cache in pairs])
