"""The part of the foreign reader that reads mixtures of experts: NumPy, and docs/library/golden-adapters.md.

Each of `BUGS` is a mistake that it can be told to make.
"""

import json
import re

import numpy as np

from . import foreign_reader as reader

NEW = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
BUGS = {
    "B expert-slowest": "experts-lora-b-is-read-expert-slowest",
    "A expert-fastest": "experts-lora-a-is-read-expert-fastest",
    "in and out": "experts-in-and-out-are-exchanged",
    "the next expert": "experts-take-the-factors-of-the-next",
    "expert 0 for all": "experts-all-take-the-first-factors",
    "the scaling in a loop": "experts-the-scaling-compounds",
    "the packed rank": "experts-alpha-is-divided-by-the-packed-rank",
    "the last expert": "experts-the-last-is-left-out",
    "up and gate": "experts-gate-and-up-are-exchanged",
    "interleaved": "experts-gate-and-up-are-taken-for-alternating",
    "no root": "rslora-root-is-ignored",
    "r of the configuration": "experts-slices-are-of-the-configurations-rank",
    "not renormalised as said": "experts-the-shares-are-renormalised-wrongly",
    "shared linears": "experts-the-shared-experts-adapter-is-left-out",
    "no layout": "experts-lora-b-layout-is-not-read",
    "one root for gate and up": "experts-rslora-root-is-that-of-gate-and-up-together",
}
"""The flag by which each is to be named."""


def slices(lora_A, lora_B, E, r, bug=None, grouped=False):
    """A_e (r, in) and B_e (out, r) of each expert; `grouped`: B has the expert as its slow index."""
    A = lora_A.reshape(r, E, -1).swapaxes(0, 1) if bug == "A expert-fastest" else lora_A[: E * r].reshape(E, r, -1)
    if grouped or bug == "B expert-slowest":
        B = lora_B[:, : E * r].reshape(-1, E, r).transpose(1, 0, 2)
    else:
        B = lora_B[:, : E * r].reshape(-1, r, E).transpose(2, 0, 1)
    order = {"the next expert": np.roll(np.arange(E), -1), "expert 0 for all": np.zeros(E, int)}.get(bug)
    return (A, B) if order is None else (A[order], B[order])


def scalings(alpha, r, E, bug=None, root=False):
    s = np.full(E, alpha / (r**0.5 if root and bug != "no root" else r * E if bug == "the packed rank" else r))
    if bug == "the scaling in a loop":
        s = s ** np.arange(1, E + 1)
    if bug == "the last expert" and E > 1:
        s[-1] = 0
    return s


def read_base(folder, W):
    """Put the experts' weights into arrays (E, 2 m, d) and (E, d, m), whichever way the file has them."""
    config = json.loads((folder / "config.json").read_text())
    each = {}
    for name, array in reader.tensors_of(folder / "model.safetensors").items():
        name = name.replace("block_sparse_moe", "mlp")
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            each[match[1], int(match[2]), NEW.get(match[3], match[3])] = array
        else:
            W[name] = array.astype(np.float64)
    for experts in {key[0] for key in each}:
        count = 1 + max(e for _, e, _ in each)
        pairs = [(each[experts, e, "gate_proj"], each[experts, e, "up_proj"]) for e in range(count)]
        W[f"{experts}.gate_up_proj"] = np.array([np.concatenate(pair) for pair in pairs], float)
        W[f"{experts}.down_proj"] = np.array([each[experts, e, "down_proj"] for e in range(count)], float)
    W.setdefault("lm_head.weight", W["model.embed_tokens.weight"])
    return config


