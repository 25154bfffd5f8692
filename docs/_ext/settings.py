"""What to set for LoRA: what fits into memory, which runs to make, and what their held-out losses say.

docs/learn/what-do-i-set.md shows what these rules answer. `docs/_static/live/settings.js` has the same rules for a
reader's own numbers, and those about what a reader pastes; tests/site/test_settings.py holds it to the rules here and
to those of tests/site/pasted.py, to the last printed digit. What is a fact and no rule, such as the sizes of models,
the recipes of others and every sentence, stands here alone: the page hands `data` to its script.

The bytes are those of `minilora.language.memory.training_memory`, which has the formula.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pages

from minilora.language.config import LlamaConfig
from minilora.language.memory import count_numbers, training_memory
from minilora.layers.rotary import frequencies

BILLION = 10**9

# --- models -----------------------------------------------------------------------------------------------------------

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""The values of model_type that are counted. A Qwen 2 has biases at q, k and v, a Qwen 3 norms q and k."""


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder: those of `LlamaConfig`, L layers, and what its kind has besides."""

    kind: str
    V: int
    d: int
    m: int
    L: int
    H: int
    K: int
    D: int
    tied: bool = False
    family: str = ""  # whose rates Tinker's formula gives: "Llama", "Qwen" or nobody's

    def config(self) -> LlamaConfig:
        """Return the sizes as the package counts them."""
        return LlamaConfig(
            self.V, self.d, self.m, self.L, self.H, self.K, self.D, 1e-6, frequencies(self.D, 10_000.0),
            tie_word_embeddings=self.tied, attention_bias=self.kind == "qwen2",
            model_type="llama" if self.kind == "gemma" else self.kind,
        )  # fmt: skip

    @property
    def weights(self) -> int:
        """How many numbers the model has."""
        return sum(count_numbers(self.config()))

    def sizes(self) -> dict[str, Any]:
        """Return what the page's script counts with."""
        return asdict(self) | {"biases": self.kind == "qwen2", "normed": self.kind == "qwen3"}


