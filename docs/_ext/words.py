"""What the recordings advise, in numbers: for the front page and "Which rank, which rate"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import median

from pages import recording
from recordings import RULES, Recordings
from settings import FACTS

from minilora import LlamaConfig
from minilora.language.memory import training_memory
from minilora.layers.rotary import frequencies

RANKS, WINDOWS = (1, 4, 16), (60, 239, 956)
GLASSLLM = LlamaConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=341, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, frequencies=frequencies(32, 10000.0),
    tie_word_embeddings=True,
)  # fmt: skip


@cache
def laboratory() -> Recordings:
    """Return the trainings of the small language model."""
    return Recordings(recording("laboratory"))


@cache
def earlier() -> Recordings:
    """Return the trainings before those, over wide ranges of rates; in place of full, the same matrices train."""
    return Recordings(recording("laboratory")["earlier"])


# --- the rank ---------------------------------------------------------------------------------------------------------


def per_rank(config: LlamaConfig) -> int:
    """Return how many numbers one rank trains beside all linear layers of a decoder but the head."""
    return training_memory(config, tokens=1, rank=1)["trained"] // 4


def a_token(rank: int, windows: int) -> float:
    """Return how many numbers an adapter of the laboratory trains for each token of its text."""
    return rank * per_rank(GLASSLLM) / (windows * 128)


def gains() -> dict[int, list[float]]:
    """Return LoRA's gain as a share of that of full fine-tuning, by rank, from the shortest text on."""
    recorded = laboratory()
    return {rank: [recorded.gain(rank, windows=windows) for windows in recorded.windows] for rank in RANKS}


def gains_a_token() -> list[tuple[float, float, int, int]]:
    """Return the numbers trained a token, the share of the gain, the rank and the windows, by the first."""
    recorded = laboratory()
    return sorted(
        (a_token(rank, windows), recorded.gain(rank, windows=windows), rank, windows)
        for rank in RANKS
        for windows in recorded.windows
    )


def enough() -> list[float]:
    """Return the shares of the gain of adapters that train a number a token or more."""
    return [share for numbers, share, *_ in gains_a_token() if numbers >= 1]


# --- alpha and the rate -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A rate of Adam that others use or recommend. Its scaling is None where the source gives none."""

    name: str
    source: str
    models: str
    rate: float
    scaling: float | None
    alpha: str

    @property
    def moves(self) -> float | None:
        """The scaling times the rate: how far a first step of Adam moves an entry of s B, at most."""
        return None if self.scaling is None else self.scaling * self.rate


TINKER = "Tinker's formula", "https://tinker-docs.thinkingmachines.ai/cookbook/api-reference/hyperparam_utils"
TUNE = "torchtune", FACTS["sources"]["torchtune"][1]
QLORA = "QLoRA's scripts", FACTS["sources"]["qlora"][1]
LITGPT = "LitGPT", FACTS["sources"]["litgpt"][1]
UNSLOTH = "Unsloth", "https://unsloth.ai/docs/get-started/fine-tuning-llms-guide/lora-hyperparameters-guide"
PREDIBASE = "Predibase", "https://docs.predibase.com/guides/fine-tuning/hyperparameter-best-practices"


def fixed(rank: int, alpha: int, rate: float) -> tuple[float, float, str]:
    """Return the rate, the scaling and the words of a recipe with one rank and one alpha."""
    return rate, alpha / rank, f"{alpha}, at rank {rank}"


def sizes() -> list[int]:
    """Return the sizes of the recipes' models, in billions of weights."""
    return [int(size) for recipe in RECIPES for size in re.findall(r"(\d+)B", recipe.models)]


def tinker_rate(family: str, width: int) -> float:
    """Return the rate of Tinker's formula: 0.0005 (2000 / width)^power, at each rank."""
    of = FACTS["tinker"]
    return of["rate"] * (of["width"] / width) ** of["power"][family]