def add_adapter(W, folder, bug):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {k: v.astype(np.float64) for k, v in reader.tensors_of(folder / "adapter_model.safetensors").items()}
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        path = key.removeprefix(reader.PREFIX).removesuffix(".lora_A.weight").replace("block_sparse_moe", "mlp")
        lora_A, lora_B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        if bug == "shared linears" and "shared_expert" in path:
            continue
        module, names = path.replace(".base_layer", ""), config.get("target_parameters") or []
        own = sorted(name for name in names if module.endswith(name.rpartition(".")[0]))
        if own:  # of two arrays, gate_up_proj lies within base_layer
            path = f"{module}.{own[-1 if path.endswith('base_layer') else 0].rpartition('.')[2]}"
        r = reader.number(config, "r", "rank_pattern", path, None)
        alpha, root = reader.number(config, "lora_alpha", "alpha_pattern", path, None), config["use_rslora"]
        old = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", path)
        if old or path not in W:
            part = NEW.get(old[3], old[3]) if old else ""
            both = bug == "one root for gate and up" and root and part in ("gate_proj", "up_proj")
            delta = alpha / (r**0.5 if root and bug != "no root" else r) * (2**0.5 if both else 1) * lora_B @ lora_A
            array = "down_proj" if part == "down_proj" else "gate_up_proj"
            target = W[f"{old[1]}.{array}"][int(old[2])] if old else W[f"{path}.weight"]
            target[len(delta) * (part == "up_proj") :][: len(delta)] += delta
            continue
        stack = W[path] if W[path].ndim == 3 else W[path][None]
        E = len(stack)
        if len(lora_A) != E * r or lora_B.shape[1] != E * r:
            raise reader.Refused(path)
        sliced = config["r"] if bug == "r of the configuration" else r
        grouped = config.get("lora_B_layout") == "grouped_by_expert" and bug != "no layout"
        A, B = slices(lora_A, lora_B, E, sliced, bug if E > 1 else None, grouped)
        delta = scalings(alpha, r, E, bug, root)[:, None, None] * B @ A
        turned = tuple(map(int, config["peft_version"].split("."))) <= (0, 19, 0)
        if E > 1 and turned != (bug == "in and out" and stack.shape[1] == stack.shape[2]):
            delta = delta.swapaxes(1, 2)
        if path.endswith("gate_up_proj") and bug == "up and gate":
            delta = np.roll(delta, delta.shape[1] // 2, axis=1)
        if path.endswith("gate_up_proj") and bug == "interleaved":
            delta = np.concatenate([delta[:, ::2], delta[:, 1::2]], axis=1)
        stack += delta


def silu(z):
    return z / (1 + np.exp(-z))


def mixture_of(config, W, bug):
    K = config["num_experts_per_tok"]
    renormalised = config.get("norm_topk_prob", True) != (bug == "not renormalised as said")

    def mixture(mlp, h):
        p = np.exp(h @ W[f"{mlp}.gate.weight"].T)
        kept = np.argsort(-p, axis=1)[:, :K]
        y = np.zeros_like(h)
        for n, experts in enumerate(kept):
            total = p[n, experts].sum() if renormalised else p[n].sum()
            for e in experts:
                a, b = np.split(W[f"{mlp}.experts.gate_up_proj"][e] @ h[n], 2)
                y[n] += p[n, e] / total * (W[f"{mlp}.experts.down_proj"][e] @ (silu(a) * b))
        if f"{mlp}.shared_expert_gate.weight" in W:
            gate, up, down = (W[f"{mlp}.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
            y += silu(h @ gate.T) * (h @ up.T) @ down.T / (1 + np.exp(-h @ W[f"{mlp}.shared_expert_gate.weight"].T))
        return y

    return mixture


def answer(golden, case, bug=None):
    """Return the logits (prompts, T, V) of a case, None where its adapter is refused."""
    W = {}
    config = read_base(golden / case["base"], W)
    try:
        add_adapter(W, golden / case["adapter"], bug)
    except reader.Refused:
        return None
    mixture = mixture_of(config, W, bug)
    return np.stack([reader.logits(config, W, np.array(prompt), mixture=mixture) for prompt in case["prompts"]])
