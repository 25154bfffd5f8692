"""Numbers that back the advice on the front page, computed from recordings ("Which rank, which rate" has them too)."""

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
    """Return the earlier trainings, over wide ranges of rates; instead of all weights, the same matrices train."""
    return Recordings(recording("laboratory")["earlier"])


# --- the rank ---------------------------------------------------------------------------------------------------------


def per_rank(config: LlamaConfig) -> int:
    """Return the number of parameters that one rank trains on all linear layers of a decoder except the head."""
    return training_memory(config, tokens=1, rank=1)["trained"] // 4


def a_token(rank: int, windows: int) -> float:
    """Return how many parameters an adapter of the laboratory trains for each token of its text."""
    return rank * per_rank(GLASSLLM) / (windows * 128)


def gains() -> dict[int, list[float]]:
    """Return LoRA's gain as a share of full fine-tuning's, by rank, from the shortest text to the longest."""
    recorded = laboratory()
    return {rank: [recorded.gain(rank, windows=windows) for windows in recorded.windows] for rank in RANKS}


def gains_a_token() -> list[tuple[float, float, int, int]]:
    """Return the parameters per token, the share of the gain, the rank and the windows, sorted by the first."""
    recorded = laboratory()
    return sorted(
        (a_token(rank, windows), recorded.gain(rank, windows=windows), rank, windows)
        for rank in RANKS
        for windows in recorded.windows
    )


def enough() -> list[float]:
    """Return the shares of the gain for adapters that train at least one parameter per token."""
    return [share for numbers, share, *_ in gains_a_token() if numbers >= 1]


# --- alpha and the rate -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A learning rate for Adam that others use or recommend. The scaling is None if the source gives none."""

    name: str
    source: str
    models: str
    rate: float
    scaling: float | None
    alpha: str

    @property
    def moves(self) -> float | None:
        """The scaling times the rate: an upper bound on how far Adam's first step moves an entry of s B."""
        return None if self.scaling is None else self.scaling * self.rate


TINKER = "Tinker's formula", "https://tinker-docs.thinkingmachines.ai/cookbook/api-reference/hyperparam_utils"
TUNE = "torchtune", FACTS["sources"]["torchtune"][1]
QLORA = "QLoRA's scripts", FACTS["sources"]["qlora"][1]
LITGPT = "LitGPT", FACTS["sources"]["litgpt"][1]
UNSLOTH = "Unsloth", "https://unsloth.ai/docs/get-started/fine-tuning-llms-guide/lora-hyperparameters-guide"
PREDIBASE = "Predibase", "https://docs.predibase.com/guides/fine-tuning/hyperparameter-best-practices"


def fixed(rank: int, alpha: int, rate: float) -> tuple[float, float, str]:
    """Return the rate, the scaling and the description of a recipe with one rank and one alpha."""
    return rate, alpha / rank, f"{alpha}, at rank {rank}"


def sizes() -> list[int]:
    """Return the sizes of the recipes' models, in billions of weights."""
    return [int(size) for recipe in RECIPES for size in re.findall(r"(\d+)B", recipe.models)]


def tinker_rate(family: str, width: int) -> float:
    """Return the rate of Tinker's formula: 0.0005 (2000 / width)^power, at each rank."""
    of = FACTS["tinker"]
    return of["rate"] * (of["width"] / width) ** of["power"][family]


SCALING = 2.0  # the scaling at which the advice gives a rate
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
    """Return the rate to start with at s = 2, to one digit: the median of the recipes' s times rate, divided by s."""
    return float(f"{median(recipe.moves for recipe in RECIPES if recipe.moves is not None) / SCALING:.0e}")


def rate_ratios() -> list[float]:
    """Return the ratios of LoRA's best rate, at s = 2, to full fine-tuning's, for all texts and ranks."""
    recorded = laboratory()
    return sorted(
        recorded.best("LoRA", rank, windows=windows) / recorded.best("full", windows=windows)
        for windows in recorded.windows
        for rank in RANKS
    )


def most_lost(recorded: Recordings, *multiples: float) -> float:
    """Return the largest share of the gain lost at these multiples of the best rate, at s = 2, any rank and length."""
    parts = [recorded.lost("LoRA", rank, windows=windows) for rank, windows in product(RANKS, recorded.windows)]
    return max(of[times] for of in parts for times in multiples if times in of)


def evidence() -> dict[str, float]:
    """Return the largest loss of gain at half or twice the best rate, at four times it, and the spread over seeds."""
    recorded = laboratory()
    return {
        "half": most_lost(recorded, 1 / 2, 2),
        "four": most_lost(earlier(), 4),
        "spread": recorded.spread,
    }


def best_steps(way: str, rank: int | None, *, windows: int) -> list[int]:
    """Return the step with the lowest loss, at the best rate, for each seed."""
    return laboratory().seeds(way, rank, windows=windows, what="step")[laboratory().best(way, rank, windows=windows)]


@dataclass(frozen=True)
class Scaled:
    """The best rate of one scaling rule at one rank and text length, with its loss."""

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
    """Return the best rate at each rank, by the length of the text and the scaling rule."""
    recorded, found = laboratory(), dict[tuple[int, str], list[Scaled]]()
    for windows, (rule, scaling), rank in product(WINDOWS, RULES.items(), RANKS):
        of = {"windows": windows, "scaling": scaling(rank)}
        ends = recorded.best("LoRA", rank, **of), recorded.least("LoRA", rank, **of)
        found.setdefault((windows, rule), []).append(Scaled(rank, of["scaling"], *ends))
    return found


def apart() -> tuple[float, float]:
    """Return the largest disagreement of the rules at one rank and length: the ratio of s times the rate; the loss."""
    cells = [of for windows in WINDOWS for of in zip(*(scaled()[windows, rule] for rule in RULES), strict=True)]
    moves, losses = ([[getattr(one, name) for one in of] for of in cells] for name in ("moves", "loss"))
    return max(max(of) / min(of) for of in moves), max(max(of) - min(of) for of in losses)


def falls(rule: str) -> list[float]:
    """Return the factor by which the best rate falls from the lowest rank to the highest, for each text length."""
    return [scaled()[windows, rule][0].rate / scaled()[windows, rule][-1].rate for windows in WINDOWS]


def say(number: float) -> str:
    """Return a small number without an exponent."""
    return f"{number:.7f}".rstrip("0").rstrip(".")


def percent(shares: list[float]) -> str:
    """Return a range of shares in words."""
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"