SCALING = 2.0  # with which the advice says a rate
TINKER_SETS, QLORA_SETS = ((of["rank"], of["alpha"]) for of in (FACTS["tinker"], FACTS["qlora"]))
RECIPES = [
    Recipe(*TINKER, "Llama 3.2 1B", *fixed(*TINKER_SETS, tinker_rate("Llama", 2048))),
    Recipe(*TINKER, "Llama 3.1 8B", *fixed(*TINKER_SETS, tinker_rate("Llama", 4096))),
    Recipe(*TINKER, "Llama 3.1 70B", *fixed(*TINKER_SETS, tinker_rate("Llama", 8192))),
    Recipe(*TINKER, "Qwen 3 8B", *fixed(*TINKER_SETS, tinker_rate("Qwen", 4096))),
    Recipe(*TUNE, "Llama 3, 1B to 70B", *fixed(*FACTS["torchtune"]["Llama-3.1-8B"])[:2], "2r, at rank 8 to 64"),
    Recipe(*QLORA, "LLaMA 7B, 13B", *fixed(*QLORA_SETS, FACTS["qlora"]["rate"])),
    Recipe(*QLORA, "LLaMA 33B, 65B", *fixed(*QLORA_SETS, FACTS["qlora"]["above"])),
    Recipe(*LITGPT, "Llama 2 and 3, 1B to 8B", *fixed(*FACTS["litgpt"]["Llama-3.1-8B"])),
    Recipe(*UNSLOTH, "any", 2e-4, 1.0, "r, the standard"),
    Recipe(*UNSLOTH, "any", 2e-4, 2.0, "2r, the common one"),
    Recipe(*PREDIBASE, "any", 2e-4, None, ""),
]


def start() -> float:
    """Return the rate to begin with at s = 2, in one digit: s times the rate is in the middle of the recipes."""
    return float(f"{median(recipe.moves for recipe in RECIPES if recipe.moves is not None) / SCALING:.0e}")


def rate_ratios() -> list[float]:
    """Return LoRA's best rate, at s = 2, in multiples of full fine-tuning's: all texts and ranks."""
    recorded = laboratory()
    return sorted(
        recorded.best("LoRA", rank, windows=windows) / recorded.best("full", windows=windows)
        for windows in recorded.windows
        for rank in RANKS
    )


def most_lost(recorded: Recordings, *multiples: float) -> float:
    """Return the largest part of the gain lost at a rate so many times the best, at s = 2, at any rank and length."""
    parts = [recorded.lost("LoRA", rank, windows=windows) for rank, windows in product(RANKS, recorded.windows)]
    return max(of[times] for of in parts for times in multiples if times in of)


def evidence() -> dict[str, float]:
    """Return what half or twice the best rate loses of the gain, at most, and four times; and what a seed moves."""
    recorded = laboratory()
    return {
        "half": most_lost(recorded, 1 / 2, 2),
        "four": most_lost(earlier(), 4),
        "spread": recorded.spread,
    }


def best_steps(way: str, rank: int | None, *, windows: int) -> list[int]:
    """Return the steps at which the loss was least, at the best rate, a seed each."""
    return laboratory().seeds(way, rank, windows=windows, what="step")[laboratory().best(way, rank, windows=windows)]


@dataclass(frozen=True)
class Scaled:
    """What one rule of scaling had at one rank, on one length of the text."""

    rank: int
    scaling: float
    rate: float
    loss: float

    @property
    def moves(self) -> float:
        """The scaling times the rate."""
        return self.scaling * self.rate


@cache
def scaled() -> dict[tuple[int, str], list[Scaled]]:
    """Return the best rate at each rank, by the length of the text and the rule of scaling."""
    recorded, found = laboratory(), dict[tuple[int, str], list[Scaled]]()
    for windows, (rule, scaling), rank in product(WINDOWS, RULES.items(), RANKS):
        of = {"windows": windows, "scaling": scaling(rank)}
        ends = recorded.best("LoRA", rank, **of), recorded.least("LoRA", rank, **of)
        found.setdefault((windows, rule), []).append(Scaled(rank, of["scaling"], *ends))
    return found


def apart() -> tuple[float, float]:
    """Return how far rules lie apart at one rank and length, at most: by a factor of s times the rate; in the loss."""
    cells = [of for windows in WINDOWS for of in zip(*(scaled()[windows, rule] for rule in RULES), strict=True)]
    moves, losses = ([[getattr(one, name) for one in of] for of in cells] for name in ("moves", "loss"))
    return max(max(of) / min(of) for of in moves), max(max(of) - min(of) for of in losses)


def falls(rule: str) -> list[float]:
    """Return by which factor the best rate falls from the lowest rank to the highest, on each length of the text."""
    return [scaled()[windows, rule][0].rate / scaled()[windows, rule][-1].rate for windows in WINDOWS]


def say(number: float) -> str:
    """Return a small number without an exponent."""
    return f"{number:.7f}".rstrip("0").rstrip(".")


def percent(shares: list[float]) -> str:
    """Return a range of shares in words."""
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"