MODELS = {
    "SmolLM2-135M": Model("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "Qwen2.5-0.5B": Model("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True, "Qwen"),
    "Llama-3.2-1B": Model("llama", 128256, 2048, 8192, 16, 32, 8, 64, True, "Llama"),
    "Gemma-2B": Model("gemma", 256000, 2048, 16384, 18, 8, 1, 256, True),
    "Llama-3.2-3B": Model("llama", 128256, 3072, 8192, 28, 24, 8, 128, True, "Llama"),
    "Qwen3-4B": Model("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True, "Qwen"),
    "Llama-2-7B": Model("llama", 32000, 4096, 11008, 32, 32, 32, 128, False, "Llama"),
    "Mistral-7B": Model("mistral", 32000, 4096, 14336, 32, 32, 8, 128),
    "Qwen2.5-7B": Model("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False, "Qwen"),
    "Llama-3.1-8B": Model("llama", 128256, 4096, 14336, 32, 32, 8, 128, False, "Llama"),
    "Llama-2-13B": Model("llama", 32000, 5120, 13824, 40, 40, 40, 128, False, "Llama"),
    "Qwen2.5-14B": Model("qwen2", 152064, 5120, 13824, 48, 40, 8, 128, False, "Qwen"),
    "Qwen2.5-32B": Model("qwen2", 152064, 5120, 27648, 64, 40, 8, 128, False, "Qwen"),
    "Llama-3.1-70B": Model("llama", 128256, 8192, 28672, 80, 64, 8, 128, False, "Llama"),
}
"""Sizes as in LitGPT's list of models, which links each config.json; whether the head is tied, that file says."""

# --- sources ----------------------------------------------------------------------------------------------------------

SOURCES = {
    "litgpt models": ("LitGPT's list", "https://github.com/Lightning-AI/litgpt/blob/main/litgpt/config.py"),
    "quicktour": ("docs", "https://github.com/huggingface/peft/blob/main/docs/source/quicktour.md"),
    "fsdp": ("docs", "https://github.com/huggingface/peft/blob/main/docs/source/accelerate/fsdp.md"),
    "torchtune": ("recipes", "https://github.com/pytorch/torchtune/tree/main/recipes/configs"),
    "qlora": ("scripts", "https://github.com/artidoro/qlora/tree/main/scripts"),
    "litgpt": ("recipes", "https://github.com/Lightning-AI/litgpt/tree/main/config_hub/finetune"),
    "tinker": (
        "hyperparam_utils.py",
        "https://github.com/thinking-machines-lab/tinker-cookbook/blob/main/tinker_cookbook/hyperparam_utils.py",
    ),
    "primer": ("Tinker's primer", "https://tinker-docs.thinkingmachines.ai/tinker/lora-primer/index.md"),
    "schulman": ("Schulman et al. 2025", "https://thinkingmachines.ai/blog/lora/"),
    "biderman": ("Biderman et al. 2024", "https://arxiv.org/abs/2405.09673"),
    "memory": ("memory.py", "../../minilora/language/memory.py"),
    "choosing": ("lesson 10", "choosing.md"),
    "laboratory": ("our recordings", "../library/laboratory.md"),
    "audit": ("minilora audit", "../library/is-my-adapter-applied.md"),
}
"""What a line or a recipe is from, and where that is read."""

# --- the recipes of others --------------------------------------------------------------------------------------------

TORCHTUNE = {  # rank, alpha, rate of lora_single_device, or of lora where that is the only one
    "Qwen2.5-0.5B": (32, 64, 2e-3),
    "Llama-3.2-1B": (64, 128, 3e-4),
    "Gemma-2B": (64, 128, 2e-5),
    "Llama-3.2-3B": (64, 128, 3e-4),
    "Qwen3-4B": (8, 16, 3e-4),
    "Llama-2-7B": (8, 16, 3e-4),
    "Mistral-7B": (64, 16, 2e-5),
    "Qwen2.5-7B": (8, 16, 3e-4),
    "Llama-3.1-8B": (8, 16, 3e-4),
    "Llama-2-13B": (8, 16, 2e-4),
    "Qwen2.5-14B": (8, 16, 3e-4),
    "Qwen2.5-32B": (8, 16, 3e-4),
    "Llama-3.1-70B": (16, 32, 3e-4),
}
LITGPT = {
    "Llama-3.2-1B": (32, 16, 2e-4),
    "Gemma-2B": (8, 16, 2e-4),
    "Llama-3.2-3B": (32, 16, 2e-4),
    "Llama-2-7B": (32, 16, 2e-4),
    "Mistral-7B": (32, 16, 2e-4),
    "Llama-3.1-8B": (32, 16, 2e-4),
}
QLORA = {"rank": 64, "alpha": 16, "up to": 20 * BILLION, "rate": 2e-4, "above": 1e-4}
"""The scripts for 7 and 13 billion weights have one rate, those for 33 and 65 the other; the limit is between."""
TINKER = {"rank": 32, "alpha": 32, "rate": 5e-5 * 10, "width": 2000, "power": {"Llama": 0.781, "Qwen": 0.0775}}
"""The rate is 0.0005 (2000 / d)^power, at each rank."""
START, SCALING = 1e-4, 2.0
"""Where a search begins that has no recipe: the rate, at this s. It is the middle of the lesson's recipes."""
RECIPES = [  # name, source, what it was written for, rank, alpha, rate; None: by the model
    ("PEFT quicktour", "quicktour", "Llama 3.2 1B, q alone", 8, 32, 1e-3),
    ("PEFT FSDP", "fsdp", "Llama 2 70B", 8, 16, 1e-4),
    ("torchtune", "torchtune", None, None, None, None),
    ("QLoRA", "qlora", None, None, None, None),
    ("LitGPT", "litgpt", None, None, None, None),
    ("Tinker", "tinker", None, None, None, None),
]

CONVENTIONS = {  # words; the rank to begin with; alpha, fixed or a multiple of the rank; whether by the rank's root
    "peft": ("PEFT's default: alpha stays 8", 8, 8, 0, False),
    "2r": ("alpha is twice the rank", 8, 0, 2, False),
    "root": ("root (use_rslora): alpha stays 8", 8, 8, 0, True),
    "torchtune": ("torchtune: alpha is twice the rank", 8, 0, 2, False),
    "qlora": ("QLoRA: alpha stays 16", 64, 16, 0, False),
    "tinker": ("Tinker: alpha stays 32", 32, 32, 0, False),
}

# --- printed numbers --------------------------------------------------------------------------------------------------


def plain(x: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, without an exponent; a half is rounded up."""
    exact = Decimal(x)
    if not exact:
        return "0"
    place = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    rounded = exact.quantize(place, ROUND_HALF_UP)
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def gigabytes(count: int) -> str:
    """Return bytes in units of 10^9: two decimals below 10, then one."""
    unit = 10**7 if count < 9_995 * 10**6 else 10**8
    whole, part = divmod((count + unit // 2) // unit, BILLION // unit)
    return f"{whole:,}.{part:0{2 if unit == 10**7 else 1}}"


def fill(words: str, **values: object) -> str:
    """Return a sentence with its numbers."""
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), words)


WORDS = {
    # of what fits
    "fits": "Take the first that fits: LoRA over {way}, {total} GB of your {memory}.",
    "fewer tokens": "Nothing fits with {tokens} tokens a step. LoRA over {way} fits with {most}: sum over parts.",
    "too large": "Nothing fits, not even one token a step: LoRA over {way} takes {total} GB with one.",
    # of the data
    "data": "{rows} rows of {length} tokens are {all} tokens: {steps} steps of {tokens} for one pass.",
    "holds": "Rank {rank} trains {numbers} numbers, at least one for each token. Rank {need} would be enough for that.",
    "short": "Rank {rank} trains {numbers} numbers, fewer than there are tokens. Rank {need} would have one for each.",
    # of the runs
    "own rate": "{name}'s own rate for this model is {rate}.",
    "start": "s times rate begins at {start}, as 0.0001 does at s = 2.",
    "no recipe": "{name} has no rate for this model, so s times rate begins at {start}, as 0.0001 does at s = 2.",
    # of the losses
    "nothing moved": (
        "All runs ended at {loss}, to the last digit. Rates or ranks that differ cannot do that. The adapter is not "
        "trained, or it is not applied."
    ),
    "nothing learned": (
        "No run ends below the untouched model's {base} by more than {noise}. Look first whether the adapter is "
        "applied and trained."
    ),
    "all broke": "Rank {rank}: no run stayed finite. Divide the smallest rate by four: {next}.",
    "broke": "Rank {rank}: the rate broke at {at}. The run diverged, or lost more than half of what the best gains.",
    "no base": "Add a line: base, then the untouched model's loss. A rate that breaks without diverging shows only so.",
    "one rate": "Rank {rank}: one rate says little. Run {below} and {above}.",
    "search lower": "Rank {rank}: the smallest rate is the best. Search wider: {next}.",
    "search higher": "Rank {rank}: the largest rate is the best. Search wider: {next}.",
    "search between": "Rank {rank}: the best rate is {rate}, and its neighbours are far. Search closer: {next}.",
    "rate found": (
        "Rank {rank}: stop searching the rate at {rate}, loss {loss}. Half or twice the best rate lost at most "
        "{half} of what training gained, four times up to {four}."
    ),
    "one rank": "One rank cannot say whether the rank is the limit. Run rank {next} at {rate} and {below}.",
    "cannot compare": (
        "Ranks {low} and {high} cannot be compared yet: each needs its own best rate, with a worse one at each side. "
        "At one common rate, the rate decides which rank wins."
    ),
    "limit": (
        "The rank was the limit: rank {high} ends {less} below rank {low}, each at its own best rate. Run rank {next} "
        "at {rate} and {below}."
    ),
    "no limit": (
        "The rank is not the limit: rank {high} ends within {noise} of rank {low}. Keep rank {low} at {rate} and stop "
        "here; more or other data would change more."
    ),
    "worse": (
        "Rank {high} ends {more} above rank {low}, each at its own best rate. Keep rank {low}; look at another seed, "
        "and at fewer passes."
    ),
    "noise": "Differences up to {noise} count as none: two standard errors, by {whose}.",
    "yours": "the runs that you made twice",
    "ours": "how far a seed moves a loss of our small model; run one setting twice, and yours counts",
}
SEEN = {  # the source of a line about losses, and the size at which it was seen
    "nothing moved": ("audit", "by arithmetic, at any size"),
    "nothing learned": ("audit", "at any size"),
    "all broke": ("laboratory", "0.85 million weights"),
    "broke": ("laboratory", "0.85 million weights"),
    "no base": ("laboratory", "0.85 million weights"),
    "one rate": ("laboratory", "0.85 million weights"),
    "search lower": ("laboratory", "0.85 million weights"),
    "search higher": ("laboratory", "0.85 million weights"),
    "search between": ("laboratory", "0.85 million weights"),
    "rate found": ("laboratory", "0.85 million weights, alpha = 2 r"),
    "one rank": ("laboratory", "0.85 million weights"),
    "cannot compare": ("laboratory", "0.85 million weights, three lengths of text"),
    "limit": ("biderman", "Llama-2-7B; ours, 0.85 million weights, the same"),
    "no limit": ("schulman", "Llama 3 and Qwen 3"),
    "worse": ("laboratory", "not seen at 0.85 million weights, so doubt it"),
    "noise": ("laboratory", "0.85 million weights"),
}
ADVISED = {  # the same of what is said before any run
    "fits": ("memory", "a count, the least: a library needs more"),
    "capacity": ("primer", "large models, roughly; ours of 0.85 million weights, too"),
    "why": ("choosing", "recipes for 1 to 70 billion weights"),
}
WHEN = {  # what each line says, and when it is said: the rules in words
    "nothing moved": "**Nothing moved**: runs of different settings end at one loss, to the last digit pasted.",
    "nothing learned": "**Nothing was learned**: no run is below *base* by more than the noise.",
    "all broke": "**All broke**: a rank has no finite loss. Next, a quarter of its smallest rate.",
    "broke": "**The rate broke**: above the best rate a run diverged, or lost more than half of the gain over *base*.",
    "no base": "**Add base**: it is missing.",
    "one rate": "**One rate**: a rank has only one. Next, half and twice of it.",
    "search lower": "**Search wider**: the smallest rate is the best. Next, half of it.",
    "search higher": "**Search wider**: the largest rate is the best. Next, twice it.",
    "search between": "**Search closer**: a neighbour of the best rate is more than 2.5 times away.",
    "rate found": "**Stop the search here**: the best rate has a worse one at each side, within 2.5 times.",
    "one rank": "**One rank**: next, twice that rank at its best rate and at half of it.",
    "cannot compare": "**No comparison yet**: of the two highest ranks, one has not found its rate.",
    "limit": "**The rank was the limit**: the higher of them ends lower by more than the noise.",
    "no limit": "**The rank is not the limit; stop here**: both end within the noise.",
    "worse": "**The higher rank is worse**: it ends higher by more than the noise.",
    "noise": (
        "**The noise** of a difference is 2 S √(1/n + 1/m), for n and m runs. S is the spread of one run: of settings "
        "that you ran more than once, or else of our recordings."
    ),
}
FAR, LOST = 2.5, 0.5
"""How many times a neighbour may be away, and which part of the gain a rate has lost that broke."""
REFUSED = {
    "memory": "Memory: write gigabytes between 0.1 and 100000, such as 24.",
    "rows": "Rows: write a whole number between 1 and 1000000000, such as 5000.",
    "length": "Tokens a row: write a whole number between 1 and 1000000, such as 512.",
    "tokens": "Tokens a step: write a whole number between 1 and 10000000, such as 4096.",
    "rank": "Rank: write a whole number between 1 and the model's width, {d}, or nothing.",
    "model": "Choose a model.",
    "convention": "Choose a convention.",
    "json": "This is no config.json: paste the whole file, from { to }.",
    "kind": "model_type is {kind}: only {kinds} are counted here.",
    "bias": "{name} is true: biases there are not counted here.",
    "size": "{name} is missing, or no whole number between 1 and {most}.",
    "heads": "{H} heads cannot share {K} key-value heads evenly.",
    "none": "Paste at least one line: rank, rate, loss.",
    "many": "Paste at most 200 lines.",
    "parts": "Line {line} has {parts} parts: write rank, rate and loss, with spaces or commas between them.",
    "base": "Line {line}: write base and one loss, once.",
    "line rank": "Line {line}: the rank must be a whole number above 0, not {word}.",
    "line rate": "Line {line}: the rate must be a number above 0 and at most 1, not {word}.",
    "line loss": "Line {line}: the loss must be a number from 0, or nan for a run that diverged, not {word}.",
}
LIMITS = {"memory": (0.1, 1e5), "rows": (1, 1e9), "length": (1, 1e6), "tokens": (1, 1e7)}
DEFAULTS = {
    "model": "Llama-3.1-8B", "memory": "24", "rows": "5000", "length": "512", "tokens": "4096", "convention": "2r",
    "rank": "",
}  # fmt: skip

# --- what comes in ----------------------------------------------------------------------------------------------------


def number(text: str) -> float | None:
    """Return the number that a text is, with or without commas between thousands; None where it is none."""
    text = text.strip()
    grouped = re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text)
    return float(text.replace(",", "")) if grouped or re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text) else None


def read_inputs(fields: Mapping[str, str], model: Model | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a reader has entered, and what is wrong with it, in words, by field; `model` is one of no list."""
    found: dict[str, Any] = {"model": model, "key": ""}
    wrong = {}
    if model is None:
        if fields["model"] in MODELS:
            found |= {"model": MODELS[fields["model"]], "key": fields["model"]}
        else:
            wrong["model"] = REFUSED["model"]
    for name, (low, high) in LIMITS.items():
        value = number(fields[name])
        if value is None or not low <= value <= high or (name != "memory" and value % 1):
            wrong[name] = REFUSED[name]
        else:
            found[name] = value if name == "memory" else int(value)
    if fields["convention"] not in CONVENTIONS:
        wrong["convention"] = REFUSED["convention"]
    found["convention"], found["rank"] = fields["convention"], None
    if fields["rank"].strip() and found["model"]:
        value = number(fields["rank"])
        if value is None or value % 1 or not 1 <= value <= found["model"].d:
            wrong["rank"] = fill(REFUSED["rank"], d=found["model"].d)
        else:
            found["rank"] = int(value)
    return found, wrong


CONFIG = {  # each size's name there, and the most that it may be
    "L": ("num_hidden_layers", 1000), "d": ("hidden_size", 65536), "H": ("num_attention_heads", 1024),
    "K": ("num_key_value_heads", 1024), "D": ("head_dim", 1024), "m": ("intermediate_size", 10**6),
    "V": ("vocab_size", 10**7),
}  # fmt: skip

# --- what fits --------------------------------------------------------------------------------------------------------

WAYS = [(f"{bits} bits", bits) for bits in (16, 8, 4)] + [("all weights", 0)]
"""LoRA over a base of so many bits; and without LoRA."""


def what_fits(model: Model, memory: float, tokens: int, rank: int) -> list[dict[str, Any]]:
    """Return each way to train: its bytes by part, whether they fit, and how many tokens a step could have."""
    ways = []
    for (name, bits), recompute in ((way, again) for way in WAYS for again in (False, True)):
        options: dict[str, Any] = {"rank": rank, "bits": bits} if bits else {}
        parts = training_memory(model.config(), tokens=tokens, recompute=recompute, **options)
        grows = parts["activations"] + parts["logits"]
        total = sum(parts.values())
        free = math.floor(memory * BILLION + 0.5) - (total - grows)
        most = max(0, free // (grows // tokens))
        ways.append({
            "way": f"{name}, recomputed" if recompute else name,
            "weights": gigabytes(parts["weights"]),
            "trained": gigabytes(parts["trained"] + parts["gradients"] + parts["Adam"]),
            "activations": gigabytes(parts["activations"]),
            "logits": gigabytes(parts["logits"]),
            "total": gigabytes(total),
            "bytes": total,
            "fits": most >= tokens,
            "most": f"{most:,}",
            "one": gigabytes(total - grows + grows // tokens),
        })  # fmt: skip
    return ways


def choose_way(ways: Sequence[Mapping[str, Any]], memory: str, tokens: int) -> str:
    """Return in words the first way of LoRA that fits: the most bits, then without a second forward."""
    adapters = [way for way in ways if "bits" in way["way"]]
    for way in adapters:
        if way["fits"]:
            return fill(WORDS["fits"], way=way["way"], total=way["total"], memory=memory)
    least = adapters[-1]
    if least["most"] == "0":
        return fill(WORDS["too large"], way=least["way"], total=least["one"])
    return fill(WORDS["fewer tokens"], way=least["way"], tokens=f"{tokens:,}", most=least["most"])


# --- which runs -------------------------------------------------------------------------------------------------------


def recipes(key: str, model: Model) -> list[dict[str, Any]]:
    """Return what others set for a model: rank, alpha, s = alpha / r, the rate and s times rate."""
    weights = model.weights
    tables = {"torchtune": TORCHTUNE, "LitGPT": LITGPT}
    found = []
    for name, source, made_for, rank, alpha, rate in RECIPES:
        if name in tables:
            if key not in tables[name]:
                continue
            made_for, (rank, alpha, rate) = key, tables[name][key]
        elif name == "QLoRA":
            small = weights < QLORA["up to"]
            made_for = "LLaMA 7B, 13B" if small else "LLaMA 33B, 65B"
            rank, alpha, rate = QLORA["rank"], QLORA["alpha"], QLORA["rate"] if small else QLORA["above"]
        elif name == "Tinker":
            if (rate := tinker_rate(model.family, model.d)) is None:
                continue
            made_for, rank, alpha = f"a {model.family} of this width", TINKER["rank"], TINKER["alpha"]
        found.append({
            "name": name, "source": source, "for": made_for, "rank": rank, "alpha": alpha, "s": alpha / rank,
            "rate": rate, "product": alpha / rank * rate,
        })  # fmt: skip
    return found


def tinker_rate(family: str, d: int) -> float | None:
    """Return the rate of Tinker's formula for a width, None for a family that it does not know."""
    power = TINKER["power"].get(family)
    return None if power is None else TINKER["rate"] * (TINKER["width"] / d) ** power


def four_runs(key: str, model: Model, convention: str, rank: int | None) -> tuple[list[dict[str, Any]], str]:
    """Return four runs, and why: half, once and twice a rate at one rank, and twice the rank at that rate."""
    words, usual, fixed, multiple, root = CONVENTIONS[convention]
    own = None
    if convention == "torchtune" and key in TORCHTUNE:
        usual, alpha, own = TORCHTUNE[key]
        multiple = alpha / usual
    elif convention == "qlora":
        own = QLORA["rate"] if model.weights < QLORA["up to"] else QLORA["above"]
    elif convention == "tinker":
        own = tinker_rate(model.family, model.d)
    rank = rank or usual

    def strength(r: int) -> tuple[float, float]:
        alpha = fixed or multiple * r
        return alpha, alpha / (math.sqrt(r) if root else r)

    rate = float(plain(own if own is not None else START * SCALING / strength(rank)[1], 2))
    runs = []
    for r, lr in ((rank, rate / 2), (rank, rate), (rank, 2 * rate), (2 * rank, rate)):
        alpha, s = strength(r)
        runs.append({"rank": r, "alpha": alpha, "s": s, "rate": lr, "product": s * lr})
    name = words.partition(":")[0]
    if own is not None:
        return runs, fill(WORDS["own rate"], name=name, rate=plain(own))
    words = WORDS["no recipe" if convention in ("torchtune", "tinker") else "start"]
    return runs, fill(words, name=name, start=plain(START * SCALING))


def printed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe or a run as it is shown."""
    shown = {name: plain(row[name]) for name in ("alpha", "s", "rate", "product")}
    return {**row, **shown, "rank": str(row["rank"]), "at": x_of(row["product"])}


def advise(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the instrument's answer to what `read_inputs` has read, as it is shown."""
    model, key, tokens = inputs["model"], inputs["key"], inputs["tokens"]
    others = recipes(key, model)
    runs, why = four_runs(key, model, inputs["convention"], inputs["rank"])
    rank = runs[0]["rank"]
    ways = what_fits(model, inputs["memory"], tokens, rank)
    text = inputs["rows"] * inputs["length"]
    each = training_memory(model.config(), tokens=1, rank=1)["trained"] // 4
    need = -(-text // each)
    return {
        "ways": ways,
        "fits": choose_way(ways, plain(inputs["memory"], 9), tokens),
        "data": fill(WORDS["data"], rows=f"{inputs['rows']:,}", length=f"{inputs['length']:,}", all=f"{text:,}",
                     steps=f"{-(-text // tokens):,}", tokens=f"{tokens:,}"),
        "capacity": fill(WORDS["holds" if rank >= need else "short"], rank=rank, numbers=f"{rank * each:,}",
                         need=f"{need:,}"),
        "recipes": [printed(recipe) for recipe in others],
        "runs": [printed(run) for run in runs],
        "why": why,
        "axis": axis([printed(recipe) for recipe in others], [printed(run) for run in runs]),
    }  # fmt: skip


# --- the axis ---------------------------------------------------------------------------------------------------------

LEFT, RIGHT, LOWEST, DECADES = 96, 322, -6, 5


def x_of(product: float) -> str:
    """Return where s times rate lies on the axis, from 10^-6 to 10^-1."""
    return f"{LEFT + (RIGHT - LEFT) * (math.log10(product) - LOWEST) / DECADES:.1f}"


def axis(others: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the drawing of s times rate: a dot for each recipe, and the four runs below them."""
    low, foot = 18, 18 + 20 * (len(others) + 1)
    band = [float(run["at"]) for run in runs]
    parts = [
        f'<rect x="{min(band):.1f}" y="{low - 8}" width="{max(band) - min(band):.1f}" height="{foot - low + 8}" '
        'fill="#e8743b" opacity="0.15"/>'
    ]
    for power in range(LOWEST, LOWEST + DECADES + 1):
        x = f"{LEFT + (RIGHT - LEFT) * (power - LOWEST) / DECADES:.1f}"
        parts.append(f'<path d="M{x} {low - 8}V{foot}" stroke="#888" stroke-opacity="0.3"/>')
        label = "0." + "0" * (-power - 1) + "1"
        if power % 2:
            parts.append(f'<text x="{x}" y="{foot + 14}" text-anchor="middle" font-size="10">{label}</text>')
    for row, recipe in enumerate(others):
        y = low + 20 * row
        parts.append(f'<text x="0" y="{y + 4}">{recipe["name"]}</text>')
        parts.append(f'<circle cx="{recipe["at"]}" cy="{y}" r="4.5" fill="#4269d0"/>')
    y = low + 20 * len(others)
    parts.append(f'<text x="0" y="{y + 4}" font-weight="600">your runs</text>')
    for run in runs:
        parts.append(f'<circle cx="{run["at"]}" cy="{y}" r="4.5" fill="none" stroke="#e8743b" stroke-width="2"/>')
    says = ", ".join(f"{recipe['name']} {recipe['product']}" for recipe in others)
    mine = ", ".join(run["product"] for run in runs)
    label = f"s times rate on a logarithmic axis. {says}. Your four runs: {mine}."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 330 {foot + 20}" role="img" aria-label="{label}" '
        f'font-family="sans-serif" font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )


# --- what held-out losses say -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What our recordings say about how far a rate may be off, and how much a seed moves a loss."""

    half: float  # of what training gains, the most that half or twice the best rate loses
    four: float  # and four times the best
    spread: float  # the standard deviation of one run's loss


# --- for the page -----------------------------------------------------------------------------------------------------


def data(seen: Evidence) -> dict[str, Any]:
    """Return all that is no rule, for the script of the page."""
    return {
        "models": {key: model.sizes() for key, model in MODELS.items()},
        "kinds": KINDS, "torchtune": TORCHTUNE, "litgpt": LITGPT, "qlora": QLORA, "tinker": TINKER,
        "recipes": RECIPES, "conventions": CONVENTIONS, "words": WORDS, "seen": SEEN,
        "advised": ADVISED, "refused": REFUSED,
        "limits": LIMITS, "defaults": DEFAULTS, "config": CONFIG, "ways": WAYS, "evidence": asdict(seen),
        "far": FAR, "lost": LOST, "start": START * SCALING,
    }  # fmt: skip


def control(seen: Evidence, address: Callable[[str], str]) -> str:
    """Return what a reader sets and reads, as HTML; `address` is where the site has the page that a source names."""
    page = Path(__file__).with_name("settings.html")
    sources = {key: (name, address(target)) for key, (name, target) in SOURCES.items()}
    return page.read_text(encoding="utf-8").replace("DATA", pages.data(data(seen) | {"sources": sources}))
